"""A wrapper with the parameters of the function it wraps, compiled once for each shape of parameters.

A wrapper that takes `*args, **kwargs` packs and unpacks them on every call, which costs more than everything else that
a successful attempt needs. And it takes any arguments: a wrong call would fail inside the attempt, and be retried. One
that has the function's own parameters is as fast as a plain call, and a wrong call raises `TypeError` at once. (attrs
and dataclasses compile their `__init__` for the same reasons.)
"""

from __future__ import annotations

import functools
import linecache
from time import monotonic
from types import FunctionType
from typing import Any, Final

from retrykit.context import _bound

_VARIADIC: Final = 0x04 | 0x08  # CO_VARARGS | CO_VARKEYWORDS of a code object
_ANY: Final = ("*args, **kwargs", "*args, **kwargs", "args, kwargs")

_DIRECT: Final = """\
def make(_rk_function, _rk_template, _rk_bind, _rk_unbind, _rk_bound, _rk_now, _rk_drive, _rk_start, _rk_exception):
    {async_}def wrapper({parameters}):
        _rk_frame = [_rk_template, _rk_now(), _rk_bound()]
        _rk_token = _rk_bind(_rk_frame)
        try:
            return {await_}_rk_function({arguments})
        except _rk_exception as _rk_error:
            _rk_failure = _rk_error
        finally:
            _rk_unbind(_rk_token)
        try:
            return {await_}_rk_drive(_rk_start({packed}, _rk_frame, _rk_failure), (_rk_failure, _rk_now()))
        finally:
            del _rk_failure, _rk_frame, _rk_token
    return wrapper
"""

_DRIVEN: Final = """\
def make(_rk_drive, _rk_start):
    {async_}def wrapper({parameters}):
        return {await_}_rk_drive(_rk_start({packed}))
    return wrapper
"""


def direct_wrapper(function: Any, template: Any, drive: Any, start: Any, *, awaited: bool) -> Any:
    """The function, called at once in a frame of its own.

    When it raises, `drive(start(args, kwargs, frame, failure), (failure, time))`.
    """
    make = _made(_DIRECT, function, awaited)
    return _with_defaults(
        make(function, template, _bound.set, _bound.reset, _bound.get, monotonic, drive, start, Exception), function
    )


def driven_wrapper(function: Any, drive: Any, start: Any, *, awaited: bool) -> Any:
    """A function with the parameters of `function` that does `drive(start(args, kwargs))`."""
    return _with_defaults(_made(_DRIVEN, function, awaited)(drive, start), function)


def _with_defaults(wrapper: Any, function: Any) -> Any:
    if _shape_of(function) != _ANY:
        wrapper.__defaults__, wrapper.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return wrapper


def _made(source: str, function: Any, awaited: bool) -> Any:  # noqa: FBT001 - passed on as a part of a cache's key
    return _factory(source, *_shape_of(function), awaited)


def _shape_of(function: Any) -> tuple[str, str, str]:
    """How its parameters are written in a definition, passed on, and packed."""
    if type(function) is not FunctionType or function.__code__.co_flags & _VARIADIC:
        return _ANY
    code = function.__code__
    positional = code.co_varnames[: code.co_argcount]
    named = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    if any(name.startswith("_rk_") or not name.isidentifier() for name in (*positional, *named)):
        return _ANY
    # The defaults themselves are given to the wrapper afterwards: here only their places count.
    plain = len(positional) - len(function.__defaults__ or ())
    written = [name if place < plain else f"{name}=None" for place, name in enumerate(positional)]
    if code.co_posonlyargcount:
        written.insert(code.co_posonlyargcount, "/")
    if named:
        defaults = function.__kwdefaults__ or {}
        written += ["*", *(f"{name}=None" if name in defaults else name for name in named)]
    passed = [*positional, *(f"{name}={name}" for name in named)]
    packed = f"({''.join(f'{name}, ' for name in positional)}), {{{', '.join(f'{name!r}: {name}' for name in named)}}}"
    return ", ".join(written), ", ".join(passed), packed


@functools.cache
def _factory(  # noqa: PLR0917 - the parts of the cache's key
    template: str,
    parameters: str,
    arguments: str,
    packed: str,
    awaited: bool,  # noqa: FBT001
) -> Any:
    source = template.format(
        parameters=parameters,
        arguments=arguments,
        packed=packed,
        async_="async " if awaited else "",
        await_="await " if awaited else "",
    )
    kind = "direct" if template is _DIRECT else "driven"
    name = f"<retrykit {kind} {'async ' if awaited else ''}wrapper ({parameters})>"
    scope: dict[str, Any] = {}
    exec(compile(source, name, "exec"), scope)  # noqa: S102 - made of identifiers of a compiled function, nothing else
    # So that tracebacks show the line.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    return scope["make"]
