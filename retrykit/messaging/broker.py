"""What the listener container asks of a message source: a `Broker` that connects, and the `Session` that it gives.

A session is one connection generation: used by one worker, thrown away when it is lost, never repaired. Everything that
it hands out (deliveries, open transactions) dies with it, so nothing of an earlier generation can be settled on a later
one.

Its transaction opens by itself with the first `send` or with `commit`, and ends with `commit` or `rollback`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import attrs

from retrykit.check import takes, wrong_type
from retrykit.message import Message


@attrs.frozen(kw_only=True)
class Capabilities:
    """What a source can do by itself, and how far its word goes; the contract suite tests each, or its absence."""

    delayed_redelivery: bool = False
    """`rollback(message, delay)` keeps the message back for `delay` seconds, here and for other consumers."""
    atomic_send_and_ack: bool = False
    """`commit` makes the sends and the acknowledgement happen together, or neither."""
    stable_ids: bool = False
    """A message has the same id at every delivery, without help by its producer."""
    trustworthy_flag: bool = False
    """`redelivered` is true at every delivery but the first; where it is not, the history is always looked up."""
    flags_while_connected: bool = False
    """`redelivered` is true at every delivery but the first as long as one connection lives; a restart forgets it."""
    counts_deliveries: bool = False
    """`delivery_count` is known."""
    delayed_copies: bool = False
    """`put_off` replaces a message by a copy that comes later; see `retrykit.messaging.delays.Postponing`."""
    longest_hold: float | None = None
    """So many seconds a delivery may be in hand; then the source takes it back. None: for ever."""


class Session(Protocol):
    """One connection to a source, for one worker.

    `interrupt` and `close` may be called from any thread, the rest is the worker's.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the source at the other end can do."""

    @property
    def stale_frames(self) -> int:
        """Deliveries dropped because they belonged to an earlier subscription of this session."""

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next delivery; None after `timeout` seconds without one, or when interrupted.

        `ConnectionLostError` when there is no more.
        """

    def send(self, destination: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Put a message into the open transaction. What the source says to it is known after `flush` or `commit`."""

    def flush(self) -> None:
        """Return when the source has taken every send of the open transaction.

        Else `ConnectionLostError`; `BrokerRefusedError` when the source said that it would not take one.
        """

    def commit(self, message: Message | None = None) -> None:
        """Acknowledge `message` as the last act of the transaction and commit it.

        `CommitInDoubtError` when that was not confirmed in time: it may have happened or not, and the session is of no
        more use. `BrokerRefusedError` when the source said that it has not happened.
        """

    def rollback(self, message: Message | None = None, delay: float = 0.0) -> None:
        """Undo the open transaction, and give `message` back, to be delivered again (after `delay` seconds, if it can).

        Without a message the delivery in hand stays in hand. Never raises: a connection that is lost has done the same.
        """

    def pause(self, seconds: float) -> bool:
        """Wait with a delivery in hand. False as soon as the wait is pointless: interrupted, or the connection lost."""

    def interrupt(self) -> None:
        """End the wait of `receive` and `pause`, now and from now on: no more deliveries are wanted."""

    def close(self, *, wait: bool = True) -> None:
        """Leave: what is not committed is undone and goes back.

        In good order and in bounded time, or at once without `wait`.
        """


Told = Callable[[Exception | None], None]
"""Told that an acknowledgement is confirmed (None), or why nobody can know."""


@runtime_checkable
class Overlapping(Protocol):
    """A session that need not wait, message by message, until its acknowledgement is confirmed."""

    def acknowledge(self, message: Message, told: Told) -> None:
        """As `commit` where nothing was sent; but it may return before that is confirmed.

        `told` is called once, by this call or a later one, and before another message is acknowledged, or `close` ends:
        with None, or with what left it in doubt. When this call itself raises, as `commit` does, it is not called.
        """


def overlaps(session: Session) -> bool:
    """Whether a session is `Overlapping`, and has not just something else of that name."""
    return isinstance(session, Overlapping) and takes(session.acknowledge, ("message", "told"))


@runtime_checkable
class Broker(Protocol):
    """Where messages come from: an address and a destination, as a value. Connecting gives a session."""

    @property
    def name(self) -> str:
        """How logs and errors call it; without credentials."""

    def connect(self, *, consume: bool = True) -> Session:
        """Open a session, subscribed if `consume`. `BrokerUnavailableError` when that fails, with nothing left open."""


def is_broker(_instance: Any, field: Any, value: Any) -> None:
    """An attrs validator: something that connects."""
    if isinstance(value, type) or not isinstance(value, Broker):
        raise wrong_type(field.name, "a broker: an object with a name and connect()", value)
