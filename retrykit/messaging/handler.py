"""What may be a handler, how it is called, and what must not pass for its result."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from retrykit.check import wrong_type
from retrykit.message import Message
from retrykit.messaging.errors import HandlerExitError

if TYPE_CHECKING:
    from retrykit.context import RetryContext
    from retrykit.template import AsyncRetryTemplate, RetryTemplate

    Template = RetryTemplate | AsyncRetryTemplate

_CODE: Final = 200

Handler = Callable[..., Any]
"""A coroutine function where the template is an `AsyncRetryTemplate`, else a plain one."""


def calls_with(handler: Handler, template: Template) -> Callable[[Message, RetryContext], Any]:
    """The handler as a function of message and context; it may take the message alone, or the context by its name.

    `TypeError` for what cannot be called so, and for a kind of function that the template does not go with.
    """
    if not callable(handler):
        raise wrong_type("handler", "callable", handler)
    if not template.asynchronous:
        refuse_coroutines("handler", handler)
    elif not _is_coroutine_function(handler):
        wanted = (
            "a coroutine function (async def), because the template is an AsyncRetryTemplate: "
            "a plain one would hold up the event loop, and all other deliveries; for that use a RetryTemplate"
        )
        raise wrong_type("handler", wanted, handler)
    takes, named = _arguments(handler)
    if takes == 1:
        # A context that is taken by its name only is given by its name.
        return lambda message, context: handler(message, **{"context": context} if named else {})
    if takes != 2 or named:  # noqa: PLR2004 - message and context
        raise wrong_type("handler", "callable with (message) or (message, context)", handler)
    return handler


def refuse_coroutines(name: str, function: object) -> None:
    """`TypeError` for what only makes a coroutine or generator: it would not run inside the transaction, if ever."""
    if _is_coroutine_function(function):
        wanted = "a plain function, because the template is a RetryTemplate: a coroutine needs an AsyncRetryTemplate"
        raise wrong_type(name, wanted, function)
    refuse_generators(name, function)


def refuse_generators(name: str, function: object) -> None:
    """`TypeError` for what only makes a generator: it would never run."""
    for one in _bodies(function):
        if inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one):
            raise wrong_type(name, "a function without yield (a generator would not run)", function)


def _is_coroutine_function(function: object) -> bool:
    return any(inspect.iscoroutinefunction(one) for one in _bodies(function))


def _bodies(function: object) -> tuple[object, ...]:
    """What runs when it is called: an object with an async __call__ is no coroutine function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return (function, type(function).__call__) if callable(function) else (function,)


def _arguments(handler: Handler) -> tuple[int, bool]:
    """How many arguments a handler wants by place, and whether it wants the context by name.

    Those that it requires, and an optional second one called "context". One that it requires by another name makes too
    many.
    """
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except ValueError:
        return 1, False  # a builtin that does not tell: the simple form
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    by_name = {one.name: one.default is one.empty for one in parameters if one.kind is one.KEYWORD_ONLY}
    named = by_name.pop("context", None) is not None
    if any(by_name.values()):
        return 3, named
    required = sum(one.default is one.empty for one in positional)
    if any(one.kind is one.VAR_POSITIONAL for one in parameters):
        return max(1 if named else 2, required), named
    wanted = 2 if len(positional) > 1 and positional[1].name == "context" else min(1, len(positional))
    return max(required, wanted), named


def exited(leaving: SystemExit, whose: str) -> HandlerExitError:
    """What a call of `sys.exit` in a handler is to the message: argparse's and click's `main` do so at their ends."""
    code = "" if leaving.code is None else repr(leaving.code)[:_CODE]
    return HandlerExitError(whose="handler" if whose == "handler" else "recovery", code=code)


def refuse_unfinished(result: Any, whose: str) -> None:
    """What has not run yet must not count as done."""
    if result is None or not (inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)):
        return
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()
    raise TypeError(
        f"{whose} returned a {type(result).__name__}, which has not run: "
        "it must do its work itself, inside the transaction (coroutines need an AsyncRetryTemplate)"
    )
