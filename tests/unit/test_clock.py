"""The machine's own clock."""

from __future__ import annotations

import asyncio
import time

import attrs
import trio

from retrykit import Clock, SystemClock
from tests.doubles import pickled


def test_the_system_clock_is_a_clock_and_a_value():
    assert isinstance(SystemClock(), Clock)
    assert SystemClock() == SystemClock() == attrs.evolve(SystemClock())
    assert hash(SystemClock()) == hash(SystemClock())
    assert pickled(SystemClock()) == SystemClock()
    assert repr(SystemClock()) == "SystemClock()"


def test_it_tells_the_time_of_the_machine():
    before, now, after = time.time(), SystemClock().time(), time.time()
    assert before <= now <= after
    before, now, after = time.monotonic(), SystemClock().monotonic(), time.monotonic()
    assert before <= now <= after


def test_sleeping_takes_at_least_as_long_as_it_says():
    clock = SystemClock()
    began = clock.monotonic()
    clock.sleep(0.01)
    assert clock.monotonic() - began >= 0.01


def test_it_sleeps_on_asyncio_without_blocking_the_loop():
    async def main():
        order = []

        async def sleeper():
            await SystemClock().async_sleep(0.02)
            order.append("slept")

        async def worker():
            order.append("worked")

        await asyncio.gather(sleeper(), worker())
        return order

    assert asyncio.run(main()) == ["worked", "slept"]


def test_it_sleeps_on_trio():
    async def main():
        began = trio.current_time()
        await SystemClock().async_sleep(0.02)
        return trio.current_time() - began

    assert trio.run(main) >= 0.02
