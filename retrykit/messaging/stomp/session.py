"""What a worker does on a STOMP connection: receive, send, commit, give back. The connection itself is `Wire`'s."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import attrs

from retrykit.check import wrong_type
from retrykit.errors import CommitInDoubtError
from retrykit.message import Message
from retrykit.messaging.broker import Capabilities, Told
from retrykit.messaging.delays import Way
from retrykit.messaging.errors import (
    BrokerError,
    BrokerRefusedError,
    NotSupportedError,
)
from retrykit.messaging.headers import check_headers
from retrykit.messaging.identity import by_content
from retrykit.messaging.kept import Kept
from retrykit.messaging.stomp.delays import copy_headers, delays_are_ignored, has_ended, lack_of
from retrykit.messaging.stomp.incoming import Incoming
from retrykit.messaging.stomp.java_text import to_java
from retrykit.messaging.stomp.outgoing import outgoing
from retrykit.messaging.stomp.places import misplaced
from retrykit.messaging.stomp.profiles import ACTIVEMQ, PROFILES, RABBITMQ, Profile, profile_for
from retrykit.messaging.stomp.refusals import not_subscribed
from retrykit.messaging.stomp.subscription import (
    check_supported,
    headers_for,
    is_lost_when_given_back,
    is_topic,
    subscription_id,
)
from retrykit.messaging.stomp.wire import GOODBYE_SECONDS, THE_COMMIT, Wire

if TYPE_CHECKING:
    from retrykit.messaging.stomp.settings import StompSettings

_log: Final = logging.getLogger("retrykit.messaging")
_THE_SENDS: Final = "the sends"
_QUEUE: Final = "/queue/"
_LENGTH: Final = "content-length"


@attrs.frozen(eq=False)
class _Handle:
    """What settles a delivery: only in the session and the subscription that it came from."""

    wire: Wire
    subscription: str
    ack: str


class StompSession:
    """One connection to a STOMP broker."""

    def __init__(self, broker: StompSettings, wire: Wire) -> None:
        self._broker = broker
        self._wire = wire
        self._know(broker.profile or profile_for(""))
        self._subscription: str | None = None
        self._subscriptions = itertools.count(1)
        self._transaction: str | None = None
        self._transactions = itertools.count(1)
        self._sends: list[str] = []
        self._in_hand: set[str] = set()
        # The acknowledgement that was sent and is not confirmed yet: its receipt, and who wants to know. At most one.
        self._unconfirmed: deque[tuple[str, Told]] = deque(maxlen=1)
        self._kept = Kept()
        self._stale = 0

    def open(self, *, consume: bool) -> None:
        """Connect, find out what kind of broker it is, subscribe."""
        server = self._wire.open()
        self._know(self._profile_at(server))
        self._wire.not_refusals = self._profile.not_refusals
        if consume:
            check_supported(self._broker, self._profile)
            self._subscribe()
            try:
                self._wire.settle(self._broker.receipt_timeout)
            except BrokerError as error:
                raise not_subscribed(self._broker, self._profile, error) from error

    def _profile_at(self, server: str) -> Profile:
        given, found = self._broker.profile, profile_for(server)
        if given is None:
            return found
        if {given.name, found.name} == {ACTIVEMQ.name, RABBITMQ.name}:
            # ActiveMQ would bury what is given back as on RabbitMQ; RabbitMQ names no message as ActiveMQ does.
            reason = f"profile: {given.name!r} was given, and the server calls itself {server!r}; leave it out"
            raise NotSupportedError(broker=self._broker.name, reason=reason)
        # By its name alone it is the kind; the server's words tell its version, too.
        return found if given in PROFILES and given.name == found.name else given

    @property
    def profile(self) -> Profile:
        """The kind of broker at the other end."""
        return self._profile

    @property
    def capabilities(self) -> Capabilities:
        """What that kind can do."""
        return self._capabilities

    def _know(self, profile: Profile) -> None:
        """It is a broker of this kind."""
        self._profile = profile
        self._incoming = Incoming(self._broker, profile)
        self._capabilities = self._capabilities_of(profile.capabilities)

    def _capabilities_of(self, own: Capabilities) -> Capabilities:
        identify = self._broker.identify
        if identify is not None:
            # An id that is not the broker's may come again with another message, which the broker does not flag.
            stable = isinstance(identify, by_content)
            own = attrs.evolve(own, stable_ids=stable, trustworthy_flag=False, flags_while_connected=False)
        if is_topic(self._broker.destination):
            # What a durable subscriber had in hand when its connection ended comes again without a flag.
            # A copy would go to every subscriber.
            own = attrs.evolve(own, trustworthy_flag=False, flags_while_connected=False, delayed_copies=False)
        return attrs.evolve(own, counts_deliveries=True) if self._incoming.counts else own

    @property
    def stale_frames(self) -> int:
        """Deliveries of subscriptions that were left."""
        return self._stale

    # -- receiving

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next delivery of the present subscription."""
        limit = None if timeout is None else time.monotonic() + timeout
        while not self._wire.interrupted:
            if self._wire.lost is not None:
                raise self._wire.error()
            if (kept := self._kept.due(self._in_hand_still)) is not None:
                return kept
            # A broker may know no prefetch, and send more; who wants one at a time has it confirmed before the next.
            if self._broker.prefetch == 1 or not self._wire.has_delivery:
                self._confirm()
            frame = self._wire.delivery(self._kept.wait(limit))
            if frame is None:
                if limit is not None and limit <= time.monotonic():
                    return None
                continue
            if frame.headers.get("subscription") == self._subscription:
                handle = _Handle(self._wire, frame.headers["subscription"], frame.headers.get("ack", ""))
                message = self._incoming.message(frame, handle)
                self._in_hand.add(handle.ack)
                if not self._drops(message):
                    return message
                continue
            self._stale += 1
        return None

    def _drops(self, message: Message) -> bool:
        """Acknowledge what nobody is to get any more; should that be lost, it comes and goes once more."""
        if not has_ended(message):
            return False
        _log.warning("message %r has expired while it waited: it is dropped", message.key)
        self._in_hand.discard(self._handle(message).ack)
        self._wire.put("ACK", {"id": self._handle(message).ack})
        return True

    # -- settling

    @property
    def longest_header(self) -> int | None:
        """How many bytes the line of a header may have; None: as many as anybody sends."""
        return self._profile.longest_header

    def misplaced(self, destination: str) -> str:
        """Why nothing can be sent to a destination of this broker; "" for nothing that is known."""
        return misplaced(self._profile, destination)

    def send(self, destination: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send in the transaction; the receipt is waited for by `flush` or `commit`.

        Persistent unless the headers say otherwise, and with a stable id. `ValueError` for what cannot be said to this
        kind of broker.
        """
        full, body = outgoing(destination, body, headers, broker=self._broker, profile=self._profile)
        # What the broker refuses from here on is of this transaction. Should the connection be lost, `flush` says so.
        with contextlib.suppress(BrokerError):
            self._confirm()
        full["transaction"] = self._begun()
        self._sends.append(self._wire.put_confirmed("SEND", full, body, f"a message to {destination!r}"))

    def flush(self) -> None:
        """Wait for the receipts of the sends, or, where those come after the commit only, until they were looked at.

        RabbitMQ refuses a destination that cannot be, or a header, by then; a queue of another kind or an exchange that
        is missing it may refuse at the commit only.
        """
        # A connection that has ended meanwhile is known before the database commits: nothing is repeated for its sake.
        self._wire.look()
        if self._wire.lost is not None:
            raise self._wire.failure()
        if self._profile.commit == "together":
            self._wire.settle(self._broker.receipt_timeout)
        elif self._sends:
            # Frames are looked at in turn: what the receipt of this one comes before was not refused at first sight.
            name = f"t-{next(self._transactions)}"
            receipt = self._wire.put_confirmed("BEGIN", {"transaction": name})
            self._wire.settle(self._broker.receipt_timeout, receipt)
            self._wire.put("ABORT", {"transaction": name})

    def commit(self, message: Message | None = None) -> None:
        """Commit the sends and acknowledge the message, in one transaction or one after the other."""
        try:
            if self._profile.commit == "together":
                self._commit_together(message)
            else:
                self._confirm()
                self._commit_sends()
                self._acknowledge(message)
        except BrokerRefusedError as error:
            # When a send is refused while the COMMIT of everything is under way, the rest may have been committed.
            if self._profile.commit == "together" and error.__dict__["what"] != THE_COMMIT:
                raise CommitInDoubtError from error
            raise
        except BrokerError as error:
            raise CommitInDoubtError from error
        self._transaction = None
        self._sends.clear()
        if message is not None:
            self._in_hand.discard(self._handle(message).ack)

    def _commit_together(self, message: Message | None) -> None:
        """ACK last, then COMMIT, and wait for its receipt."""
        transaction = self._begun()
        if message is not None:
            self._wire.put("ACK", {"id": self._own(message).ack, "transaction": transaction}, more=True)
        self._wire.put_confirmed("COMMIT", {"transaction": transaction}, what=THE_COMMIT)
        self._wire.settle(self._broker.receipt_timeout)

    def _commit_sends(self) -> None:
        if self._transaction is not None:
            self._wire.put_confirmed("COMMIT", {"transaction": self._transaction}, what=_THE_SENDS)
            self._wire.settle(self._broker.receipt_timeout)

    def _acknowledge(self, message: Message | None) -> None:
        if message is not None:
            self._wire.put_confirmed("ACK", {"id": self._own(message).ack})
            self._wire.settle(self._broker.receipt_timeout)

    def acknowledge(self, message: Message, told: Told) -> None:
        """As `commit`; the confirmation is waited for when there is nothing else to do, or the next one is due."""
        if self._profile.commit == "together" or self._transaction is not None:
            self.commit(message)
            told(None)
            return
        try:
            self._confirm()
            handle = self._own(message)
        except BrokerError as error:
            raise CommitInDoubtError from error
        self._in_hand.discard(handle.ack)
        self._unconfirmed.append((self._wire.put_confirmed("ACK", {"id": handle.ack}), told))

    def _confirm(self) -> None:
        """Wait until the last acknowledgement is confirmed, and tell; `ConnectionLostError` if it will not be."""
        try:
            receipt, told = self._unconfirmed.pop()
        except IndexError:
            return
        try:
            self._wire.settle(self._broker.receipt_timeout, receipt)
        except BrokerError as error:
            told(error)
            raise
        told(None)

    def rollback(self, message: Message | None = None, delay: float = 0.0) -> None:
        """ABORT what is open; give the message back as the profile says."""
        if self._transaction is not None:
            self._wire.put("ABORT", {"transaction": self._transaction})
            self._transaction = None
        if self._profile.commit != "together":
            self._wire.forget(self._sends)
        self._sends.clear()
        if message is not None:
            self._give_back(message, delay if self.keeps_back else 0.0)

    @property
    def keeps_back(self) -> bool:
        """Whether what is rolled back with a delay stays in hand for so long, and other deliveries go on."""
        return self._broker.prefetch > 1 and self._profile.prefetch_header is not None

    def _in_hand_still(self, message: Message) -> bool:
        return self._is_own(self._handle(message))

    def _give_back(self, message: Message, delay: float) -> None:
        if delay > 0 or is_lost_when_given_back(self._broker, self._profile):
            self._kept.keep(message, delay)
            return
        match self._profile.give_back:
            case "resubscribe":
                self._wire.put("UNSUBSCRIBE", {"id": self._subscription})
                self._subscribe()
            case "nack":
                self._nack(message)
            case _:
                with contextlib.suppress(BrokerError):
                    self._confirm()
                self._wire.lose("given up, to give a message back")
                self._wire.hang_up()

    def _nack(self, message: Message) -> None:
        handle = self._handle(message)
        if self._is_own(handle):
            self._in_hand.discard(handle.ack)
            self._wire.put("NACK", {"id": handle.ack})

    # -- messages that are to come later (see `retrykit.messaging.delays.Postponing`)

    def lacks(self, way: Way) -> str:
        """What the broker lacks for this way; asks it on this connection."""
        asked = lambda: delays_are_ignored(self._wire, self._broker.receipt_timeout)  # noqa: E731
        return lack_of(self._profile, self._broker.destination, way, asked)

    def put_off(self, message: Message, delay: float) -> None:
        """A confirmed copy first, then the acknowledgement."""
        self._own(message)
        try:
            headers = copy_headers(self._profile, message, delay)
            check_headers(headers)
        except ValueError as fault:
            raise BrokerRefusedError(broker=self._broker.name, what="a copy", reason=str(fault)) from fault
        body = message.body if _LENGTH in headers else to_java(message.body)
        self._confirm()
        self._wire.put_confirmed("SEND", headers, body, f"a copy to {headers['destination']!r}")
        try:
            self._wire.settle(self._broker.receipt_timeout)
        except BrokerRefusedError:
            raise
        except BrokerError as error:
            raise CommitInDoubtError from error
        self.commit(message)

    def redeliver(self, message: Message) -> None:
        """NACK, outside of any transaction."""
        self.rollback()
        self._nack(message)

    def _begun(self) -> str:
        """The open transaction; begun when it is first needed."""
        if self._transaction is None:
            self._transaction = f"t-{next(self._transactions)}"
            self._wire.put("BEGIN", {"transaction": self._transaction}, more=True)
        return self._transaction

    def _handle(self, message: Message) -> _Handle:
        if not isinstance(message.handle, _Handle):
            raise wrong_type("message", "a delivery of a STOMP session", message)
        return message.handle

    def _is_own(self, handle: _Handle) -> bool:
        return handle.wire is self._wire and handle.subscription == self._subscription and handle.ack in self._in_hand

    def _own(self, message: Message) -> _Handle:
        handle = self._handle(message)
        if not self._is_own(handle):
            # RabbitMQ takes an id of another session for a message of this one, and acknowledges that.
            self._wire.lose("a delivery that is not in hand was to be acknowledged")
            raise self._wire.error()
        return handle

    def _subscribe(self) -> None:
        own = subscription_id(self._broker, self._profile)
        self._subscription = f"s-{next(self._subscriptions)}" if own is None else own
        self._in_hand.clear()
        ours = {"id": self._subscription, "destination": self._broker.destination, "ack": "client-individual"}
        self._wire.put_confirmed("SUBSCRIBE", {**headers_for(self._broker, self._profile), **ours})

    # -- waiting and leaving

    def pause(self, seconds: float) -> bool:
        """Wait; heart-beats go on."""
        return self._wire.pause(seconds)

    def interrupt(self) -> None:
        """End all waiting."""
        self._wire.interrupt()

    def close(self, *, wait: bool = True) -> None:
        """DISCONNECT and wait for its receipt for at most 2 s, or just drop the connection."""
        if wait and self._wire.lost is None:
            with contextlib.suppress(BrokerError):
                self._confirm()
                self._wire.put_confirmed("DISCONNECT", {})
                self._wire.settle(GOODBYE_SECONDS)
        self._wire.hang_up()
        with contextlib.suppress(BrokerError):
            self._confirm()
