"""The facts of one call that the flow works on: its template's plan, its context, and what has been learned of the store."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from retrykit.context import RetryContext, RetryState
from retrykit.errors import RetryError
from retrykit.steps import Raise, Step

Flow = Generator[Step, Any, Any]
Failure = tuple[Exception, float]


class Plan:
    """What all calls of one template have in common, worked out once."""

    __slots__ = (
        "back_off",
        "breaker_key",
        "breakers",
        "budgets",
        "lease",
        "listeners",
        "name",
        "now",
        "pauses",
        "policy",
        "quiet",
        "recovery_policy",
        "remember",
        "reversed_listeners",
        "tallied",
        "throw_last",
    )

    name: str
    policy: Any
    back_off: Any
    recovery_policy: Any
    listeners: tuple[Any, ...]
    reversed_listeners: tuple[Any, ...]
    breakers: tuple[Any, ...]
    budgets: tuple[Any, ...]
    breaker_key: str
    now: Callable[[], float] | None
    """The monotonic clock itself, where it is the machine's and cannot fail."""
    quiet: bool
    """Nobody has to be told or asked: no listeners, breakers or budgets."""
    pauses: bool
    tallied: bool
    throw_last: bool
    remember: float | None
    lease: float

    def __init__(self, **facts: Any) -> None:
        for fact, value in facts.items():
            setattr(self, fact, value)


class Call:
    """One call as the flow sees it: facts that the driver gives, and what the flow has learned of the store."""

    __slots__ = (
        "admitted",
        "begun",
        "blind",
        "context",
        "fault",
        "flight",
        "key",
        "owner",
        "plan",
        "recovers",
        "seen",
        "settled",
        "state",
        "transactional",
        "version",
    )

    def __init__(self, plan: Plan, context: RetryContext) -> None:
        self.plan = plan
        self.context = context
        self.state: RetryState | None = context._state
        self.key: str | None = None
        self.owner = ""
        self.transactional = False
        self.recovers: Callable[[BaseException | None], bool] | None = None
        # The first attempt was made before the flow began: its failure is the first answer.
        self.begun = False
        # Circuit breakers have let the present attempt through.
        self.admitted = False
        # What is known of the store: the version of the history there, the fence of our flight in it, whether there was one at all.
        self.version: int | None = None
        self.flight: int | None = None
        self.seen = False
        # It cannot be read (because of this fault), so nothing is stored over what cannot be seen.
        self.blind = False
        self.fault: Exception | None = None
        # The history was brought to its end within the work's own transaction.
        self.settled = False


def raising(error_type: type[RetryError], call: Call, cause: BaseException | None, **facts: Any) -> Raise:
    """The outcome of a call that ends with one of our errors: with what is known of the call, chained to its cause."""
    error = error_type(name=call.plan.name, key=call.context.key, **facts)
    error.__cause__ = cause
    return Raise(error)
