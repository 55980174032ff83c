"""What may be a handler, how it is called, and what must not pass for its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retrykit.check import wrong_type
from retrykit.message import Message

if TYPE_CHECKING:
    from retrykit.context import RetryContext

Handler = Callable[..., Any]


def calls_with(handler: Handler) -> Callable[[Message, RetryContext], Any]:
    """The handler as a function of message and context; it may take the message alone, or the context by its name.

    `TypeError` for what cannot be called so.
    """
    if not callable(handler):
        raise wrong_type("handler", "callable", handler)
    refuse_coroutines("handler", handler)
    takes, named = _arguments(handler)
    if takes == 1:
        # A context that is taken by its name only is given by its name.
        return lambda message, context: handler(message, **{"context": context} if named else {})
    if takes != 2 or named:  # noqa: PLR2004 - message and context
        raise wrong_type("handler", "callable with (message) or (message, context)", handler)
    return handler


def refuse_coroutines(name: str, function: object) -> None:
    """`TypeError` for what only makes a coroutine or generator: it would not run inside the transaction, if ever."""
    # An object with an async __call__ is no coroutine function itself.
    for one in (function, type(function).__call__ if callable(function) else None):
        if inspect.iscoroutinefunction(one) or inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one):
            wanted = "a plain function (coroutines and generators would not run inside the transaction)"
            raise wrong_type(name, wanted, function)


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


def refuse_unfinished(result: Any, whose: str) -> None:
    """What has not run yet must not count as done."""
    if not (inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)):
        return
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()
    raise TypeError(
        f"{whose} returned a {type(result).__name__}, which has not run: "
        "it must do its work itself, inside the transaction (asyncio.run runs a coroutine)"
    )
