"""THE algorithm: in which order things happen to an operation that may fail, and when it is tried again.

Everything that retrykit does, it does by driving this one generator: the sync and the async template, decorators, the
block style, consumers. The flow performs nothing. It yields steps (`retrykit.steps`) and is sent what came of them; a
*driver* performs them, and does not know why. So there is one order of effects, it can be read from top to bottom, and
it can be tested without a clock, a store or a thread.

Why it is as it is:

*The failure is stored before anyone hears of it.* A consumer's failure makes its session roll back, and after that
everybody has forgotten it, except the history. So the order after a failure is: roll back, count, store, decide, tell
the listeners, rethrow. (The decision is made just before the write, so that the due time goes with it; deciding is a
pure question, it changes nothing if the write then fails.)

*The history is dropped only when the outcome is sure*: after the commit, or in it (when the cache is in the same
database, `JOIN`), and after a recovery that succeeded. Dropping it when the callback returns would make a failing
commit attempt 1 for ever.

*An attempt is reserved before it is made.* An attempt that kills its process never reports; two processes that got the
same item would both believe in attempt 1. So "attempt n is running" is stored first (a *flight*), unless the source
says that this is the first delivery. A flight counts against the limit while its owner lives, and as a failed attempt
when its owner is gone. Every store is a compare-and-set: when somebody else was faster, their facts are read and ours
are applied to them, so the count is exact under any interleaving.

*A recovery is reserved too*, so that it happens once. If an exhausted history has vanished when it is to be recovered,
and the store neither evicts nor leaves marks of what was settled, somebody else has brought the item to its end in the
meantime, and the delivery is answered as a duplicate. (Where it may have been evicted it is recovered, and a history
that vanishes *before an attempt* lets the attempt be made: to run twice is better than to lose. Eviction leaves a
tombstone, from which everything here goes on as from any history; but those are bounded too.)

*Pauses are spent before any transaction is begun*, and before the reservation: a process that dies waiting has made no
attempt.

*Faults of stores, listeners and clocks change no outcome*: they come back as answers, are reported, and the flow goes
on with less knowledge. Where a decision cannot be made, because a policy itself raises, the answer is no.

*Cancellation ends the main flow where it is*; `abort` then puts things straight: roll back, withdraw the reservation,
tell the listeners.
"""

from __future__ import annotations

from typing import Any

from retrykit.call import Call, Failure, Flow, raising
from retrykit.circuit import admit, record
from retrykit.decision import RecoveryView, allowed, count, decide, pay, rethrows, standing_decision
from retrykit.errors import (
    AttemptsInFlightError,
    BackOffInterruptedError,
    CommitInDoubtError,
    ExhaustedRetryError,
    RecoveryFailedError,
    TerminatedRetryError,
)
from retrykit.flight import reserve, take_off, withdraw
from retrykit.memory import collision, keep_veto, recall, store_failure
from retrykit.policy import Branch, RetryDecision
from retrykit.settlement import has_to_settle, settle, settle_within
from retrykit.steps import (
    ANSWER_NOTHING,
    ATTEMPT,
    BEGIN,
    COMMIT,
    NOW,
    RECOVER,
    RETURN,
    VALUE,
    Give,
    Notify,
    Pause,
    Raise,
    RollBack,
    Step,
)


def run(call: Call) -> Flow:  # noqa: C901, PLR0912 - the one order of effects, to be read from top to bottom
    """A whole call: opened, attempted until an outcome is reached, closed. The last step is the outcome.

    `quiet` calls have nothing to load, to store and nobody to tell: they are most calls, and go through the same lines
    without asking. A first delivery is one until it fails.
    """
    plan, context = call.plan, call.context
    stateful, quiet = call.state is not None, plan.quiet and (call.key is None or _is_news(call))
    first, call.first = call.first, None
    outcome: Any = None if quiet or first is not None else (yield from _open(call))
    while outcome is None:
        if first is not None:
            failure, first = first, None
        elif not quiet and (outcome := (yield from _before_attempt(call))) is not None:
            break
        else:
            failure = (yield from _transaction(call, ATTEMPT)) if call.transactional else (yield ATTEMPT)
        if failure is None:
            outcome = RETURN if quiet else (yield from _succeed(call))
            break
        if type(failure) is not tuple:
            if call.admitted:
                yield from record(call, "cancelled")
            outcome = failure
            break
        error, context._now = failure
        if call.key is None:
            count(call, error, None)
            decision = context.decision = decide(call) if quiet else (yield from pay(call, decide(call)))
        else:
            quiet = False
            decision = context.decision = yield from store_failure(call, error)
        if not plan.quiet:
            decision = context.decision = yield from _tell(call, error, decision)
        rethrow = stateful and rethrows(call.state, error)
        if rethrow and (decision.retry or _recovers_later(call)):
            outcome = Raise(error)
        elif not decision.retry:
            outcome = yield from _recover(call, decision)
        elif decision.delay <= 0 or (outcome := (yield from _pause(call, decision))) is None:
            context.attempt += 1
    if call.key is not None and type(outcome) is Raise:
        yield from keep_veto(call)
    if plan.listeners:
        yield from close(call, outcome.error if type(outcome) is Raise else None)
    yield outcome


def _is_news(call: Call) -> bool:
    """Whether nothing is stored of the item, as its source says, and nothing is to be before an attempt has failed."""
    state = call.state
    return state is not None and state.redelivered is False and state.plain and call.plan.remember is None


def _open(call: Call) -> Flow:
    """Load what is known of the item, and tell the listeners that a call begins. `ANSWER_NOTHING` for a duplicate."""
    if call.key is not None:
        yield from recall(call)
    for listener in call.plan.listeners:
        yield Notify(listener, "open", (call.context,))
    for budget in call.plan.budgets:
        yield Give(budget)
    return ANSWER_NOTHING if call.context.duplicate else None


def close(call: Call, error: BaseException | None) -> Flow:
    """Tell the listeners that the call is over; always."""
    call.context.closed = True
    if call.to_close is None:
        call.to_close = list(call.plan.listeners)
    # Each is told once, also when the telling itself is interrupted and begun again.
    while call.to_close:
        yield Notify(call.to_close.pop(), "close", (call.context, error))


# -- before an attempt


def _before_attempt(call: Call) -> Flow:
    """Is another attempt allowed, is it due, is it reserved? The outcome if it is not to be made, None if it is."""
    context = call.context
    while not context.duplicate:
        if context._history is not None:
            context._history.pause = 0.0
        refusal = yield from _standing(call)
        due = 0.0 if refusal is not None else (yield from _due_in(call))
        # Where what says no, or wait, is only what this process knew last, it is looked up first.
        if not call.recent or (refusal is None and due <= 0):
            if refusal is not None:
                return refusal if type(refusal) is Raise else (yield from _recover(call, refusal))
            if due > 0 and (outcome := (yield from _wait(call, due))) is not None:
                return outcome
            if call.key is None or (yield from reserve(call)):
                return (yield from _pass_the_gate(call))
            # Somebody else stored something first.
        yield from recall(call, again=True)
    return ANSWER_NOTHING


def _pass_the_gate(call: Call) -> Flow:
    """Ask the circuit breakers, last of all: what they let through is made."""
    context = call.context
    refusal = yield from admit(call)
    if refusal is not None:
        yield from withdraw(call)
        return (yield from _recover(call, refusal))
    context.attempt = context.retry_count + 1
    return None


def _standing(call: Call) -> Flow:
    """What the history says before anything is tried: None to go on, the decision that refuses, or an outcome."""
    context, history = call.context, call.context._history
    if call.collision is not None:
        return Raise(collision(call, call.collision))
    if history is None or not (history.failures or history.veto or history.in_flight or history.exhausted):
        return None
    if call.plan.timed:
        yield NOW
    decision = standing_decision(call)
    running = len(history.in_flight)
    if running and not (decision.retry and allowed(call, Branch(context, "", extra=running, paid=True)).retry):
        # What runs elsewhere may still succeed, so it is neither repeated beyond the limit nor recovered.
        return _in_flight(call, context.last_error, f"{running} running")
    return None if decision.retry else decision


def _in_flight(call: Call, cause: BaseException | None, reason: str) -> Raise:
    flights = call.context._facts().in_flight
    until = min(flight.until for flight in flights)
    return raising(AttemptsInFlightError, call, cause, running=len(flights), until=until, reason=reason)


def _due_in(call: Call) -> Flow:
    """For how many seconds the next attempt is not due."""
    history = call.context._history
    if history is None or history.not_before is None:
        return 0.0
    due = history.not_before - (yield NOW)
    # A wall clock that was set back makes no pause longer than the back-off asked for.
    return min(due, history.last_delay) if history.last_delay else due


def _wait(call: Call, seconds: float) -> Flow:
    """The pause before an attempt. The outcome if it was interrupted."""
    fault = yield Pause(seconds)
    return None if fault is None else raising(BackOffInterruptedError, call, fault, seconds=seconds)


def _pause(call: Call, decision: RetryDecision) -> Flow:
    """The pause before a retry in place. The outcome if it was interrupted, or if somebody vetoed meanwhile."""
    context = call.context
    fault = yield Pause(decision.delay)
    if fault is not None:
        return raising(BackOffInterruptedError, call, fault, seconds=decision.delay)
    context._facts().not_before = None
    if call.plan.timed:
        # Pauses oversleep: the deadline is held against the time that it is now.
        yield NOW
        context._facts().pause = 0.0
    if not (call.plan.timed or context.vetoed) or (decision := allowed(call, context)).retry:
        return None
    return (yield from _recover(call, decision))


# -- the attempt and its transaction


def _transaction(call: Call, step: Step) -> Flow:
    """The step inside a transaction of its own. None, the failure, or an outcome."""
    failure = yield BEGIN
    if failure is not None:
        return (yield from _at_the_edge(call, failure))
    failure = yield step
    if failure is not None:
        yield RollBack(failure[0])
        return failure
    if step is RECOVER:
        call.context._facts().recovered = True
    outcome = (yield from settle_within(call)) if has_to_settle(call) else None
    if type(outcome) is tuple:
        # The transaction has a fault. It cannot commit, and that is as good as a commit that failed.
        yield RollBack(outcome[0])
        return outcome
    if outcome is not None:
        # Left as after a failure: nothing of this attempt may stay.
        left = raising(TerminatedRetryError, call, None, reason="somebody else had the outcome")
        yield RollBack(left.error)
        yield from withdraw(call)
        return outcome
    failure = yield COMMIT
    if failure is None:
        return None
    call.settled, call.unsent = False, None
    return (yield from _at_the_edge(call, failure))


def _at_the_edge(call: Call, failure: Failure) -> Flow:
    """A transaction that did not open or commit is a failed attempt; unless it says itself that nobody can know."""
    if not isinstance(failure[0], CommitInDoubtError):
        return failure
    yield from withdraw(call)
    return Raise(failure[0])


def _succeed(call: Call) -> Flow:
    plan = call.plan
    if plan.breakers:
        yield from record(call, "success")
    if call.key is not None:
        yield from settle(call)
    for listener in plan.reversed_listeners:
        yield Notify(listener, "on_success", (call.context, VALUE))
    return RETURN


# -- failures


def _tell(call: Call, error: Exception, decision: RetryDecision) -> Flow:
    """Tell those who share in the outcome of an attempt: the decision when all have been heard."""
    plan = call.plan
    if plan.breakers:
        yield from record(call, "failure")
    return (yield from _tell_listeners(call, error, decision)) if plan.listeners else decision


def _tell_listeners(call: Call, error: Exception, decision: RetryDecision) -> Flow:
    """One of them may veto what was decided, and the veto is stored too."""
    context = call.context
    vetoed = context.vetoed
    for listener in call.plan.reversed_listeners:
        yield Notify(listener, "on_error", (context, error, decision))
    if not context.vetoed or vetoed:
        return decision
    history = context._facts()
    history.exhausted, history.not_before = True, None
    if call.key is not None:
        yield from keep_veto(call)
    return allowed(call, context)


def _recovers_later(call: Call) -> bool:
    return call.state is not None and call.state.recover_on_redelivery


# -- recovery


def _recover(call: Call, decision: RetryDecision) -> Flow:
    """No further attempt is allowed: a substitute outcome, or an error that says so."""
    context = call.context
    if context.duplicate:
        return ANSWER_NOTHING
    history = context._facts()
    history.exhausted, context.decision = True, decision
    context.attempt = max(1, history.failures)
    if call.key is not None:
        history.reason = decision.reason
    if not decision.recoverable or call.recovers is None or not call.recovers(context.last_error):
        return _give_up(call, decision)
    if call.key is not None and not call.blind:
        outcome = yield from _claim(call)
        if outcome is not None:
            return outcome
    return (yield from _recovery(call))


def _give_up(call: Call, decision: RetryDecision) -> Raise:
    last = call.context.last_error
    if last is None and call.context.vetoed:
        return raising(TerminatedRetryError, call, None, reason=decision.reason)
    if last is not None and (call.state is None or call.plan.throw_last or not decision.recoverable):
        return Raise(last)
    return raising(ExhaustedRetryError, call, last, attempts=call.context.retry_count, reason=decision.reason)


def _claim(call: Call) -> Flow:
    """Reserve the recovery, so that it happens once. The outcome if somebody else has it."""
    context = call.context
    while not (yield from take_off(call, recovery=True)):
        error = context.last_error
        yield from recall(call, again=True)
        if call.collision is not None:
            return Raise(collision(call, call.collision))
        if context.duplicate or (call.version is None and not _may_be_evicted(call)):
            context.duplicate = True
            return ANSWER_NOTHING
        history = context._facts()
        if history.in_flight:
            return _in_flight(call, error, "it is being recovered")
        history.exhausted = True
    return None


def _may_be_evicted(call: Call) -> bool:
    """Whether a history that vanished need not have been settled.

    A settled one would have left a mark, or is never evicted. (An evicted one has left a tombstone, and then has not
    vanished; unless there were too many, or it was too old.)
    """
    return call.plan.remember is not None or call.plan.evicts


def _recovery(call: Call) -> Flow:
    context = call.context
    view = RecoveryView(call)
    while True:
        call.reporting = False
        failure = (yield from _transaction(call, RECOVER)) if call.transactional else (yield RECOVER)
        if failure is None:
            context._facts().recovered = True
            if call.key is not None:
                yield from settle(call)
            for listener in call.plan.reversed_listeners:
                yield Notify(listener, "on_recover", (context, VALUE))
            return RETURN
        if type(failure) is not tuple:
            return failure
        context._facts().recovered = False
        error, context._now = failure
        if not view.tries_again(error):
            context._facts().recovery_failures += view.retry_count
            yield from withdraw(call)
            facts = {"attempts": view.retry_count, "failure": context.last_error}
            return raising(RecoveryFailedError, call, error, **facts)


# -- cancellation


def abort(call: Call, error: BaseException, *, opened: bool) -> Flow:
    """The call was cancelled or the interpreter is exiting.

    Nothing counts, nothing stays reserved, the listeners are told.
    """
    if opened:
        yield RollBack(error)
    if call.admitted:
        yield from record(call, "cancelled")
    yield from withdraw(call)
    yield from close(call, error)
