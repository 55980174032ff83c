"""Where a worker waits for the delivery that it has handed to the event loop, and does what that asks of it.

What a worker has begun cannot be taken back, and a commit must not be cut in two. So a cancellation is heard by the
user's own code only: while it runs, or just before it would. All around it ends by itself, in bounded time: the
connection is gone by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from inspect import isawaitable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

from retrykit.messaging.errors import CutShortError

if TYPE_CHECKING:
    from retrykit.messaging.coroutines.loop import HandlerLoop

T = TypeVar("T")

PATIENCE: Final = 1.0
"""A worker that has waited for so many seconds looks whether the loop is blocked."""

_log = logging.getLogger("retrykit.messaging")


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
class Outcome:
    """What a delivery came to."""

    value: Any = None
    error: BaseException | None = None


class Desk:
    """Where a worker waits for the delivery that it has handed to the loop, and does its errands."""

    def __init__(self, loop: HandlerLoop) -> None:
        self._loop = loop
        self._brought: SimpleQueue[_Errand | Outcome] = SimpleQueue()
        self._hearing: asyncio.Task[Any] | None = None
        self._cancelled = False

    # -- in the worker's thread

    def run(self, function: Callable[[], Any]) -> Any:
        """Have it called on the loop, and awaited if it is asynchronous, and do its errands meanwhile.

        Its value; raises what it raises, and `CutShortError` where it was cancelled.
        """
        self._loop.start(self, function)
        while isinstance(brought := self._next(), _Errand):
            brought.do()
        error = brought.error
        try:
            if isinstance(error, asyncio.CancelledError):
                raise CutShortError("it was cancelled, as the container stops at once") from error
            if error is not None:
                raise error
            return brought.value
        finally:
            # Tracebacks keep this frame: what leads back to an exception may not stay in it.
            del brought, error

    def _next(self) -> _Errand | Outcome:
        while True:
            with suppress(Empty):
                return self._brought.get(timeout=PATIENCE)
            self._loop.look()

    # -- in any thread

    def bring(self, outcome: Outcome) -> None:
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

        Cancelled by nobody, it has failed: it awaited something that was. That would be so again at each delivery. What
        fails when it is cancelled, in its clean-up for one, has been cancelled and no more.
        """
        if self._cancelled:
            raise asyncio.CancelledError
        self._hearing = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError as error:
            if self._interrupted:
                raise
            raise RuntimeError("something that was awaited had been cancelled") from error
        except Exception as error:
            if not self._interrupted:
                raise
            _log.warning("what was cancelled has ended with %r", error, exc_info=error)
            raise asyncio.CancelledError from error
        finally:
            self._hearing = None

    @property
    def _interrupted(self) -> bool:
        return self._cancelled or self._loop.over
