"""An exponential series as spring-retry has it: each interval is cut to whole milliseconds before it is multiplied."""

from __future__ import annotations

from math import isclose

import attrs

from .clock import SECOND


@attrs.frozen
class Exponential:
    """An exponential series in milliseconds."""

    initial: int
    multiplier: float
    longest: int

    def exact(self, index: int) -> float:
        """The member with this index, from 0, as it is meant: what retrykit pauses for."""
        try:
            return float(min(self.initial * self.multiplier**index, self.longest))
        except OverflowError:
            return float(self.longest)

    def cut(self, index: int) -> int:
        """The same member as spring-retry has it."""
        interval = self.initial
        for _ in range(index):
            if interval > self.longest:
                break
            interval = int(interval * self.multiplier)
        return min(interval, self.longest)


def whole_milliseconds(series: Exponential | None, seconds: float, failures: int) -> int:
    """A pause of retrykit in whole milliseconds; the right member of an exponential series as spring-retry cuts it."""
    milliseconds = seconds * SECOND
    index = max(0, failures - 1)
    if series is not None and isclose(milliseconds, series.exact(index), rel_tol=1e-9, abs_tol=1e-3):
        return series.cut(index)
    return int(milliseconds + 1e-3)
