"""MODULE:NAME, and what stands behind it: a container, a group, a registry, or a function that makes one."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from retrykit.errors import RetryError
from retrykit.messaging import Consumers, ContainerGroup, ListenerContainer

KINDS: Final = (ListenerContainer, ContainerGroup, Consumers)
LIKE: Final = "orders:container, or shop.orders:make_container"
WANTED: Final = "a ListenerContainer, a ContainerGroup, a Consumers registry, or a function without arguments for one"


class TargetError(Exception):
    """The name stands for nothing that can consume: the text says what was found instead."""


class LoadingError(Exception):
    """The user's own code has failed while it was loaded; the cause is its error."""


def load(target: str, *, concurrency: int | None = None) -> ListenerContainer | ContainerGroup:
    """What `target` names, ready to be started; with `concurrency` workers for each container, if given.

    The current directory is importable. `TargetError`, `LoadingError`.
    """
    module_name, name = check(target)
    module = loaded(f"module {module_name!r}", lambda: importlib.import_module(module_name))
    found = _attribute(module, name)
    if not isinstance(found, KINDS):
        _check_function(found, target)
        found = loaded(f"{target}()", found)
        _check_kind(found, f"{target}() gave")
    return _with_workers(found, target, concurrency)


def check(target: str, like: str = LIKE) -> tuple[str, str]:
    """Module and name; `TargetError` if it is not written `like` that, or if there is no such module to import.

    Runs nothing of the module.
    """
    module, colon, name = target.partition(":")
    names = (*module.split("."), *name.split("."))
    if not colon or not all(part.isidentifier() for part in names):
        raise TargetError(f"{target!r} is not MODULE:NAME, such as {like}")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    top = module.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise TargetError(f"there is no module {top!r}, neither in {folder} nor among the installed ones")
    return module, name


def loaded(what: str, load: Callable[[], Any]) -> Any:
    """What the call gives. `LoadingError`; `TargetError` if the module that it imports is not there."""
    try:
        return load()
    except ModuleNotFoundError as error:
        if what != f"module {error.name!r}":
            raise LoadingError(f"{what} could not be loaded: {error}") from error
        hint = ": leave out the .py" if str(error.name).endswith(".py") else ""
        raise TargetError(f"there is no {what}{hint}") from None
    except (Exception, SystemExit) as error:
        # Its own traceback says where; whatever it is, nothing was started. What we say ourselves is a sentence.
        told = error if isinstance(error, RetryError) else repr(error)
        raise LoadingError(f"{what} could not be loaded: {told}") from error


def _attribute(module: ModuleType, name: str) -> Any:
    try:
        return attrgetter(name)(module)
    except AttributeError:
        there = [f"{key} ({type(value).__name__})" for key, value in vars(module).items() if isinstance(value, KINDS)]
        has = f"it has {', '.join(there)}" if there else "there is no container or registry in it either"
        raise TargetError(f"module {module.__name__!r} has no {name!r}; {has}") from None


def _check_function(found: Any, target: str) -> None:
    if not callable(found):
        _check_kind(found, f"{target} is")
    try:
        signature = inspect.signature(found)
    except ValueError:
        return  # a builtin that does not tell
    try:
        signature.bind()
    except TypeError as error:
        raise TargetError(f"{target} is a {type(found).__name__}, but {error}: wanted is {WANTED}") from None


def _check_kind(found: Any, verb: str) -> None:
    if isinstance(found, KINDS):
        return
    if inspect.iscoroutine(found):
        found.close()
    # Its repr may show what nobody else is to see, such as a URL with a password.
    raise TargetError(f"{verb} a {type(found).__name__}: wanted is {WANTED}")


def _with_workers(found: Any, target: str, concurrency: int | None) -> ListenerContainer | ContainerGroup:
    if isinstance(found, Consumers):
        try:
            return found.group(concurrency=concurrency)
        except ValueError as error:
            raise TargetError(f"{target}: {error}") from error
    containers = found.containers if isinstance(found, ContainerGroup) else (found,)
    for one in containers if concurrency is not None else ():
        try:
            one.concurrency = concurrency
        except ValueError as error:
            raise TargetError(f"{target}: {error}") from error
    return found  # type: ignore[no-any-return]
