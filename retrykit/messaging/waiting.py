"""A clock whose pauses end with the session that they are taken in."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from retrykit.clock import Clock, SystemClock


@attrs.frozen
class WaitingClock:
    """A template's clock whose sleep ends when `wait` says that it is pointless: stopping, or the connection lost."""

    clock: Clock
    wait: Callable[[float], bool]

    def time(self) -> float:
        """As the template's own."""
        return self.clock.time()

    def monotonic(self) -> float:
        """As the template's own."""
        return self.clock.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait, to be interrupted by the end of the session."""
        # A clock of the tests decides by itself how time passes; only the system's is waited for here.
        real = isinstance(self.clock, SystemClock)
        if not self.wait(seconds if real else 0.0):
            raise InterruptedError("the session ends")
        if not real:
            self.clock.sleep(seconds)

    async def async_sleep(self, seconds: float) -> None:
        """As the template's own; the container never calls it."""
        await self.clock.async_sleep(seconds)
