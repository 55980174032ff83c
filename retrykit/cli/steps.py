"""MODULE:NAME, and the step behind it: itself, or a function that makes one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

from retrykit.batch import AsyncChunkStep, ChunkStep
from retrykit.cli.target import LoadingError, TargetError, check

KINDS = (ChunkStep, AsyncChunkStep)


def step_of(target: str, parameters: Mapping[str, str]) -> ChunkStep | AsyncChunkStep:
    """The step that the target is, or makes of the parameters that it has arguments for. `TargetError`,
    `LoadingError`.
    """
    found = _found(target)
    if isinstance(found, KINDS):
        return found
    if not callable(found) or isinstance(found, type):
        raise TargetError(f"{target} is a {type(found).__name__}: wanted is a ChunkStep, or a function that makes one")
    return _checked(f"{target}()", _done(f"{target}()", partial(found, **_arguments(target, found, parameters))), KINDS)  # type: ignore[no-any-return]


def made_by(target: str, parameters: Mapping[str, str]) -> Callable[[int, int], ChunkStep | AsyncChunkStep]:
    """The function that makes the step of a partition, of the parameters that it has arguments for too; checked each
    time. `TargetError`, `LoadingError`.
    """
    found = _found(target)
    if not callable(found) or isinstance(found, type):
        wanted = "wanted for partitions is a function of (part, parts) that makes a step"
        raise TargetError(f"{target} is a {type(found).__name__}: {wanted}")

    arguments = _arguments(target, found, parameters, 1, 1)

    def make(part: int, parts: int) -> ChunkStep | AsyncChunkStep:
        call = f"{target}({part}, {parts})"
        return _checked(call, _done(call, lambda: found(part, parts, **arguments)), KINDS)  # type: ignore[no-any-return]

    return make


def _arguments(target: str, function: Any, parameters: Mapping[str, str], *places: int) -> dict[str, str]:
    """Those parameters of the job that the function has arguments for, behind its first ones."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return {}  # a builtin that does not tell
    behind = list(signature.parameters.values())[len(places) :]
    named = {one.name for one in behind if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}}
    takes_all = any(one.kind is one.VAR_KEYWORD for one in behind)
    arguments = {name: value for name, value in parameters.items() if takes_all or name in named}
    try:
        signature.bind(*places, **arguments)
    except TypeError as error:
        hint = "with --partitions it is called as (part, parts)" if places else "--param NAME=VALUE gives it one"
        raise TargetError(f"{target} cannot be called: {error}; {hint}") from None
    return arguments


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
