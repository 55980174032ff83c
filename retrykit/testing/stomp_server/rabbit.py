"""RabbitMQ 3.10 over STOMP, where it differs from ActiveMQ: as measured on the real one, surprising parts included.

A transaction is a list of frames that COMMIT carries out one by one; receipts of its SENDs come after that of the
COMMIT. Acknowledgements name a number within the connection, whoever gave out the id. `/queue/NAME` makes a queue with
the arguments in the headers, on SEND as on SUBSCRIBE, and they have to agree. A crash forgets the acknowledgements of a
classic queue that has not been idle since; a quorum queue forgets none, and counts deliveries.

Of the arguments of queues it knows `x-queue-type`, `x-expires`, and `x-message-ttl` with dead-lettering through the
default exchange. There are topics, but no other exchanges, and no virtual hosts besides "/". What expires is gone at
once, wherever in its queue it lies, and its time begins anew with a restart.
"""

from __future__ import annotations

import re
from bisect import insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from retrykit.testing.stomp_server.broker import PREFIX, Broker, StompError
from retrykit.testing.stomp_server.frames import Frame
from retrykit.testing.stomp_server.queues import Delivery, Message, Queue, Subscription
from retrykit.testing.stomp_server.topics import is_topic

_OF_THIS_LIFE: Final = ("x-delivery-count", "expiration")
DECLARED: Final = "/amq/queue/"
IDLE_SECONDS: Final = 0.25
"""After so long without acknowledgements, those of a classic queue survive a crash."""

_OWN_HEADERS: Final = ("message-id", "redelivered", "subscription", "ack", "destination", "persistent")
_ARGUMENTS: Final = (
    "x-queue-type",
    "x-message-ttl",
    "x-expires",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
)
_UNKNOWN: Final = re.compile(r"x-(max-|overflow|single-active|delivery-limit|quorum|stream|dead-letter-strategy)")
_KINDS: Final = ("classic", "quorum")


def _name_of(destination: str, prefix: str) -> str | None:
    return destination.removeprefix(prefix) if destination.startswith(prefix) else None


def _argument(value: str | None) -> str:
    return "none" if value is None else f"the value '{value}' of type 'longstr'"


def _arguments(headers: dict[str, str]) -> dict[str, str]:
    """What a queue is made with."""
    odd = [name for name in headers if _UNKNOWN.match(name)]
    odd += [name for name in ("auto-delete", "exclusive") if headers.get(name, "false") != "false"]
    odd += ["durable"] if headers.get("durable", "true") != "true" else []
    if odd or headers.get("x-dead-letter-exchange", "") or headers.get("x-queue-type", "classic") not in _KINDS:
        raise StompError(f"The embedded server does not know queues like that: {' '.join(odd) or headers}")
    given = {name: headers[name] for name in _ARGUMENTS if name in headers}
    return {name: value for name, value in given.items() if (name, value) != ("x-queue-type", "classic")}


class RabbitBroker(Broker):
    """The queues of one virtual host."""

    _leases: dict[str, object]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As the base."""
        self._leases = {}
        super().__init__(*arguments, **options)

    def queue(self, destination: str) -> Queue:
        """Find a queue by its `/queue/NAME`, or make one as it is made without arguments."""
        if is_topic(destination):
            return super().queue(destination)
        return self.queues.get(destination) or self.declare(destination, {})

    def declare(self, destination: str, headers: dict[str, str]) -> Queue:
        """Find or make the queue with these arguments."""
        name = _name_of(destination, PREFIX)
        if not name or "/" in name:
            raise StompError("Invalid destination", f"'/{name}' is not a valid queue destination\n")
        arguments, known = _arguments(headers), self.journal.queues.get(destination)
        if known is None:
            self.journal.record_queue(destination, arguments)
        elif known != arguments:
            odd = next(key for key in _ARGUMENTS if known.get(key) != arguments.get(key))
            found = f"received {_argument(arguments.get(odd))} but current is {_argument(known.get(odd))}"
            detail = f"PRECONDITION_FAILED - inequivalent arg '{odd}' for queue '{name}' in vhost '/': {found}"
            raise StompError("precondition_failed", detail, fatal=True)
        if destination not in self.queues:
            kind = arguments.get("x-queue-type", "classic")
            self.queues[destination] = Queue(destination, kind=kind)
        self._renew(destination, arguments)
        return self.queues[destination]

    def _renew(self, destination: str, arguments: dict[str, str]) -> None:
        """Have an expiring queue live on for its time, from now."""
        expires = arguments.get("x-expires", "")
        if expires.isascii() and expires.isdigit():
            lease = self._leases[destination] = object()
            self._call_later(int(expires) / 1000, lambda: self._vanish(destination, lease))

    def _vanish(self, destination: str, lease: object) -> None:
        queue = self.queues[destination]
        if self._leases.get(destination) is lease and not (queue.turns or queue.left):
            # What is in it does not count as dead: it goes with the queue.
            self.forget(destination)
            self.journal.forget_queue(destination)

    def route(self, destination: str, headers: dict[str, str]) -> Queue | None:
        """Find the queue that a SEND goes to; None: nobody gets it, and nobody is told."""
        if destination.startswith(PREFIX):
            return self.declare(destination, headers)
        name = _name_of(destination, DECLARED)
        if name is None and destination.startswith("/"):
            raise StompError("Unknown destination", f"'{destination}' is not a valid destination.\n")
        return self._known(PREFIX + (name or destination))

    def source(self, destination: str, headers: dict[str, str]) -> Queue:
        """Find the queue that a SUBSCRIBE is about."""
        name = _name_of(destination, DECLARED)
        if name is None:
            return self.declare(destination, headers)
        queue = self._known(PREFIX + name)
        if queue is None:
            raise StompError("not_found", f"NOT_FOUND - no queue '{name}' in vhost '/'", fatal=True)
        return queue

    def _known(self, destination: str) -> Queue | None:
        """Find a queue, also one that is empty since a restart."""
        arguments = self.journal.queues.get(destination)
        if arguments is None:
            return None
        return self.queues.get(destination) or self.declare(destination, arguments)

    def found(self, destination: str) -> Queue | None:
        """Find a queue that a connection has made before: it makes none again, be it gone meanwhile."""
        return self._known(destination)

    def new_message(self, frame: Frame, origin: str) -> Message:
        """Make the message of a SEND frame whose queue is known; all headers travel, those of the frame too."""
        expiration = frame.headers.get("expiration", "0")
        if not (expiration.isascii() and expiration.isdigit()):
            raise StompError(
                "precondition_failed", f"PRECONDITION_FAILED - invalid expiration '{expiration}'", fatal=True
            )
        destination = frame.headers["destination"]
        destination = destination if is_topic(destination) else self.queue(destination).name
        headers = {name: value for name, value in frame.headers.items() if name not in _OWN_HEADERS}
        headers["content-length"] = str(len(frame.body))
        return self._made(frame, origin, destination, headers)

    # -- what survives a crash

    def _revive(self, message: Message) -> None:
        queue = self._known(message.destination) or self.queue(message.destination)
        if self.journal.crashed and queue.kind == "classic":
            message.redelivered = True
        self._place(message)

    def change(self, arriving: Sequence[Message], leaving: Sequence[Message]) -> None:
        """Let messages arrive and settled ones go; those of classic queues are written down later."""
        arriving = self.spread(arriving)
        gone: list[Message] = []
        for message in leaving:
            queue = self.queue(message.destination)
            if queue.kind == "classic" and message.persistent:
                self._settle_later(queue, message)
            else:
                gone.append(message)
        for queue in {self.queue(message.destination) for message in arriving if message.persistent}:
            # What is written for a message that has to be safe takes along what waited.
            gone += queue.settled
            queue.settled.clear()
        super().change(arriving, gone)

    def _settle_later(self, queue: Queue, message: Message) -> None:
        queue.settled.append(message)
        self._call_later(IDLE_SECONDS, lambda: self._write_settled(queue, message))

    def _write_settled(self, queue: Queue, last: Message) -> None:
        if queue.settled and queue.settled[-1] is last:
            self.journal.record((), queue.settled)
            queue.settled.clear()

    def closing(self) -> None:
        """Write down what a clean end leaves behind."""
        for queue in self.queues.values():
            waiting = [message for _, message in queue.all_messages() if message.redelivered]
            self.journal.record((), queue.settled, waiting)
            queue.settled.clear()
        self.journal.record_end()

    def survivors(self, *, crash: bool) -> list[Message]:
        """List the persistent messages; after a crash with those that classic queues had forgotten to forget."""
        kept = super().survivors(crash=crash)
        for queue in self.queues.values():
            if crash and queue.kind == "classic":
                kept += queue.settled
                for message in kept:
                    message.redelivered = message.redelivered or message.destination == queue.name
        return sorted(kept, key=lambda message: message.number)

    # -- deliveries

    def _expired(self, message: Message) -> bool:
        return False

    def _deliver(self, message: Message, subscription: Subscription) -> None:
        if subscription.queue.kind == "quorum" and subscription.mode != "auto":
            # If it comes back, then with this count, however it does.
            headers = message.headers | {"x-delivery-count": str(_count(message) + 1)}
            self.journal.record([replace(message, headers=headers, redelivered=True)], ())
        super()._deliver(message, subscription)

    def leave(self, subscription: Subscription) -> None:
        """End a subscription, which keeps what it has until its connection ends."""
        subscription.queue.turns.remove(subscription)
        subscription.queue.left.append(subscription)

    def detach(self, subscription: Subscription) -> list[Delivery]:
        """End a subscription and hand back what it had."""
        queue = subscription.queue
        if subscription in queue.left:
            queue.left.remove(subscription)
            queue.turns.append(subscription)
        gone = super().detach(subscription)
        self._renew(queue.name, self.journal.queues.get(queue.name, {}))
        return gone

    def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Put deliveries back where they were in their queues, flagged; quorum queues count them."""
        for delivery in deliveries:
            message, queue = delivery.message, delivery.subscription.queue
            delivery.subscription.remove(delivery)
            message.redelivered = True
            if queue.kind == "quorum":
                message.headers["x-delivery-count"] = str(_count(message) + 1)
            place = list(queue.returned)
            insort(place, message, key=lambda other: other.number)
            queue.returned.clear()
            queue.returned.extend(place)
        for queue in {delivery.subscription.queue for delivery in deliveries}:
            self.dispatch(queue)

    def _place(self, message: Message) -> None:
        super()._place(message)
        times = (
            self.journal.queues.get(message.destination, {}).get("x-message-ttl"),
            message.headers.get("expiration"),
        )
        for ttl in times:
            if ttl is not None and ttl.isascii() and ttl.isdigit():
                self._call_later(int(ttl) / 1000, lambda: self._outlive(message))

    def _outlive(self, message: Message) -> None:
        queue = self.queues.get(message.destination)
        for waiting in (queue.fresh, queue.returned) if queue is not None else ():
            if message in waiting:
                waiting.remove(message)
                self.bury(message)

    def bury(self, message: Message, cause: str | None = None) -> None:
        """Move a message to where its queue sends dead letters, or drop it."""
        self.counters["dead_letters"] += 1
        arguments = self.journal.queues.get(message.destination, {})
        key = arguments.get("x-dead-letter-routing-key", message.destination.removeprefix(PREFIX))
        target = self._known(PREFIX + key) if "x-dead-letter-exchange" in arguments else None
        if target is None:
            self.change((), [message])
            return
        source = message.destination.removeprefix(PREFIX)
        death = {
            "x-first-death-exchange": "",
            "x-first-death-queue": source,
            "x-first-death-reason": "expired" if cause is None else cause,
        }
        headers = {name: value for name, value in message.headers.items() if name not in _OF_THIS_LIFE}
        headers = death | headers
        number = next(self._numbers)
        dead = Message(number, message.message_id, target.name, headers, message.body, message.persistent)
        self.change([dead], [message])


def _count(message: Message) -> int:
    return int(message.headers.get("x-delivery-count", "0"))
