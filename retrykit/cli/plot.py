"""A picture of a run, as SVG: items a second over time, and the failures below."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Final

import attrs

_log = logging.getLogger("retrykit.batch")

WIDTH: Final = 800
HEIGHT: Final = 300
FAILURES: Final = 60
LEFT: Final = 70
MARGIN: Final = 30
BASE: Final = HEIGHT - MARGIN
FLOOR: Final = BASE - FAILURES
POINTS: Final = 400
TITLE: Final = 110
SPREAD: Final = 60
"""Into so many parts of its time a line is divided that several processes have made."""
PARTS: Final = 12
"""More lines than these nobody could follow."""


@attrs.frozen
class Point:
    """What was counted so many seconds after the beginning."""

    seconds: float
    items: int
    failures: int


@attrs.define
class Series:
    """Points of a run, at most 800 however long it is: when there are more, each second one is dropped."""

    points: list[Point] = attrs.Factory(list)
    every: int = 1
    _offered: int = 0

    def add(self, point: Point) -> None:
        """Keep the point, if it is one of those to be kept."""
        self._offered += 1
        if self._offered % self.every:
            return
        self.points.append(point)
        if len(self.points) >= 2 * POINTS:
            self.points, self.every = self.points[1::2], 2 * self.every

    def begin(self, point: Point) -> None:
        """What there was before the first one."""
        self.points.insert(0, point)

    def end(self, point: Point) -> None:
        """Keep the last point, unless nothing has come since the one before."""
        last = self.points[-1] if self.points else None
        if last is None or (last.items, last.failures) != (point.items, point.failures) or len(self.points) == 1:
            self.points.append(point)


def spread(points: Sequence[Point]) -> list[Point]:
    """Points that are not too near to each other for a rate between them, and the last: of several processes two may
    commit in the same moment.
    """
    apart = points[-1].seconds / SPREAD if points else 0.0
    kept: list[Point] = []
    for point in points:
        if not kept or point.seconds - kept[-1].seconds >= apart:
            kept.append(point)
    if kept and kept[-1] is not points[-1]:
        kept[max(1, len(kept) - 1) :] = [points[-1]]
    return kept


def draw(
    path: Path | None, title: str, points: Sequence[Point], parts: Mapping[int, Sequence[Point]] | None = None
) -> None:
    """The picture in a file, if there is to be one. That it cannot be written is logged, and changes nothing."""
    if path is None:
        return
    try:
        path.write_text(svg(title, points, parts), encoding="utf-8")
    except OSError as error:
        _log.error("the picture cannot be written: %s", error)


def svg(title: str, points: Sequence[Point], parts: Mapping[int, Sequence[Point]] | None = None) -> str:
    """The picture. Rates are those between neighboring points. `parts`: thin lines for each, by its number."""
    steps = list(_steps(points))
    theirs = parts if parts and len(parts) <= PARTS else {}
    lines = {part: line for part, points in theirs.items() if (line := list(_steps(points)))}
    scale = _Scale.of([step for line in (steps, *lines.values()) for step in line])
    thick = scale.line(steps, 'stroke="#2471a3" stroke-width="1.5"')
    thin = "".join(
        scale.line(line, 'stroke="#7fb3d5" stroke-width="0.7"', f"<title>partition {part}</title>")
        for part, line in lines.items()
    )
    bars = "".join(map(scale.bar, filter(lambda step: step.failures, steps)))
    failed = sum(step.failures for step in steps)
    words = [
        (LEFT, 18, escape(title if len(title) <= TITLE else title[: TITLE - 1] + "…", quote=False)),
        (4, MARGIN + 8, f"{scale.fastest:,.0f}/s"),
        (4, FLOOR, "0/s"),
        (4, BASE - 14, "failures"),
        (4, BASE, f"{failed:,}"),
        (WIDTH - MARGIN - 40, HEIGHT - 10, f"{scale.longest:,.1f} s"),
    ]
    texts = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in words)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<path d="M{LEFT} {MARGIN}V{FLOOR}H{WIDTH - MARGIN}M{LEFT} {BASE}H{WIDTH - MARGIN}" fill="none" '
        f'stroke="#999"/>{thin}{thick}{bars}{texts}</svg>\n'
    )


@attrs.frozen
class _Step:
    """From one point to the next."""

    begin: float
    seconds: float
    rate: float
    failures: int


def _steps(points: Sequence[Point]) -> Iterator[_Step]:
    for before, later in pairwise(points):
        passed = later.seconds - before.seconds
        if passed > 0:
            rate = (later.items - before.items) / passed
            yield _Step(before.seconds, later.seconds, rate, later.failures - before.failures)


@attrs.frozen
class _Scale:
    """How far right and how high things are. `most`: the failures of one step."""

    longest: float
    fastest: float
    most: int

    @classmethod
    def of(cls, steps: Sequence[_Step]) -> _Scale:
        longest = max((step.seconds for step in steps), default=0.0)
        fastest = max((step.rate for step in steps), default=0.0)
        return cls(longest or 1.0, fastest or 1.0, max((step.failures for step in steps), default=0) or 1)

    def line(self, steps: Sequence[_Step], style: str, inside: str = "") -> str:
        """From the left end of the first step, so that a single one is seen too."""
        ends = [(steps[0].begin, steps[0].rate)] if steps else []
        ends += [(step.seconds, step.rate) for step in steps]
        drawn = " ".join(
            f"{self._across(at)},{FLOOR - rate / self.fastest * (FLOOR - MARGIN):.1f}" for at, rate in ends
        )
        return f'<polyline points="{drawn}" fill="none" {style}>{inside}</polyline>'

    def bar(self, step: _Step) -> str:
        x, top = self._across(step.seconds), BASE - step.failures / self.most * (FAILURES - 15)
        style = 'stroke="#c0392b" stroke-width="2"'
        return f'<line x1="{x}" x2="{x}" y1="{BASE}" y2="{top:.1f}" {style}><title>{step.failures:,}</title></line>'

    def _across(self, seconds: float) -> str:
        return f"{LEFT + seconds / self.longest * (WIDTH - LEFT - MARGIN):.1f}"
