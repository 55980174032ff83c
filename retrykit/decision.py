"""Again, when, and why: the decision after what the history tells, and the counting that it rests on."""

from __future__ import annotations

from typing import Any

import attrs

from retrykit.call import Call, Flow
from retrykit.check import seconds, wrong_type
from retrykit.context import instant
from retrykit.failure import message_of
from retrykit.history import MAX_ERRORS, History, Tally
from retrykit.policy import Branch, RetryDecision, tallies_of
from retrykit.state import RetryState
from retrykit.steps import Take


def allowed(call: Call, context: Any) -> RetryDecision:
    """The decision for the next attempt, from what the history tells; a veto comes before every policy."""
    try:
        decision: RetryDecision = call.plan.policy.decide(context)
        if decision.__class__ is not RetryDecision:
            raise wrong_type("decision", "a RetryDecision", decision)  # noqa: TRY301 - handled as what it is
    except Exception as fault:  # noqa: BLE001 - a policy may call user code; a decision that cannot be made is a no
        decision = undecided("retry policy", fault)
    history = call.context._history
    if history is None:
        return decision
    if history.evicted is not None:
        # Not all that was counted can be looked at any more.
        decision = attrs.evolve(decision, reason=history.evicted.told_in(decision.reason))
    if history.veto is None:
        return decision
    return RetryDecision(
        False, 0.0, ("vetoed: {}", history.veto), (decision,), None, decision.recoverable or decision.retry
    )


def undecided(what: str, fault: Exception) -> RetryDecision:
    """The decision where none could be made."""
    return RetryDecision(False, 0.0, f"the {what} raised {type(fault).__name__}: {message_of(fault)}")


def decide(call: Call) -> RetryDecision:
    """The decision after a failure. The pause is proposed first, so that a policy with a deadline can refuse it."""
    context = call.context
    if not call.plan.pauses:
        decision = allowed(call, context)
        return _scheduled(call, decision, 0.0) if decision.delay and decision.retry else decision
    try:
        pause = context._facts().pause = max(0.0, seconds("delay", call.plan.back_off.delay(context)))
    except Exception as fault:  # noqa: BLE001 - as in `allowed`
        return undecided("back-off policy", fault)
    return _scheduled(call, allowed(call, context), pause)


def _scheduled(call: Call, decision: RetryDecision, pause: float) -> RetryDecision:
    """The decision with its delay and its instant."""
    context = call.context
    if decision.delay > pause:
        # A policy that names a pause of its own: the others are asked again, with that pause before their eyes.
        context._facts().pause = decision.delay
        decision = allowed(call, context)
    delay = decision.delay or pause
    if not decision.retry or delay <= 0:
        return decision
    context._facts().last_delay = delay
    return attrs.evolve(decision, delay=delay, next_at=instant(context._wall_of(context._now) + delay))


def count(call: Call, error: Exception, at: float | None) -> None:
    """One more failed attempt. `at`: seconds since the epoch, None where nobody will store it."""
    context = call.context
    history = context._history
    if history is None:
        history = context._history = History()
    failures = history.failures = history.failures + 1
    if at is not None:
        history.last_failed_at = at
        if failures == 1:
            history.first_failed_at = at
    history.last_error = error
    context.attempt = failures
    live = history.live
    if live is None:
        history.live = [(failures, error, context._now)]
    else:
        live.append((failures, error, context._now))
        if failures > MAX_ERRORS:
            del live[:-MAX_ERRORS]
    if call.plan.tallied:
        for branch in tallies_of(call.plan.policy, error, ""):
            tally = history.tallies.setdefault(branch, Tally(0, context.elapsed))
            tally.count += 1


def rethrows(state: RetryState | None, error: Exception) -> bool:
    """Whether a stateful call rethrows this failure. A predicate that fails cannot say that no roll-back is needed."""
    try:
        return state is not None and bool(state.rollback_for(error))
    except Exception:  # noqa: BLE001 - as in `allowed`
        return True


def standing_decision(call: Call) -> RetryDecision:
    """The decision at a new delivery. What was decided about a recorded failure stays decided.

    Only what may have changed since is asked anew: the count (crashes, other processes), the time, a veto.
    """
    context, history = call.context, call.context._facts()
    # What the history was decided upon has been paid for: a budget is not asked a second time.
    decision = allowed(call, Branch(context, "", paid=True)) if call.plan.budgets else allowed(call, context)
    if not history.exhausted or history.veto is not None:
        return decision
    reason = history.reason if history.evicted is None else history.evicted.told_in(history.reason)
    return RetryDecision(False, 0.0, reason, (decision,), None, decision.recoverable)


def pay(call: Call, decision: RetryDecision) -> Flow:
    """Take what a retry costs from the shared budgets; the refusal if one of them has nothing left."""
    for budget in call.plan.budgets:
        if decision.retry and not (yield Take(budget)):
            reason = "BudgetRetryPolicy: the last token was taken by another call"
            return RetryDecision(False, 0.0, reason, (decision,), None, decision.recoverable)
    return decision


class RecoveryView:
    """The context as the recovery's own policy sees it: the failures of the recovery instead of the operation's."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._started = call.context._now
        self.retry_count = 0
        self.last_error: BaseException | None = None
        self.tallies: dict[str, Tally] = {}
        self.pause = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.context, name)

    @property
    def elapsed(self) -> float:
        """Seconds since the recovery was begun."""
        return max(0.0, self._call.context._now - self._started)

    def tries_again(self, error: Exception) -> bool:
        """Count a failed recovery, and ask its policy. A decision that cannot be made is a no."""
        policy = self._call.plan.recovery_policy
        self.retry_count += 1
        self.last_error = error
        for branch in tallies_of(policy, error, ""):
            self.tallies.setdefault(branch, Tally(0, self.elapsed)).count += 1
        try:
            return bool(policy.decide(self).retry)
        except Exception:  # noqa: BLE001 - as in `allowed`
            return False
