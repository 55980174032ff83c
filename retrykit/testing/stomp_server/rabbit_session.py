"""A client's session with RabbitMQ's STOMP plug-in: what its frames do, and how they are confirmed and refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Final

from retrykit.testing.stomp_server.broker import PREFIX, StompError
from retrykit.testing.stomp_server.faults import DroppedError
from retrykit.testing.stomp_server.frames import Frame
from retrykit.testing.stomp_server.queues import Delivery, Message, Queue, Subscription
from retrykit.testing.stomp_server.rabbit import RabbitBroker
from retrykit.testing.stomp_server.session import Session, Transaction
from retrykit.testing.stomp_server.topics import TOPIC, queue_name

_TAG: Final = re.compile(r"([TQ]_.*)@@[^@]*@@([0-9]+)", re.DOTALL)


@dataclass(slots=True, eq=False)
class _Buffered(Transaction):
    """Frames that wait for COMMIT."""

    frames: list[Frame] = field(default_factory=list)


class RabbitSession(Session):
    """One client of RabbitMQ's STOMP plug-in."""

    _broker: RabbitBroker

    def __init__(self, *arguments: object, **options: object) -> None:
        """As the base."""
        super().__init__(*arguments, **options)  # type: ignore[arg-type] # handed on as they came
        self._tags = itertools.count(1)
        self._by_tag: dict[int, Delivery] = {}
        self._left: list[Subscription] = []
        self._doomed: StompError | None = None
        self._made: set[str] = set()

    def end(self) -> None:
        """Hand back what ended subscriptions still had, too."""
        left, self._left = self._left, []
        for subscription in left:
            self._broker.detach(subscription)
        self._by_tag.clear()
        super().end()

    def _carry_out(self, frame: Frame) -> None:
        super()._carry_out(frame)
        if self._doomed is not None:
            # The broker behind the plug-in refuses when the plug-in has confirmed already.
            error, self._doomed = self._doomed, None
            raise error
        if self._is_confirmed_ack(frame) and self._faults.strikes("after_receipt"):
            self._ended = True
            self._outlet.finish()

    def _is_confirmed_ack(self, frame: Frame) -> bool:
        """Whether this frame ends a delivery as a COMMIT does: faults that are ordered for those strike."""
        return frame.command == "ACK" and "receipt" in frame.headers and "transaction" not in frame.headers

    def _connect(self, frame: Frame) -> None:
        if self._version is not None:
            raise DroppedError
        host = frame.headers.get("host", "/")
        if host != "/":
            raise StompError("Bad CONNECT", f"Virtual host '{host}' access denied", fatal=True)
        super()._connect(frame)

    def _refused_login(self, user: str) -> StompError:
        return StompError("Bad CONNECT", f"Access refused for user '{user}'\n", fatal=True)

    def _error_headers(self, frame: Frame) -> dict[str, str]:
        return {"version": "1.0,1.1,1.2"}

    def _receipts_itself(self, frame: Frame) -> bool:
        return super()._receipts_itself(frame) or (frame.command == "SEND" and "transaction" in frame.headers)

    # -- messages

    def _send(self, frame: Frame) -> None:
        if "message-id" in frame.headers:
            raise StompError("Invalid header", "'message-id' is not allowed on 'SEND'.\n")
        destination = frame.headers.get("destination")
        if not destination:
            raise StompError("Missing destination", "\"SEND\" must include a 'destination' header\n")
        if not destination.startswith(("/exchange/", TOPIC)):
            self._route(destination, frame.headers)
        if not self._wait_for_commit(frame):
            self._publish(frame)

    def _publish(self, frame: Frame) -> None:
        self._broker.counters["sends"] += 1
        destination = frame.headers["destination"]
        if destination.startswith("/exchange/"):
            exchange = destination.split("/")[2]
            self._doomed = StompError("not_found", f"NOT_FOUND - no exchange '{exchange}' in vhost '/'", fatal=True)
            return
        if not destination.startswith(TOPIC):
            queue = self._route(destination, frame.headers)
            if queue is None:
                return
            destination = queue.name
        headers = frame.headers | {"destination": destination}
        self._broker.change([self._broker.new_message(Frame("SEND", headers, frame.body), self._name)], ())

    def _route(self, destination: str, headers: dict[str, str]) -> Queue | None:
        """Find where a SEND goes; a connection makes each queue once, whatever becomes of it then."""
        if destination in self._made:
            return self._broker.found(destination)
        queue = self._broker.route(destination, headers)
        if destination.startswith(PREFIX):
            self._made.add(destination)
        return queue

    def _claim(self, client: str | None) -> None:
        """RabbitMQ knows no clients."""

    def _queue_of(self, headers: dict[str, str]) -> Queue:
        destination = headers["destination"]
        if not destination.startswith(TOPIC):
            return self._broker.source(destination, headers)
        durable = headers.get("durable") == "true"
        # Whoever names the durable subscription takes part in it.
        whose = headers.get("id", "") if durable else f"{headers.get('id')} of {self._name}"
        return self._broker.own_queue(queue_name(destination, whose, durable=durable))

    def _name_delivery(self, id_: str) -> tuple[str, str]:
        handle = f"T_{id_}@@{self._name}@@{next(self._tags)}"
        return handle, handle

    def _subscribed(self, subscription: Subscription) -> None:
        subscription.name = lambda _message: self._name_delivery(subscription.id)
        super()._subscribed(subscription)

    def _deliver(self, delivery: Delivery) -> None:
        if delivery.subscription.mode != "auto":
            self._by_tag[int(delivery.ack_id.rpartition("@@")[2])] = delivery
        super()._deliver(delivery)

    def _flag(self, message: Message) -> dict[str, str]:
        return {"redelivered": "true" if message.redelivered else "false"}

    def _unsubscribe(self, frame: Frame) -> None:
        subscription = self._subscriptions.pop(frame.headers.get("id", ""), None)
        if subscription is None:
            raise StompError("No subscription found", "UNSUBSCRIBE must refer to an existing subscription.\n")
        self._broker.leave(subscription)
        self._left.append(subscription)

    # -- settlements

    def _ack(self, frame: Frame) -> None:
        if self._wait_for_commit(frame):
            return
        if self._is_confirmed_ack(frame) and self._faults.strikes("before_commit"):
            raise DroppedError
        deliveries = self._taken(frame)
        self._broker.counters["acks"] += len(deliveries)
        self._settle(deliveries)
        if self._is_confirmed_ack(frame) and self._faults.strikes("before_receipt"):
            raise DroppedError

    def _nack(self, frame: Frame) -> None:
        if self._wait_for_commit(frame):
            return
        deliveries = self._taken(frame)
        self._broker.counters["nacks"] += len(deliveries)
        if frame.headers.get("requeue") != "false":
            self._broker.hand_back(deliveries)
            return
        for delivery in deliveries:
            self._broker.bury(delivery.message, "rejected")
        self._release(deliveries)

    def _taken(self, frame: Frame) -> list[Delivery]:
        """Find what an ACK or NACK is about: by the number in the id, of whatever session that was."""
        header = "id" if self._version == "1.2" else "message-id"
        text = frame.headers.get(header)
        if text is None:
            raise StompError("Missing header", f'"{frame.command}" must include the "{header}" header\n')
        match = _TAG.fullmatch(text)
        if match is None:
            raise StompError("Invalid header", f'"{frame.command}" must include a valid "{header}" header\n')
        subscription = self._subscriptions.get(match[1].removeprefix("T_").removeprefix("Q_"))
        if subscription is None:
            raise StompError("Subscription not found", f'Message with id "{text}" has no subscription')
        last = int(match[2])
        several = subscription.mode == "client"
        tags = [tag for tag in self._by_tag if tag == last or (several and tag < last)]
        if last not in tags:
            detail = f"PRECONDITION_FAILED - unknown delivery tag {last}"
            self._doomed = StompError("precondition_failed", detail, fatal=True)
            return []
        return [self._by_tag.pop(tag) for tag in sorted(tags)]

    # -- transactions

    def _wait_for_commit(self, frame: Frame) -> bool:
        transaction = self._transaction(frame)
        if transaction is None:
            return False
        assert isinstance(transaction, _Buffered)  # noqa: S101 - `_begin` makes no others
        transaction.frames.append(frame)
        return True

    def _transaction(self, frame: Frame) -> Transaction | None:
        name = frame.headers.get("transaction")
        if name is not None and name not in self._transactions:
            raise StompError("Bad transaction", f'Invalid transaction identifier: "{name}"\n')
        return super()._transaction(frame)

    def _begin(self, frame: Frame) -> None:
        name = frame.headers.get("transaction")
        if not name:
            raise StompError("Missing transaction", "\"BEGIN\" must include a 'transaction' header\n")
        self._transactions[name] = _Buffered()

    def _commit(self, frame: Frame) -> None:
        transaction = self._ending(frame, "committing")
        if self._faults.strikes("before_commit"):
            raise DroppedError
        del self._transactions[frame.headers["transaction"]]
        self._broker.counters["commits"] += 1
        assert isinstance(transaction, _Buffered)  # noqa: S101 - `_begin` makes no others
        confirmed = [each for each in transaction.frames if self._carry_out_late(each)]
        if self._faults.strikes("before_receipt"):
            raise DroppedError
        for each in (frame, *confirmed):
            self._receipt(each)
        if self._faults.strikes("after_receipt"):
            self._ended = True
            self._outlet.finish()

    def _carry_out_late(self, frame: Frame) -> bool:
        """Carry out a frame of a transaction, unless one before it was refused; whether it is a SEND, and done."""
        if self._doomed is not None:
            return False
        if frame.command == "SEND":
            self._publish(frame)
            return self._doomed is None
        settle = self._ack if frame.command == "ACK" else self._nack
        settle(Frame(frame.command, _without(frame.headers, "transaction", "receipt")))
        return False


def _without(headers: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}
