"""A TCP proxy on the loopback that fails as networks do: cuts, refuses, delays, half-closes, stalls, loses answers."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

from tests.servers.process import free_port

HOST = "127.0.0.1"
CHUNK = 1 << 16
# One side that does not read must not hold the test for ever.
PATIENCE = 20.0


class TcpProxy:
    """Listens at a port of its own and hands everything on to `target`, until a test says otherwise.

    What is said holds at once, for the connections there are and for those to come, and has happened when the call
    returns.
    """

    host = HOST

    def __init__(self, target: int | tuple[str, int]) -> None:
        """Listen, and accept connections."""
        self.target = (HOST, target) if isinstance(target, int) else target
        self.accepted = 0
        self.lost = 0
        self._changed = threading.Condition()
        self._links: set[_Link] = set()
        self._delay = 0.0
        self._stalled = False
        self._budget: int | None = None
        self._traps: list[_Trap] = []
        self._closed = False
        # Asked for by number: Linux lets go of a port that it chose itself when `refuse` shuts the listener down.
        self._listener = socket.create_server((HOST, free_port()))
        self.port = int(self._listener.getsockname()[1])
        self._accepting: threading.Thread | None = None
        self.accept()

    def via(self, url: str) -> str:
        """The same URL through this proxy."""
        direct, detour = f"{self.target[0]}:{self.target[1]}", f"{HOST}:{self.port}"
        assert direct in url, f"{url} does not lead to {direct}"
        return url.replace(direct, detour)

    # -- faults

    def cut(self) -> int:
        """Reset all connections (RST, both sides); how many."""
        with self._changed:
            links = list(self._links)
        for link in links:
            link.tell("reset")
        for link in links:
            link.join(PATIENCE)
        return len(links)

    def refuse(self) -> None:
        """Refuse new connections; those that are open stay."""
        if self._accepting is None:
            return
        # Shut down and not closed: the port stays ours.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(PATIENCE)
        self._accepting = None

    def accept(self) -> None:
        """Take connections again."""
        if self._accepting is None:
            self._listener.listen(256)
            self._accepting = threading.Thread(target=self._accept, name="proxy", daemon=True)
            self._accepting.start()

    def delay(self, seconds: float) -> None:
        """Hand each piece on this much later, both ways; 0 ends it for what comes from then on."""
        self._set(delay=seconds)

    def stall(self) -> None:
        """Hold all bytes back, both ways, while the connections stay open."""
        self._set(stalled=True)

    def resume(self) -> None:
        """Hand on what was held back, and go on."""
        self._set(stalled=False)

    def half_close(self) -> int:
        """Tell each client that the server has nothing more to say (FIN); what they say still arrives. How many."""
        with self._changed:
            links = list(self._links)
        for link in links:
            link.tell("half-close")
        for link in links:
            link.half_closed.wait(PATIENCE)
        return len(links)

    def drop_after(self, answered: int) -> None:
        """Hand on this many bytes more of the server's answers, in all, then reset their connection, once."""
        self._set(budget=answered)

    def lose_answers(self, to: bytes = b"", *, after: int = 0, times: int = 1) -> None:
        """The next request that contains these bytes arrives, and its answer does not: the connection is reset instead.

        Exactly that makes a COMMIT doubtful. `after` so many of them, and so many `times`; `lost` counts.
        """
        self._set(trap=_Trap(to, after, times, arrives=True))

    def lose_requests(self, to: bytes = b"", *, after: int = 0, times: int = 1) -> None:
        """The next request that contains these bytes does not arrive: the connection is reset instead."""
        self._set(trap=_Trap(to, after, times, arrives=False))

    def await_lost(self, number: int, timeout: float = 20.0) -> None:
        """Wait until so many answers and requests were lost."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.lost >= number, timeout), f"{self.lost} lost, not {number}"

    def heal(self) -> None:
        """End all faults; what was cut stays cut."""
        with self._changed:
            self._traps.clear()
            self._budget = None
        self._set(delay=0.0, stalled=False)
        self.accept()

    def close(self) -> None:
        """Reset the connections and stop listening."""
        if self._closed:
            return
        self._closed = True
        self.refuse()
        self.cut()
        self._listener.close()

    def __enter__(self) -> Self:
        """As it is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # -- what the connections ask

    def due(self) -> float | None:
        """When what has just come is handed on (monotonic)."""
        return time.monotonic() + self._delay

    @property
    def stalled(self) -> bool:
        """Whether bytes are held back."""
        return self._stalled

    def trap_for(self, request: bytes) -> _Trap | None:
        """The fault that this request has run into, which is used up by that."""
        with self._changed:
            for place, trap in enumerate(self._traps):
                if trap.pattern not in request:
                    continue
                if trap.after:
                    self._traps[place] = trap._replace(after=trap.after - 1)
                    continue
                self._traps[place : place + 1] = [trap._replace(times=trap.times - 1)] if trap.times > 1 else []
                return trap
        return None

    def allowed(self, answer: bytes) -> bytes | None:
        """How much of an answer may pass; None: all of it."""
        with self._changed:
            if self._budget is None:
                return None
            if len(answer) <= self._budget:
                self._budget -= len(answer)
                return None
            passing, self._budget = answer[: self._budget], None
            return passing

    def note_lost(self) -> None:
        """Something was lost."""
        with self._changed:
            self.lost += 1
            self._changed.notify_all()

    def forget(self, link: _Link) -> None:
        """A connection is over."""
        with self._changed:
            self._links.discard(link)

    def _set(
        self,
        *,
        delay: float | None = None,
        stalled: bool | None = None,
        budget: int | None = None,
        trap: _Trap | None = None,
    ) -> None:
        with self._changed:
            self._delay = self._delay if delay is None else delay
            self._stalled = self._stalled if stalled is None else stalled
            self._budget = self._budget if budget is None else budget
            self._traps += [trap] if trap else []
            links = list(self._links)
        for link in links:
            link.tell("look")

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target, timeout=PATIENCE)
            except OSError:
                _reset(client)
                continue
            link = _Link(self, client, server)
            with self._changed:
                self.accepted += 1
                self._links.add(link)
                # Before anybody can find it, and wait for its end.
                link.start()


class _Trap(NamedTuple):
    """A request that runs into a fault."""

    pattern: bytes
    after: int
    times: int
    arrives: bool


class _Piece(NamedTuple):
    """Bytes on their way (none: the end)."""

    due: float
    to: socket.socket
    data: bytes


class _Link(threading.Thread):
    """One connection, both ways."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket) -> None:
        super().__init__(name="proxied connection", daemon=True)
        self.proxy, self.client, self.server = proxy, client, server
        self.half_closed = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._orders: deque[str] = deque()
        self._pieces: deque[_Piece] = deque()
        self._open = {client, server}
        self._asked = b""
        self._trapped: _Trap | None = None
        self._muted = False
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.settimeout(PATIENCE)

    def tell(self, order: str) -> None:
        """Have something done by the connection's own thread."""
        self._orders.append(order)
        try:
            self._wake.send(b"!")
        except OSError:
            self.half_closed.set()

    def run(self) -> None:
        """Hand on what comes until both sides have said all, or a fault ends it."""
        with selectors.DefaultSelector() as self._selector:
            for each in (self.client, self.server, self._woken):
                self._selector.register(each, selectors.EVENT_READ)
            try:
                while self._open or self._pieces:
                    self._turn()
            except OSError:
                # Reset by one side, or by order: so is the other.
                _reset(self.client)
                _reset(self.server)
            finally:
                self._end()

    def _end(self) -> None:
        self.proxy.forget(self)
        for each in (self.client, self.server, self._wake, self._woken):
            each.close()
        self.half_closed.set()

    def _turn(self) -> None:
        for ready, _ in self._selector.select(self._wait()):
            if ready.fileobj is self._woken:
                self._woken.recv(64)
                self._obey()
            else:
                assert isinstance(ready.fileobj, socket.socket)
                self._receive(ready.fileobj)
        while self._pieces and not self.proxy.stalled and self._pieces[0].due <= time.monotonic():
            self._hand_on(self._pieces.popleft())

    def _wait(self) -> float | None:
        if not self._pieces or self.proxy.stalled:
            return None
        return max(self._pieces[0].due - time.monotonic(), 0)

    def _obey(self) -> None:
        while self._orders:
            order = self._orders.popleft()
            if order == "reset":
                raise ConnectionAbortedError
            if order == "half-close":
                self._muted = True
                self.client.shutdown(socket.SHUT_WR)
                self.half_closed.set()

    def _receive(self, side: socket.socket) -> None:
        data = side.recv(CHUNK)
        if not data:
            self._selector.unregister(side)
            self._open.discard(side)
        other = self.server if side is self.client else self.client
        self._pieces.append(_Piece(self.proxy.due(), other, data))

    def _hand_on(self, piece: _Piece) -> None:
        if piece.to is self.server:
            self._request(piece.data)
        elif not self._muted:
            self._answer(piece.data)

    def _request(self, data: bytes) -> None:
        if not data:
            self.server.shutdown(socket.SHUT_WR)
            return
        # A request may come in two pieces.
        if trap := self.proxy.trap_for(self._asked[-CHUNK:] + data):
            self._trapped = trap
            if not trap.arrives:
                self._lose()
        self._asked = data
        self.server.sendall(data)

    def _answer(self, data: bytes) -> None:
        if self._trapped is not None:
            self._lose()
        self._asked = b""
        if not data:
            self.client.shutdown(socket.SHUT_WR)
            return
        passing = self.proxy.allowed(data)
        self.client.sendall(data if passing is None else passing)
        if passing is not None:
            self._lose()

    def _lose(self) -> None:
        # Noted when it has happened, for whoever waits for it.
        _reset(self.client)
        _reset(self.server)
        self.proxy.note_lost()
        raise ConnectionAbortedError


def _reset(side: socket.socket) -> None:
    # Closed with nothing to linger for: the other end gets a reset, no orderly end.
    if side.fileno() >= 0:
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        side.close()
