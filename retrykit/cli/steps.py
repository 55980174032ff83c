"""MODULE:NAME, and the step behind it: itself, or a function that makes one."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from functools import partial
from operator import attrgetter
from typing import Any, Final

from retrykit.batch import AsyncChunkStep, ChunkStep
from retrykit.cli.target import TargetError, check, loaded

_log = logging.getLogger("retrykit.batch")

KINDS = (ChunkStep, AsyncChunkStep)
LIKE: Final = "orders:step, or shop.orders:make_step"
_SIMILAR: Final = 0.7


def step_of(target: str, parameters: Mapping[str, str]) -> ChunkStep | AsyncChunkStep:
    """The step that the target is, or makes of the parameters that it has arguments for. `TargetError`,
    `LoadingError`.
    """
    found = _found(target)
    if isinstance(found, KINDS):
        return found
    if not callable(found) or isinstance(found, type):
        raise TargetError(f"{target} is a {type(found).__name__}: wanted is a ChunkStep, or a function that makes one")
    arguments = _arguments(target, found, parameters)
    return _checked(f"{target}()", loaded(f"{target}()", partial(found, **arguments)), KINDS)  # type: ignore[no-any-return]


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
        return _checked(call, loaded(call, lambda: found(part, parts, **arguments)), KINDS)  # type: ignore[no-any-return]

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
    if not takes_all:
        _check_names(target, named, parameters)
    arguments = {name: value for name, value in parameters.items() if takes_all or name in named}
    try:
        signature.bind(*places, **arguments)
    except TypeError as error:
        hint = "with --partitions it is called as (part, parts)" if places else "--param NAME=VALUE gives it one"
        raise TargetError(f"{target} cannot be called: {error}; {hint}") from None
    return arguments


def _check_names(target: str, named: Collection[str], parameters: Mapping[str, str]) -> None:
    """A parameter that is no argument names the job, and does nothing else: so a slip would run another job, on
    whatever the argument is without it.
    """
    free = [name for name in named if name not in parameters]
    for name in parameters:
        if name in named:
            continue
        for meant in get_close_matches(name, free, 1, _SIMILAR):
            raise TargetError(f"{target} has no argument {name!r}: --param {meant}=… is perhaps what is meant")
        if named:
            _log.info("the parameter %r only names the job: %s has no such argument", name, target)


def _found(target: str) -> Any:
    module_name, name = check(target, LIKE)
    module = loaded(f"module {module_name!r}", lambda: importlib.import_module(module_name))
    try:
        return attrgetter(name)(module)
    except AttributeError:
        there = [key for key, value in vars(module).items() if isinstance(value, KINDS)]
        has = f"it has {', '.join(there)}" if there else "there is no step in it either"
        raise TargetError(f"module {module_name!r} has no {name!r}; {has}") from None


def _checked(call: str, made: Any, kinds: tuple[type, ...]) -> Any:
    if not isinstance(made, kinds):
        raise TargetError(
            f"{call} gave a {type(made).__name__}: wanted is a {' or '.join(one.__name__ for one in kinds)}"
        )
    return made
