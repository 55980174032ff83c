"""One STOMP connection, on stomp.py 9: `Wire`.

stomp.py runs a thread that reads frames and calls listeners; a listener that raises closes the connection without a
word, one that waits holds up heart-beats. So here the callbacks put what came into queues and set flags, nothing else,
and everything is decided by the worker. A connection is used once: no callback reconnects, and frames of another
generation have nowhere to arrive.

stomp.py's own sockets are not used: its TLS connections do not notice that the other side has closed, and turn in
circles until a heart-beat is missed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import ssl
import threading
from collections.abc import Iterable, Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import attrs

from retrykit.messaging.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConnectionLostError,
    LoginRefusedError,
)
from retrykit.messaging.stomp.address import Address
from retrykit.messaging.stomp.frames import HEART_BEAT, FrameCutter, decoded, encoded
from retrykit.messaging.stomp.refusals import sentence, unanswered, whole_text
from retrykit.messaging.stomp.session import GOODBYE_SECONDS, THE_COMMIT
from retrykit.messaging.stomp.sockets import TlsSocket, acknowledge_at_once, explained, open_socket

if TYPE_CHECKING:
    from retrykit.messaging.stomp.broker import StompBroker

try:
    from stomp.connect import BaseConnection
    from stomp.exception import NotConnectedException, StompException
    from stomp.listener import ConnectionListener
    from stomp.protocol import Protocol12
    from stomp.transport import Transport
    from stomp.utils import HEARTBEAT_FRAME, Frame, convert_frame, default_create_thread, pack
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "stomp":
        raise
    raise ImportError('STOMP brokers need stomp.py: pip install "retrykit[stomp]"', name="stomp") from missing

_log = logging.getLogger("retrykit.messaging")
_CHUNK: Final = 65_536
LAST_WORDS_SECONDS: Final = 1.0


@attrs.frozen
class Call:
    """Whom to connect to, as whom."""

    address: Address
    login: str | None = None
    passcode: str | None = attrs.field(default=None, repr=False)
    virtual_host: str | None = None
    client_id: str | None = None
    context: ssl.SSLContext | None = None
    """How to encrypt; None: not at all."""


class _Transport(Transport):  # type: ignore[misc] # stomp.py has no types
    """stomp.py's transport over a socket of our own, read frame by frame."""

    def __init__(self, broker: StompBroker, call: Call) -> None:
        super().__init__([(call.address.host, call.address.port)], auto_decode=False)
        self._broker = broker
        self._call = call
        self.socket: socket.socket | TlsSocket | None = None
        self._frames = FrameCutter()
        self._sending = threading.Lock()
        self.failure: OSError | None = None
        self.silent = False
        self._ended = False
        self.override_threading(lambda _stomp_pys_own_loop: default_create_thread(self._read))

    def _read(self) -> None:
        """Tell of each frame, until the connection ends."""
        try:
            while self.running and (piece := self.receive()):
                self.process_frame(HEARTBEAT_FRAME if piece == HEART_BEAT else Frame(*decoded(piece)), piece)
        finally:
            self._ended = True
            self.disconnect_socket()

    def attempt_connection(self) -> None:
        """Once, to one address; whoever asked decides what is tried next."""
        address, broker = self._call.address, self._broker
        self.socket = open_socket(
            address,
            connect_timeout=broker.connect_timeout,
            send_timeout=broker.send_timeout,
            context=self._call.context,
        )
        self.current_host_and_port = (address.host, address.port)

    def receive(self) -> bytes:
        """One frame or heart-beat, or what is as good as one, a part of a frame; b"" at the end."""
        if (piece := self._frames.next()) is not None:
            return piece
        live = self.socket
        if live is None:
            return b""
        try:
            data: bytes = live.recv(_CHUNK)
        except OSError as error:
            self.failure = error
            return b""
        if not data:
            return b""
        acknowledge_at_once(live)
        self._frames.feed(data)
        # Within a frame no broker can beat: one that takes its time is a sign of life all the same.
        return self._frames.next() or HEART_BEAT

    def send(self, encoded_frame: bytes) -> None:
        """One frame after the other. Whoever sends tells what goes wrong; stomp.py's own would log each as an error."""
        live = self.socket
        if live is None:
            raise NotConnectedException
        with self._sending:
            live.sendall(encoded_frame)

    def is_connected(self) -> bool:
        """Logged in, and not closed; the socket may go at any moment."""
        return self.socket is not None and bool(self.connected)

    def disconnect_socket(self) -> None:
        """Wake the reader, and close; it is no matter who was first."""
        # While it is being read stomp.py closes a connection only if no heart-beat came, and says why afterwards.
        self.silent = self.silent or not self._ended
        self.running = False
        live, self.socket = self.socket, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.shutdown(socket.SHUT_RDWR)
            live.close()
        if not self.notified_on_disconnect:
            self.notify("disconnected")


class _Connection(BaseConnection, Protocol12):  # type: ignore[misc] # stomp.py has no types
    """STOMP 1.2 over that transport."""

    def __init__(self, broker: StompBroker, call: Call) -> None:
        beat = int(broker.heart_beat * 1000)
        transport = _Transport(broker, call)
        BaseConnection.__init__(self, transport)
        Protocol12.__init__(
            self,
            transport,
            heartbeats=(beat, beat),
            auto_content_length=False,
            # A broker that beats only if the last interval was silent is up to two intervals late, in good health.
            heart_beat_receive_scale=2.5,
        )

    def login(self, call: Call) -> None:
        """Send CONNECT past stomp.py's own `connect`, which logs the password when debugging."""
        headers = {
            "accept-version": self.version,
            "host": call.virtual_host,
            "heart-beat": ",".join(map(str, self.heartbeats)),
            "login": call.login,
            "passcode": call.passcode,
            "client-id": call.client_id,
        }
        self.transport.send(pack(convert_frame(Frame("CONNECT", headers))))


class Wire(ConnectionListener):  # type: ignore[misc] # stomp.py has no types
    """One connection: sends frames, keeps what comes until the worker asks.

    Its `on_…` methods run on stomp.py's thread.
    """

    def __init__(self, broker: StompBroker, call: Call) -> None:
        self.broker = broker
        self.name = call.address.name + broker.destination
        self.not_refusals: tuple[str, ...] = ()
        self._call = call
        self.lost: str | None = None
        self.interrupted = False
        self.server: str | None = None
        self._beats = False
        self.frames: SimpleQueue[Any] = SimpleQueue()
        self._changed = threading.Condition()
        # What each receipt that is due stands for, in the order of sending; "" for what is not of a transaction.
        self._awaited: dict[str, str] = {}
        self._refused = ""
        self.answer = ""
        self._outgoing: list[bytes] = []
        self._numbers = itertools.count(1)
        self._leaving = False
        self._closed = False
        self._connection = _Connection(broker, call)
        self._connection.set_listener("retrykit", self)

    # -- called by stomp.py's threads

    def on_connected(self, frame: Any) -> None:
        """Logged in: the server's name for itself is known."""
        with self._changed:
            self.server = frame.headers.get("server", "")
            self._beats = frame.headers.get("heart-beat", "0").partition(",")[0].strip() != "0"
            self._changed.notify_all()

    def on_message(self, frame: Any) -> None:
        """A delivery: for the worker to look at."""
        self.frames.put(frame)

    def on_receipt(self, frame: Any) -> None:
        """One confirmation less to wait for.

        After an ERROR it confirms nothing: RabbitMQ refuses a SUBSCRIBE, and then sends its receipt.
        """
        with self._changed:
            if self.lost is None:
                self._awaited.pop(frame.headers.get("receipt-id", ""), None)
            self._changed.notify_all()

    def on_error(self, frame: Any) -> None:
        """The broker refused something: after that nothing on this connection can be relied on."""
        body, message = frame.body or b"", frame.headers.get("message", "")
        with self._changed:
            if not message.startswith(self.not_refusals):
                self._refused = self._refused or self._meant(frame.headers.get("receipt-id"))
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
        with self._changed:
            news = self.lost is None and self.server is not None and not self._leaving
        self.lose(reason)
        if news:
            self.broker.rota.lost(self._call.address)

    def lose(self, reason: str) -> None:
        """Note that the connection is of no more use, and wake everybody.

        Closes nothing: this may be stomp.py's own thread.
        """
        with self._changed:
            self.lost = self.lost or reason
            self._changed.notify_all()
        self.frames.put(None)

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
        with self._changed:
            self._changed.wait_for(lambda: self.server is not None or self.lost, self.broker.connect_timeout)
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
        self._outgoing.append(encoded(command, headers, body))
        if more:
            return
        data = b"".join(self._outgoing)
        self._outgoing.clear()
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
        with self._changed:
            self._changed.wait_for(lambda: self.lost, LAST_WORDS_SECONDS)
            return self.lost

    def put_confirmed(self, command: str, headers: Mapping[str, Any], body: bytes = b"", what: str = "") -> str:
        """Send a frame with a receipt, which `settle` waits for; `what` says what it is of the open transaction."""
        receipt = f"r-{next(self._numbers)}"
        with self._changed:
            self._awaited[receipt] = what
        self.put(command, {**headers, "receipt": receipt}, body)
        return receipt

    def forget(self, receipts: Iterable[str]) -> None:
        """Wait no more for these: what they would confirm was undone."""
        with self._changed:
            for receipt in receipts:
                self._awaited.pop(receipt, None)

    def settle(self, timeout: float, receipt: str | None = None) -> None:
        """Wait for every receipt that is due, or for one.

        `ConnectionLostError` if the connection, or the patience, ends before; `BrokerRefusedError` if it ends because
        the broker refused a part of the open transaction.
        """

        def confirmed() -> bool:
            return receipt not in self._awaited if receipt is not None else not self._awaited

        with self._changed:
            self._changed.wait_for(lambda: confirmed() or self.lost, timeout)
            done = confirmed()
        if not done:
            self._server_lost(f"no receipt came in {timeout:g} s")
            raise self.failure()

    def failure(self) -> BrokerError:
        """Why the open transaction came to nothing."""
        with self._changed:
            what, self._refused = self._refused, ""
        # Said once: what is tried on this connection afterwards was not refused, it never arrived.
        if not what:
            return self.error()
        return BrokerRefusedError(broker=self.name, what=what, reason=self.lost, answer=self.answer)

    def pause(self, length: float) -> bool:
        """Wait; False when interrupted or lost."""
        with self._changed:
            # The longest wait that there is: longer ones are an error.
            limit = min(length, threading.TIMEOUT_MAX)
            return not self._changed.wait_for(lambda: self.interrupted or self.lost, limit)

    def interrupt(self) -> None:
        """End all waiting for deliveries and in pauses."""
        with self._changed:
            self.interrupted = True
            self._changed.notify_all()
        self.frames.put(None)

    def hang_up(self) -> None:
        """Close the socket and see stomp.py's thread off. Never called from it."""
        self.lose("closed")
        with self._changed:
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
