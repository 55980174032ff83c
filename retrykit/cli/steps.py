"""MODULE:NAME, and the step behind it: itself, or a function that makes one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from retrykit.batch import AsyncChunkStep, ChunkStep
from retrykit.cli.target import LoadingError, TargetError, check

KINDS = (ChunkStep, AsyncChunkStep)


def step_of(target: str) -> ChunkStep | AsyncChunkStep:
    """The step that the target is, or makes. `TargetError`, `LoadingError`."""
    found = _found(target)
    if isinstance(found, KINDS):
        return found
    if not callable(found) or isinstance(found, type):
        raise TargetError(f"{target} is a {type(found).__name__}: wanted is a ChunkStep, or a function that makes one")
    return _checked(f"{target}()", _done(f"{target}()", found), KINDS)  # type: ignore[no-any-return]


def made_by(target: str) -> Callable[[int, int], ChunkStep]:
    """The function that makes the step of a partition, checked each time. `TargetError`, `LoadingError`."""
    found = _found(target)
    if not callable(found) or isinstance(found, type):
        wanted = "wanted for partitions is a function of (part, parts) that makes a ChunkStep"
        raise TargetError(f"{target} is a {type(found).__name__}: {wanted}")

    def make(part: int, parts: int) -> ChunkStep:
        call = f"{target}({part}, {parts})"
        return _checked(call, _done(call, lambda: found(part, parts)), (ChunkStep,))  # type: ignore[no-any-return]

    return make


def _found(target: str) -> Any:
    module_name, name = check(target)
    module = _done(f"module {module_name!r}", lambda: importlib.import_module(module_name))
    try:
        return attrgetter(name)(module)
    except AttributeError:
        there = [key for key, value in vars(module).items() if isinstance(value, KINDS)]
        has = f"it has {', '.join(there)}" if there else "there is no step in it either"
        raise TargetError(f"module {module_name!r} has no {name!r}; {has}") from None


def _done(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        # Its own traceback says where; whatever it is, nothing was started.
        raise LoadingError(f"{what} could not be loaded: {error!r}") from error


def _checked(call: str, made: Any, kinds: tuple[type, ...]) -> Any:
    if not isinstance(made, kinds):
        raise TargetError(
            f"{call} gave a {type(made).__name__}: wanted is a {' or '.join(one.__name__ for one in kinds)}"
        )
    return made
