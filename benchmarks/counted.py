"""What retrykit's calls do, counted, not timed: contexts made, cyclic garbage, empty sleeps, frames in tracebacks."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import own
import work
from peers import RETRIED, Function
from report import Target
from sampling import Call
from work import EXHAUSTED, FLAKY, SUCCESS

from retrykit import RetryContext, retryable

REPEATS = 20
FRAMES = 2
BENCHMARKS = Path(__file__).resolve().parent
Build = Callable[[Function], Call]

STATELESS: dict[bool, dict[str, Build]] = {
    False: {"decorated": own.decorated, "execute": own.executed, "block": own.block},
    True: {"decorated": own.async_decorated, "execute": own.async_executed, "block": own.async_block},
}
STATEFUL: dict[bool, dict[str, Build]] = {
    False: {"stateful": own.three_deliveries},
    True: {"stateful": own.async_three_deliveries},
}


def targets() -> list[Target]:
    """All counted facts, sync and async."""
    return [target for awaited in (False, True) for target in asyncio.run(_targets(awaited=awaited))]


async def _targets(*, awaited: bool) -> list[Target]:
    mode = "async" if awaited else "sync"
    counts = [
        ("decorated success: contexts allocated", await contexts_allocated(awaited=awaited), 0),
        *[
            (f"{way}: objects left in cycles", await cyclic_garbage(build, scenarios, awaited=awaited), 0)
            for way, build, scenarios in _ways(awaited=awaited)
        ],
        ("sleeps when the delay is 0", await empty_sleeps(awaited=awaited), 0),
        *[
            (f"{way}, exhausted: library frames in the traceback", await library_frames(build, awaited=awaited), FRAMES)
            for way, build in STATELESS[awaited].items()
            if way != "block"
        ],
    ]
    return [Target(f"{mode}, {name}", count, bound) for name, count, bound in counts]


def _ways(*, awaited: bool) -> Iterator[tuple[str, Build, tuple[str, ...]]]:
    for way, build in STATELESS[awaited].items():
        yield way, build, (SUCCESS, FLAKY, EXHAUSTED)
    for way, build in STATEFUL[awaited].items():
        yield way, build, (FLAKY,)


async def contexts_allocated(*, awaited: bool) -> int:
    """Contexts that a successful call of a decorated function makes, or keeps alive during the attempt."""
    alive: list[int] = []

    def look() -> None:
        alive.append(sum(isinstance(found, RetryContext) for found in gc.get_objects()))

    function = work.watched(work.body(SUCCESS, awaited=awaited), look, awaited=awaited)
    once = STATELESS[awaited]["decorated"](function).once()
    await work.outcome(once, awaited=awaited)
    gc.collect()
    look()
    *_, before = alive
    alive.clear()
    with mock.patch.object(RetryContext, "__init__", autospec=True) as made:
        await work.outcome(once, awaited=awaited)
    return max(int(made.call_count), alive[0] - before)


async def cyclic_garbage(build: Build, scenarios: tuple[str, ...], *, awaited: bool) -> int:
    """Unreachable objects that only the collector could free after many calls."""
    left = 0
    for scenario in scenarios:
        once = build(work.body(scenario, awaited=awaited)).once()
        await work.outcome(once, awaited=awaited)
        with _collector_off():
            for _ in range(REPEATS):
                await work.outcome(once, awaited=awaited)
            left += gc.collect()
    return left


@contextmanager
def _collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class CountingClock:
    """A clock that stands still and writes down the pauses that are asked of it."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def time(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def async_sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


async def empty_sleeps(*, awaited: bool) -> int:
    """How often the clock is asked to sleep by retries without a delay: decorated and executed."""
    clock = CountingClock()
    template: Any = own.async_template(clock=clock) if awaited else own.template(clock=clock)
    for scenario in (FLAKY, EXHAUSTED):
        function = work.body(scenario, awaited=awaited)
        decorated = retryable(template=template)(function)
        for call in (lambda decorated=decorated: decorated(None), lambda function=function: template.execute(function)):
            await work.outcome(call, awaited=awaited)
    return len(clock.slept)


async def library_frames(build: Build, *, awaited: bool) -> int:
    """Entries of the traceback of an exhausted call that are neither the caller's nor the function's."""
    once: Callable[[], Awaitable[Any]] | Callable[[], Any] = build(work.body(EXHAUSTED, awaited=awaited)).once()
    try:
        outcome = once()
        if awaited:
            await outcome
    except RETRIED as error:
        return sum(1 for entry in _entries(error.__traceback__) if not _is_ours(entry))
    raise AssertionError


def _entries(entry: TracebackType | None) -> Iterator[TracebackType]:
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _is_ours(entry: TracebackType) -> bool:
    """Frames of the benchmark: its files, and the caller that `Call.once` compiled."""
    code = entry.tb_frame.f_code
    return Path(code.co_filename).parent == BENCHMARKS or code.co_name == "once"
