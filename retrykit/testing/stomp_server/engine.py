"""The server on an event loop: sockets, heart-beats, group commit, and the verbs that tests use."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from retrykit.testing.stomp_server.broker import Broker
from retrykit.testing.stomp_server.faults import Faults
from retrykit.testing.stomp_server.frames import Frame, FrameError, FrameParser, encode
from retrykit.testing.stomp_server.journal import Journal
from retrykit.testing.stomp_server.outlet import Outlet
from retrykit.testing.stomp_server.profiles import Profile
from retrykit.testing.stomp_server.queues import Message
from retrykit.testing.stomp_server.rabbit import RabbitBroker
from retrykit.testing.stomp_server.rabbit_session import RabbitSession
from retrykit.testing.stomp_server.session import Session

log = logging.getLogger(__name__)

_KINDS: dict[str, tuple[type[Broker], type[Session]]] = {
    "activemq": (Broker, Session),
    "rabbitmq": (RabbitBroker, RabbitSession),
}
# A client that is silent for longer than this many of its heart-beats is taken for dead.
_PATIENCE = 3.0


class Engine:
    """One server's life on one running loop; every method is called on that loop.

    With a data file its content is the state; without one `survivors` carries persistent messages over a restart.
    """

    def __init__(
        self,
        profile: Profile,
        data: Path | None,
        login: tuple[str, str] | None = None,
        *,
        keep_flags: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; nothing is open yet."""
        self.faults = Faults()
        self.connections: set[Connection] = set()
        self.survivors: list[Message] = []
        self.on_failure: Callable[[], None] = lambda: None
        self.login = login
        self._profile = profile
        self._data = data
        self._keep_flags = keep_flags
        self._ssl_context = ssl_context
        self._flush_due = False
        self._dirty: list[Connection] = []
        self._sessions = 0
        self._queues: dict[str, dict[str, str]] = {}
        self._timers: set[asyncio.TimerHandle] = set()

    async def open(self, host: str, port: int) -> int:
        """Read the data file and listen; the port. Raises OSError."""
        self.loop = asyncio.get_running_loop()
        self.journal = Journal(self._data, None if self._data else self._queues)
        self.connections.clear()
        self._timers.clear()
        self._dirty, self._flush_due = [], False
        survivors = self.journal.open() if self._data else self.survivors
        kind, _ = _KINDS[self._profile.name]
        self.broker = kind(self._profile, self.journal, survivors, self._call_later, keep_flags=self._keep_flags)
        try:
            self._server = await self.loop.create_server(
                lambda: Connection(self), host, port, reuse_address=True, ssl=self._ssl_context
            )
        except OSError:
            self.journal.close()
            raise
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self, *, crash: bool) -> None:
        """Stop listening and end every connection; a crash forgets what no receipt has confirmed yet."""
        self._server.close()
        if not crash:
            self.flush()
        self.drop_connections()
        if not crash:
            self.broker.closing()
            self.flush()
        for timer in self._timers:
            timer.cancel()
        self.survivors = self.broker.survivors(crash=crash)
        self.journal.close()
        # One turn of the loop lets the sockets close before anybody binds the port again.
        await asyncio.sleep(0)

    def _call_later(self, seconds: float, action: Callable[[], None]) -> None:
        def act() -> None:
            self._timers.discard(timer)
            action()
            self.wants_flush()

        timer = self.loop.call_later(seconds, act)
        self._timers.add(timer)

    def new_session(self, outlet: Outlet) -> Session:
        """Start the session of a new connection."""
        self._sessions += 1
        name = f"ID:embedded-{self.broker.boot}:{self._sessions}"
        _, kind = _KINDS[self._profile.name]
        return kind(self.broker, self.faults, outlet, name=name, login=self.login)

    # -- output: what is durable first, then what says so

    def wants_flush(self, connection: Connection | None = None) -> None:
        """Write after the current turn of the loop, so that all commits of one turn share one fsync."""
        if connection is not None:
            self._dirty.append(connection)
        if not self._flush_due:
            self._flush_due = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Make changes durable, then write the frames that tell of them."""
        self._flush_due = False
        try:
            self.journal.sync()
        except OSError:
            # The memory is ahead of the disk now; going on would promise what a restart breaks.
            log.exception("the data file cannot be written: the server stops")
            self._server.close()
            self.drop_connections()
            self.on_failure()
            return
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.write_out()

    # -- verbs

    def do(self, verb: str, arguments: dict[str, Any]) -> Any:
        """Carry out a verb of `Controls`; the answer is made of JSON's types. ValueError for an unknown one."""
        action = getattr(self, f"do_{verb}", None)
        if action is None:
            raise ValueError(f"unknown verb {verb!r}")
        return action(**arguments)

    def do_depths(self) -> dict[str, int]:
        """Count per destination what is ready or in flight."""
        return {name: self._depth(name) for name in sorted(self.broker.queues)}

    def _depth(self, name: str) -> int:
        states = [state for state, _ in self.broker.queues[name].all_messages()]
        return len(states) - states.count("scheduled")

    def do_messages(self, destination: str) -> list[dict[str, Any]]:
        """List a queue's messages."""
        queue = self.broker.queues.get(destination)
        return [] if queue is None else [_describe(state, message) for state, message in queue.all_messages()]

    def do_dead_letters(self) -> list[dict[str, Any]]:
        """List the dead-letter queue's messages."""
        return self.do_messages(self._profile.dead_letters) if self._profile.dead_letters else []

    def do_counters(self) -> dict[str, int]:
        """Copy the counters."""
        return dict(self.broker.counters) | {"open_connections": len(self.connections)}

    def do_publish(self, destination: str, body: str, headers: dict[str, str]) -> str:
        """Put a message in without a connection; `body` is text in Latin-1. Its id."""
        frame = Frame("SEND", headers | {"destination": destination}, body.encode("latin-1"))
        message = self.broker.new_message(frame, f"ID:embedded-{self.broker.boot}:0")
        self.broker.counters["sends"] += 1
        self.broker.change([message], ())
        self.flush()
        return message.message_id

    def do_drop_connections(self) -> int:
        """Cut every connection; how many there were."""
        return self.drop_connections()

    def drop_connections(self) -> int:
        """Cut every connection; how many there were."""
        connections = list(self.connections)
        # They all end at the same time: none may inherit what another one hands back.
        self.broker.paused = True
        for connection in connections:
            connection.abort()
        self.broker.paused = False
        return len(connections)

    def do_order_fault(self, moment: Any, times: int) -> None:
        """Drop connections at a moment of the next COMMITs."""
        self.faults.order(moment, times)

    def do_delay_receipts(self, seconds: float) -> None:
        """Hold back each receipt from now on."""
        self.faults.receipt_delay = seconds

    def do_clear_faults(self) -> None:
        """Take back every ordered fault."""
        self.faults.clear()

    def do_forget_flags(self) -> None:
        """Forget which waiting messages were delivered before."""
        self.broker.forget_flags()


class Connection(asyncio.Protocol):
    """One client's socket."""

    transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        """Wait for the socket."""
        self._engine = engine
        self._parser = FrameParser(longest_header=engine.broker.profile.longest_header)
        self._version = "1.0"
        self._out: list[bytes] = []
        self._finishing = False
        self._gone = False
        self._last_read = 0.0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start a session."""
        self.transport = cast("asyncio.Transport", transport)
        with contextlib.suppress(OSError):
            # Best effort: the client may be gone already. Without it every receipt waits for the peer's delayed ACK.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        engine = self._engine
        engine.connections.add(self)
        self._session = engine.new_session(self)

    def data_received(self, data: bytes) -> None:
        """Carry out the frames that came."""
        self._last_read = self._engine.loop.time()
        try:
            for frame in self._parser.feed(data):
                self._session.receive(frame)
        except FrameError as error:
            self._session.refuse_bytes(str(error))
        # Settlements and unanswered SENDs have to reach the disk too.
        self._engine.wants_flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Undo what is open."""
        self._leave()

    # -- what the session asks for

    def send(self, frame: Frame) -> None:
        """Write a frame at the end of this turn."""
        if not self._out:
            self._engine.wants_flush(self)
        self._out.append(encode(frame, self._version))

    def send_receipt(self, frame: Frame) -> None:
        """Write a receipt, late if a test wants it late."""
        delay = self._engine.faults.receipt_delay
        if delay:
            # What it confirms is durable by then: the flush of this turn has long run.
            self._engine.loop.call_later(delay, self.send, frame)
        else:
            self.send(frame)

    def agreed(self, version: str, send_every: float, expect_every: float) -> None:
        """Speak this version from now on, with these heart-beats in seconds."""
        self._version = self._parser.version = version
        if send_every:
            # A little early, so that a client with a strict clock never sees one late.
            self._beat(send_every * 0.75)
        if expect_every:
            self._watch(expect_every * _PATIENCE)

    def finish(self) -> None:
        """Close after what is written, delayed receipts included."""
        self._engine.loop.call_later(self._engine.faults.receipt_delay, self._finish)

    def _finish(self) -> None:
        self._finishing = True
        self._engine.wants_flush(self)

    def abort(self) -> None:
        """Close at once; what is not written yet never will be."""
        self._out.clear()
        self.transport.abort()
        self._leave()

    def write_out(self) -> None:
        """Hand the collected frames to the socket."""
        if self._gone:
            return
        if self._out:
            self.transport.write(b"".join(self._out))
            self._out.clear()
        if self._finishing:
            self.transport.close()

    def _beat(self, every: float) -> None:
        self.transport.write(b"\n")
        self._timers["beat"] = self._engine.loop.call_later(every, self._beat, every)

    def _watch(self, patience: float) -> None:
        silent = self._engine.loop.time() - self._last_read
        if silent >= patience:
            log.info("a client was silent for %.3f s: its connection ends", silent)
            self.abort()
            return
        self._timers["watch"] = self._engine.loop.call_later(patience - silent, self._watch, patience)

    def _leave(self) -> None:
        if self._gone:
            return
        self._gone = True
        for timer in self._timers.values():
            timer.cancel()
        self._engine.connections.discard(self)
        self._session.end()
        self._engine.wants_flush()


def _describe(state: str, message: Message) -> dict[str, Any]:
    return {
        "message_id": message.message_id,
        "destination": message.destination,
        "headers": message.headers,
        "body": message.body.decode("latin-1"),
        "persistent": message.persistent,
        "redelivered": message.redelivered,
        "deliveries": message.deliveries,
        "state": state,
    }
