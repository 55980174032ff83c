"""What stomp.py 9 does of a STOMP connection: CONNECTED, heart-beats, ERROR, and the threads for them.

stomp.py's own thread reads frames and calls listeners for each, which takes longer than all else that is done for a
message. Here MESSAGE and RECEIPT go straight to whom they are for, in whatever thread reads (`reading`); all that is
rare goes through stomp.py. A listener that raises would close its connection without a word, and one that waits would
hold up heart-beats: ours put what came into queues and set flags, nothing else.

stomp.py's own sockets are not used: its TLS connections do not notice that the other side has closed, and turn in
circles until a heart-beat is missed.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from retrykit.messaging.stomp.address import Address
from retrykit.messaging.stomp.frames import HEART_BEAT, Frame, FrameReader
from retrykit.messaging.stomp.reading import Reading
from retrykit.messaging.stomp.sockets import PlainSocket, TlsSocket, open_socket

if TYPE_CHECKING:
    from retrykit.messaging.stomp.settings import StompSettings

try:
    from stomp.connect import BaseConnection
    from stomp.exception import NotConnectedException, StompException
    from stomp.listener import ConnectionListener
    from stomp.protocol import Protocol12
    from stomp.transport import Transport
    from stomp.utils import Frame as StompFrame
    from stomp.utils import convert_frame, default_create_thread, pack
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "stomp":
        raise
    raise ImportError('STOMP brokers need stomp.py: pip install "retrykit[stomp]"', name="stomp") from missing

_log = logging.getLogger("retrykit.messaging")

__all__ = ["Call", "Connection", "Hears", "StompException"]

_CHUNK: Final = 65_536
# So long a connection may go unread while a message is handled; or for a quarter of a heart-beat.
_UNREAD_SECONDS: Final = 0.25


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


class Hears(Protocol):
    """Who is told what comes; by any thread, which may not be kept waiting."""

    def on_message(self, frame: Frame) -> None:
        """A delivery."""

    def on_receipt(self, receipt: str) -> None:
        """A confirmation."""

    def on_connected(self, headers: dict[str, str]) -> None:
        """Logged in."""

    def on_error(self, headers: dict[str, str], body: bytes) -> None:
        """The broker refused something."""

    def on_disconnected(self) -> None:
        """The socket is closed, by whomever."""


class _Rare(ConnectionListener):  # type: ignore[misc] # stomp.py has no types
    """What goes through stomp.py."""

    def __init__(self, whom: Hears) -> None:
        self._whom = whom

    def on_connected(self, frame: Any) -> None:
        """Logged in."""
        self._whom.on_connected(frame.headers)

    def on_error(self, frame: Any) -> None:
        """Refused."""
        self._whom.on_error(frame.headers, frame.body if isinstance(frame.body, bytes) else b"")


class _Transport(Transport):  # type: ignore[misc] # stomp.py has no types
    """stomp.py's transport over a socket of our own, read frame by frame."""

    def __init__(self, broker: StompSettings, call: Call, whom: Hears, beat: Callable[[], None]) -> None:
        super().__init__([(call.address.host, call.address.port)], auto_decode=False)
        self._broker = broker
        self._call = call
        self._whom = whom
        self._beat = beat
        self.socket: PlainSocket | TlsSocket | None = None
        self._frames = FrameReader()
        self._sending = threading.Lock()
        self.failure: Exception | None = None
        self.silent = False
        self._ended = False
        self.reading = Reading(self.read, min(broker.heart_beat / 4, _UNREAD_SECONDS))
        self.override_threading(lambda _stomp_pys_own_loop: default_create_thread(self.reading.stand_by))

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

    def has_come(self) -> bool:
        """Whether there may be something to read; asked far more often than there is."""
        live = self.socket
        return live is None or live.has_come()

    def read(self, seconds: float | None) -> bool:
        """Wait for so many seconds (None: without end) for bytes; tell of each frame. Whether one came."""
        try:
            data = self._received(seconds)
            if data is None:
                return False
            if data:
                return self._told(data)
        except Exception as fault:  # noqa: BLE001 - whatever the other side sends ends no more than its connection
            _log.warning("%s: what came from the server makes no sense", self._call.address.name, exc_info=fault)
            self.failure = ConnectionError(f"what it sent makes no sense: {fault!r}")
        except BaseException:
            # What was read may be lost, and the rest would not be understood.
            self._end()
            raise
        self._end()
        return True

    def _received(self, seconds: float | None) -> bytes | None:
        live = self.socket
        if live is None:
            return b""
        try:
            return live.receive(_CHUNK, seconds)
        except OSError as error:
            self.failure = error
            return b""

    def _told(self, data: bytes) -> bool:
        # Within a frame no broker can beat: one that takes its time is a sign of life all the same.
        self._beat()
        self._frames.feed(data)
        told = False
        while (frame := self._frames.next()) is not None:
            if frame is not HEART_BEAT:
                self._tell(frame)
                told = True
        return told

    def _tell(self, frame: Frame) -> None:
        if frame.command == "MESSAGE":
            self._whom.on_message(frame)
        elif frame.command == "RECEIPT":
            self._whom.on_receipt(frame.headers.get("receipt-id", ""))
        else:
            self.process_frame(StompFrame(*frame), frame.body)

    def _end(self) -> None:
        self._ended = True
        self.disconnect_socket()

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
        # Told by whoever comes here, not through stomp.py, where only the first one tells: nobody may find that there
        # is nothing more to read before it is known that the connection is lost.
        self._whom.on_disconnected()
        self.reading.end()


class Connection(BaseConnection, Protocol12):  # type: ignore[misc] # stomp.py has no types
    """STOMP 1.2 over that transport."""

    def __init__(self, broker: StompSettings, call: Call, whom: Hears) -> None:
        # 0 would mean: none.
        beat = max(1, int(broker.heart_beat * 1000))
        transport = _Transport(broker, call, whom, self.on_heartbeat)
        BaseConnection.__init__(self, transport)
        Protocol12.__init__(
            self,
            transport,
            heartbeats=(beat, beat),
            auto_content_length=False,
            # A broker that beats only if the last interval was silent is up to two intervals late, in good health.
            heart_beat_receive_scale=2.5,
        )
        self.set_listener("retrykit", _Rare(whom))

    def on_connected(self, frame: Any) -> None:
        """Expect heart-beats from now on: stomp.py gives a server that hangs at once twice the time."""
        super().on_connected(frame)
        self.received_heartbeat: float = time.monotonic()
        if self.transport.socket is None:
            # Closed while this was read: stomp.py would wait, interval by interval and for ever, to be connected.
            self.heartbeat_terminate_event.set()

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
        self.transport.send(pack(convert_frame(StompFrame("CONNECT", headers))))
