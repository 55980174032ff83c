"""The work that every subject of `overhead.py` does: the scenarios, the function around which all of them are put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import ATTEMPTS, RETRIED, Function

ANSWER = "answer"
SUCCESS, FLAKY, EXHAUSTED = "success", "two failures, then success", "exhausted"
FAILURES = {SUCCESS: 0, FLAKY: ATTEMPTS - 1, EXHAUSTED: ATTEMPTS}


def body(scenario: str, *, awaited: bool) -> Function:
    """A function that fails as the scenario says, then succeeds, then begins again. A success has nothing to count."""
    if scenario == SUCCESS:
        return _async_succeed if awaited else _succeed
    flaky = _flaky(FAILURES[scenario])

    async def async_flaky(_argument: object) -> object:
        return flaky(_argument)

    return async_flaky if awaited else flaky


def _succeed(_argument: object) -> object:
    return ANSWER


async def _async_succeed(_argument: object) -> object:
    return ANSWER


def _flaky(failures: int) -> Function:
    calls = 0

    def flaky(_argument: object) -> object:
        nonlocal calls
        calls += 1
        if failures >= ATTEMPTS or calls % (failures + 1):
            raise RETRIED("connection refused")
        return ANSWER

    return flaky


def watched(function: Function, seen: Callable[[], None], *, awaited: bool) -> Function:
    """The function, with `seen` called at the beginning of each of its calls."""

    def watching(argument: object) -> object:
        seen()
        return function(argument)

    async def async_watching(argument: object) -> object:
        seen()
        return await function(argument)

    return async_watching if awaited else watching


async def outcome(once: Callable[[], Any], *, awaited: bool) -> object:
    """What one call came to: its value, or the name of the error if that is the one that is retried."""
    try:
        return await once() if awaited else once()
    except RETRIED as error:
        return type(error).__name__
