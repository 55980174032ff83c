"""The broker proper: queues, journal, dead letters, schedule, counters. It knows no sockets."""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from retrykit.testing.stomp_server.frames import Frame
from retrykit.testing.stomp_server.journal import Journal
from retrykit.testing.stomp_server.profiles import Profile
from retrykit.testing.stomp_server.queues import Delivery, Message, Queue, Subscription
from retrykit.testing.stomp_server.topics import TOPIC, is_durable, is_topic, spread, topic_of

PREFIX = "/queue/"
TEMPORARY = "/remote-temp-queue/"
_OWN_HEADERS = {
    "receipt",
    "transaction",
    "message-id",
    "redelivered",
    "subscription",
    "ack",
    "destination",
    "persistent",
}


class StompError(Exception):
    """The client's frame cannot be carried out; the connection goes on unless `fatal`."""

    def __init__(self, message: str, detail: str | None = None, *, fatal: bool = False) -> None:
        """Keep the text of the ERROR frame's `message` header, and of its body (the same by default)."""
        super().__init__(message)
        self.detail = message if detail is None else detail
        self.fatal = fatal


def _schedule(message: Message, delay: float) -> None:
    """Note that a message comes later; what expires does so later by as much, as with ActiveMQ."""
    message.headers["scheduledJobId"] = message.message_id
    expires = message.headers.get("expires", "0")
    if expires.isdigit() and int(expires):
        message.headers["expires"] = str(int(expires) + round(delay * 1000))
    # The delay counts from the COMMIT where there is one, so until `change` it is a duration.
    message.due = delay


class Broker:
    """All state that connections share; every method runs on one thread.

    `call_later(seconds, action)` is how it gets woken for scheduled messages.
    """

    def __init__(
        self,
        profile: Profile,
        journal: Journal,
        survivors: Iterable[Message],
        call_later: Callable[[float, Callable[[], None]], object],
        *,
        keep_flags: bool = False,
    ) -> None:
        """Take over what survived from an earlier life."""
        self.profile = profile
        self.journal = journal
        self.queues: dict[str, Queue] = {}
        self.counters: Counter[str] = Counter()
        self.boot = f"{uuid.uuid4().hex[:12]}-{time.time_ns() // 1_000_000}"
        self.paused = False
        self.clients: set[str] = set()
        self._keep_flags = keep_flags
        self._call_later = call_later
        self._ack_numbers = itertools.count(1)
        survivors = list(survivors)
        self._numbers = itertools.count(max((message.number for message in survivors), default=0) + 1)
        for name in filter(is_topic, journal.queues):
            self.queue(name)
        for message in survivors:
            self._revive(message)

    def _revive(self, message: Message) -> None:
        message.redelivered = message.redelivered and self._keep_flags
        self._place(message)

    # -- messages in and out

    def queue(self, destination: str) -> Queue:
        """Find or make a queue; StompError for a destination that this test double does not have."""
        if destination in (PREFIX, TOPIC) or not destination.startswith((PREFIX, TEMPORARY, TOPIC)):
            raise StompError(f"The embedded server has only {PREFIX}NAME and {TOPIC}NAME, not {destination}")
        if destination not in self.queues:
            self.queues[destination] = Queue(destination)
        return self.queues[destination]

    def new_message(self, frame: Frame, origin: str) -> Message:
        """Make the message of a SEND frame; `origin` becomes part of its id."""
        destination = frame.headers["destination"]
        if not is_topic(destination):
            self.queue(destination)
        headers = {name: value for name, value in frame.headers.items() if name not in _OWN_HEADERS}
        delay = self._delay(headers)
        stamp = str(time.time_ns() // 1_000_000)
        headers = {"expires": "0", "priority": "4", "timestamp": stamp} | headers
        message = self._made(frame, origin, destination, headers)
        if delay > 0:
            _schedule(message, delay)
        return message

    def _made(self, frame: Frame, origin: str, destination: str, headers: dict[str, str]) -> Message:
        number = next(self._numbers)
        persistent = frame.headers.get("persistent") == "true"
        if persistent:
            headers["persistent"] = "true"
        return Message(number, f"{origin}:-1:1:{number}", destination, headers, frame.body, persistent)

    def _delay(self, headers: dict[str, str]) -> float:
        scheduling = [name for name in headers if name.startswith("AMQ_SCHEDULED_")]
        if not scheduling or not self.profile.scheduler or "scheduledJobId" in headers:
            return 0.0
        if scheduling != ["AMQ_SCHEDULED_DELAY"]:
            raise StompError(f"The embedded server knows only AMQ_SCHEDULED_DELAY, not {' '.join(scheduling)}")
        text = headers.pop("AMQ_SCHEDULED_DELAY")
        if not (text.isascii() and text.isdigit()):
            raise StompError(f"AMQ_SCHEDULED_DELAY is not a number of milliseconds: {text}", fatal=True)
        return int(text) / 1000

    def change(self, arriving: Sequence[Message], leaving: Sequence[Message]) -> None:
        """Let messages arrive and settled ones go, as one atomic step of the journal."""
        arriving = self.spread(arriving)
        for message in arriving:
            if message.due:
                message.due += time.time()
        self.journal.record(arriving, leaving)
        for message in arriving:
            self._place(message)

    def spread(self, arriving: Sequence[Message]) -> list[Message]:
        """What arrives, with copies in place of what is sent to topics."""
        return [each for message in arriving for each in spread(message, self.queues, self._numbers)]

    def own_queue(self, name: str) -> Queue:
        """Find or make the queue of a topic's subscription; one that is durable is not forgotten."""
        if any(mark in topic_of(name) for mark in "*#>"):
            raise StompError(f"The embedded server has no wildcards in topics: {topic_of(name)}")
        if is_durable(name) and name not in self.journal.queues:
            self.journal.record_queue(name, {})
        if name not in self.queues:
            self.queues[name] = Queue(name)
        return self.queues[name]

    def _place(self, message: Message) -> None:
        queue = self.queue(message.destination)
        wait = message.due - time.time()
        if wait > 0:
            queue.scheduled[message.number] = message
            self._call_later(wait, lambda: self._come_due(queue, message))
        else:
            queue.fresh.append(message)
            self.dispatch(queue)

    def _come_due(self, queue: Queue, message: Message) -> None:
        del queue.scheduled[message.number]
        queue.fresh.append(message)
        self.dispatch(queue)

    # -- deliveries

    def name_delivery(self, message: Message) -> tuple[str, str]:
        """Make the message id and the acknowledgement id of one more delivery."""
        return message.message_id, f"ID:{self.boot}:{next(self._ack_numbers)}"

    def attach(self, subscription: Subscription) -> None:
        """Let a subscription take part; it may get messages at once."""
        subscription.queue.turns.append(subscription)
        self.dispatch(subscription.queue)

    def detach(self, subscription: Subscription) -> list[Delivery]:
        """End a subscription and hand back what it had in flight, flagged; the deliveries that went back.

        What is ACKed in an open transaction stays away until that transaction ends.
        """
        subscription.queue.turns.remove(subscription)
        going = [delivery for delivery in subscription.in_flight.values() if not delivery.in_transaction]
        self.hand_back(going)
        if not is_durable(subscription.queue.name):
            self.queues.pop(subscription.queue.name, None)
        return going

    def hand_back(self, deliveries: Sequence[Delivery]) -> None:
        """Put deliveries back into their queues, flagged as redelivered, before all that is fresh."""
        for delivery in deliveries:
            delivery.subscription.remove(delivery)
            # A durable subscriber is not told that it had a message before.
            delivery.message.redelivered = not is_topic(delivery.subscription.queue.name)
            delivery.subscription.queue.returned.append(delivery.message)
        for queue in {delivery.subscription.queue for delivery in deliveries}:
            self.dispatch(queue)

    def dispatch(self, queue: Queue) -> None:
        """Deliver as much as there are messages and room, in turns; nothing while `paused`."""
        while not self.paused and queue.waiting and (subscription := queue.next_subscription()) is not None:
            message = queue.next_message()
            if self._expired(message):
                self.bury(message, f"java.lang.Throwable: Message Expired. Expiration:{message.headers['expires']}")
                continue
            self._deliver(message, subscription)

    def _expired(self, message: Message) -> bool:
        return message.expired(time.time())

    def _deliver(self, message: Message, subscription: Subscription) -> None:
        shown_id, ack_id = subscription.name(message)
        delivery = Delivery(message, subscription, shown_id, ack_id)
        if self._keep_flags and not message.redelivered:
            # Before the frame leaves: after a crash nobody knows how far the client came.
            self.journal.record((), (), [message])
        message.deliveries += 1
        self.counters["deliveries"] += 1
        self.counters["redeliveries"] += message.redelivered
        if subscription.mode == "auto":
            self.change((), [message])
        else:
            subscription.in_flight[shown_id] = delivery
        subscription.deliver(delivery)

    def bury(self, message: Message, cause: str | None = None) -> None:
        """Move a message to the dead letters, under its old id; as ActiveMQ does, drop one that is not persistent."""
        self.counters["dead_letters"] += 1
        if self.profile.dead_letters is None or not message.persistent:
            self.change((), [message])
            return
        headers = dict(message.headers)
        headers["original-destination"] = message.destination
        headers["originalExpiration"] = headers.get("expires", "0")
        headers["expires"] = "0"
        if cause is not None:
            headers["dlqDeliveryFailureCause"] = cause
        dead = Message(
            number=next(self._numbers),
            message_id=message.message_id,
            destination=self.profile.dead_letters,
            headers=headers,
            body=message.body,
            persistent=True,
        )
        self.change([dead], [message])

    def redeliver(self, message: Message, delay: float) -> None:
        """Have a message come again after `delay` seconds, as ActiveMQ's plug-in does: the same one, flagged."""
        headers = message.headers | {"redeliveryDelay": str(round(delay * 1000))}
        again = replace(message, number=next(self._numbers), headers=headers, redelivered=True)
        _schedule(again, delay)
        self.change([again], [message])

    def forget(self, prefix: str) -> None:
        """Delete queues with what is in them."""
        for name in [name for name in self.queues if name.startswith(prefix)]:
            self.change((), [message for _, message in self.queues[name].all_messages()])
            del self.queues[name]

    def forget_flags(self) -> None:
        """Forget which waiting messages were delivered before."""
        for queue in self.queues.values():
            for message in queue.returned:
                message.redelivered = False

    def closing(self) -> None:
        """Write down what a clean end leaves behind, and a crash does not."""

    def survivors(self, *, crash: bool) -> list[Message]:
        """List the persistent messages in order of arrival, wherever they are."""
        kept = [message for queue in self.queues.values() for _, message in queue.all_messages() if message.persistent]
        return sorted(kept, key=lambda message: message.number)
