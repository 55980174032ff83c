"""Interleaved sampling: every subject of a group is timed once per round, A B C A B C …, under the same weather.

Each subject gets a timing loop compiled for itself. A loop shared by all of them would have call sites that have seen
every callee, and the interpreter stops specializing such sites: the cheapest subjects would look dearer than they are.
The loop is unrolled, so what it costs by itself disappears next to one call.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, cast

import attrs

UNROLLED = 10


@attrs.frozen(kw_only=True)
class Call:
    """One call as its user would write it: an expression, the names in it, and the error that it may end with."""

    expression: str
    names: Mapping[str, object]
    awaited: bool = False
    ends_with: type[Exception] | None = None

    def once(self) -> Callable[[], Any]:
        """A function (a coroutine function when awaited) that makes this call once and returns its value."""
        return self._compiled("", f"    return {self._written}\n", name="once")

    def loop(self) -> Callable[[int], Any]:
        """A function of n that makes n * UNROLLED calls and returns the seconds they took."""
        lines = "".join(self._guarded("        ") for _ in range(UNROLLED))
        body = f"    started = clock()\n    for _ in repeat(None, n):\n{lines}    return clock() - started\n"
        return self._compiled("n, ", body, name="loop")

    @property
    def _written(self) -> str:
        return f"await {self.expression}" if self.awaited else self.expression

    def _guarded(self, indent: str) -> str:
        if self.ends_with is None:
            return f"{indent}{self._written}\n"
        return f"{indent}try:\n{indent}    {self._written}\n{indent}except ends_with:\n{indent}    pass\n"

    def _compiled(self, parameters: str, body: str, *, name: str) -> Callable[..., Any]:
        names = {**self.names, "ends_with": self.ends_with, "repeat": repeat, "clock": time.perf_counter}
        # Names become parameters with defaults: a call pays for a local name, not for a global one.
        bound = ", ".join(f"{given}=_names[{given!r}]" for given in names)
        source = f"{'async ' if self.awaited else ''}def {name}({parameters}{bound}):\n{body}"
        scope: dict[str, Any] = {"_names": names}
        exec(source, scope)  # noqa: S102  the source is written here, from this project's own expressions
        return cast("Callable[..., Any]", scope[name])


@attrs.define
class Samples:
    """Seconds per call of one subject, one number per round."""

    loop: Callable[[int], Any]
    repeats: int = 1
    seconds: list[float] = attrs.Factory(list)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def maximum(self) -> float:
        return max(self.seconds)


def paired_ratio(ours: Sequence[float], reference: Sequence[float]) -> float:
    """The median over rounds of ours / reference, each pair taken in the same round."""
    return statistics.median(a / b for a, b in zip(ours, reference, strict=True))


async def sample(calls: Sequence[Call], *, rounds: int, seconds: float) -> list[Samples]:
    """Time the calls in turn, `rounds` times, each for about `seconds` a round.

    The collector runs as it would in a program: who makes cyclic garbage pays for it.
    """
    subjects = [Samples(loop=call.loop()) for call in calls]
    for subject in subjects:
        await _calibrate(subject, seconds)
    gc.collect()
    gc.freeze()
    for _ in range(rounds):
        for subject in subjects:
            elapsed = await _run(subject)
            subject.seconds.append(elapsed / (subject.repeats * UNROLLED))
    gc.unfreeze()
    return subjects


async def _calibrate(subject: Samples, seconds: float) -> None:
    subject.repeats = 1
    while (elapsed := await _run(subject)) < seconds / 4:
        subject.repeats *= 2
    subject.repeats = max(1, round(subject.repeats * seconds / elapsed))


async def _run(subject: Samples) -> float:
    outcome = subject.loop(subject.repeats)
    return cast("float", await outcome if inspect.isawaitable(outcome) else outcome)
