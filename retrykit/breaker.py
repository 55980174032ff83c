"""The circuit breaker: after many failures nobody asks the patient for a while, then a few ask carefully.

closed -> open (too many failures within the window) -> half-open (a few trial calls after `reset_timeout`) -> closed (a
trial succeeded) or open again (it failed). Nygard, "Release It!", 2nd ed. 2018, ch. 5.

The state is JSON data in the template's context cache, one per template name, changed by the pure functions below under
compare-and-set: threads share it, and processes whose cache is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

from retrykit.check import as_seconds, more_than, whole, wrong_value
from retrykit.policy import RetryDecision, RetryPolicy, SimpleRetryPolicy, is_policy, tallies_of
from retrykit.value import Value

MAX_CALLS: Final = 1_000
"""So many calls of the window are remembered at most."""

State = Mapping[str, Any]


def _check_rate(_instance: Any, field: Any, value: Any) -> None:
    more_than(0)(_instance, field, value)
    if value is not None and value > 1:
        raise wrong_value(field.name, "a share of calls, more than 0 and at most 1", value)


@attrs.frozen(eq=False, repr=False)
class CircuitBreakerRetryPolicy(Value):
    """A policy behind a circuit breaker: every attempt is a call through it.

    It opens when, within the last `open_timeout` seconds, `failure_threshold` calls failed and (if `failure_rate` is
    given) they were at least that share of the calls. It stays open for `reset_timeout` seconds; then
    `half_open_max_calls` trial calls at a time are let through. A success of a trial closes it, a failure opens it
    again. While it is open, calls go to their recovery, or raise `ExhaustedRetryError`.
    """

    delegate: RetryPolicy = attrs.field(factory=SimpleRetryPolicy, validator=is_policy)
    failure_threshold: int = attrs.field(default=5, validator=whole(1), kw_only=True)
    failure_rate: float | None = attrs.field(default=None, validator=_check_rate, kw_only=True)
    open_timeout: float = attrs.field(default=5.0, converter=as_seconds, validator=more_than(0), kw_only=True)
    reset_timeout: float = attrs.field(default=20.0, converter=as_seconds, validator=more_than(0), kw_only=True)
    half_open_max_calls: int = attrs.field(default=1, validator=whole(1), kw_only=True)

    @property
    def max_attempts(self) -> int | None:
        """The delegate's limit."""
        limit: int | None = getattr(self.delegate, "max_attempts", None)
        return limit

    def delegates(self) -> tuple[RetryPolicy, ...]:
        """The policy behind the breaker."""
        return (self.delegate,)

    def decide(self, context: Any) -> RetryDecision:
        """What the delegate decides; whether the circuit lets the call through is asked when it is made."""
        return self.delegate.decide(context)

    def tally(self, error: BaseException, branch: str) -> Any:
        """The branches of the delegate that count this failure."""
        return tallies_of(self.delegate, error, branch)

    # -- transitions: old state and instant in, new state and verdict out

    def admit(self, state: State, now: float) -> tuple[State, RetryDecision | None]:
        """A call wants through at `now` (seconds since the epoch). The new state, and the refusal if it may not."""
        if state["state"] == "closed":
            return state, None
        due = state["since"] + self.reset_timeout
        if state["state"] == "open":
            if now < due:
                return state, self._refusal("open", due - now)
            return {"state": "half-open", "since": now, "trials": 1}, None
        if now >= due:
            # Trials that never ended (their process died) do not keep the gate shut for ever.
            return {"state": "half-open", "since": now, "trials": 1}, None
        if state["trials"] >= self.half_open_max_calls:
            return state, self._refusal("half-open, its trial calls are under way", due - now)
        return {**state, "trials": state["trials"] + 1}, None

    def _refusal(self, state: str, wait: float) -> RetryDecision:
        reason = f"CircuitBreakerRetryPolicy: the circuit is {state}; ask again in {wait:.3f} s"
        return RetryDecision(retry=False, reason=reason)

    def record(self, state: State, outcome: Literal["success", "failure", "cancelled"], now: float) -> State:
        """A call that was let through has ended at `now`. The new state."""
        if outcome == "cancelled":
            trials = max(0, state.get("trials", 0) - 1)
            return {**state, "trials": trials} if state["state"] == "half-open" else state
        failed = outcome == "failure"
        if state["state"] == "half-open":
            return {"state": "open", "since": now} if failed else {"state": "closed", "calls": []}
        if state["state"] == "open":
            return state
        recent = [call for call in state["calls"] if call[0] > now - self.open_timeout][-MAX_CALLS + 1 :]
        calls = [*recent, [now, failed]]
        return (
            {"state": "open", "since": now} if failed and self._too_many(calls) else {"state": "closed", "calls": calls}
        )

    def _too_many(self, calls: list[Any]) -> bool:
        failures = sum(1 for _, failed in calls if failed)
        return failures >= self.failure_threshold and failures >= (self.failure_rate or 0) * len(calls)
