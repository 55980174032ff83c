"""The scenarios' recording listeners, and what a trace shows of a context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retrykit import RetryContext, RetryDecision, RetryListener

from . import errors
from .loader import Json

Event = list[Any]


class RecordingListener(RetryListener):
    """A listener of a scenario: the event is recorded first, then its act is done."""

    def __init__(self, events: list[Event], template: int, position: int, script: Json) -> None:
        self._events = events
        self._place = [template, position]
        self._acts: dict[str, Iterator[Any]] = {kind: iter(script.get(kind, ())) for kind in ("open", "error", "close")}

    def open(self, context: RetryContext) -> None:
        """An act may veto, or set an attribute."""
        self._record("open", context.retry_count, errors.describe(context.last_error), attributes_of(context))
        self._act("open", context)

    def on_success(self, context: RetryContext, result: object) -> None:
        """Has no act that a listener here may do."""
        self._record("success", context.retry_count, result)

    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None:
        """An act may veto."""
        self._record("error", context.retry_count, errors.describe(error))
        self._act("error", context)

    def close(self, context: RetryContext, error: BaseException | None) -> None:
        """An act may veto."""
        self._record("close", context.retry_count, errors.describe(error), attributes_of(context))
        self._act("close", context)

    def _record(self, kind: str, *facts: Any) -> None:
        self._events.append([kind, *self._place, *facts])

    def _act(self, kind: str, context: RetryContext) -> None:
        act = next(self._acts[kind], None)
        if act == "exhaust":
            context.veto()
        elif isinstance(act, dict):
            set_attribute(context, act["set"])


def set_attribute(context: RetryContext, pair: list[Any]) -> None:
    """Sets a user's attribute; None removes it."""
    name, value = pair
    if value is None:
        context.attributes.pop(name, None)
    else:
        context.attributes[name] = value


def attributes_of(context: RetryContext) -> dict[str, Any]:
    """What a trace shows of a context, besides its count and last error; an entry that is false or None is absent."""
    limit = context.max_attempts
    shown: dict[str, Any] = {
        "key": context.key,
        "max": -1 if limit is None else limit,
        "exhausted": context.exhausted or None,
        "recovered": context.recovered or None,
        "xo": context.vetoed or None,
        **{f"x.{name}": value for name, value in context.attributes.items()},
    }
    if context.parent is not None:
        shown |= {"pd": sum(1 for _ in _ancestors(context)), "pc": context.parent.retry_count}
    return {name: value for name, value in shown.items() if value is not None}


def _ancestors(context: RetryContext) -> Iterator[RetryContext]:
    parent = context.parent
    while parent is not None:
        yield parent
        parent = parent.parent
