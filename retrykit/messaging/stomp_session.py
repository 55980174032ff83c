"""What a worker does on a STOMP connection: receive, send, commit, give back. The connection itself is `Wire`'s."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping
from queue import Empty
from typing import TYPE_CHECKING, Any, Final

import attrs

from retrykit.check import wrong_type
from retrykit.errors import CommitInDoubtError
from retrykit.message import Message
from retrykit.messaging.broker import Capabilities
from retrykit.messaging.errors import BrokerError, BrokerRefusedError, BrokerUnavailableError, NoStableIdError
from retrykit.messaging.profiles import Profile, profile_for

if TYPE_CHECKING:
    from retrykit.messaging.stomp import StompBroker, Wire

GOODBYE_SECONDS: Final = 2.0
THE_COMMIT: Final = "the commit"
_TEXTUAL: Final = ("text/", "application/json", "application/xml")


@attrs.frozen(eq=False)
class _Handle:
    """What settles a delivery: only in the session and the subscription that it came from."""

    wire: Wire
    subscription: str
    ack: str


class StompSession:
    """One connection to a STOMP broker."""

    def __init__(self, broker: StompBroker, wire: Wire) -> None:
        self._broker = broker
        self._wire = wire
        self._profile = broker.profile or profile_for("")
        self._subscription: str | None = None
        self._subscriptions = itertools.count(1)
        self._transaction: str | None = None
        self._transactions = itertools.count(1)
        self._stale = 0

    def open(self, *, consume: bool) -> None:
        """Connect, find out what kind of broker it is, subscribe."""
        server = self._wire.open()
        self._profile = self._broker.profile or profile_for(server)
        if consume:
            self._subscribe()
            try:
                self._wire.settle(self._broker.receipt_timeout)
            except BrokerError as error:
                raise BrokerUnavailableError(broker=self._broker.name, reason=error.__dict__["reason"]) from error

    @property
    def profile(self) -> Profile:
        """The kind of broker at the other end."""
        return self._profile

    @property
    def capabilities(self) -> Capabilities:
        """What that kind can do."""
        own = self._profile.capabilities
        return attrs.evolve(own, stable_ids=True) if self._broker.id_header else own

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
            try:
                frame = self._wire.frames.get(timeout=None if limit is None else max(0.0, limit - time.monotonic()))
            except Empty:
                return None
            if frame is None:
                continue
            if frame.headers.get("subscription") == self._subscription:
                return self._message(frame)
            self._stale += 1
        return None

    def _message(self, frame: Any) -> Message:
        headers = frame.headers
        destination = headers.get("destination", self._broker.destination)
        stable = headers.get(self._broker.id_header or self._profile.id_header)
        if not stable:
            remedy = (
                self._profile.remedy
                if self._broker.id_header is None
                else f"it has no header {self._broker.id_header!r}"
            )
            raise NoStableIdError(destination=destination, broker=self._broker.name, remedy=remedy)
        return Message(
            destination=destination,
            body=frame.body,
            headers=headers,
            id=stable,
            key=(destination, stable),
            redelivered=headers.get("redelivered") == "true",
            handle=_Handle(self._wire, headers["subscription"], headers.get("ack", "")),
        )

    # -- settling

    def send(self, destination: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send in the transaction; the receipt is waited for by `flush`.

        Persistent unless the headers say otherwise.
        """
        marks = self._profile.text_headers if _is_text(headers) else {}
        ours = {"destination": destination, "transaction": self._begun()}
        if not marks or b"\0" in body:
            ours["content-length"] = str(len(body))
        what = f"a message to {destination!r}"
        self._wire.put_confirmed("SEND", {"persistent": "true", **headers, **marks, **ours}, body, what)

    def flush(self) -> None:
        """Wait for the receipts of the sends."""
        if self._wire.lost is not None:
            raise self._wire.failure()
        self._wire.settle(self._broker.receipt_timeout)

    def commit(self, message: Message | None = None) -> None:
        """ACK last, then COMMIT, and wait for its receipt."""
        try:
            transaction = self._begun()
            if message is not None:
                self._wire.put("ACK", {"id": self._own(message).ack, "transaction": transaction})
            self._wire.put_confirmed("COMMIT", {"transaction": transaction}, what=THE_COMMIT)
            self._wire.settle(self._broker.receipt_timeout)
        except BrokerError as error:
            # When a send is refused while the COMMIT is under way, the rest may have been committed.
            if isinstance(error, BrokerRefusedError) and error.__dict__["what"] == THE_COMMIT:
                raise
            raise CommitInDoubtError from error
        self._transaction = None

    def rollback(self, message: Message | None = None, delay: float = 0.0) -> None:
        """ABORT what is open; give the message back as the profile says."""
        if self._transaction is not None:
            self._wire.put("ABORT", {"transaction": self._transaction})
            self._transaction = None
        if message is None:
            return
        if self._profile.give_back == "resubscribe":
            self._wire.put("UNSUBSCRIBE", {"id": self._subscription})
            self._subscribe()
        else:
            self._wire.lose("given up, to give a message back")
            self._wire.hang_up()

    def _begun(self) -> str:
        """The open transaction; begun when it is first needed."""
        if self._transaction is None:
            self._transaction = f"t-{next(self._transactions)}"
            self._wire.put("BEGIN", {"transaction": self._transaction})
        return self._transaction

    def _own(self, message: Message) -> _Handle:
        handle = message.handle
        if not isinstance(handle, _Handle):
            raise wrong_type("message", "a delivery of a STOMP session", message)
        if handle.wire is not self._wire or handle.subscription != self._subscription:
            # Some brokers take an id of another session for a message of this one, and acknowledge that.
            self._wire.lose("a delivery of an earlier subscription was to be acknowledged")
            raise self._wire.error()
        return handle

    def _subscribe(self) -> None:
        self._subscription = f"s-{next(self._subscriptions)}"
        prefetch = self._profile.prefetch_header
        headers = {"id": self._subscription, "destination": self._broker.destination, "ack": "client-individual"}
        self._wire.put_confirmed("SUBSCRIBE", headers | ({prefetch: str(self._broker.prefetch)} if prefetch else {}))

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
            self._wire.put_confirmed("DISCONNECT", {})
            with contextlib.suppress(BrokerError):
                self._wire.settle(GOODBYE_SECONDS)
        self._wire.hang_up()


def _is_text(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").lower().startswith(_TEXTUAL)
