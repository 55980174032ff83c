"""Where handlers that are coroutines run: an event loop in a thread of its own, and the desks of the workers.

Transactions and prefetch belong to a connection, so a worker has one, and a thread. Engines, pools and clients belong
to an event loop, so all coroutines of a container (or of a group of them) run on one. The two meet at a *desk*: the
worker hands its delivery to the loop and waits there for errands, which are the calls that its delivery makes to the
broker. So the loop never waits for a broker, and a session is used by its own worker alone.

What a worker has begun cannot be taken back, and a commit must not be cut in two. So a cancellation is heard by the
user's own code only: while it runs, or just before it would. All around it ends by itself, in bounded time: the
connection is gone by then.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from functools import partial
from inspect import isawaitable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import attrs

T = TypeVar("T")

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

LOOK: Final = 1.0
"""Every so many seconds it is looked whether the loop was blocked, for longer than that."""

_log = logging.getLogger("retrykit.messaging")


class HandlerLoop:
    """An asyncio event loop in a thread of its own: there as long as somebody has joined it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._running: _Running | None = None

    def join(self) -> None:
        """Use the loop, until `leave`."""
        with self._lock:
            self._running = self._running or _Running()
            self._users += 1

    def leave(self) -> None:
        """Use it no longer. The last one ends it, the lifespans first; raises what ends it badly."""
        with self._lock:
            self._users -= 1
            if self._running is not None and not self._users:
                running, self._running = self._running, None
                running.end()

    def enter(self, lifespan: Lifespan | None) -> None:
        """Return when what `lifespan` gives was entered on the loop, once for all who name it; raises what that raises.

        It is left when the loop ends.
        """
        assert self._running is not None  # noqa: S101 - somebody has joined
        if lifespan is not None:
            self._running.entrance(lifespan).result()

    def start(self, desk: Desk, function: Callable[[], Any]) -> None:
        """Have a task call and await it, and tell the desk what came of that; raises what has ended the loop."""
        assert self._running is not None  # noqa: S101 - somebody has joined
        self._running.start(desk, function)

    def tell(self, function: Callable[[], object]) -> None:
        """Have a function called on the loop, if that is there."""
        running = self._running
        if running is not None:
            running.call(function)

    @property
    def over(self) -> bool:
        """Whether it has ended, or is ending by itself: what is still there is cancelled."""
        return self._running is None or self._running.over


class _Running:
    """A loop that runs; it ends when it is told to, or when something on it exits."""

    def __init__(self) -> None:
        self.over = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._waiting: dict[Desk, asyncio.Task[None] | None] = {}
        self._entrances: list[tuple[Lifespan, Future[None]]] = []
        self._asked: asyncio.Queue[tuple[Lifespan, Future[None]] | None] = asyncio.Queue()
        ready: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="retrykit-loop", daemon=True)
        self._thread.start()
        self._loop = ready.result()

    def entrance(self, lifespan: Lifespan) -> Future[None]:
        """What came of entering it, which is begun if it was not yet."""
        entered: Future[None] = Future()
        with self._lock:
            if self.over:
                raise self._reason()
            for named, entrance in self._entrances:
                if named == lifespan:
                    return entrance
            self._entrances.append((lifespan, entered))
        self.call(self._asked.put_nowait, (lifespan, entered))
        return entered

    def end(self) -> None:
        """Leave what was entered, end what still runs, and wait for the thread."""
        self.call(self._asked.put_nowait, None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have it called on the loop, unless that has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def start(self, desk: Desk, function: Callable[[], Any]) -> None:
        """As `HandlerLoop.start`."""
        with self._lock:
            if self.over:
                raise self._reason()
            self._waiting[desk] = None
        self.call(self._begin, desk, function)

    def _begin(self, desk: Desk, function: Callable[[], Any]) -> None:
        if self.over:
            return
        # The loop itself keeps no task alive.
        self._waiting[desk] = asyncio.get_running_loop().create_task(self._finish(desk, function))

    async def _finish(self, desk: Desk, function: Callable[[], Any]) -> None:
        try:
            outcome = _Outcome(await finished(function()))
        except BaseException as error:  # noqa: BLE001 - raised in the worker's thread, where all of them have a meaning
            outcome = _Outcome(error=error)
        del self._waiting[desk]
        desk.bring(outcome)
        del outcome

    def _reason(self) -> BaseException:
        return self._error or RuntimeError("the event loop has ended")

    def _run(self, ready: Future[asyncio.AbstractEventLoop]) -> None:
        try:
            with asyncio.Runner() as runner:
                ready.set_result(runner.get_loop())
                try:
                    runner.run(self._serve())
                finally:
                    self._error = sys.exception()
                    with self._lock:
                        self.over = True
        except BaseException as error:  # noqa: BLE001 - a thread ends here; whoever uses the loop raises it
            self._error = error
            if not ready.done():
                ready.set_exception(error)
        # What was to begin when it ended never will.
        for _, entrance in self._entrances:
            if not entrance.done():
                entrance.set_exception(self._reason())
        for desk in tuple(self._waiting):
            desk.bring(_Outcome(error=self._reason()))

    async def _serve(self) -> None:
        watch = asyncio.create_task(_watch())
        # All are entered and left by one task, as many need it.
        async with AsyncExitStack() as stack:
            while (asked := await self._asked.get()) is not None:
                await _enter(stack, *asked)
        watch.cancel()


async def _enter(stack: AsyncExitStack, lifespan: Lifespan, entered: Future[None]) -> None:
    try:
        await stack.enter_async_context(lifespan())
    except BaseException as error:  # noqa: BLE001 - raised to the one who asked
        entered.set_exception(error)
    else:
        entered.set_result(None)


async def _watch() -> None:
    """Tell when the loop was blocked: nothing else would, and every delivery has waited."""
    loop = asyncio.get_running_loop()
    while True:
        before = loop.time()
        await asyncio.sleep(LOOK)
        late = loop.time() - before - LOOK
        if late > LOOK:
            _log.warning(
                "the event loop of the handlers was blocked for %.1f s: one of them calls something that blocks "
                "(asyncio's debug mode, PYTHONASYNCIODEBUG=1, tells which)",
                late,
            )


async def finished(value: Any) -> Any:
    """The value itself, awaited if it is to be."""
    return await value if isawaitable(value) else value


@attrs.frozen(eq=False)
class _Errand:
    """A call that a delivery wants made, and the future that tells it what came of it."""

    function: Callable[[], Any]
    done: asyncio.Future[Any]

    def do(self) -> None:
        """In the worker's thread."""
        try:
            answer = self.function()
        except BaseException as error:  # noqa: BLE001 - raised to the one who asked
            self._tell(self.done.set_exception, error)
        else:
            self._tell(self.done.set_result, answer)

    def _tell(self, function: Callable[[Any], None], fact: Any) -> None:
        self.done.get_loop().call_soon_threadsafe(function, fact)


@attrs.frozen(eq=False)
class _Outcome:
    """What a delivery came to."""

    value: Any = None
    error: BaseException | None = None


class Desk:
    """Where a worker waits for the delivery that it has handed to the loop, and does its errands."""

    def __init__(self, loop: HandlerLoop) -> None:
        self._loop = loop
        self._brought: SimpleQueue[_Errand | _Outcome] = SimpleQueue()
        self._hearing: asyncio.Task[Any] | None = None
        self._cancelled = False

    # -- in the worker's thread

    def run(self, function: Callable[[], Any]) -> Any:
        """Have it called on the loop, and awaited if it is asynchronous, and do its errands meanwhile.

        Its value; raises what it raises, `CancelledError` included.
        """
        self._loop.start(self, function)
        while isinstance(brought := self._brought.get(), _Errand):
            brought.do()
        error = brought.error
        try:
            if error is not None:
                raise error
            return brought.value
        finally:
            # Tracebacks keep this frame: what leads back to an exception may not stay in it.
            del brought, error

    # -- in any thread

    def bring(self, outcome: _Outcome) -> None:
        """What the worker waits for."""
        self._brought.put(outcome)

    def cancel(self) -> None:
        """Interrupt the user's code, if it runs; and let none begin from now on."""
        self._cancelled = True
        self._loop.tell(self._interrupt)

    # -- on the loop

    def _interrupt(self) -> None:
        if self._hearing is not None:
            self._hearing.cancel()

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """An errand: the function is called by the worker, one after the other."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._brought.put(_Errand(partial(function, *arguments), done))
        try:
            while True:
                # Whoever cancels this has to wait: what is under way may be a commit, and its outcome has to be known.
                with suppress(asyncio.CancelledError):
                    return await asyncio.shield(done)
        finally:
            del done

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """The user's own code runs: it is what `cancel` interrupts.

        Cancelled by nobody, it has failed: it awaited something that was. That would be so again at each delivery.
        """
        if self._cancelled:
            raise asyncio.CancelledError
        self._hearing = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError as error:
            if self._cancelled or self._loop.over:
                raise
            raise RuntimeError("something that was awaited had been cancelled") from error
        finally:
            self._hearing = None
