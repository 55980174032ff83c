"""A scenario's virtual clock: integer milliseconds from 0, moved by the scenario and by pauses."""

from __future__ import annotations

from collections.abc import Callable

import attrs

START = 1_000_000.0
"""What the clock shows at a scenario's beginning, in seconds: any instant that is not 0."""


@attrs.define
class Timeline:
    """The time that all templates of a scenario share."""

    now: int = 0


@attrs.frozen(eq=False)
class ScenarioClock:
    """One template's view of the time line; `spend(seconds)` does what a pause does in the scenario."""

    timeline: Timeline
    spend: Callable[[float], None]

    def time(self) -> float:
        return START + self.timeline.now / 1000

    def monotonic(self) -> float:
        return START + self.timeline.now / 1000

    def sleep(self, seconds: float) -> None:
        self.spend(seconds)

    async def async_sleep(self, seconds: float) -> None:
        self.spend(seconds)
