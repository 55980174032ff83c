"""A clock whose pauses end with the session that they are taken in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from retrykit.clock import Clock, SystemClock, is_real
from retrykit.messaging.delays import PutOffError

if TYPE_CHECKING:
    from retrykit.messaging.coroutines.desk import Desk


def _never(_seconds: float) -> bool:
    return False


@attrs.frozen
class WaitingClock:
    """A template's clock whose sleep ends when `wait` says that it is pointless: stopping, or the connection lost.

    A pause that `defers` says is not to be taken here ends at once, with `PutOffError`.
    """

    clock: Clock
    wait: Callable[[float], bool]
    desk: Desk | None = None
    defers: Callable[[float], bool] = _never

    def time(self) -> float:
        """As the template's own."""
        return self.clock.time()

    def monotonic(self) -> float:
        """As the template's own."""
        return self.clock.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait, to be interrupted by the end of the session."""
        self._go_on(self.wait(self._waited_for(seconds)))
        if not self._real:
            self.clock.sleep(seconds)

    async def async_sleep(self, seconds: float) -> None:
        """As `sleep`, without blocking the event loop: the worker waits."""
        assert self.desk is not None  # noqa: S101 - where there is a loop there is a desk
        self._go_on(await self.desk.call(self.wait, self._waited_for(seconds)))
        if not self._real:
            await self.clock.async_sleep(seconds)

    @property
    def is_real(self) -> bool:
        """Whether it tells the machine's own time; see `retrykit.clock.is_real`."""
        return is_real(self.clock)

    @property
    def _real(self) -> bool:
        # A clock of the tests decides by itself how time passes; only the system's is waited for here.
        return isinstance(self.clock, SystemClock)

    def _waited_for(self, seconds: float) -> float:
        if self.defers(seconds):
            raise PutOffError(seconds)
        return seconds if self._real else 0.0

    def _go_on(self, waited: bool) -> None:  # noqa: FBT001 - what `wait` said
        if not waited:
            raise InterruptedError("the session ends")
