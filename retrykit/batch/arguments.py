"""What a step is made of, checked when it is made: errors name the argument and the value, before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any

from retrykit.batch.skipping import SkipPolicy
from retrykit.check import callable_with, is_callable, wrong_type, wrong_value


def called_with(
    *arguments: str, optional: bool = True, plain: bool = False, gives: bool = False
) -> Callable[[Any, Any, Any], None]:
    """An attrs validator: what can be called so; None too if `optional`.

    Coroutine functions are for asynchronous steps, and for none if it is to be `plain`. A generator function will do
    only if what it `gives` is passed on: else nobody would run its body.
    """
    function = callable_with(*arguments)

    def check(step: Any, field: Any, value: Any) -> None:
        if value is None and optional:
            return
        if isinstance(value, type):
            # Such as int: not every class tells what it is called with.
            return
        if value is None:
            is_callable(step, field, value)
        function(step, field, value)
        if not gives and (isgeneratorfunction(value) or isasyncgenfunction(value)):
            raise wrong_type(field.name, "a function whose body runs when it is called, no generator", value)
        if iscoroutinefunction(value) and (plain or not step.asynchronous):
            hint = "a plain function" if plain else "a plain function (a coroutine function needs an AsyncChunkStep)"
            raise wrong_type(field.name, hint, value)

    return check


def begins(step: Any, field: Any, value: Any) -> None:
    """An attrs validator: what gives a context manager for each attempt, and is none itself."""
    if value is None:
        return
    opened = not isinstance(value, type) and (hasattr(value, "__enter__") or hasattr(value, "__aenter__"))
    if opened:
        wanted = "callable for one context manager after the other, such as engine.begin (not engine.begin())"
        raise wrong_type(field.name, wanted, value)
    is_callable(step, field, value)


def is_skip_policy(_step: Any, field: Any, value: Any) -> None:
    """An attrs validator: a policy, not the failures that it is to skip."""
    if not isinstance(value, SkipPolicy):
        raise wrong_type(field.name, "a SkipPolicy, such as SkipPolicy(skip_for=ValueError)", value)


def is_for_its_kind(step: Any, field: Any, jobs: Any) -> None:
    """An attrs validator: a job store whose verbs the step can wait for."""
    if jobs is not None and iscoroutinefunction(jobs.claim) and not step.asynchronous:
        raise wrong_type(field.name, "a store of plain verbs (an asynchronous one needs an AsyncChunkStep)", jobs)


def check_position(positions: Any) -> None:
    """`ValueError` for positions that no job store can keep: by the first of them, before anything is written."""
    try:
        json.dumps(positions[0], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise wrong_value("reader", f"one whose positions are JSON-able ({error})", positions[0]) from error


def check_together(step: Any) -> None:
    """What each is in order, and makes no sense together: `ValueError`."""
    if step.transaction is None and getattr(step.writer, "needs_transaction", False):
        raise wrong_value("transaction", f"such as engine.begin, for {step.writer!r}", None)
    if step.skip.skip_crashes:
        _check_crashes(step)
    if not step.no_rollback_for:
        return
    if step.transaction is None:
        raise wrong_value("no_rollback_for", "empty where there is no transaction", step.no_rollback_for)
    if step.none_closes_chunk:
        wanted = "False with no_rollback_for, which lets the transaction go on behind a skipped item"
        raise wrong_value("none_closes_chunk", wanted, step.none_closes_chunk)
    for kind in step.no_rollback_for:
        if not any(issubclass(kind, one) or issubclass(one, kind) for one in step.skip.skip_for):
            wanted = f"classes of failures that skip has in skip_for ({kind.__name__} is none)"
            raise wrong_value("no_rollback_for", wanted, step.no_rollback_for)


def _check_crashes(step: Any) -> None:
    if step.jobs is None:
        raise wrong_value("skip", "without skip_crashes where there are no jobs, which know of a crash", step.skip)
    if not getattr(step.template.context_cache, "shared", True):
        wanted = "of a template whose context_cache outlives the process, with skip_crashes"
        raise wrong_value("skip", wanted, step.template.context_cache)
