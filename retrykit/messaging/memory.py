"""A broker inside the process, with the settlements of the real ones: for tests, demonstrations and fast feedback.

Nothing survives the process. Several consumers share a destination; a message that is rolled back, or whose session is
closed or lost, goes back to its place in the queue, flagged redelivered, its delivery counted. Sends and
acknowledgement are one transaction. Faults can be ordered: a commit that is not confirmed (done or not), and
connections that are lost.
"""

from __future__ import annotations

import bisect
import itertools
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Final, Literal

import attrs

from retrykit.check import wrong_type
from retrykit.errors import CommitInDoubtError
from retrykit.message import EXPIRES_AT, Message, is_nonempty_text
from retrykit.messaging.broker import Capabilities
from retrykit.messaging.errors import BrokerUnavailableError, ConnectionLostError
from retrykit.messaging.recoverers import ID

_CAPABILITIES: Final = Capabilities(
    delayed_redelivery=True, atomic_send_and_ack=True, stable_ids=True, trustworthy_flag=True, counts_deliveries=True
)


@attrs.define(eq=False)
class _Stored:
    """A message and what became of it so far; `number` is its place in the order of sending."""

    number: int
    id: str
    body: bytes
    headers: dict[str, str]
    deliveries: int = 0
    due: float = 0.0

    def expired(self, instant: float) -> bool:
        """Whether its end (epoch milliseconds) is past."""
        end = self.headers.get(EXPIRES_AT, "")
        return end.isascii() and end.isdigit() and int(end) <= instant

    def delivery(self, destination: str) -> Message:
        return Message(
            destination=destination,
            body=self.body,
            headers=self.headers,
            id=self.id,
            key=(destination, self.id),
            redelivered=self.deliveries > 1,
            delivery_count=self.deliveries or None,
            handle=_Handle(self, self.deliveries),
        )


@attrs.frozen(eq=False)
class _Handle:
    """What settles one delivery of a message, and no later one."""

    stored: _Stored
    delivery: int


@attrs.define(eq=False)
class _Queues:
    """The broker's state: queues by destination, each in the order of sending; one lock for all of it."""

    changed: threading.Condition = attrs.field(factory=threading.Condition)
    queues: dict[str, list[_Stored]] = attrs.field(factory=dict)
    sessions: list[MemorySession] = attrs.field(factory=list)
    numbers: itertools.count[int] = attrs.field(factory=lambda: itertools.count(1))
    # Histories may outlive this broker: the ids of the next one must not be those of its messages.
    mark: str = attrs.field(factory=lambda: uuid.uuid4().hex[:12])
    doubts: list[Literal["done", "undone"]] = attrs.field(factory=list)
    refusing: bool = False
    may_expire: bool = False

    def put(self, destination: str, body: bytes, headers: Mapping[str, str]) -> _Stored:
        number = next(self.numbers)
        stored = _Stored(number, headers.get(ID) or f"m-{self.mark}-{number}", body, dict(headers))
        self.queues.setdefault(destination, []).append(stored)
        self.may_expire = self.may_expire or EXPIRES_AT in headers
        self.changed.notify_all()
        return stored

    def give_back(self, destination: str, stored: _Stored, due: float = 0.0) -> None:
        stored.due = due
        bisect.insort(self.queues.setdefault(destination, []), stored, key=lambda other: other.number)
        self.changed.notify_all()

    def take(self, destination: str, now: float) -> tuple[_Stored | None, float | None]:
        """The first message that is due, and else how long until one is; what has expired is dropped."""
        queue = self.queues.get(destination, [])
        if self.may_expire:
            instant = time.time() * 1000
            queue[:] = [stored for stored in queue if not stored.expired(instant)]
        for place, stored in enumerate(queue):
            if stored.due <= now:
                return queue.pop(place), None
        return None, min((stored.due - now for stored in queue), default=None)


@attrs.frozen(eq=False)
class MemoryBroker:
    """An in-process broker, and a destination of it to consume from; `at` gives another one of the same broker."""

    destination: str = attrs.field(validator=is_nonempty_text)
    _state: _Queues = attrs.field(factory=_Queues, repr=False, kw_only=True, alias="state")

    @property
    def name(self) -> str:
        """How logs and errors call it."""
        return f"memory:{self.destination}"

    def at(self, destination: str) -> MemoryBroker:
        """The same broker, to consume from another destination."""
        return attrs.evolve(self, destination=destination)

    def connect(self, *, consume: bool = True) -> MemorySession:
        """Open a session. `BrokerUnavailableError` while `refuse_connections` is in force."""
        state = self._state
        with state.changed:
            if state.refusing:
                raise BrokerUnavailableError(broker=self.name, reason="it refuses connections")
            session = MemorySession(self, state, consume=consume)
            state.sessions.append(session)
        return session

    def publish(self, body: bytes | str, headers: Mapping[str, str] | None = None, *, id: str | None = None) -> str:  # noqa: A002
        """Send one message to the destination, outside of any transaction; gives its id, which is `id` if given."""
        data = body.encode() if isinstance(body, str) else body
        named = dict(headers or {}) | ({ID: id} if id is not None else {})
        with self._state.changed:
            return self._state.put(self.destination, data, named).id

    # -- to look inside

    def messages(self) -> tuple[Message, ...]:
        """What the destination holds, deliveries in hand of a session included, in the order of sending."""
        with self._state.changed:
            waiting = list(self._state.queues.get(self.destination, ()))
            held = [stored for session in self._state.sessions for stored in session.holds(self.destination)]
            return tuple(
                stored.delivery(self.destination) for stored in sorted(waiting + held, key=lambda one: one.number)
            )

    def wait_until_empty(self, timeout: float = 10.0) -> bool:
        """Wait until nothing is left at the destination, waiting or in hand; False after `timeout` seconds."""
        with self._state.changed:
            return self._state.changed.wait_for(self._is_empty, timeout)

    def _is_empty(self) -> bool:
        held = any(session.holds(self.destination) for session in self._state.sessions)
        return not held and not self._state.queues.get(self.destination)

    # -- faults

    def doubt_next_commit(self, fate: Literal["done", "undone"]) -> None:
        """Lose the connection during the next commit, after it was done or before; the session cannot know which."""
        with self._state.changed:
            self._state.doubts.append(fate)

    def drop_connections(self) -> None:
        """Lose every connection: what is not committed goes back, redelivered."""
        with self._state.changed:
            sessions = list(self._state.sessions)
        for session in sessions:
            session.lose("dropped by the broker")

    def refuse_connections(self, refuse: bool = True) -> None:  # noqa: FBT001, FBT002 - reads as a switch
        """Let nobody connect until `refuse_connections(False)`."""
        with self._state.changed:
            self._state.refusing = refuse


class MemorySession:
    """A session of the in-process broker."""

    def __init__(self, broker: MemoryBroker, state: _Queues, *, consume: bool) -> None:
        self._broker = broker
        self._state = state
        self._consume = consume
        self._held: dict[int, tuple[str, _Stored]] = {}
        self._sends: list[tuple[str, bytes, dict[str, str]]] = []
        self._interrupted = False
        self._lost: str | None = None

    @property
    def capabilities(self) -> Capabilities:
        """Everything that a session can ask for."""
        return _CAPABILITIES

    @property
    def stale_frames(self) -> int:
        """Always 0: no delivery is on its way while the lock is held."""
        return 0

    def receive(self, timeout: float | None = None) -> Message | None:
        """The first message that is due."""
        limit = None if timeout is None else time.monotonic() + timeout
        with self._state.changed:
            while not self._interrupted:
                self._check()
                now = time.monotonic()
                stored, due_in = self._take(now)
                if stored is not None:
                    return stored.delivery(self._broker.destination)
                if limit is not None and now >= limit:
                    return None
                waits = [wait for wait in (due_in, None if limit is None else limit - now) if wait is not None]
                self._state.changed.wait(min([*waits, threading.TIMEOUT_MAX]))
        return None

    def _take(self, now: float) -> tuple[_Stored | None, float | None]:
        if not self._consume:
            return None, None
        stored, due_in = self._state.take(self._broker.destination, now)
        if stored is not None:
            stored.deliveries += 1
            self._held[stored.number] = (self._broker.destination, stored)
        return stored, due_in

    def send(self, destination: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Keep a message for the commit."""
        self._sends.append((destination, body, dict(headers)))

    def flush(self) -> None:
        """Every send was taken, unless the connection is lost."""
        with self._state.changed:
            self._check()

    def commit(self, message: Message | None = None) -> None:
        """Acknowledge and send, in one step."""
        with self._state.changed:
            if message is not None and self._in_hand(message) is None:
                self._lose("a delivery that is not in hand was to be acknowledged")
            fate = self._state.doubts.pop(0) if self._state.doubts else None
            if fate != "undone" and self._lost is None:
                self._settle(message)
            if fate is not None:
                self._lose("the commit was not confirmed")
            if self._lost is not None:
                raise CommitInDoubtError from self._lost_error()

    def _settle(self, message: Message | None) -> None:
        for destination, body, headers in self._sends:
            self._state.put(destination, body, headers)
        self._sends = []
        if message is not None:
            del self._held[_handle(message).stored.number]
            self._state.changed.notify_all()

    def _in_hand(self, message: Message) -> _Stored | None:
        handle = _handle(message)
        held = self._held.get(handle.stored.number)
        return handle.stored if held is not None and handle.delivery == handle.stored.deliveries else None

    def rollback(self, message: Message | None = None, delay: float = 0.0) -> None:
        """Forget the sends; give the message back."""
        self._sends = []
        if message is None:
            return
        with self._state.changed:
            stored = self._in_hand(message)
            if stored is not None:
                self._state.give_back(*self._held.pop(stored.number), due=time.monotonic() + delay)

    def pause(self, seconds: float) -> bool:
        """Wait, unless interrupted or lost."""
        with self._state.changed:
            # The longest wait that there is: longer ones are an error.
            limit = min(seconds, threading.TIMEOUT_MAX)
            return not self._state.changed.wait_for(lambda: self._interrupted or self._lost is not None, limit)

    def interrupt(self) -> None:
        """End all waiting."""
        with self._state.changed:
            self._interrupted = True
            self._state.changed.notify_all()

    def close(self, *, wait: bool = True) -> None:
        """Give back what is in hand."""
        self.lose("closed")

    def lose(self, reason: str) -> None:
        """Lose the connection."""
        with self._state.changed:
            self._lose(reason)

    def _lose(self, reason: str) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        self._sends = []
        for destination, stored in self._held.values():
            self._state.give_back(destination, stored)
        self._held = {}
        self._state.sessions.remove(self)
        self._state.changed.notify_all()

    def holds(self, destination: str) -> list[_Stored]:
        """What is in hand, of a destination."""
        return [stored for held_from, stored in self._held.values() if held_from == destination]

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost_error()

    def _lost_error(self) -> ConnectionLostError:
        return ConnectionLostError(broker=self._broker.name, reason=self._lost)


def _handle(message: Message) -> _Handle:
    if not isinstance(message.handle, _Handle):
        raise wrong_type("message", "a delivery of this broker", message)
    return message.handle
