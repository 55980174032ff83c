"""STOMP 1.2 brokers, on stomp.py 9: `StompBroker`.

stomp.py runs a thread that reads frames and calls listeners; a listener that raises closes the connection without a
word, one that waits holds up heart-beats. So here the callbacks put what came into queues and set flags, nothing else,
and everything is decided by the worker. A session is used once: no callback reconnects, and frames of another
generation have nowhere to arrive.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from typing import Any, Final

import attrs

from retrykit.check import more_than, seconds, whole, wrong_type, wrong_value
from retrykit.errors import CommitInDoubtError
from retrykit.message import Message
from retrykit.messaging.address import Address, parse_address, redacted
from retrykit.messaging.broker import Capabilities
from retrykit.messaging.errors import BrokerUnavailableError, ConnectionLostError, NoStableIdError
from retrykit.messaging.profiles import Profile, profile_for, to_profile

try:
    from stomp.connect import BaseConnection
    from stomp.exception import StompException
    from stomp.listener import ConnectionListener
    from stomp.protocol import Protocol12
    from stomp.transport import Transport
    from stomp.utils import Frame, convert_frame, pack
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "stomp":
        raise
    raise ImportError('STOMP brokers need stomp.py: pip install "retrykit[stomp]"', name="stomp") from missing

_GOODBYE_SECONDS: Final = 2.0
_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", None)
_TEXTUAL: Final = ("text/", "application/json", "application/xml")
_MAX_ERROR: Final = 500


def _duration(value: Any) -> float:
    return seconds("timeout", value)


def _is_destination(_instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise wrong_type(field.name, "a str", value)


@attrs.frozen
class StompBroker:
    """A STOMP broker (`stomp://user:password@host:port`), and the destination to consume from, such as "/queue/orders".

    The destination may be the path of the URL. `prefetch` bounds how many deliveries are on their way: 1 is the fastest
    for transactional sessions on ActiveMQ. `profile` ("activemq", "generic") is what the broker calls itself, unless
    given. `id_header` names the header by which a message is known again at its next delivery, where the profile's own
    rule does not do. Timeouts are in seconds.
    """

    url: str = attrs.field(repr=redacted)
    destination: str = attrs.field(default="", kw_only=True, validator=_is_destination)
    prefetch: int = attrs.field(default=1, kw_only=True, validator=whole(1))
    profile: Profile | None = attrs.field(default=None, kw_only=True, converter=to_profile)
    id_header: str | None = attrs.field(default=None, kw_only=True)
    host: str | None = attrs.field(default=None, kw_only=True)
    heart_beat: float = attrs.field(default=10.0, kw_only=True, converter=_duration, validator=more_than(0))
    connect_timeout: float = attrs.field(default=10.0, kw_only=True, converter=_duration, validator=more_than(0))
    receipt_timeout: float = attrs.field(default=15.0, kw_only=True, converter=_duration, validator=more_than(0))
    send_timeout: float = attrs.field(default=15.0, kw_only=True, converter=_duration, validator=more_than(0))
    address: Address = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "address", parse_address(self.url))
        if self.destination and self.address.path not in ("", self.destination):
            raise wrong_value(
                "destination", f"the path of the URL ({self.address.path!r}) or left out", self.destination
            )
        object.__setattr__(self, "destination", self.destination or self.address.path)

    @property
    def name(self) -> str:
        """How logs and errors call it; without credentials."""
        return self.address.name + self.destination

    def connect(self, *, consume: bool = True) -> StompSession:
        """Open a session.

        `BrokerUnavailableError` when the broker is not there, refuses the credentials, or does not answer in time.
        """
        if consume and not self.destination:
            raise wrong_value("destination", "given, to consume from it", self.destination)
        session = StompSession(self)
        try:
            session.open(consume=consume)
        except BaseException:
            session.close(wait=False)
            raise
        return session


class _TunedTransport(Transport):  # type: ignore[misc] # stomp.py has no types
    """stomp.py's transport with a socket for transactions: small frames go out, and are acknowledged, at once."""

    def receive(self) -> Any:
        data = super().receive()
        if _QUICKACK is not None and (live := self.socket) is not None:
            # The kernel takes this back by itself; without it the answer to each small frame waits for 40 ms.
            with contextlib.suppress(OSError):
                live.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        return data

    def tune(self, send_timeout: float) -> None:
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform != "win32":
            # A broker that reads no more would block a send for ever.
            limit = struct.pack("ll", int(send_timeout), int(send_timeout % 1 * 1e6))
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class _Connection(BaseConnection, Protocol12):  # type: ignore[misc] # stomp.py has no types
    """STOMP 1.2 over the tuned transport. Frames go out through `send_frame`, which escapes headers."""

    def __init__(self, broker: StompBroker) -> None:
        beat = int(broker.heart_beat * 1000)
        transport = _TunedTransport(
            [(broker.address.host, broker.address.port)],
            prefer_localhost=False,
            try_loopback_connect=False,
            reconnect_sleep_initial=0,
            reconnect_sleep_max=0,
            reconnect_attempts_max=1,
            timeout=broker.connect_timeout,
            auto_decode=False,
        )
        BaseConnection.__init__(self, transport)
        Protocol12.__init__(
            self,
            transport,
            heartbeats=(beat, beat),
            auto_content_length=False,
            # A broker that beats only if the last interval was silent is up to two intervals late, in good health.
            heart_beat_receive_scale=2.5,
        )

    def login(self, broker: StompBroker) -> None:
        """Send CONNECT past stomp.py's own `connect`, which logs the password when debugging."""
        address = broker.address
        headers = {
            "accept-version": self.version,
            "host": broker.host or address.host,
            "heart-beat": ",".join(map(str, self.heartbeats)),
            "login": address.login,
            "passcode": address.passcode,
        }
        self.transport.send(pack(convert_frame(Frame("CONNECT", headers))))


class _Wire(ConnectionListener):  # type: ignore[misc] # stomp.py has no types
    """One connection: sends frames, keeps what comes until the worker asks.

    Its `on_…` methods run on stomp.py's thread.
    """

    def __init__(self, broker: StompBroker) -> None:
        self.broker = broker
        self.lost: str | None = None
        self.interrupted = False
        self.server: str | None = None
        self.frames: SimpleQueue[Any] = SimpleQueue()
        self._changed = threading.Condition()
        self._awaited: set[str] = set()
        self._numbers = itertools.count(1)
        self._closed = False
        self._connection = _Connection(broker)
        self._connection.set_listener("retrykit", self)

    # -- called by stomp.py's threads

    def on_connected(self, frame: Any) -> None:
        with self._changed:
            self.server = frame.headers.get("server", "")
            self._changed.notify_all()

    def on_message(self, frame: Any) -> None:
        self.frames.put(frame)

    def on_receipt(self, frame: Any) -> None:
        with self._changed:
            self._awaited.discard(frame.headers.get("receipt-id", ""))
            self._changed.notify_all()

    def on_error(self, frame: Any) -> None:
        detail = frame.body[:_MAX_ERROR].decode("utf-8", "replace") if isinstance(frame.body, bytes) else ""
        self.lose(f"the broker sent ERROR: {frame.headers.get('message', '')} {' '.join(detail.split())}".rstrip())

    def on_disconnected(self) -> None:
        self.lose("the connection was closed")

    def on_heartbeat_timeout(self) -> None:
        self.lose("no heart-beat came in time")

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
            self._connection.transport.tune(self.broker.send_timeout)
            self._connection.login(self.broker)
        except (OSError, StompException) as error:
            raise self._unavailable(str(error) or "nobody listens there, or not in time") from error
        with self._changed:
            self._changed.wait_for(lambda: self.server is not None or self.lost, self.broker.connect_timeout)
        if self.lost or self.server is None:
            raise self._unavailable(self.lost or f"it did not answer in {self.broker.connect_timeout:g} s")
        return self.server

    def put(self, command: str, headers: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame; a failure shows as a lost connection."""
        if self.lost is not None:
            return
        try:
            self._connection.send_frame(command, dict(headers), body)
        except (OSError, StompException) as error:
            # Half a frame may be out: nothing that follows would be understood.
            self.lose(f"{command} could not be sent: {error!r}")

    def put_confirmed(self, command: str, headers: Mapping[str, Any], body: bytes = b"") -> None:
        """Send a frame with a receipt, which `settle` waits for."""
        receipt = f"r-{next(self._numbers)}"
        with self._changed:
            self._awaited.add(receipt)
        self.put(command, {**headers, "receipt": receipt}, body)

    def settle(self, timeout: float) -> None:
        """Wait for every receipt that is due; `ConnectionLostError` if the connection, or the patience, ends before."""
        with self._changed:
            self._changed.wait_for(lambda: not self._awaited or self.lost, timeout)
            confirmed = not self._awaited
        if not confirmed:
            self.lose(f"no receipt came in {timeout:g} s")
            raise self.error()

    def pause(self, length: float) -> bool:
        """Wait; False when interrupted or lost."""
        with self._changed:
            return not self._changed.wait_for(lambda: self.interrupted or self.lost, length)

    def interrupt(self) -> None:
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
        # stomp.py's thread lets go of the socket at the same moment when the other side hangs up.
        with contextlib.suppress(AttributeError, OSError):
            transport.disconnect_socket()
        if transport.io_thread is not None:
            transport.io_thread.join(_GOODBYE_SECONDS)

    def error(self) -> ConnectionLostError:
        return ConnectionLostError(broker=self.broker.name, reason=self.lost)

    def _unavailable(self, reason: str) -> BrokerUnavailableError:
        return BrokerUnavailableError(broker=self.broker.name, reason=reason)


@attrs.frozen(eq=False)
class _Handle:
    """What settles a delivery: only in the session and the subscription that it came from."""

    wire: _Wire
    subscription: str
    ack: str


class StompSession:
    """One connection to a STOMP broker."""

    def __init__(self, broker: StompBroker) -> None:
        self._broker = broker
        self._wire = _Wire(broker)
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
            except ConnectionLostError as error:
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
        self._wire.put_confirmed("SEND", {"persistent": "true", **headers, **marks, **ours}, body)

    def flush(self) -> None:
        """Wait for the receipts of the sends."""
        if self._wire.lost is not None:
            raise self._wire.error()
        self._wire.settle(self._broker.receipt_timeout)

    def commit(self, message: Message | None = None) -> None:
        """ACK last, then COMMIT, and wait for its receipt."""
        try:
            transaction = self._begun()
            if message is not None:
                self._wire.put("ACK", {"id": self._own(message).ack, "transaction": transaction})
            self._wire.put_confirmed("COMMIT", {"transaction": transaction})
            self._wire.settle(self._broker.receipt_timeout)
        except ConnectionLostError as error:
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
            with contextlib.suppress(ConnectionLostError):
                self._wire.settle(_GOODBYE_SECONDS)
        self._wire.hang_up()


def _is_text(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").lower().startswith(_TEXTUAL)
