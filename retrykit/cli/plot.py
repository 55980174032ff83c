"""A picture of a run, as SVG: items a second over time, and the failures below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Final

import attrs

WIDTH: Final = 800
HEIGHT: Final = 300
FAILURES: Final = 60
LEFT: Final = 70
MARGIN: Final = 30
BASE: Final = HEIGHT - MARGIN
FLOOR: Final = BASE - FAILURES
POINTS: Final = 400


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


def svg(title: str, points: Sequence[Point]) -> str:
    """The picture. Rates are those between neighboring points: when the first one's items were read nobody knows."""
    steps = list(_steps(points))
    longest = max((step.seconds for step in steps), default=0.0) or 1.0
    fastest = max((step.rate for step in steps), default=0.0) or 1.0
    most = max((step.failures for step in steps), default=0) or 1
    line = " ".join(f"{_across(step, longest)},{FLOOR - step.rate / fastest * (FLOOR - MARGIN):.1f}" for step in steps)
    bars = "".join(_bar(_across(step, longest), step.failures / most) for step in steps if step.failures)
    words = [
        (LEFT, 18, escape(title, quote=False)),
        (4, MARGIN + 8, f"{fastest:,.0f}/s"),
        (4, FLOOR, "0/s"),
        (4, BASE, "failures"),
        (WIDTH - MARGIN - 40, HEIGHT - 10, f"{longest:,.1f} s"),
    ]
    texts = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in words)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<path d="M{LEFT} {MARGIN}V{FLOOR}H{WIDTH - MARGIN}M{LEFT} {BASE}H{WIDTH - MARGIN}" fill="none" '
        'stroke="#999"/>'
        f'<polyline points="{line}" fill="none" stroke="#2471a3" stroke-width="1.5"/>{bars}{texts}</svg>\n'
    )


@attrs.frozen
class _Step:
    seconds: float
    rate: float
    failures: int


def _steps(points: Sequence[Point]) -> Iterator[_Step]:
    for before, later in pairwise(points):
        passed = later.seconds - before.seconds
        if passed > 0:
            yield _Step(later.seconds, (later.items - before.items) / passed, later.failures - before.failures)


def _across(step: _Step, longest: float) -> str:
    return f"{LEFT + step.seconds / longest * (WIDTH - LEFT - MARGIN):.1f}"


def _bar(x: str, share: float) -> str:
    top = f"{BASE - share * (FAILURES - 15):.1f}"
    return f'<line x1="{x}" x2="{x}" y1="{BASE}" y2="{top}" stroke="#c0392b" stroke-width="2"/>'
