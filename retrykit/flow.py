"""THE algorithm: in which order things happen to an operation that may fail, and when it is tried again.

Everything that retrykit does, it does by driving this one generator: the sync and the async template, decorators, the block style, consumers.
The flow performs nothing. It yields steps (`retrykit.steps`) and is sent what came of them; a *driver* performs them, and does not know why.
So there is one order of effects, it can be read from top to bottom, and it can be tested without a clock, a store or a thread.

Why it is as it is:

*The failure is stored before anyone hears of it.* A consumer's failure makes its session roll back, and after that everybody has forgotten
it, except the history. So the order after a failure is: roll back, count, store, decide, tell the listeners, rethrow. (The decision is made
just before the write, so that the due time goes with it; deciding is a pure question, it changes nothing if the write then fails.)

*The history is dropped only when the outcome is sure*: after the commit, or in it (when the cache is in the same database, `JOIN`), and after
a recovery that succeeded. Dropping it when the callback returns would make a failing commit attempt 1 for ever.

*An attempt is reserved before it is made.* An attempt that kills its process never reports; two processes that got the same item would both
believe in attempt 1. So "attempt n is running" is stored first (a *flight*), unless the source says that this is the first delivery. A flight
counts against the limit while its owner lives, and as a failed attempt when its owner is gone. Every store is a compare-and-set: when somebody
else was faster, their facts are read and ours are applied to them, so the count is exact under any interleaving.

*A recovery is reserved too*, so that it happens once. If an exhausted history has vanished when it is to be recovered, somebody else has
brought the item to its end in the meantime, and the delivery is answered as a duplicate. (A history that vanishes *before an attempt* may
also have been evicted or forgotten: then the attempt is made, because to run twice is better than to lose.)

*Pauses are spent before any transaction is begun*, and before the reservation: a process that dies waiting has made no attempt.

*Faults of stores, listeners and clocks change no outcome*: they come back as answers, are reported, and the flow goes on with less knowledge.
Where a decision cannot be made, because a policy itself raises, the answer is no.

*Cancellation ends the main flow where it is*; `abort` then puts things straight: roll back, withdraw the reservation, tell the listeners.
"""

from __future__ import annotations

from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any

import attrs

from retrykit.breaker import CLOSED, CircuitBreakerRetryPolicy
from retrykit.context import RetryContext, RetryState
from retrykit.errors import (
    AttemptsInFlightError,
    BackOffInterruptedError,
    CommitInDoubtError,
    ExhaustedRetryError,
    RecoveryFailedError,
    TerminatedRetryError,
)
from retrykit.history import ErrorSummary, Flight, History, StoredError, Tally
from retrykit.listener import RetryListener
from retrykit.policy import Branch, RetryDecision, tallies_of
from retrykit.steps import (
    ANSWER_NOTHING,
    ATTEMPT,
    BEGIN,
    COMMIT,
    JOIN,
    NOW,
    RECOVER,
    RETURN,
    Give,
    Load,
    Notify,
    Pause,
    Probe,
    Raise,
    RaiseFrom,
    Remove,
    Report,
    RollBack,
    Save,
    VALUE,
    Step,
    Take,
)

Flow = Generator[Step, Any, Any]
Failure = tuple[Exception, float]


@attrs.define
class Plan:
    """What all calls of one template have in common."""

    name: str
    policy: Any
    back_off: Any
    recovery_policy: Any
    listeners: tuple[RetryListener, ...]
    reversed_listeners: tuple[RetryListener, ...]
    breakers: tuple[CircuitBreakerRetryPolicy, ...]
    budgets: tuple[Any, ...]
    breaker_key: str
    pauses: bool
    tallied: bool
    throw_last: bool
    remember: float | None
    lease: float


@attrs.define
class Call:
    """One call as the flow sees it: facts that the driver gives, and what the flow has learned of the store."""

    plan: Plan
    context: RetryContext
    state: RetryState | None = None
    key: str | None = None
    owner: str = ""
    transactional: bool = False
    recovers: Any = None
    seen: bool = False
    blind: bool = False
    settled: bool = False
    admitted: bool = False
    begun: bool = False


def run(call: Call) -> Flow:
    """A whole call, from its opening to its outcome."""
    plan, context = call.plan, call.context
    if call.key is not None:
        yield from _recall(call)
    for listener in plan.listeners:
        yield Notify(listener, "open", (context,))
    for budget in plan.budgets:
        yield Give(budget)
    outcome = ANSWER_NOTHING if context.duplicate else (yield from _operate(call))
    if plan.listeners:
        yield from close(call, outcome.error if isinstance(outcome, Raise | RaiseFrom) else None)
    yield outcome


def close(call: Call, error: BaseException | None) -> Flow:
    """Tell the listeners that the call is over; always."""
    call.context.closed = True
    for listener in call.plan.reversed_listeners:
        yield Notify(listener, "close", (call.context, error))


def _operate(call: Call) -> Flow:
    """Attempts, until one succeeds, or the failure is rethrown, or nothing is left but recovery."""
    plan, context = call.plan, call.context
    while True:
        history = context._history
        made, call.begun = call.begun, False
        if not made and (call.key is not None or plan.breakers or (history is not None and history.veto is not None)):
            ending = yield from _before_attempt(call)
            if ending is not None:
                return ending
        failure = (yield from _transaction(call, ATTEMPT)) if call.transactional else (yield ATTEMPT)
        if failure is None:
            return (yield from _succeed(call))
        if not isinstance(failure, tuple):
            return failure
        error = failure[0]
        decision = yield from _fail(call, failure)
        rethrow = call.state is not None and _rethrows(call.state, error)
        if decision.retry and not rethrow:
            fault = (yield Pause(decision.delay)) if decision.delay > 0 else None
            if fault is not None:
                return _interrupted(call, decision.delay, fault)
            context._facts().not_before = None
            context.attempt += 1
            continue
        if rethrow and (decision.retry or _recovers_later(call)):
            return Raise(error)
        return (yield from _recover(call, decision))


# -- before an attempt


def _before_attempt(call: Call) -> Flow:
    """Is another attempt allowed, is it due, is it reserved? The ending if it is not to be made, None if it is."""
    context = call.context
    context._pause = 0.0
    while True:
        if context.duplicate:
            return ANSWER_NOTHING
        refusal = yield from _standing(call)
        if refusal is not None:
            return refusal
        fault = yield from _wait_until_due(call)
        if fault is not None:
            return fault
        if call.key is None or (yield from _reserve(call)):
            break
        yield from _recall(call, again=True)
    refused = yield from _admit(call)
    if refused is not None:
        yield from _withdraw(call)
        return (yield from _recover(call, refused))
    context.attempt = context.retry_count + 1
    return None


def _standing(call: Call) -> Flow:
    """What the history says before anything is tried: None to go on, or the ending."""
    context, history = call.context, call.context._history
    if history is None or not (history.failures or history.veto or history.in_flight):
        return None
    decision = _allowed(call)
    if history.in_flight:
        # What runs elsewhere may still succeed, so it is neither repeated beyond the limit nor recovered.
        running = len(history.in_flight)
        if not (decision.retry and _ask(call, Branch(context, "", extra=running)).retry):
            reason = f"{running} running"
            return RaiseFrom(_facts(AttemptsInFlightError, call, running=running, reason=reason), history.last_error)
    if decision.retry:
        return None
    context.decision = decision
    return (yield from _recover(call, decision))


def _wait_until_due(call: Call) -> Flow:
    history = call.context._history
    if history is None or history.not_before is None:
        return None
    due = history.not_before - (yield NOW)
    if due <= 0:
        return None
    fault = yield Pause(due)
    return None if fault is None else _interrupted(call, due, fault)


def _interrupted(call: Call, seconds: float, fault: BaseException) -> RaiseFrom:
    return RaiseFrom(_facts(BackOffInterruptedError, call, seconds=seconds), fault)


def _admit(call: Call) -> Flow:
    """Ask the circuit breakers; the refusal of the first that is open."""
    for number, breaker in enumerate(call.plan.breakers):
        refusal = yield from _shift(call, number, lambda state, now, breaker=breaker: breaker.admit(state, now))
        if refusal is not None:
            return refusal
    call.admitted = True
    return None


def _record(call: Call, outcome: Any) -> Flow:
    """Tell the circuit breakers how the call through them ended."""
    call.admitted = False
    for number, breaker in enumerate(call.plan.breakers):
        yield from _shift(call, number, lambda state, now, breaker=breaker: (breaker.record(state, outcome, now), None))


def _shift(call: Call, number: int, transition: Any) -> Flow:
    """Change the state of a circuit breaker by compare-and-set, as often as others change it in between."""
    key = f"{call.plan.breaker_key}{number}"
    while True:
        stored = yield Load(key)
        if isinstance(stored, Exception):
            yield Report("circuit breaker", stored)
            return None
        now = yield NOW
        state = CLOSED if stored is None else stored.snapshot["breaker"]
        changed, verdict = transition(state, now)
        if changed == state:
            return verdict
        saved = yield Save(key, {"format": 1, "name": call.plan.name, "retry_count": 0, "breaker": dict(changed)}, stored and stored.version)
        if saved is not None:
            if isinstance(saved, Exception):
                yield Report("circuit breaker", saved)
            return verdict


# -- decisions


def _allowed(call: Call) -> RetryDecision:
    """The decision for the next attempt, from what the history tells; a veto comes before every policy."""
    reason = call.context.veto_reason
    if reason is not None:
        return RetryDecision(False, 0.0, f"vetoed: {reason}")
    return _ask(call, call.context)


def _ask(call: Call, context: Any) -> RetryDecision:
    try:
        return call.plan.policy.decide(context)  # type: ignore[no-any-return]
    except Exception as fault:  # noqa: BLE001 - a policy may call user code; a decision that cannot be made is a no
        return _undecided("retry policy", fault)


def _undecided(what: str, fault: Exception) -> RetryDecision:
    return RetryDecision(False, 0.0, f"the {what} raised {type(fault).__name__}: {fault}")


def _decide(call: Call) -> RetryDecision:
    """The decision after a failure: again? when? The pause is proposed first, so that a policy with a deadline can refuse it."""
    context, plan = call.context, call.plan
    if plan.pauses:
        try:
            context._pause = max(0.0, plan.back_off.delay(context))
        except Exception as fault:  # noqa: BLE001 - as in `_ask`
            return _undecided("back-off policy", fault)
    decision = _allowed(call)
    delay = decision.delay or context._pause
    if not decision.retry or delay <= 0:
        return decision
    context._facts().last_delay = delay
    return attrs.evolve(decision, delay=delay, next_at=datetime.fromtimestamp(context._wall_of(context._now) + delay, UTC))


def _rethrows(state: RetryState, error: Exception) -> bool:
    try:
        return bool(state.rollback_for(error))
    except Exception:  # noqa: BLE001 - a user's predicate that fails cannot say that no roll-back is needed
        return True


def _recovers_later(call: Call) -> bool:
    return call.state is not None and call.state.recover_on_redelivery


# -- the attempt and its transaction


def _transaction(call: Call, step: Step) -> Flow:
    """The step inside a transaction of its own. None, the failure, or an ending."""
    failure = yield BEGIN
    if failure is not None:
        return failure
    failure = yield step
    if failure is not None:
        yield RollBack(failure[0])
        return failure
    ending = yield from _settle_within(call)
    if ending is not None:
        # Left as after a failure: nothing of this attempt may stay.
        yield RollBack(_facts(TerminatedRetryError, call, reason="somebody else had the outcome"))
        yield from _withdraw(call)
        return ending
    failure = yield COMMIT
    if failure is None:
        return None
    call.settled = False
    if isinstance(failure[0], CommitInDoubtError):
        yield from _withdraw(call)
        return Raise(failure[0])
    return failure


def _settle_within(call: Call) -> Flow:
    """Settle the history inside the work's own transaction, if the cache can join it. The ending if somebody else had the outcome."""
    if not _has_to_settle(call) or not (yield JOIN):
        return None
    while True:
        answer = yield from _settling(call, joined=True)
        if isinstance(answer, Exception):
            return RaiseFrom(_facts(CommitInDoubtError, call), answer)
        if answer not in (None, False):
            call.settled = True
            return None
        stored = yield Load(call.key or "", joined=True)
        ending = _overtaken(call, stored)
        if ending is not None:
            return ending


def _overtaken(call: Call, stored: Any) -> Any:
    """Somebody else changed the history while the attempt ran: may it still settle?"""
    context = call.context
    theirs = _history_of(stored)
    if isinstance(theirs, Exception):
        return RaiseFrom(_facts(CommitInDoubtError, call), theirs)
    if theirs is not None and theirs.completed_at is not None:
        context.duplicate = True
        return ANSWER_NOTHING
    if context._flight is not None and (theirs is None or theirs.flight(context._flight) is None):
        reason = "the attempt was believed dead, counted as a crash and overtaken; its work is rolled back"
        return RaiseFrom(_facts(TerminatedRetryError, call, reason=reason), None)
    context._version = None if stored is None else stored.version
    return None


def _has_to_settle(call: Call) -> bool:
    if call.key is None or call.blind or call.settled:
        return False
    return call.plan.remember is not None or call.context._version is not None


def _settling(call: Call, *, joined: bool) -> Flow:
    """One try to bring the stored history to its end: a completion mark, or nothing left."""
    context, key = call.context, call.key or ""
    if call.plan.remember is None:
        if context._version is None:
            return True
        return (yield Remove(key, context._version, joined))
    now = yield NOW
    mark = History(
        failures=context.retry_count,
        fence=context.fence,
        recovered=context.recovered,
        completed_at=now,
        expires_at=now + call.plan.remember,
    )
    return (yield Save(key, mark.to_json(call.plan.name, context.snapshot()["key"]), context._version, joined))


def _settle(call: Call) -> Flow:
    """Settle the history after a confirmed outcome, when that was not done within the transaction."""
    if not _has_to_settle(call):
        return
    while True:
        answer = yield from _settling(call, joined=False)
        if isinstance(answer, Exception):
            yield Report("settle", answer)
            return
        if answer not in (None, False):
            return
        stored = yield Load(call.key or "")
        if stored is None or isinstance(stored, Exception):
            return
        call.context._version = stored.version


def _succeed(call: Call) -> Flow:
    plan = call.plan
    if plan.breakers:
        yield from _record(call, "success")
    if call.key is not None:
        yield from _settle(call)
    for listener in plan.reversed_listeners:
        yield Notify(listener, "on_success", (call.context, VALUE))
    return RETURN


# -- failures


def _fail(call: Call, failure: Failure) -> Flow:
    """Count, store, decide, tell: the decision."""
    plan, context = call.plan, call.context
    error, context._now = failure
    if plan.breakers:
        yield from _record(call, "failure")
    if call.key is None:
        _count(call, context._facts(), error, None)
        decision = _decide(call)
    else:
        decision = yield from _store_failure(call, error)
    for budget in plan.budgets:
        if decision.retry and not (yield Take(budget)):
            decision = RetryDecision(False, 0.0, "BudgetRetryPolicy: the last token was taken by another call")
    context.decision = decision
    if plan.listeners:
        decision = yield from _tell(call, error, decision)
    return decision


def _tell(call: Call, error: Exception, decision: RetryDecision) -> Flow:
    """Tell the listeners; one of them may veto what was decided, and the veto is stored too."""
    context = call.context
    vetoed = context.vetoed
    for listener in call.plan.reversed_listeners:
        yield Notify(listener, "on_error", (context, error, decision))
    if not context.vetoed or vetoed:
        return decision
    context._facts().exhausted = True
    if call.key is not None:
        yield from _save_veto(call)
    context.decision = _allowed(call)
    return context.decision


def _save_veto(call: Call) -> Flow:
    reason = call.context.veto_reason
    while not call.blind:
        saved = yield Save(call.key or "", call.context.snapshot(), call.context._version)
        if isinstance(saved, Exception):
            yield Report("veto", saved)
            return
        if saved is not None:
            call.context._version = saved
            return
        stored = yield Load(call.key or "")
        if not _take_over(call, stored):
            return
        call.context._facts().veto = reason


def _count(call: Call, history: History, error: Exception, at: float | None) -> None:
    """One more failed attempt. `at`: seconds since the epoch, None where nobody will store it."""
    context = call.context
    history.failures += 1
    if history.failures == 1:
        history.first_failed_at, context._first = at, context._now
    history.last_failed_at = at
    history.last_error = error
    history.fence = max(history.fence, 1)
    context.attempt = history.failures
    live = context._live or []
    live.append((history.failures, error, context._now))
    context._live = live[-10:]
    if call.plan.tallied:
        for branch in tallies_of(call.plan.policy, error, ""):
            tally = history.tallies.setdefault(branch, Tally(0, context.elapsed))
            tally.count += 1


def _store_failure(call: Call, error: Exception) -> Flow:
    """Count the failure in the stored history, whatever others store at the same time; the decision that follows from it."""
    context = call.context
    now = yield NOW
    while True:
        history = context._facts()
        if history.started_at is None:
            history.started_at = context._wall_of(context._started)
        if context._flight is not None and history.flight(context._flight) is None:
            # Somebody believed this attempt dead and counted it: it is counted once.
            history.last_error = error
        else:
            _count(call, history, error, now)
            if context._flight is not None:
                history.land(context._flight)
        decision = _decide(call)
        history.not_before = now + decision.delay if decision.retry and decision.delay > 0 else None
        history.exhausted, history.reason = not decision.retry, decision.reason
        stored = yield from _try_to_store(call, error)
        if stored:
            context._flight = None
            return decision


def _try_to_store(call: Call, error: Exception) -> Flow:
    """One compare-and-set of the history. False: somebody else was first, and theirs was read; True: it is stored, or cannot be."""
    context = call.context
    try:
        snapshot = context.snapshot()
    except Exception as fault:  # noqa: BLE001 - what the user keeps in attributes must not hide the business error
        yield from _not_stored(call, error, fault)
        return True
    saved = context._fault if call.blind else (yield Save(call.key or "", snapshot, context._version))
    if isinstance(saved, Exception):
        yield from _not_stored(call, error, saved)
        return True
    if saved is not None:
        context._version, call.seen = saved, True
        return True
    stored = yield Load(call.key or "")
    theirs = _history_of(stored)
    if isinstance(theirs, Exception):
        yield from _not_stored(call, error, theirs)
        return True
    _take_over(call, stored)
    return False


def _take_over(call: Call, stored: Any) -> bool:
    """Go on with the history that somebody else stored, keeping the user's attributes of this call. Whether there was one."""
    context = call.context
    mine, theirs = context._facts(), _history_of(stored)
    if isinstance(theirs, Exception):
        return False
    context._live = None
    context._version = None if stored is None else stored.version
    context._history = history = theirs or History()
    history.attributes.update(mine.attributes)
    history.fence = max(history.fence, mine.fence)
    history.veto = history.veto or mine.veto
    return theirs is not None


def _history_of(stored: Any) -> History | Exception | None:
    """The history in what a cache gave; the fault if it gave none, or one that cannot be read."""
    if stored is None or isinstance(stored, Exception):
        return stored
    try:
        return History.from_json(stored.snapshot)
    except Exception as fault:  # noqa: BLE001 - whatever is wrong with it: it is not ours to overwrite
        return fault


def _not_stored(call: Call, error: Exception, fault: BaseException) -> Flow:
    """The failure could not be stored: its exception says so, and goes on its way."""
    error.add_note(f"retrykit: this failure of {call.plan.name!r} was not stored: {type(fault).__name__}: {fault}")
    yield Report("store", fault)


# -- the history


def _recall(call: Call, *, again: bool = False) -> Flow:
    """Load what is known of the key."""
    state, context = call.state, call.context
    if state is None or call.blind or (state.redelivered is False and not state.fresh and not again):
        return
    stored = yield Load(call.key or "")
    history = _history_of(stored)
    if isinstance(history, Exception):
        yield from _lose_sight(call, history)
        return
    vetoed = context.veto_reason if again else None
    context._version = None if stored is None else stored.version
    if history is not None:
        yield from _read(call, state, history)
    elif again:
        context._history = None
    if vetoed:
        context.veto(vetoed)


def _lose_sight(call: Call, fault: Exception) -> Flow:
    """The store cannot be read: go on without it, and store nothing over what cannot be seen."""
    call.blind = True
    call.context._fault = fault
    yield Report("load", fault)


def _read(call: Call, state: RetryState, history: History) -> Flow:
    context = call.context
    now = yield NOW
    if history.completed_at is not None:
        over = history.expires_at is not None and history.expires_at <= now
        context.duplicate = not (over or state.fresh)
        context._history = history if context.duplicate else History(fence=history.fence)
        return
    if state.fresh and not call.seen:
        context._history = History(fence=history.fence)
        call.seen = True
        return
    call.seen = True
    context._history = history
    for flight in history.in_flight:
        gone = state.redelivered is True or flight.until <= now or (yield Probe(flight.owner))
        if gone:
            _crashed(history, flight, now)


def _crashed(history: History, flight: Flight, now: float) -> None:
    """An attempt that never ended is a failed attempt; a recovery that never ended is a failed recovery."""
    history.land(flight.fence)
    error = StoredError.of_crash(flight.fence, flight.owner)
    if flight.recovery:
        history.recovery_failures += 1
        return
    history.failures += 1
    history.crashes += 1
    history.last_error = error
    history.first_failed_at = now if history.first_failed_at is None else history.first_failed_at
    history.last_failed_at = now
    history.errors = (*history.errors, ErrorSummary(history.failures, error.type, error.message, now))[-10:]


def _reserve(call: Call) -> Flow:
    """Store that an attempt is running, if it is to be journaled. False: somebody else stored something first."""
    state, context = call.state, call.context
    if state is None or call.blind:
        return True
    if state.journal == "never" or (state.journal == "redelivered" and state.redelivered is False):
        if context._history is not None:
            context._history.fence += 1
        return True
    return (yield from _take_off(call, recovery=False))


def _take_off(call: Call, *, recovery: bool) -> Flow:
    """Store a flight. False: somebody else stored something first."""
    context = call.context
    now = yield NOW
    history = context._facts()
    if history.started_at is None:
        history.started_at = context._wall_of(context._started)
    history.fence += 1
    history.in_flight = (*history.in_flight, Flight(history.fence, call.owner, now, now + call.plan.lease, recovery))
    saved = yield Save(call.key or "", context.snapshot(), context._version)
    if saved is None:
        return False
    if isinstance(saved, Exception):
        # Without a reservation crashes go uncounted, but the work can be done: a store's fault changes no outcome.
        history.land(history.fence)
        yield Report("journal", saved)
        return True
    context._flight, context._version, call.seen = history.fence, saved, True
    return True


def _withdraw(call: Call) -> Flow:
    """The reserved attempt will not report: it never was one."""
    context = call.context
    flight, context._flight = context._flight, None
    while flight is not None:
        history = context._facts()
        history.land(flight)
        known = history.failures or history.veto or history.attributes or history.in_flight
        step: Step = (
            Save(call.key or "", context.snapshot(), context._version) if known else Remove(call.key or "", context._version)
        )
        answer = yield step
        if isinstance(answer, Exception):
            yield Report("withdraw", answer)
        if answer not in (None, False):
            context._version = None if answer is True or isinstance(answer, Exception) else answer
            return
        stored = yield Load(call.key or "")
        if not _take_over(call, stored) or context._facts().flight(flight) is None:
            return


# -- recovery


def _recover(call: Call, decision: RetryDecision) -> Flow:
    """No further attempt is allowed: a substitute outcome, or an error that says so."""
    context = call.context
    history = context._facts()
    history.exhausted, history.reason = True, decision.reason
    context.decision = decision
    if not decision.recoverable or call.recovers is None or not call.recovers(history.last_error):
        return _give_up(call, decision)
    if call.key is not None and not call.blind:
        ending = yield from _claim(call)
        if ending is not None:
            return ending
    return (yield from _recovery(call))


def _give_up(call: Call, decision: RetryDecision) -> Raise | RaiseFrom:
    last = call.context.last_error
    if call.state is None and isinstance(last, Exception):
        return Raise(last)
    if last is None and call.context.vetoed:
        return RaiseFrom(_facts(TerminatedRetryError, call, reason=decision.reason), None)
    if last is not None and (call.plan.throw_last or not decision.recoverable):
        return Raise(last)
    return RaiseFrom(_facts(ExhaustedRetryError, call, attempts=call.context.retry_count, reason=decision.reason), last)


def _claim(call: Call) -> Flow:
    """Reserve the recovery, so that it happens once. The ending if somebody else has it."""
    context = call.context
    while not (yield from _take_off(call, recovery=True)):
        error = context.last_error
        yield from _recall(call, again=True)
        if context.duplicate or context._version is None:
            context.duplicate = True
            return ANSWER_NOTHING
        history = context._facts()
        if history.in_flight:
            running = len(history.in_flight)
            return RaiseFrom(_facts(AttemptsInFlightError, call, running=running, reason="being recovered"), error)
        history.exhausted = True
    return None


def _recovery(call: Call) -> Flow:
    plan, context = call.plan, call.context
    failed = 0
    while True:
        # Said before it has happened: the completion mark, which tells of it, is written within the recovery's own transaction.
        context._facts().recovered = True
        failure = (yield from _transaction(call, RECOVER)) if call.transactional else (yield RECOVER)
        if failure is None:
            if call.key is not None:
                yield from _settle(call)
            for listener in plan.reversed_listeners:
                yield Notify(listener, "on_recover", (context, VALUE))
            return RETURN
        if not isinstance(failure, tuple):
            return failure
        context._facts().recovered = False
        failed += 1
        context._now = failure[1]
        if not _tries_recovery_again(plan, context, failed, failure[0]):
            context._facts().recovery_failures += failed
            yield from _withdraw(call)
            facts = _facts(RecoveryFailedError, call, attempts=failed, failure=context.last_error)
            return RaiseFrom(facts, failure[0])


def _tries_recovery_again(plan: Plan, context: RetryContext, failed: int, error: Exception) -> bool:
    try:
        return bool(plan.recovery_policy.decide(RecoveryView(context, failed, error)).retry)
    except Exception:  # noqa: BLE001 - a decision that cannot be made is a no
        return False


class RecoveryView:
    """The context as the recovery's own policy sees it: the failures of the recovery instead of the operation's."""

    def __init__(self, context: RetryContext, failed: int, error: Exception) -> None:
        self._context = context
        self.retry_count = failed
        self.last_error = error
        self.pause = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _facts(error_type: Any, call: Call, **facts: Any) -> Any:
    """One of our errors, with what is known of the call."""
    return error_type(name=call.plan.name, key=call.context.key, **facts)


# -- cancellation


def abort(call: Call, error: BaseException, *, opened: bool) -> Flow:
    """The call was cancelled or the interpreter is exiting: nothing counts, nothing stays reserved, the listeners are told."""
    if opened:
        yield RollBack(error)
    if call.admitted:
        yield from _record(call, "cancelled")
    if call.key is not None:
        yield from _withdraw(call)
    yield from close(call, error)
