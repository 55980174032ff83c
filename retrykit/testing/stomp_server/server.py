"""The embedded server inside this process: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from retrykit.testing.stomp_server.controls import Controls
from retrykit.testing.stomp_server.engine import Engine
from retrykit.testing.stomp_server.process import StompServerProcess
from retrykit.testing.stomp_server.profiles import equipped

ANSWER_SECONDS = 30.0
MAX_PORT = 65_535
T = TypeVar("T")


class StompServer(Controls):
    """A STOMP 1.0-1.2 server for tests and demonstrations, imitating a broker's behavior as measured on the real one.

    ```python
    with StompServer(profile="activemq") as server:
        connect_to(server.url)
    ```

    `profile` is `activemq` or `rabbitmq`. `port` 0 takes any free one, known after the start and kept over restarts.
    `data` is a file that keeps persistent messages; without it they survive a restart of this object only.
    `user` and `password`, given together, are asked of clients. `keep_flags` remembers `redelivered` over a restart,
    which ActiveMQ does only with `persistJMSRedelivered`. `scheduler=False` is an ActiveMQ that heeds no
    `AMQ_SCHEDULED_DELAY`; with `redelivery=SECONDS` it has the redelivery plug-in, and a NACKed message comes again.
    With an `ssl_context` (of a server, with its certificate) it speaks TLS only; a child process cannot be given one.
    `host` is the loopback address unless told otherwise.
    """

    def __init__(
        self,
        *,
        profile: str = "activemq",
        host: str = "127.0.0.1",
        port: int = 0,
        data: str | Path | None = None,
        user: str | None = None,
        password: str | None = None,
        keep_flags: bool = False,
        scheduler: bool = True,
        redelivery: float | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        """Check the options; nothing runs yet. Raises ValueError."""
        imitated = equipped(profile, scheduler=scheduler, redelivery=redelivery)
        self.profile = imitated.name
        self.host = host
        self.port = checked_port(port)
        self.tls = ssl_context is not None
        self._engine = Engine(
            imitated,
            Path(data) if data else None,
            checked_login(user, password),
            keep_flags=keep_flags,
            ssl_context=ssl_context,
        )
        self._running: _LoopThread | None = None

    @staticmethod
    def process(**options: Any) -> StompServerProcess:
        """Make a server that runs as a child process, with the same options: it can be killed."""
        return StompServerProcess(**options)

    def start(self) -> None:
        """Start listening. Raises OSError when the port is taken or the data file cannot be read or written."""
        if self._running is not None:
            raise RuntimeError("the server runs already")
        running = _LoopThread()
        try:
            self.port = running.wait(self._engine.open(self.host, self.port))
        except BaseException:
            running.end()
            raise
        self._running = running

    def stop(self) -> None:
        """End in good order: what is done becomes durable. Does nothing when it does not run."""
        self._close(crash=False)

    def kill(self) -> None:
        """End as a crash does: what was not confirmed by a receipt may be lost. Non-persistent messages are."""
        self._close(crash=True)

    def restart(self) -> None:
        """Crash, if it runs, and start again on the same port with what survived."""
        self.kill()
        self.start()

    def _close(self, *, crash: bool) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        try:
            running.wait(self._engine.close(crash=crash))
        finally:
            running.end()

    def _do(self, verb: str, **arguments: Any) -> Any:
        if self._running is None:
            raise RuntimeError("the server does not run")
        return self._running.wait(self._ask(verb, arguments))

    async def _ask(self, verb: str, arguments: dict[str, Any]) -> Any:
        return self._engine.do(verb, arguments)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()


class _LoopThread:
    """An event loop that runs in a thread until it is told to end."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="retrykit-stomp-server", daemon=True)
        self._thread.start()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it on the loop; its result or its error, TimeoutError when there is none in time."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_SECONDS)

    def end(self) -> None:
        """Stop the loop and join the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def checked_port(port: int) -> int:
    """Pass a port number through; ValueError for what is none."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= MAX_PORT:
        raise ValueError(f"port must be a number from 0 to 65535, not {port!r}")
    return port


def checked_login(user: str | None, password: str | None) -> tuple[str, str] | None:
    """Pair the credentials; ValueError when only one is given (the password is not repeated in it)."""
    if user is None and password is None:
        return None
    if not user or password is None:
        raise ValueError("user and password must be given together")
    return user, password
