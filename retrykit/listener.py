"""Being told what happens: each listener sees every call of its template, and changes none.

What a listener raises is logged and goes no further. The one thing it can do is to call `context.veto(reason)`.
"""

from __future__ import annotations

from typing import Any

import attrs

from retrykit.check import whole, wrong_type
from retrykit.context import RetryContext
from retrykit.lock import lock_of
from retrykit.policy import RetryDecision
from retrykit.value import Value


class RetryListener:
    """Override what you want to hear. `open` is called in the order of the template's listeners, the others in reverse.

    With `AsyncRetryTemplate` the methods may be coroutine functions.
    """

    def open(self, context: RetryContext) -> Any:
        """A call begins; its history is loaded."""

    def on_success(self, context: RetryContext, result: Any) -> Any:
        """An attempt has succeeded, its transaction (if it is the template's) is committed."""

    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> Any:
        """An attempt has failed and was counted and stored; `decision` says what follows and why."""

    def on_recover(self, context: RetryContext, result: Any) -> Any:
        """A recovery has produced the outcome."""

    def close(self, context: RetryContext, error: BaseException | None) -> Any:
        """The call ends: with `error`, or with a result. Called always."""


LISTENER_METHODS = ("open", "on_success", "on_error", "close")


@attrs.define(eq=False, slots=False)
class StatisticsListener(RetryListener):
    """Counts per template name: calls started, complete, recovered, aborted (by an error), and failed attempts."""

    _counts: dict[str, dict[str, int]] = attrs.field(init=False, factory=dict)
    _lock: Any = attrs.field(init=False, default=attrs.Factory(lock_of, takes_self=True), repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return StatisticsListener, ()

    def snapshot(self, name: str | None = None) -> dict[str, Any]:
        """A copy of the counts: of one name, or {name: counts} of all."""
        with self._lock:
            if name is not None:
                return dict(self._counts.get(name, _ZERO))
            return {known: dict(counts) for known, counts in self._counts.items()}

    def open(self, context: RetryContext) -> None:
        """Count a call."""
        self._add(context, "started")

    def on_success(self, context: RetryContext, result: Any) -> None:
        """Count a success."""
        self._add(context, "complete")

    def on_recover(self, context: RetryContext, result: Any) -> None:
        """Count a recovery."""
        self._add(context, "recovered")

    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None:
        """Count a failed attempt."""
        self._add(context, "errors")

    def close(self, context: RetryContext, error: BaseException | None) -> None:
        """Count a call that ended with an error."""
        if error is not None:
            self._add(context, "aborted")

    def _add(self, context: RetryContext, event: str) -> None:
        with self._lock:
            counts = self._counts.setdefault(context.name, dict(_ZERO))
            counts[event] += 1


_ZERO = {"started": 0, "complete": 0, "recovered": 0, "errors": 0, "aborted": 0}


def _check_logger(_instance: Any, field: Any, value: Any) -> None:
    if value is not None and not callable(getattr(value, "log", None)):
        raise wrong_type(field.name, "a logging.Logger or None", value)


@attrs.frozen(eq=False, repr=False)
class LoggingListener(RetryListener, Value):
    """Logs each failed attempt with its decision, and each recovery: who, which attempt, what, and what follows.

    `logger`: a `logging.Logger`; None is the logger "retrykit". `level`: of failed attempts; an attempt after which
    nothing more is tried is logged as a warning at least.
    """

    logger: Any = attrs.field(default=None, validator=_check_logger)
    level: int = attrs.field(default=20, validator=whole(0))

    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None:
        """Log the failure and the decision."""
        level = self.level if decision.retry else max(self.level, 30)
        facts = (context.name, context.key, context.attempt, type(error).__name__, error, decision)
        self._log(level, "%s key=%r attempt %d failed: %s: %s; %s", facts)

    def on_recover(self, context: RetryContext, result: Any) -> None:
        """Log the recovery."""
        self._log(
            max(self.level, 30),
            "%s key=%r recovered after %d failed attempts",
            (context.name, context.key, context.retry_count),
        )

    def _log(self, level: int, message: str, facts: tuple[Any, ...]) -> None:
        # `import retrykit` must not cost what logging costs.
        import logging

        (self.logger or logging.getLogger("retrykit")).log(level, message, *facts)
