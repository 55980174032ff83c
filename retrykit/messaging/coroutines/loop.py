"""Where handlers that are coroutines run: an event loop in a thread of its own.

Transactions and prefetch belong to a connection, so a worker has one, and a thread. Engines, pools and clients belong
to an event loop, so all coroutines of a container (or of a group of them) run on one. The two meet at a *desk*
(`retrykit.messaging.coroutines.desk`): the worker hands its delivery to the loop and waits there for errands, which are
the calls that its delivery makes to the broker. So the loop never waits for a broker, and a session is used by its own
worker alone.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final

from retrykit.messaging.coroutines.desk import Desk, Outcome, finished
from retrykit.messaging.coroutines.lifespans import Lifespans
from retrykit.messaging.coroutines.spare_threads import SpareThreads
from retrykit.messaging.errors import LoopEndedError
from retrykit.messaging.lifetime import Lifespan

Told = Callable[[BaseException], None]

FAREWELL: Final = 2.0
"""So many seconds has what is cancelled to come to its end."""
LOOK: Final = 1.0
"""Every so many seconds it is looked whether the loop was blocked, for longer than that."""

_log = logging.getLogger("retrykit.messaging")


class HandlerLoop:
    """An asyncio event loop in a thread of its own: there as long as somebody has joined it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: list[Told] = []
        self._running: _Running | None = None

    def join(self, tell: Told) -> None:
        """Use the loop, until `leave`. `tell` is called with the reason, in any thread, if it ends before that."""
        with self._lock:
            self._running = running = self._running or _Running()
            self._users.append(tell)
        running.watch(tell)

    def leave(self, tell: Told) -> None:
        """Use it no longer. The last one ends it, the lifespans first; raises what ends it badly, or has ended it."""
        with self._lock:
            self._users.remove(tell)
            running = self._running
            if running is not None:
                running.ignore(tell)
                if not self._users:
                    self._running = None
                    running.end()

    def desk(self) -> Desk:
        """A new place for a worker to wait at."""
        return Desk(self)

    def enter(self, lifespan: Lifespan | None, desk: Desk) -> None:
        """Return when what `lifespan` gives was entered on the loop, once for all who name it; raises what that raises.

        It is left when the loop ends. `CutShortError` if the desk is cancelled before that.
        """
        assert self._running is not None  # noqa: S101 - somebody has joined
        if lifespan is not None:
            desk.run(partial(self._running.lifespans.enter, lifespan, desk))

    def start(self, desk: Desk, function: Callable[[], Any]) -> None:
        """Have a task call and await it, and tell the desk what came of that; `LoopEndedError` if it has ended."""
        assert self._running is not None  # noqa: S101 - somebody has joined
        self._running.start(desk, function)

    def tell(self, function: Callable[[], object]) -> None:
        """Have a function called on the loop, if that is there."""
        running = self._running
        if running is not None:
            running.call(function)

    def look(self) -> None:
        """Tell if it is blocked: nobody on it can."""
        running = self._running
        if running is not None:
            running.pulse.look()

    @property
    def over(self) -> bool:
        """Whether it has ended, or is ending by itself: what is still there is cancelled."""
        return self._running is None or self._running.over


class _Running:
    """A loop that runs; it ends when it is told to, or when something on it exits, or fails in a lifespan."""

    def __init__(self) -> None:
        self.over = False
        self.lifespans = Lifespans()
        self.pulse = _Pulse()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._served = threading.Event()
        self._watching: list[Told] = []
        self._waiting: dict[Desk, asyncio.Task[None] | None] = {}
        ready: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="retrykit-loop", daemon=True)
        self._thread.start()
        self._loop = ready.result()

    def watch(self, tell: Told) -> None:
        """Call it with what ends the loop; at once if something has."""
        with self._lock:
            self._watching.append(tell)
            error = self._error
        if error is not None:
            tell(error)

    def ignore(self, tell: Told) -> None:
        """Call it no more."""
        with self._lock:
            self._watching.remove(tell)

    def end(self) -> None:
        """Leave what was entered, end what still runs, and wait for the thread, but not for what does not end."""
        self.call(self.lifespans.finish)
        self._served.wait()
        self._thread.join(FAREWELL)
        if self._thread.is_alive():
            _log.warning("the event loop of the handlers is left alone: a task or thread on it does not end")
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
                raise self._ended()
            self._waiting[desk] = None
        self.call(self._begin, desk, function)

    def _begin(self, desk: Desk, function: Callable[[], Any]) -> None:
        if self.over:
            return
        # The loop itself keeps no task alive.
        self._waiting[desk] = asyncio.get_running_loop().create_task(self._finish(desk, function))

    async def _finish(self, desk: Desk, function: Callable[[], Any]) -> None:
        try:
            outcome = Outcome(await finished(function()))
        except BaseException as error:  # noqa: BLE001 - raised in the worker's thread, where all of them have a meaning
            cut = self.over and isinstance(error, asyncio.CancelledError)
            outcome = Outcome(error=self._ended() if cut else error)
        del self._waiting[desk]
        desk.bring(outcome)
        del outcome

    def _ended(self) -> LoopEndedError:
        # A new one for each: a traceback grows whenever its exception is raised.
        ended = LoopEndedError("the event loop of the handlers has ended")
        ended.__cause__ = self._error
        return ended

    def _run(self, ready: Future[asyncio.AbstractEventLoop]) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.get_loop().set_default_executor(SpareThreads())
                ready.set_result(runner.get_loop())
                try:
                    runner.run(self._serve())
                finally:
                    self._end(sys.exception())
                    self._served.set()
        except BaseException as error:  # noqa: BLE001 - a thread ends here; whoever uses the loop raises it
            self._end(error)
            self._served.set()
            if not ready.done():
                ready.set_exception(error)
        # What was to begin when it ended never will.
        for desk in tuple(self._waiting):
            desk.bring(Outcome(error=self._ended()))

    def _end(self, error: BaseException | None) -> None:
        """Nothing begins any more, and who uses the loop is told why it ends, once."""
        with self._lock:
            self.over = True
            if error is None or self._error is not None:
                return
            self._error = _reason(error)
            watching = tuple(self._watching)
        for tell in watching:
            tell(self._error)

    async def _serve(self) -> None:
        watch = asyncio.create_task(self.pulse.beat())
        await self.lifespans.serve()
        watch.cancel()
        await _end_what_is_left()


async def _end_what_is_left() -> None:
    """Leave a moment to what handlers have left behind: asyncio would wait for it without end, and without a word."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        # Cancelled twice, a clean-up that is under way may be cut in two, and wait for itself ever after.
        if not task.cancelling():
            task.cancel()
    if left:
        _, left = await asyncio.wait(left, timeout=FAREWELL)
    for task in left:
        _log.warning("a task that a handler has left behind does not end when it is cancelled: %r", task)


def _reason(error: BaseException) -> BaseException:
    """What ends a loop, as users are to see it: a cancellation would say nothing, and mean something to their loops."""
    if not isinstance(error, asyncio.CancelledError):
        return error
    reason = RuntimeError("the event loop of the handlers has ended: something has cancelled all of its tasks")
    reason.__cause__ = error
    return reason


class _Pulse:
    """Tells when the loop is blocked: nothing else would, and every delivery waits."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._told = False

    async def beat(self) -> None:
        """On the loop."""
        while True:
            before = self._last = time.monotonic()
            self._told = False
            await asyncio.sleep(LOOK)
            late = time.monotonic() - before - LOOK
            if late > LOOK:
                self._tell(f"was blocked for {late:.1f} s or up to {LOOK:g} s more")

    def look(self) -> None:
        """In the thread of a worker that has been waiting for a while."""
        if not self._told and time.monotonic() - self._last > 2 * LOOK:
            self._told = True
            self._tell("is blocked")

    def _tell(self, what: str) -> None:
        _log.warning(
            "the event loop of the handlers %s: one of them calls something that blocks "
            "(asyncio's debug mode, PYTHONASYNCIODEBUG=1, tells which)",
            what,
        )
