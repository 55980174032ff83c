"""A budget of retries shared by many callers: when everything fails, retrying everything makes it worse.

A token bucket (as in Finagle's and gRPC's retry budgets): every call deposits a fraction of a token, every retry takes
a whole one.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from retrykit.check import at_least, more_than, wrong_type
from retrykit.lock import lock_of
from retrykit.policy import RetryDecision
from retrykit.value import Value

ENOUGH: Final = 1 - 1e-6
"""A token: ten deposits of 0.1 are one, though their sum as floats is a little less."""


@attrs.define(eq=False, slots=False)
class RetryBudget:
    """Retries allowed to all who share this object: at most `ratio` of their calls, over a `reserve`.

    `ratio`: tokens a call deposits (0.1: one retry for ten calls). `reserve`: tokens at the beginning, and the most
    that can be saved up. Thread-safe. A pickled budget has the same bounds and is full.
    """

    ratio: float = attrs.field(default=0.1, validator=at_least(0))
    reserve: float = attrs.field(default=10.0, validator=more_than(0))
    _tokens: float = attrs.field(init=False, repr=False)
    _lock: Any = attrs.field(init=False, default=attrs.Factory(lock_of, takes_self=True), repr=False)

    def __attrs_post_init__(self) -> None:
        self._tokens = self.reserve

    def __reduce__(self) -> tuple[Any, ...]:
        return RetryBudget, (self.ratio, self.reserve)

    @property
    def tokens(self) -> float:
        """What is left: a retry needs 1."""
        return self._tokens

    def deposit(self) -> None:
        """A call was made."""
        with self._lock:
            self._tokens = min(self.reserve, self._tokens + self.ratio)

    def take(self) -> bool:
        """Pay for one retry; False if there is not enough left."""
        with self._lock:
            if self._tokens < ENOUGH:
                return False
            self._tokens = max(0.0, self._tokens - 1)
            return True


def _check_budget(_instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, RetryBudget):
        raise wrong_type(field.name, "a RetryBudget", value)


@attrs.frozen(eq=False, repr=False)
class BudgetRetryPolicy(Value):
    """Retry while the shared budget has a token.

    It sets no other limit: combine it with one in a `CompositeRetryPolicy`.
    Asking takes nothing; the token is taken when the whole policy has decided to retry, and if another caller was
    faster, that is a no.
    """

    budget: RetryBudget = attrs.field(validator=_check_budget)

    def decide(self, context: Any) -> RetryDecision:
        """Is there a token?"""
        if context.retry_count == 0:
            return RetryDecision(retry=True, reason="BudgetRetryPolicy: the first attempt is free")
        if getattr(context, "paid", False):
            return RetryDecision(True, 0.0, "BudgetRetryPolicy: this retry is paid for")
        tokens = self.budget.tokens
        return RetryDecision(
            tokens >= ENOUGH, 0.0, lambda: f"BudgetRetryPolicy: {tokens:.1f} of {self.budget.reserve:g} tokens left"
        )
