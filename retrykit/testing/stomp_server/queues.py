"""Messages, subscriptions, queues, and who gets which message next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Message:
    """A message that the server keeps; `headers` are those that every delivery of it shows.

    `number` orders messages by arrival; `due` is epoch seconds before which it is not delivered (0: at once).
    """

    number: int
    message_id: str
    destination: str
    headers: dict[str, str]
    body: bytes
    persistent: bool
    due: float = 0.0
    redelivered: bool = False
    deliveries: int = 0

    def expired(self, now: float) -> bool:
        """Whether its `expires` header (epoch milliseconds, 0: never) has passed."""
        expires = self.headers.get("expires", "0")
        return expires.isdigit() and 0 < int(expires) <= now * 1000


@dataclass(slots=True, eq=False)
class Delivery:
    """A message in flight: sent to a subscription and not settled yet."""

    message: Message
    subscription: Subscription
    message_id: str
    ack_id: str
    in_transaction: bool = False


@dataclass(slots=True, eq=False)
class Subscription:
    """A consumer of one queue; at most `prefetch` unsettled messages are with it.

    `name` gives each delivery its message id and its acknowledgement id.
    """

    id: str
    queue: Queue
    mode: str
    prefetch: int
    name: Callable[[Message], tuple[str, str]]
    deliver: Callable[[Delivery], None]
    in_flight: dict[str, Delivery] = field(default_factory=dict)
    acked_in_transactions: int = 0

    @property
    def has_room(self) -> bool:
        """Whether the window has a place; an ACK within an open transaction has already given its place back."""
        return len(self.in_flight) - self.acked_in_transactions < self.prefetch

    def mark(self, delivery: Delivery, *, in_transaction: bool) -> None:
        """Note that the delivery's ACK waits for a transaction, or does no more."""
        self.acked_in_transactions += in_transaction - delivery.in_transaction
        delivery.in_transaction = in_transaction

    def remove(self, delivery: Delivery) -> None:
        """Forget a settled delivery."""
        self.mark(delivery, in_transaction=False)
        self.in_flight.pop(delivery.message_id, None)


@dataclass(slots=True, eq=False)
class Queue:
    """Messages that wait, and the subscriptions that take turns.

    What came back waits in `returned`, in the order it came back, and goes before what was never delivered.
    `kind`, `settled` (what is gone, though a crash brings it back) and `left` (subscriptions that ended, with what they
    still have) mean something to RabbitMQ only.
    """

    name: str
    fresh: deque[Message] = field(default_factory=deque)
    returned: deque[Message] = field(default_factory=deque)
    scheduled: dict[int, Message] = field(default_factory=dict)
    turns: deque[Subscription] = field(default_factory=deque)
    kind: str = ""
    settled: list[Message] = field(default_factory=list)
    left: list[Subscription] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """How many messages could be delivered now."""
        return len(self.fresh) + len(self.returned)

    def next_message(self) -> Message:
        """Take the message whose turn it is; IndexError when none waits."""
        return self.returned.popleft() if self.returned else self.fresh.popleft()

    def next_subscription(self) -> Subscription | None:
        """Find the first subscription in turn that has room and put it at the end of the row."""
        for subscription in self.turns:
            if subscription.has_room:
                self.turns.remove(subscription)
                self.turns.append(subscription)
                return subscription
        return None

    def all_messages(self) -> list[tuple[str, Message]]:
        """List every message with its state, the deliverable ones in their order."""
        holders = (*self.turns, *self.left)
        in_flight = [delivery.message for subscription in holders for delivery in subscription.in_flight.values()]
        return (
            [("in_flight", message) for message in in_flight]
            + [("ready", message) for message in (*self.returned, *self.fresh)]
            + [("scheduled", message) for message in self.scheduled.values()]
        )
