"""One STOMP connection: `Wire`.

What comes is put into queues, or sets flags; everything is decided by the worker. A connection is used once: nothing
reconnects it, and frames of another generation have nowhere to arrive.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from retrykit.messaging.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConnectionLostError,
    LoginRefusedError,
)
from retrykit.messaging.stomp.address import located
from retrykit.messaging.stomp.frames import Frame, encoded
from retrykit.messaging.stomp.refusals import sentence, unanswered, whole_text
from retrykit.messaging.stomp.sockets import explained
from retrykit.messaging.stomp.transport import Call, Connection, StompException

if TYPE_CHECKING:
    from retrykit.messaging.stomp.settings import StompSettings

_log = logging.getLogger("retrykit.messaging")
LAST_WORDS_SECONDS: Final = 1.0
GOODBYE_SECONDS: Final = 2.0
THE_COMMIT: Final = "the commit"
"""What the receipt of a COMMIT stands for."""


class Wire:
    """One connection: sends frames, keeps what comes until the worker asks.

    Its `on_…` methods are called by whatever thread reads.
    """

    def __init__(self, broker: StompSettings, call: Call) -> None:
        self.broker = broker
        self.name = located(call.address.name, broker.destination)
        self.not_refusals: tuple[str, ...] = ()
        self._call = call
        self.lost: str | None = None
        self.interrupted = False
        self.server: str | None = None
        self._beats = False
        self._deliveries: deque[Frame] = deque()
        # What each receipt that is due stands for, in the order of sending; "" for what is not of a transaction.
        self._awaited: dict[str, str] = {}
        self._refused = ""
        self._told_refusal = False
        self.answer = ""
        self._outgoing: list[bytes] = []
        self._numbers = itertools.count(1)
        self._leaving = False
        self._closed = False
        self._connection = Connection(broker, call, self)
        self._reading = self._connection.transport.reading
        # Of what is below here and of whose turn it is to read.
        self._lock = self._reading.lock

    # -- called by whoever reads

    def on_connected(self, headers: dict[str, str]) -> None:
        """Logged in: the server's name for itself is known."""
        with self._lock:
            self.server = headers.get("server", "")
            self._beats = headers.get("heart-beat", "0").partition(",")[0].strip() != "0"
            self._reading.news.notify_all()

    def on_message(self, frame: Frame) -> None:
        """A delivery: for the worker to look at."""
        self._deliveries.append(frame)

    def on_receipt(self, receipt: str) -> None:
        """One confirmation less to wait for.

        After an ERROR it confirms nothing: RabbitMQ refuses a SUBSCRIBE, and then sends its receipt.
        """
        with self._lock:
            if self.lost is None:
                self._awaited.pop(receipt, None)

    def on_error(self, headers: dict[str, str], body: bytes) -> None:
        """The broker refused something: after that nothing on this connection can be relied on."""
        message = headers.get("message", "")
        with self._lock:
            # A broker may send a second one, of the same frame.
            if not self._told_refusal and not message.startswith(self.not_refusals):
                self._refused = self._refused or self._meant(headers.get("receipt-id"))
            self.answer = self.answer or whole_text(message, body)
        self.lose(f"the broker sent ERROR: {sentence(message, body)}")

    def _meant(self, receipt: str | None) -> str:
        """What an ERROR refuses; "" when that is not sure.

        Brokers that cannot read a frame (it has too long a header, say) cannot name its receipt, and RabbitMQ never
        does: then it is the first one that is not confirmed, unless a COMMIT, of which nothing is known, is under way.
        """
        if receipt is not None:
            return self._awaited.get(receipt, "")
        return "" if THE_COMMIT in self._awaited.values() else next(iter(self._awaited.values()), "")

    def on_disconnected(self) -> None:
        """The socket is closed, by whomever."""
        transport = self._connection.transport
        why = f": {explained(transport.failure)}" if transport.failure is not None else ""
        self._server_lost("no heart-beat came in time" if transport.silent else f"the connection was closed{why}")

    def _server_lost(self, reason: str) -> None:
        """The server is gone, or might as well be: the next connection tries another one first."""
        with self._lock:
            news = self.lost is None and self.server is not None and not self._leaving
        self.lose(reason)
        if news:
            self.broker.rota.lost(self._call.address)

    def lose(self, reason: str) -> None:
        """Note that the connection is of no more use, and wake everybody.

        Closes nothing: this may be the thread that reads.
        """
        with self._lock:
            self.lost = self.lost or reason
            self._reading.news.notify_all()

    # -- called by the session

    def open(self) -> str:
        """Connect and log in; gives the server's name for itself."""
        try:
            self._connection.transport.start()
        except OSError as error:
            raise self._unavailable(explained(error)) from error
        try:
            self._connection.login(self._call)
        except (OSError, StompException) as error:
            raise self._unavailable(self._last_words() or explained(error)) from error
        self._reading.wait_for(lambda: self.server is not None or self.lost, self.broker.connect_timeout)
        if self.lost or self.server is None:
            late = f"it did not answer in {self.broker.connect_timeout:g} s"
            raise self._unavailable(unanswered(self.lost or late, encrypted=self._call.context is not None))
        if not self._beats:
            _log.warning(
                "%s: the server sends no heart-beats: should it be gone, that is noticed minutes later", self.name
            )
        return self.server

    def put(self, command: str, headers: Mapping[str, Any], body: bytes = b"", *, more: bool = False) -> None:
        """Send a frame; a failure shows as a lost connection. `more`: it goes out together with the next one."""
        if self.lost is not None:
            return
        self._leaving = command == "DISCONNECT"
        _log.debug("%s: sending %s %s", self.name, command, headers)
        frame = encoded(command, headers, body)
        with self._lock:
            # Whoever closes the session may be another thread.
            self._outgoing.append(frame)
            if more:
                return
            outgoing, self._outgoing = self._outgoing, []
        data = b"".join(outgoing)
        try:
            # Not by stomp.py's own `send_frame`: each call of it is a system call, and takes as long as the handler's
            # whole way through the template.
            self._connection.transport.send(data)
        except (OSError, StompException) as error:
            # Half a frame may be out: nothing that follows would be understood. But a broker that refused an earlier
            # frame has hung up after its ERROR, which is still to be read.
            self._last_words()
            self._server_lost(f"{command} could not be sent: {error!r}")

    def _last_words(self) -> str | None:
        """Why the connection is lost, as far as the other side says it in a moment."""
        self._reading.wait_for(lambda: self.lost, LAST_WORDS_SECONDS)
        return self.lost

    def put_confirmed(self, command: str, headers: Mapping[str, Any], body: bytes = b"", what: str = "") -> str:
        """Send a frame with a receipt, which `settle` waits for; `what` says what it is of the open transaction."""
        receipt = f"r-{next(self._numbers)}"
        with self._lock:
            self._awaited[receipt] = what
        self.put(command, {**headers, "receipt": receipt}, body)
        return receipt

    def forget(self, receipts: Iterable[str]) -> None:
        """Wait no more for these: what they would confirm was undone."""
        with self._lock:
            for receipt in receipts:
                self._awaited.pop(receipt, None)

    @property
    def has_delivery(self) -> bool:
        """Whether one has been read, and not taken."""
        return bool(self._deliveries)

    def delivery(self, timeout: float | None) -> Frame | None:
        """The next delivery; None if none came in time, or none will."""
        if self._deliveries:
            # What is handled on a connection that has ended is undone.
            self.look()
        else:
            self._reading.wait_for(lambda: self._deliveries or self.interrupted or self.lost, timeout)
        return self._deliveries.popleft() if self._deliveries and self.lost is None else None

    def look(self) -> None:
        """Hear what has come already, be it the end of the connection."""
        if self._connection.transport.has_come():
            self._reading.look()

    def settle(self, timeout: float, receipt: str | None = None) -> None:
        """Wait for every receipt that is due, or for one.

        `ConnectionLostError` if the connection, or the patience, ends before; `BrokerRefusedError` if it ends because
        the broker refused a part of the open transaction.
        """

        def confirmed() -> bool:
            return receipt not in self._awaited if receipt is not None else not self._awaited

        if not confirmed():
            self._reading.wait_for(lambda: confirmed() or self.lost, timeout)
        if not confirmed():
            self._server_lost(f"no receipt came in {timeout:g} s")
            raise self.failure()

    def failure(self) -> BrokerError:
        """Why the open transaction came to nothing."""
        with self._lock:
            what, self._refused = self._refused, ""
            self._told_refusal = self._told_refusal or bool(what)
        # Said once: what is tried on this connection afterwards was not refused, it never arrived.
        if not what:
            return self.error()
        return BrokerRefusedError(broker=self.name, what=what, reason=self.lost, answer=self.answer)

    def pause(self, length: float) -> bool:
        """Wait; False when interrupted or lost."""
        # The longest wait that there is: longer ones are an error.
        self._reading.wait_for(lambda: self.interrupted or self.lost, min(length, threading.TIMEOUT_MAX))
        return not (self.interrupted or self.lost)

    def interrupt(self) -> None:
        """End all waiting for deliveries and in pauses, within `reading.OWN_SECONDS`."""
        with self._lock:
            self.interrupted = True
            self._reading.news.notify_all()

    def hang_up(self) -> None:
        """Close the socket and see the thread that stands by off. Never called from it."""
        self.lose("closed")
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        transport = self._connection.transport
        transport.disconnect_socket()
        if transport.io_thread is not None:
            transport.io_thread.join(GOODBYE_SECONDS)

    def error(self) -> ConnectionLostError:
        """Why the connection is of no use."""
        return ConnectionLostError(broker=self.name, reason=self.lost, answer=self.answer)

    def _unavailable(self, reason: str) -> BrokerUnavailableError:
        kind = LoginRefusedError if self.answer else BrokerUnavailableError
        return kind(broker=self.name, reason=reason, answer=self.answer)
