"""Time as a collaborator: what o'clock it is, here or at a store, how long something took, and how a pause is spent."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
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


def is_real(clock: Clock) -> bool:
    """Whether its monotonic time is the machine's own, which can be read without asking the clock."""
    return type(clock) is SystemClock or getattr(clock, "is_real", False) is True


class StoreClock:
    """The time of a store that several machines share, as seen from here: one clock for all of them.

    Whoever talks to the store tells it what the store's clock said, and when that was asked and answered (`observe`).
    The truth lies between the two: each observation narrows the interval in which the distance of the two clocks must
    be (Marzullo's rule), and asking for the time costs no I/O. An observation that contradicts what is known (the
    store's clock was set, ours drifted or slept) replaces it. Safe to use from any thread.

    `ask`: asks the store and tells what it said (`observe`), for who needs the time before anything else was asked; a
    cache whose verbs are coroutines has none.
    """

    __slots__ = ("_ask", "_distance")

    def __init__(self, ask: Callable[[], object] | None = None) -> None:
        self._distance: tuple[float, float] | None = None
        self._ask = ask

    def __repr__(self) -> str:
        if self._distance is None:
            return "StoreClock(not observed yet)"
        return f"StoreClock(known to {self._distance[1] - self._distance[0]:.6f} s)"

    @property
    def known(self) -> bool:
        """Whether the store's time has been observed at all."""
        return self._distance is not None

    def become_known(self) -> bool:
        """Ask the store, if it was never observed and can be asked. Whether its time is known now."""
        if self._distance is None and self._ask is not None:
            self._ask()
        return self._distance is not None

    def observe(self, sent: float, at: float, received: float) -> None:
        """The store said `at` (seconds since the epoch) between two readings of `time.monotonic()`."""
        lowest, highest = at - received, at - sent
        if self._distance is not None:
            # One tuple, replaced as a whole: a race of two observations loses a narrowing, nothing else.
            low, high = max(lowest, self._distance[0]), min(highest, self._distance[1])
            if low <= high:
                lowest, highest = low, high
        self._distance = lowest, highest

    def time(self) -> float:
        """Seconds since the epoch (UTC), by the store's clock. `ValueError` before the first observation."""
        if self._distance is None:
            raise ValueError("the store's clock has not been observed yet")
        return time.monotonic() + (self._distance[0] + self._distance[1]) / 2
