"""One client's session: what each STOMP command does to the broker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from retrykit.testing.stomp_server import asked
from retrykit.testing.stomp_server.broker import TEMPORARY, Broker, StompError
from retrykit.testing.stomp_server.faults import DroppedError, Faults
from retrykit.testing.stomp_server.frames import Frame
from retrykit.testing.stomp_server.outlet import Outlet
from retrykit.testing.stomp_server.queues import Delivery, Message, Queue, Subscription
from retrykit.testing.stomp_server.topics import is_topic, queue_name, topic_of

STALE_IDS = 10_000


@dataclass(slots=True, eq=False)
class Transaction:
    """What waits for COMMIT."""

    sends: list[Message] = field(default_factory=list)
    acks: list[Delivery] = field(default_factory=list)


class Session:
    """Carries out the frames of one connection, in order."""

    def __init__(
        self, broker: Broker, faults: Faults, outlet: Outlet, *, name: str, login: tuple[str, str] | None = None
    ) -> None:
        """Wait for CONNECT; `login` is the user and password to ask for, None to let everybody in."""
        self._broker = broker
        self._faults = faults
        self._outlet = outlet
        self._name = name
        self._login = login
        self._version: str | None = None
        self._ended = False
        self._client: str | None = None
        self._subscriptions: dict[str, Subscription] = {}
        self._browsers: set[str] = set()
        self._transactions: dict[str, Transaction] = {}
        self._pending: dict[str, Delivery] = {}
        self._stale: dict[str, None] = {}
        self._commands: dict[str, Callable[[Frame], None]] = {
            "SEND": self._send,
            "SUBSCRIBE": self._subscribe,
            "UNSUBSCRIBE": self._unsubscribe,
            "ACK": self._ack,
            "NACK": self._nack,
            "BEGIN": self._begin,
            "COMMIT": self._commit,
            "ABORT": self._abort,
            "DISCONNECT": self._disconnect,
        }

    def receive(self, frame: Frame) -> None:
        """Carry out one frame; whatever is wrong with it is answered with ERROR."""
        if self._ended:
            return
        try:
            self._carry_out(frame)
        except StompError as error:
            self._refuse(frame, error)
        except DroppedError:
            self._ended = True
            self._outlet.abort()

    def refuse_bytes(self, reason: str) -> None:
        """Answer bytes that are no frame: ERROR, then the end."""
        self._refuse(Frame("", {}), StompError(reason, fatal=True))

    def end(self) -> None:
        """Undo what is open and hand back what is in flight; the connection is gone."""
        self._ended = True
        for subscription in self._subscriptions.values():
            self._broker.detach(subscription)
        self._subscriptions.clear()
        for transaction in self._transactions.values():
            self._roll_back(transaction)
        self._transactions.clear()
        self._broker.forget(f"{TEMPORARY}{self._name}:")
        client, self._client = self._client, None
        self._broker.clients.discard(client or "")

    def _carry_out(self, frame: Frame) -> None:
        if frame.command in ("CONNECT", "STOMP"):
            self._connect(frame)
            return
        command = self._commands.get(frame.command)
        if command is None:
            raise StompError(f"Unknown STOMP action: {frame.command}", fatal=True)
        if self._version is None:
            raise StompError("Not connected.")
        command(frame)
        if not self._receipts_itself(frame):
            self._receipt(frame)

    def _receipts_itself(self, frame: Frame) -> bool:
        """Whether the command says when its receipt goes out."""
        return frame.command in ("COMMIT", "DISCONNECT")

    def _refuse(self, frame: Frame, error: StompError) -> None:
        self._broker.counters["errors"] += 1
        headers = {"content-type": "text/plain", "message": str(error).replace("\n", " ")}
        self._outlet.send(Frame("ERROR", headers | self._error_headers(frame), error.detail.encode()))
        if error.fatal:
            self._ended = True
            self._outlet.finish()

    def _error_headers(self, frame: Frame) -> dict[str, str]:
        """What else an ERROR says."""
        return {"receipt-id": frame.headers["receipt"]} if "receipt" in frame.headers else {}

    def _receipt(self, frame: Frame) -> None:
        if "receipt" in frame.headers:
            self._outlet.send_receipt(Frame("RECEIPT", {"receipt-id": frame.headers["receipt"]}))

    # -- the connection

    def _connect(self, frame: Frame) -> None:
        if self._version is not None:
            raise StompError("Already connected.")
        version = asked.version(frame.headers)
        if not asked.knows(frame.headers, self._login):
            raise self._refused_login(frame.headers.get("login", ""))
        can_send, wants = asked.heart_beat(frame.headers)
        self._claim(frame.headers.get("client-id"))
        self._version = version
        headers = {
            "server": self._broker.profile.server,
            "heart-beat": f"{wants},{can_send}",
            "session": self._name,
            "version": version,
        }
        self._outlet.send(Frame("CONNECTED", headers))
        self._outlet.agreed(version, wants / 1000, can_send / 1000)
        self._broker.counters["connections"] += 1

    def _claim(self, client: str | None) -> None:
        """Be this client, which nobody else may be meanwhile."""
        if client is None:
            return
        if client in self._broker.clients:
            raise StompError(f"Broker: embedded - Client: {client} already connected", fatal=True)
        self._broker.clients.add(client)
        self._client = client

    def _refused_login(self, user: str) -> StompError:
        return StompError("User name or password is invalid.", fatal=True)

    def _disconnect(self, frame: Frame) -> None:
        self.end()
        self._receipt(frame)
        self._outlet.finish()

    # -- messages

    def _send(self, frame: Frame) -> None:
        if not frame.headers.get("destination"):
            raise StompError("SEND received without a Destination specified!")
        transaction = self._transaction(frame)
        frame.headers["destination"] = self._named(frame.headers["destination"])
        message = self._broker.new_message(frame, self._name)
        self._broker.counters["sends"] += 1
        if transaction is None:
            self._broker.change([message], ())
        else:
            transaction.sends.append(message)

    def _subscribe(self, frame: Frame) -> None:
        headers = frame.headers
        id_ = asked.subscription_id(headers, self._version)
        if id_ in self._subscriptions:
            # ActiveMQ replaces the old one and keeps its messages from everybody until the connection ends.
            raise StompError(f"The subscription id is in use already: {id_}")
        queue = self._queue_of(headers)
        if headers.get("browser") == "true" and self._broker.profile.browses:
            self._show(id_, queue)
            return
        prefetch = asked.prefetch(headers, self._broker.profile)
        name = self._broker.name_delivery
        self._subscribed(Subscription(id_, queue, asked.mode(headers), prefetch, name, self._deliver))

    def _show(self, id_: str, queue: Queue) -> None:
        """Show all that lies in a queue, in flight or not, as at this moment, and take nothing."""
        self._browsers.add(id_)
        lying = [message for state, message in queue.all_messages() if state != "scheduled"]
        for message in sorted(lying, key=lambda message: message.number):
            self._outlet.send(Frame("MESSAGE", self._shown(id_, message) | {"ack": message.message_id}, message.body))
        end = {"subscription": id_, "destination": queue.name, "message-id": "0", "browser": "end"}
        self._outlet.send(Frame("MESSAGE", end))

    def _queue_of(self, headers: dict[str, str]) -> Queue:
        destination, durable = headers["destination"], headers.get("activemq.subscriptionName")
        if not is_topic(destination):
            if durable is not None:
                raise StompError("Invalid Subscription: cannot durably subscribe to a Queue destination!")
            return self._broker.queue(self._named(destination))
        whose = f"{headers.get('id')} of {self._name}" if durable is None else f"{durable} of {self._client}"
        queue = self._broker.own_queue(queue_name(destination, whose, durable=durable is not None))
        if queue.turns:
            raise StompError(f"Durable consumer is in use for client: {self._client} and subscriptionName: {durable}")
        return queue

    def _named(self, destination: str) -> str:
        """The broker's own name of a destination: each connection has its own temporary queues."""
        if not destination.startswith("/temp-queue/"):
            return destination
        return f"{TEMPORARY}{self._name}:{destination.removeprefix('/temp-queue/')}"

    def _called(self, destination: str) -> str:
        """How the client itself calls a destination."""
        if is_topic(destination):
            return topic_of(destination)
        own = f"{TEMPORARY}{self._name}:"
        return f"/temp-queue/{destination.removeprefix(own)}" if destination.startswith(own) else destination

    def _subscribed(self, subscription: Subscription) -> None:
        self._subscriptions[subscription.id] = subscription
        self._broker.attach(subscription)

    def _unsubscribe(self, frame: Frame) -> None:
        headers = frame.headers
        id_ = headers.get("id", headers.get("destination") if self._version == "1.0" else None)
        if id_ is None:
            raise StompError("UNSUBSCRIBE received without a subscription id!")
        if id_ in self._browsers:
            self._browsers.discard(id_)
            return
        subscription = self._subscriptions.pop(id_, None)
        if subscription is None:
            raise StompError("No subscription matched.")
        for delivery in self._broker.detach(subscription):
            self._forget(delivery)

    def _forget(self, delivery: Delivery) -> None:
        # The broker takes the first late ACK of such an id without a word, and without effect.
        if self._pending.pop(delivery.ack_id, None) is not None:
            self._stale[delivery.ack_id] = None
            if len(self._stale) > STALE_IDS:
                del self._stale[next(iter(self._stale))]

    def _deliver(self, delivery: Delivery) -> None:
        message = delivery.message
        headers = self._shown(delivery.subscription.id, message) | {"message-id": delivery.message_id}
        if delivery.subscription.mode != "auto":
            self._pending[delivery.ack_id] = delivery
            if self._version == "1.2":
                headers["ack"] = delivery.ack_id
        self._outlet.send(Frame("MESSAGE", headers, message.body))

    def _shown(self, subscription_id: str, message: Message) -> dict[str, str]:
        destination = self._called(message.destination)
        ours = {"subscription": subscription_id, "destination": destination, "message-id": message.message_id}
        return ours | message.headers | self._flag(message)

    def _flag(self, message: Message) -> dict[str, str]:
        return {"redelivered": "true"} if message.redelivered else {}

    # -- settlements

    def _ack(self, frame: Frame) -> None:
        transaction = self._transaction(frame)
        delivery = self._delivery(frame)
        if delivery is None:
            return
        deliveries = _up_to(delivery) if delivery.subscription.mode == "client" else [delivery]
        self._broker.counters["acks"] += len(deliveries)
        for each in deliveries:
            del self._pending[each.ack_id]
        if transaction is None:
            self._settle(deliveries)
            return
        transaction.acks += deliveries
        for each in deliveries:
            each.subscription.mark(each, in_transaction=True)
        self._broker.dispatch(delivery.subscription.queue)

    def _settle(self, deliveries: list[Delivery]) -> None:
        self._broker.change((), [delivery.message for delivery in deliveries])
        self._release(deliveries)

    def _release(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            delivery.subscription.remove(delivery)
        for queue in {delivery.subscription.queue for delivery in deliveries}:
            self._broker.dispatch(queue)

    def _nack(self, frame: Frame) -> None:
        transaction = self._transaction(frame)
        delivery = self._delivery(frame)
        if delivery is None:
            return
        if transaction is not None:
            raise StompError(f"Poison ack cannot be transacted: {delivery.message_id}")
        self._broker.counters["nacks"] += 1
        del self._pending[delivery.ack_id]
        after = self._broker.profile.redelivery
        if after is None:
            self._broker.bury(delivery.message)
        else:
            self._broker.redeliver(delivery.message, after)
        self._release([delivery])

    def _delivery(self, frame: Frame) -> Delivery | None:
        """Find what an ACK or NACK is about; None where it comes too late to mean anything."""
        if self._version == "1.2":
            return self._delivery_by_ack_id(frame)
        message_id = frame.headers.get("message-id")
        subscription_id = frame.headers.get("subscription")
        if message_id is None:
            raise StompError(f"{frame.command} received without a message-id to acknowledge!")
        if subscription_id is None and self._version == "1.1":
            raise StompError(f"{frame.command} received without a subscription id for acknowledge!")
        for subscription in self._subscriptions.values():
            found = subscription.in_flight.get(message_id)
            if found is not None and not found.in_transaction and subscription_id in (None, subscription.id):
                return found
        raise StompError(f"Unexpected {frame.command} received for message-id [{message_id}]")

    def _delivery_by_ack_id(self, frame: Frame) -> Delivery | None:
        ack_id = frame.headers.get("id")
        if ack_id is None:
            raise StompError(f"{frame.command} received without a ack id for acknowledge!")
        if ack_id in self._stale:
            del self._stale[ack_id]
            return None
        delivery = self._pending.get(ack_id)
        if delivery is None:
            raise StompError(f"Unexpected {frame.command} received for message-id [null]")
        return delivery

    # -- transactions

    def _transaction(self, frame: Frame) -> Transaction | None:
        name = frame.headers.get("transaction")
        if name is None:
            return None
        if name not in self._transactions:
            raise StompError(f"Invalid transaction id: {name}")
        return self._transactions[name]

    def _begin(self, frame: Frame) -> None:
        name = frame.headers.get("transaction")
        if not name:
            raise StompError("Must specify the transaction you are beginning")
        if name in self._transactions:
            raise StompError(f"The transaction was already started: {name}")
        self._transactions[name] = Transaction()

    def _commit(self, frame: Frame) -> None:
        transaction = self._ending(frame, "committing")
        if self._faults.strikes("before_commit"):
            raise DroppedError
        del self._transactions[frame.headers["transaction"]]
        self._broker.change(transaction.sends, [delivery.message for delivery in transaction.acks])
        self._release(transaction.acks)
        self._broker.counters["commits"] += 1
        if self._faults.strikes("before_receipt"):
            raise DroppedError
        self._receipt(frame)
        if self._faults.strikes("after_receipt"):
            self._ended = True
            self._outlet.finish()

    def _abort(self, frame: Frame) -> None:
        transaction = self._ending(frame, "aborting")
        del self._transactions[frame.headers["transaction"]]
        self._roll_back(transaction)
        self._broker.counters["aborts"] += 1

    def _ending(self, frame: Frame, what: str) -> Transaction:
        transaction = self._transaction(frame)
        if transaction is None:
            raise StompError(f"Must specify the transaction you are {what}")
        return transaction

    def _roll_back(self, transaction: Transaction) -> None:
        """Undo SENDs and ACKs. Nothing is redelivered: a message stays in flight where its subscription still is."""
        homeless = []
        for delivery in transaction.acks:
            delivery.subscription.mark(delivery, in_transaction=False)
            if self._subscriptions.get(delivery.subscription.id) is delivery.subscription:
                self._pending[delivery.ack_id] = delivery
            else:
                homeless.append(delivery)
        self._broker.hand_back(homeless)


def _up_to(last: Delivery) -> list[Delivery]:
    """List the deliveries that a cumulative ACK settles: this one and all before it that are not settled yet."""
    settled = []
    for delivery in last.subscription.in_flight.values():
        if not delivery.in_transaction:
            settled.append(delivery)
        if delivery is last:
            break
    return settled
