"""What can go wrong between a consumer and its broker, and what ends a delivery before its time."""

from __future__ import annotations

from retrykit.errors import RetryError


class BrokerError(RetryError):
    """The broker {broker} refused or failed: {reason}

    `answer` is all that it said in an ERROR frame, as far as 10,000 bytes of it; "" where it said nothing.
    """

    answer: str = ""


class BrokerUnavailableError(BrokerError):
    """No connection to the broker {broker} could be made: {reason}"""


class LoginRefusedError(BrokerUnavailableError):
    """The broker {broker} did not let us in: {reason}"""


class CredentialsError(BrokerError):
    """What credentials() gives for the broker {broker} is no login: {reason}

    Nothing was sent, and the error does not say what it gave, which may be half a secret. It would give the same again,
    so a container stops. A secret that is not there yet is to be raised as an error: that is tried again.
    """


class ConnectionLostError(BrokerError):
    """The connection to the broker {broker} was lost: {reason}

    What was not confirmed on it is undone by the broker, and its messages are delivered again.
    """


class BrokerRefusedError(BrokerError):
    """The broker {broker} refused {what}: {reason}

    Nothing was acknowledged, and nothing of the transaction has happened (without `Capabilities.atomic_send_and_ack`:
    other sends of it may have). Nothing is in doubt: it is a failure of the attempt (or recovery) whose transaction it
    was. The connection is of no more use.
    """


class DelayUnavailableError(BrokerError):
    """The broker {broker} cannot have messages wait as {way!r} asks: {lack}

    The container stops before it has taken a message. With delay="hold" sessions wait themselves.
    """


class NotSupportedError(BrokerError):
    """The broker {broker} cannot do what it is asked for: {reason}

    It would pass it over in silence, so nothing is begun, and a container stops.
    """


class SubscriptionRefusedError(BrokerError):
    """The broker {broker} refuses the subscription, and would at every other try: {reason}

    It cannot be understood (`selector`), or contradicts the queue (`declare`), so a container stops.
    """


class SendInDoubtError(BrokerError):
    """Whether the broker {broker} has taken {ids} is not known: {reason}

    The connection was lost while the confirmation was waited for, and the tries that were left did not bring one
    either. To lose nothing, send again under the same `ids`: receivers that know an id see the message once.
    """


class NoStableIdError(BrokerError):
    """A message from {destination} at the broker {broker} has no id that is the same at its next delivery: {remedy}

    Without one its history could not be found again, and a poison message would be retried for ever: the container
    stops at the first. The message goes back to the broker.
    """


class HandlerExitError(RetryError):
    """The {whose} called sys.exit({code}).

    Raised from its `SystemExit`. A worker's thread cannot end its process, and a message must not; so this is a failed
    attempt (or recovery) like any other exception.
    """


class CutOffInterrupt(BaseException):
    """Ends a call as an interrupt does: the container has stopped at once while the handler ran. Nothing is counted."""


class CutShortError(Exception):
    """The handler was cancelled, as the container stops at once: nothing has failed."""


class LoopEndedError(CutShortError):
    """The event loop on which a handler was to run has ended, and the container gives up; the cause says why."""
