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
from collections.abc import Iterable, Mapping
from queue import SimpleQueue
from typing import Any, Final

import attrs

from retrykit.check import is_callable_or_none, more_than, seconds, whole, wrong_type, wrong_value
from retrykit.messaging.address import Address, parse_address, redacted
from retrykit.messaging.errors import BrokerError, BrokerRefusedError, BrokerUnavailableError, ConnectionLostError
from retrykit.messaging.identity import Identify
from retrykit.messaging.profiles import Profile, to_profile
from retrykit.messaging.stomp_session import GOODBYE_SECONDS, THE_COMMIT, StompSession

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

_QUICKACK: Final = getattr(socket, "TCP_QUICKACK", None)
_MAX_ERROR: Final = 500
LAST_WORDS_SECONDS: Final = 1.0


def _duration(value: Any) -> float:
    return seconds("timeout", value)


def _headers(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for item in value.items() for text in item):
        raise wrong_type("declare", "a mapping of str to str", value)
    return dict(value)


def _is_destination(_instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise wrong_type(field.name, "a str", value)


@attrs.frozen
class StompBroker:
    """A STOMP broker (`stomp://user:password@host:port`), and the destination to consume from, such as "/queue/orders".

    The destination may be the path of the URL. `prefetch` bounds how many deliveries are on their way: 1 is the fastest
    for transactional sessions on ActiveMQ. `profile` ("activemq", "rabbitmq", "generic") is what the broker calls
    itself, unless given. `identify` says by what a message is known again at its next delivery, where the profile's own
    rule does not do: `by_header("order-id")`, `by_content()`, or a callable of headers and body.

    `host` is the virtual host; RabbitMQ's own default one where none is given. `declare` are headers that RabbitMQ
    makes a queue by (`{"x-queue-type": "quorum"}`): they go with the subscription and with each message sent to a
    `/queue/…`, since both make it, and have to agree. To a queue that somebody else made as `/amq/queue/…` they do not
    matter.

    Timeouts are in seconds.
    """

    url: str = attrs.field(repr=redacted)
    destination: str = attrs.field(default="", kw_only=True, validator=_is_destination)
    prefetch: int = attrs.field(default=1, kw_only=True, validator=whole(1))
    profile: Profile | None = attrs.field(default=None, kw_only=True, converter=to_profile)
    identify: Identify | None = attrs.field(default=None, kw_only=True, validator=is_callable_or_none)
    declare: Mapping[str, str] = attrs.field(factory=dict, kw_only=True, converter=_headers, hash=False)
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
        profile = self.profile
        if self.host is not None or (profile is not None and profile.names_virtual_hosts):
            return self._session(self.host, consume=consume)
        try:
            return self._session(self.address.host, consume=consume)
        except BrokerUnavailableError as error:
            if "virtual host" not in error.__dict__["reason"].lower():
                raise
        # STOMP asks for the name of the machine, which this broker took for a virtual host of its own.
        return self._session(None, consume=consume)

    def _session(self, virtual_host: str | None, *, consume: bool) -> StompSession:
        session = StompSession(self, Wire(self, virtual_host))
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
        # stomp.py's own thread takes the socket away when the broker goes in the meantime.
        live = self.socket
        if live is None:
            msg = "the connection was lost while it was being made"
            raise ConnectionError(msg)
        live.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sys.platform != "win32":
            # A broker that reads no more would block a send for ever.
            limit = struct.pack("ll", int(send_timeout), int(send_timeout % 1 * 1e6))
            live.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


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

    def login(self, address: Address, virtual_host: str | None) -> None:
        """Send CONNECT past stomp.py's own `connect`, which logs the password when debugging."""
        headers = {
            "accept-version": self.version,
            "host": virtual_host,
            "heart-beat": ",".join(map(str, self.heartbeats)),
            "login": address.login,
            "passcode": address.passcode,
        }
        self.transport.send(pack(convert_frame(Frame("CONNECT", headers))))


class Wire(ConnectionListener):  # type: ignore[misc] # stomp.py has no types
    """One connection: sends frames, keeps what comes until the worker asks.

    Its `on_…` methods run on stomp.py's thread.
    """

    def __init__(self, broker: StompBroker, virtual_host: str | None) -> None:
        self.broker = broker
        self.not_refusals: tuple[str, ...] = ()
        self._virtual_host = virtual_host
        self.lost: str | None = None
        self.interrupted = False
        self.server: str | None = None
        self.frames: SimpleQueue[Any] = SimpleQueue()
        self._changed = threading.Condition()
        # What each receipt that is due stands for, in the order of sending; "" for what is not of a transaction.
        self._awaited: dict[str, str] = {}
        self._refused = ""
        self._numbers = itertools.count(1)
        self._closed = False
        self._connection = _Connection(broker)
        self._connection.set_listener("retrykit", self)

    # -- called by stomp.py's threads

    def on_connected(self, frame: Any) -> None:
        """Logged in: the server's name for itself is known."""
        with self._changed:
            self.server = frame.headers.get("server", "")
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
        detail = frame.body[:_MAX_ERROR].decode("utf-8", "replace") if isinstance(frame.body, bytes) else ""
        message = frame.headers.get("message", "")
        with self._changed:
            if not message.startswith(self.not_refusals):
                self._refused = self._refused or self._meant(frame.headers.get("receipt-id"))
        self.lose(f"the broker sent ERROR: {message} {' '.join(detail.split())}".rstrip())

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
        self.lose("the connection was closed")

    def on_heartbeat_timeout(self) -> None:
        """The broker has been silent for too long."""
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
            self._connection.login(self.broker.address, self._virtual_host)
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
            # Half a frame may be out: nothing that follows would be understood. But a broker that refused an earlier
            # frame has hung up after its ERROR, which is still to be read.
            with self._changed:
                self._changed.wait_for(lambda: self.lost, LAST_WORDS_SECONDS)
            self.lose(f"{command} could not be sent: {error!r}")

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
            self.lose(f"no receipt came in {timeout:g} s")
            raise self.failure()

    def failure(self) -> BrokerError:
        """Why the open transaction came to nothing."""
        with self._changed:
            what, self._refused = self._refused, ""
        # Said once: what is tried on this connection afterwards was not refused, it never arrived.
        return BrokerRefusedError(broker=self.broker.name, what=what, reason=self.lost) if what else self.error()

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
        # stomp.py's thread lets go of the socket at the same moment when the other side hangs up.
        with contextlib.suppress(AttributeError, OSError):
            transport.disconnect_socket()
        if transport.io_thread is not None:
            transport.io_thread.join(GOODBYE_SECONDS)

    def error(self) -> ConnectionLostError:
        """Why the connection is of no use."""
        return ConnectionLostError(broker=self.broker.name, reason=self.lost)

    def _unavailable(self, reason: str) -> BrokerUnavailableError:
        return BrokerUnavailableError(broker=self.broker.name, reason=reason)
