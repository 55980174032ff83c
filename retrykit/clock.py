"""Time as a collaborator: what o'clock it is, how long something took, and how a pause is spent."""

from __future__ import annotations

import sys
import time
from typing import Protocol, runtime_checkable

import attrs

from retrykit.value import Value


@runtime_checkable
class Clock(Protocol):
    """Where a template gets its time from. Tests give their own."""

    def time(self) -> float:
        """Seconds since the epoch (UTC). May jump: it is compared with instants that other processes stored."""

    def monotonic(self) -> float:
        """Seconds from some fixed point, never going back. Measures how long things take."""

    def sleep(self, seconds: float) -> None:
        """Spend a pause (more than 0). An exception raised here ends the call with `BackOffInterruptedError`."""

    async def async_sleep(self, seconds: float) -> None:
        """Spend a pause without blocking the event loop."""


@attrs.frozen(eq=False, repr=False)
class SystemClock(Value):
    """The machine's own clock; `async_sleep` works on asyncio and on trio."""

    def time(self) -> float:
        """Seconds since the epoch (UTC)."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds from some fixed point, never going back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block the thread."""
        time.sleep(seconds)

    async def async_sleep(self, seconds: float) -> None:
        """Suspend the task, on whichever of asyncio and trio runs it."""
        # trio is asked only if the program has loaded it: a program on asyncio never imports it.
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_run():
            await trio.sleep(seconds)
            return
        # `import retrykit` must not cost what asyncio costs.
        import asyncio

        await asyncio.sleep(seconds)


SYSTEM_CLOCK = SystemClock()
