"""Where a message waits for its next attempt: in the session that has it, or at its broker.

How long, the flow has decided, and the failure is stored with the instant before which there is no other attempt. What
is done here only finds a place for the message until then, so no mistake of a broker makes an attempt early: one that
brings the message back too soon has it waited for in the session.

A broker that can only keep back what is sent to it is sent a copy, and when that is confirmed the delivery is
acknowledged. Never in one transaction: RabbitMQ has none that holds both, and ActiveMQ hands what it is to keep back to
its scheduler only after the commit, so that a crash in between loses it. In the order taken here a crash leaves the
message twice, and nothing lost. Both are one message to its history, since a copy says of whom it is one; once that has
ended without a mark, the second of the two is a message without a history, and is handled as one.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, Protocol, cast

import attrs

from retrykit.errors import BackOffInterruptedError, CommitInDoubtError
from retrykit.messaging.broker import Session
from retrykit.messaging.errors import BrokerError, BrokerRefusedError, DelayUnavailableError
from retrykit.messaging.headers import check_headers, escaped_size
from retrykit.messaging.recoverers import COPY_OF

if TYPE_CHECKING:
    from retrykit.backoff import BackOffPolicy
    from retrykit.message import Message
    from retrykit.messaging.broker import Broker
    from retrykit.messaging.counters import Tally

Way = Literal["hold", "schedule", "redeliver"]
Where = Literal["copy", "policy", "source", "session", "back"]
"""Where a message that was given back is."""
WAYS: Final = ("hold", "schedule", "redeliver")

SHORTEST: Final = 0.1
"""Seconds; what is shorter is waited for in the session, since a copy costs a broker more than that."""
REFUSED_SECONDS: Final = 60.0
"""So long no copy is tried of a message that the broker refused one of, or of any after several in a row."""
_FAILURES: Final = 3
"""So many copies in a row that were not taken are no fault of a message: a store that is full refuses all, or says
nothing."""
_KNOWN: Final = 1_000

_MAX_ORIGIN: Final = 8_000
_MINIMUM_STEP: Final = 100
# Ten to a decade, each about a quarter more than the one before.
_STEPS: Final = (100, 125, 160, 200, 250, 315, 400, 500, 630, 800)
_GRACE_MS: Final = 2 * 86_400_000

_log = logging.getLogger("retrykit.messaging")


# -- what a copy says of itself


@attrs.frozen
class Origin:
    """Of which message a delivery is a copy.

    `message_id` is the header that the original had. `early`: it was sent with less than the whole delay, since the
    broker takes no longer one. `end`: when the original expires, in epoch milliseconds; 0: never, as far as is known.
    """

    destination: str
    id: str
    message_id: str
    early: bool = False
    end: int = 0

    def to_header(self) -> str:
        """The value of the header; `ValueError` if it is longer than brokers take."""
        facts = [self.destination, self.id, self.message_id, int(self.early), self.end]
        text = json.dumps(facts if self.end else facts[:-1], ensure_ascii=False)
        if escaped_size(text) > _MAX_ORIGIN:
            msg = f"its id is too long for a header ({len(self.id)} characters)"
            raise ValueError(msg)
        return text


def origin_of(headers: Mapping[str, str], destination: str) -> Origin | None:
    """The original of a delivery from `destination`, if it is a copy that a consumer of this destination has made.

    A copy that was moved elsewhere is another message. Who may send to a destination can claim to send a copy. But a
    history knows its message's body by a digest, so a message with another body is told apart; one with the same body
    is taken for it, as it is on brokers where ids are the producer's.
    """
    text = headers.get(COPY_OF)
    if text is None:
        return None
    try:
        origin = Origin(*json.loads(text))
        known = all(isinstance(fact, str) for fact in (origin.destination, origin.id, origin.message_id))
        if not known or not isinstance(origin.end, int) or not origin.id or origin.destination != destination:
            return None
        # JSON can say what no header can: such a message could be neither copied nor parked.
        check_headers({"id": origin.id, "message-id": origin.message_id})
    except (ValueError, TypeError, RecursionError):
        return None
    return origin


# -- queues of RabbitMQ


@attrs.frozen
class DelayQueue:
    """A queue in which messages wait for so many milliseconds, and from which they go back to another queue.

    `arguments` are those of its declaration.
    """

    name: str
    arguments: Mapping[str, str | int]


def step_of(seconds: float) -> int:
    """A delay in milliseconds, rounded up to one of ten in a decade: at most 28 % more, and few queues.

    A queue lets go of its messages from its head only, so each of its messages must wait equally long.
    """
    wanted = max(_MINIMUM_STEP, seconds * 1000)
    scale = 1
    while wanted > _STEPS[-1] * scale:
        scale *= 10
    return next(step * scale for step in _STEPS if step * scale >= wanted)


def delay_queue(queue: str, seconds: float, now: float) -> DelayQueue:
    """The queue in which messages of `queue` wait; `now` in seconds since the epoch.

    Each day has queues of its own, which vanish the second day after their last message: a connection over STOMP makes
    a queue once only, and what it sent to one that has vanished since would be lost without a word.
    """
    step = step_of(seconds)
    day = datetime.fromtimestamp(now, UTC).strftime("%Y%m%d")
    arguments: dict[str, str | int] = {
        "x-message-ttl": step,
        "x-expires": step + _GRACE_MS,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
    }
    return DelayQueue(f"{queue}.retry.{step}ms.{day}", arguments)


# -- what a container does


class Postponing(Session, Protocol):
    """What is asked of a session whose broker can keep messages back."""

    def lacks(self, way: Way) -> str:
        """What the broker lacks for this way; "" for nothing. May ask the broker: only of a session that consumes
        nothing.
        """

    def put_off(self, message: Message, delay: float) -> None:
        """Send a copy that comes to the message's own queue after `delay` seconds, wait until it is confirmed, and
        acknowledge the message.

        `BrokerRefusedError`: it was not sent. `CommitInDoubtError`: it may have been, and the session is of no more
        use.
        """

    def redeliver(self, message: Message) -> None:
        """Give the message back, to be kept back as the broker's own redelivery policy says. Never raises."""


class PutOffError(InterruptedError):
    """The pause is not taken now: its message goes back with what is left of it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:g} s are left")
        self.seconds = seconds


@attrs.define(eq=False)
class Pauses:
    """Which pauses are not to be taken in a session. `message` is the one whose delivery is on its way, if any is."""

    delays: Delays
    session: Session
    message: Message | None = None

    def defers(self, seconds: float) -> bool:
        """Whether a pause ends at once, with `PutOffError`, and its message goes back."""
        return self.message is not None and self.delays.defers(self.session, self.message, seconds)

    def wait(self, seconds: float) -> bool:
        """Wait in the session; while the broker refuses copies, until they are tried again. As `Session.pause`."""
        while self.message is not None and (turn := self.delays.refused_for(self.message)) and turn < seconds:
            if not self.session.pause(turn):
                return False
            seconds -= turn
            if self.defers(seconds):
                raise PutOffError(seconds)
        return self.session.pause(seconds)


@attrs.define(eq=False)
class Delays:
    """Where the messages of a container wait, as all its workers know it."""

    way: Way = "hold"
    _told: bool = attrs.field(default=False, init=False)
    _checked: bool = attrs.field(default=False, init=False)
    _refused_until: float = attrs.field(default=0.0, init=False)
    _refused: dict[object, float] = attrs.field(factory=dict, init=False)
    _failures: int = attrs.field(default=0, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    # -- at the start

    def check(self, broker: Broker) -> None:
        """Ask the broker, on a connection of its own, whether it can do what is wanted; until it was asked once.

        `DelayUnavailableError` if it cannot.
        """
        if self.way == "hold" or self._checked:
            return
        with closing(broker.connect(consume=False)) as session:
            try:
                lack = _lack(session, self.way)
            except BrokerError as fault:
                # Perhaps it may not be asked. What it does not keep back is waited for, so nothing depends on this.
                _log.warning("%s: whether it can keep messages back could not be found out: %s", broker.name, fault)
                lack = ""
        if lack:
            raise DelayUnavailableError(broker=broker.name, way=self.way, lack=lack)
        self._checked = True

    def tell(self, name: str, session: Session, back_off: BackOffPolicy) -> None:
        """Log once where messages wait, and why."""
        with self._lock:
            told, self._told = self._told, True
        if told:
            return
        longest: float | None = getattr(back_off, "longest", None)
        if longest == 0.0:
            _log.info("%s: the back-off has no pauses: a message that fails comes again at once", name)
            return
        at_most = "as long as its back-off says" if longest is None else f"for up to {longest:g} s"
        _log.info("%s: a message that fails waits for its next attempt %s, %s", name, at_most, self._where(session))
        held = session.capabilities.longest_hold
        if self._holds(session) and held is not None and (longest is None or longest > held):
            much = "may be more" if longest is None else f"{longest:g} s are more"
            _log.warning(
                "%s: %s than the %g s that this broker leaves a message with a consumer: it closes the channel then, "
                "and delivers everything again; let long pauses be the broker's (delay='schedule')",
                name,
                much,
                held,
            )

    def _holds(self, session: Session) -> bool:
        return self.way == "hold" and not session.capabilities.delayed_redelivery

    def _where(self, session: Session) -> str:
        if session.capabilities.delayed_redelivery:
            return "where it came from: it keeps back what is rolled back"
        if self.way == "redeliver":
            # Nobody can ask whether it has one.
            without = "without one (the redeliveryPlugin of ActiveMQ) it is a dead letter after its first failure"
            how_long = f"whose own redelivery policy says how long; {without}"
            return f"at the broker (delay='redeliver'), {how_long}; a rest is waited for in the session"
        if self.way == "schedule":
            return "at the broker (delay='schedule'): it is sent a copy to keep back, and the message is acknowledged"
        if getattr(session, "keeps_back", False):
            return "in the session that has it (delay='hold'), which goes on with what else it was delivered (prefetch)"
        return "in a session (delay='hold'): whoever is delivered it next waits, and takes no other message meanwhile"

    # -- at a delivery

    def defers(self, session: Session, message: Message, seconds: float) -> bool:
        """Whether the rest of a pause is not to be waited for: it is the broker's, or other deliveries can go on.

        A copy that comes early is not copied again: a broker that kept none back would be sent one after the other.
        """
        if not self._copies(message, seconds):
            keeps_back = self.way != "redeliver" and getattr(session, "keeps_back", False)
            return seconds >= SHORTEST and keeps_back
        origin = origin_of(message.headers, message.destination)
        return origin is None or origin.early or message.headers.get("redelivered") == "true"

    def _copies(self, message: Message, delay: float) -> bool:
        return self.way == "schedule" and delay >= SHORTEST and not self.refused_for(message)

    def refused_for(self, message: Message) -> float:
        """Seconds until copies of this message are tried again."""
        until = max(self._refused_until, self._refused.get(message.key, 0.0))
        return max(0.0, until - time.monotonic())

    def give_back(self, session: Session, message: Message, delay: float, tally: Tally) -> Where:
        """Give a message back, whose next attempt is not due for `delay` seconds; says where it is then.

        Never raises what the broker did.
        """
        if self._copies(message, delay):
            session.rollback()
            return self._put_off(session, message, delay, tally)
        if self.way == "redeliver" and delay > 0 and not session.capabilities.delayed_redelivery:
            cast("Postponing", session).redeliver(message)
            tally.add(postponed=1)
            return "policy"
        session.rollback(message, delay)
        if not delay:
            return "back"
        if session.capabilities.delayed_redelivery:
            return "source"
        return "session" if getattr(session, "keeps_back", False) else "back"

    def _put_off(self, session: Session, message: Message, delay: float, tally: Tally) -> Where:
        try:
            cast("Postponing", session).put_off(message, delay)
        except BrokerRefusedError as refused:
            self._note_refused(message)
            _log.error(
                "message %r could not be sent as a copy, so its pauses are waited for in the session for %g s: %s",
                message.key,
                REFUSED_SECONDS,
                refused,
            )
            self._not_taken(refused)
        except (BrokerError, CommitInDoubtError) as doubt:
            # Whether or not there is a copy, the original comes again unless it was acknowledged, and then there is.
            _log.warning("message %r: its copy was not confirmed: %s", message.key, doubt.__cause__ or doubt)
            self._not_taken(doubt.__cause__ or doubt)
        else:
            self._failures = 0
            tally.add(postponed=1)
            return "copy"
        session.rollback(message)
        return "back"

    def _note_refused(self, message: Message) -> None:
        with self._lock:
            while len(self._refused) >= _KNOWN:
                del self._refused[next(iter(self._refused))]
            self._refused[message.key] = time.monotonic() + REFUSED_SECONDS

    def _not_taken(self, why: BaseException) -> None:
        self._failures += 1
        if self._failures < _FAILURES:
            return
        self._failures, self._refused_until = 0, time.monotonic() + REFUSED_SECONDS
        _log.error(
            "%d copies in a row were not taken, so for %g s all pauses are waited for in the session: %s",
            _FAILURES,
            REFUSED_SECONDS,
            why,
        )


_WHERE: Final[Mapping[Where, str]] = {
    "copy": "a copy waits at the broker until {due}, and the original is acknowledged",
    "policy": "it goes back, and comes when the broker's redelivery policy says so, for an attempt at {due} or later",
    "source": "it goes back to its source, which keeps it until {due}",
    "session": "it stays with its session until {due}",
    "back": "it goes back, and whoever gets it waits until {due}",
}


def waits(where: Where, due: datetime | None) -> str:
    """Where a message waits, and until when, in words."""
    if due is None:
        return "it goes back, and comes again at once"
    return _WHERE[where].format(due=due.isoformat(timespec="milliseconds").replace("+00:00", "Z"))


def _lack(session: Session, way: Way) -> str:
    can = session.capabilities
    if way == "redeliver" and can.delayed_redelivery:
        return ""
    ask = getattr(session, "lacks", None)
    if ask is None:
        return f"its sessions ({type(session).__name__}) cannot do that"
    return str(ask(way))


def still_due(error: BaseException) -> float:
    """The seconds of a pause that was put off; else 0."""
    if isinstance(error, BackOffInterruptedError) and isinstance(error.__cause__, PutOffError):
        return error.__cause__.seconds
    return 0.0
