"""What the users of an event loop have it open before they consume, and close at its end."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrykit.messaging.coroutines.desk import Desk
    from retrykit.messaging.lifetime import Lifespan

_log = logging.getLogger("retrykit.messaging")


class Lifespans:
    """Those of one loop, each entered once for all who name it. Used on the loop only."""

    def __init__(self) -> None:
        self._entrances: list[_Entrance] = []
        self._asked: asyncio.Queue[_Entrance | None] = asyncio.Queue()

    async def enter(self, lifespan: Lifespan, desk: Desk) -> None:
        """Wait until it was entered, or the desk is cancelled; raises what entering it raises."""
        entrance = self._entrance(lifespan)
        entrance.wanted += 1
        try:
            with desk.hearing():
                await asyncio.shield(entrance.done)
        finally:
            entrance.wanted -= 1
            if not (entrance.wanted or entrance.done.done()):
                self._entrances.remove(entrance)
                entrance.forgo()

    def _entrance(self, lifespan: Lifespan) -> _Entrance:
        for entrance in self._entrances:
            if entrance.lifespan == lifespan:
                return entrance
        entrance = _Entrance(lifespan)
        self._entrances.append(entrance)
        self._asked.put_nowait(entrance)
        return entrance

    def finish(self) -> None:
        """Have `serve` return."""
        self._asked.put_nowait(None)

    async def serve(self) -> None:
        """Enter what is asked for, and leave it all in the end."""
        # All are entered and left by one task, as many need it.
        async with AsyncExitStack() as stack:
            while (entrance := await self._asked.get()) is not None:
                await entrance.enter(stack)


class _Entrance:
    """One lifespan on its way in, and how many wait for that."""

    def __init__(self, lifespan: Lifespan) -> None:
        self.lifespan = lifespan
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.wanted = 0
        self._forgone = False
        self._entering: asyncio.Task[None] | None = None

    def forgo(self) -> None:
        """Nobody wants it any more."""
        self._forgone = True
        if self._entering is not None:
            self._entering.cancel()

    async def enter(self, stack: AsyncExitStack) -> None:
        """Enter it, and tell those who wait."""
        if self._forgone:
            return
        self._entering = task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine is run by one
        try:
            await stack.enter_async_context(self.lifespan())
        except BaseException as error:
            # Cancelled by more than `forgo`, all ends.
            if isinstance(error, asyncio.CancelledError) and task.cancelling() > self._forgone:
                raise
            self._tell_of(error)
        else:
            if not self._forgone:
                self.done.set_result(None)
        finally:
            self._entering = None
            if self._forgone:
                task.uncancel()

    def _tell_of(self, error: BaseException) -> None:
        if not self._forgone:
            self.done.set_exception(error)
        elif not isinstance(error, asyncio.CancelledError):
            _log.warning("a lifespan that nobody waited for any more has ended with %r", error, exc_info=error)
