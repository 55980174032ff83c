"""A scenario's virtual clock: integer milliseconds from 0, moved by the scenario and by pauses."""

from __future__ import annotations

from collections.abc import Callable

import attrs

SECOND = 1024
"""Milliseconds of a scenario in a second: sums and differences of such times are exact, as of whole numbers."""
START = 1_000_000.0
"""What the clock shows at a scenario's beginning, in seconds: any instant that is not 0."""


@attrs.define
class Timeline:
    """The time that all templates of a scenario share, and the due times that were waited for from outside of them."""

    now: int = 0
    waited: list[float] = attrs.Factory(list)


@attrs.frozen(eq=False)
class ScenarioClock:
    """One template's view of the time line; `spend(seconds)` does what a pause does in the scenario."""

    timeline: Timeline
    spend: Callable[[float], None]

    def time(self) -> float:
        return START + self.timeline.now / SECOND

    def monotonic(self) -> float:
        return START + self.timeline.now / SECOND

    def sleep(self, seconds: float) -> None:
        self.spend(seconds)

    async def async_sleep(self, seconds: float) -> None:
        self.spend(seconds)
