"""The socket of a connection: tuned for transactions, and encrypted where the address says so."""

from __future__ import annotations

import contextlib
import math
import select
import selectors
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from retrykit.messaging.stomp.address import Address

_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", None)
_AT_ONCE: Final = getattr(socket, "MSG_DONTWAIT", 0)
_Selector: Final = getattr(selectors, "PollSelector", selectors.SelectSelector)
# How long a reader may take to notice that its socket was closed at the worst of moments.
_LOOK_SECONDS: Final = 5.0
# A peer that is gone without a word is noticed after two minutes, even where no heart-beats are.
_KEEP_ALIVE: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 3}
_T = TypeVar("_T")


def open_socket(
    address: Address, *, connect_timeout: float, send_timeout: float, context: ssl.SSLContext | None
) -> PlainSocket | TlsSocket:
    """Connect, and shake hands where `context` is given; `OSError` when that fails, or takes longer than
    `connect_timeout`.
    """
    plain = socket.create_connection((address.host, address.port), connect_timeout)
    try:
        _tune(plain, send_timeout)
        if context is None:
            plain.settimeout(None)
            return PlainSocket(plain)
        # The name of the host is what the certificate is compared with.
        return TlsSocket(context.wrap_socket(plain, server_hostname=address.host), send_timeout)
    except BaseException:
        plain.close()
        raise


def _tune(live: socket.socket, send_timeout: float) -> None:
    """Small frames go out at once, and a broker that reads no more, or is gone, does not block us for ever."""
    live.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    live.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            live.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if sys.platform != "win32":
        limit = struct.pack("ll", int(send_timeout), int(send_timeout % 1 * 1e6))
        live.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _acknowledge_at_once(live: socket.socket) -> None:
    """Have the kernel acknowledge what it has received, which otherwise holds up the peer's next frame for 40 ms.

    The kernel takes it back by itself, so this is said after each read.
    """
    if _QUICKACK is not None:
        with contextlib.suppress(OSError):
            live.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


def unverified(context: ssl.SSLContext) -> str:
    """What the context leaves unchecked of a server; "" if nothing."""
    if context.verify_mode != ssl.CERT_REQUIRED:
        return "the certificate"
    return "" if context.check_hostname else "the name in the certificate"


# X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of OpenSSL
_OTHER_NAME: Final = (62, 64)


def explained(error: BaseException) -> str:
    """Why there is no connection, in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        whom = "" if error.verify_code in _OTHER_NAME else " (ssl_context=, or SSL_CERT_FILE, says whom to trust)"
        return f"its certificate was not accepted: {error.verify_message}{whom}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed (is it spoken there?): {error.reason or error}"
    if isinstance(error, TimeoutError):
        late = "TLS was not agreed on in time (is it spoken there?)"
        return late if "handshake" in str(error) else "nobody answered there in time"
    return str(error) or type(error).__name__


class PlainSocket:
    """A connection that one thread at a time reads, and others, in turn, write to."""

    def __init__(self, live: socket.socket) -> None:
        self._socket = live
        self.sendall = live.sendall
        self.shutdown = live.shutdown
        self.close = live.close
        # Made once: they are asked for each message. Two, since whoever looks and whoever waits may be two threads.
        self._wait, self._look = _poll_of(live), _poll_of(live)

    def has_come(self) -> bool:
        """Whether there is something to read, the end included. The worker's to ask."""
        return bool(self._look(0))

    def receive(self, size: int, seconds: float | None = None) -> bytes | None:
        """At most so many bytes; b"" at the end, None if nothing came in so many seconds."""
        if not seconds and seconds is not None and _AT_ONCE:
            # Who looks was told mostly that something has come: to ask once more would cost as much as to take it.
            try:
                data = self._socket.recv(size, _AT_ONCE)
            except BlockingIOError:
                return None
        else:
            if seconds is not None and not self._wait(seconds):
                return None
            data = self._socket.recv(size)
        _acknowledge_at_once(self._socket)
        return data


def _poll_of(live: socket.socket) -> Callable[[float], object]:
    """What waits for so many seconds until something can be read."""
    if not hasattr(select, "poll"):
        return lambda seconds: select.select([live], [], [], seconds)[0]
    poll = select.poll()
    poll.register(live, select.POLLIN)
    return lambda seconds: poll.poll(math.ceil(seconds * 1000))


class TlsSocket:
    """A TLS connection that one thread at a time reads, and others, in turn, write to.

    A TLS connection has one state for both directions, and can do one thing at a time; a reader that waits inside of it
    would keep the writers out. So the socket does not block: each call is made under a lock, and waited for outside.
    """

    def __init__(self, encrypted: ssl.SSLSocket, send_timeout: float) -> None:
        encrypted.setblocking(False)
        self._socket = encrypted
        self._send_timeout = send_timeout
        self._lock = threading.Lock()
        self._closed = False

    def has_come(self) -> bool:
        """True: only who reads can tell."""
        return True

    def receive(self, size: int, seconds: float | None = None) -> bytes | None:
        """At most so many bytes; b"" at the end, None if nothing came in so many seconds."""
        limit = math.inf if seconds is None else time.monotonic() + seconds
        while True:
            received, event = self._call(lambda: self._socket.recv(size))
            if received is not None:
                _acknowledge_at_once(self._socket)
                return received
            if not event:
                return b""
            left = limit - time.monotonic()
            if left <= 0:
                return None
            self._wait(event, min(left, _LOOK_SECONDS))

    def sendall(self, data: bytes) -> None:
        """Everything; `OSError` when the connection ends, or takes nothing for as long as a send may last."""
        rest = memoryview(data)
        while rest:
            # What could not be sent is offered once more as it was: TLS insists on that.
            sent, event = self._call(lambda: self._socket.send(rest))  # noqa: B023 - called before the loop goes on
            if sent is not None:
                rest = rest[sent:]
            elif not event:
                raise ConnectionError("the connection was closed")
            elif not self._wait(event, self._send_timeout):
                raise TimeoutError(f"nothing could be sent in {self._send_timeout:g} s")

    def _call(self, call: Callable[[], _T]) -> tuple[_T | None, int]:
        """What the call gives; else None, and what to wait for (0: nothing, the connection is closed)."""
        with self._lock:
            if self._closed:
                return None, 0
            try:
                return call(), 0
            except ssl.SSLWantReadError:
                return None, selectors.EVENT_READ
            except ssl.SSLWantWriteError:
                return None, selectors.EVENT_WRITE

    def _wait(self, event: int, timeout: float) -> bool:
        with _Selector() as selector:
            try:
                selector.register(self._socket, event)
            except ValueError:
                return True  # closed in the meantime, which the next call tells
            return bool(selector.select(timeout))

    def shutdown(self, how: int) -> None:
        """Say goodbye, and wake whoever waits."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError, ValueError):
                self._socket.unwrap()
        # Not SSLSocket's own, after which a reader would be given what is encrypted.
        socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        """Close, without a word."""
        with self._lock:
            self._closed = True
            self._socket.close()
