"""The flow's dealings with the store: recalling, reserving, storing a failure, settling. See the essay in
`retrykit.flow` for the why.

Every write is a compare-and-set. When it finds that somebody else was first, their facts are read and ours are applied
to them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from retrykit.call import Call, Flow, raising
from retrykit.context import RetryContext, first_fence
from retrykit.decision import count, decide, pay
from retrykit.errors import CommitInDoubtError, TerminatedRetryError
from retrykit.history import Flight, History, StoredError, message_of
from retrykit.steps import ANSWER_NOTHING, JOIN, NOW, Load, Probe, Remove, Report, Save, Step

# -- recalling


def recall(call: Call, *, again: bool = False) -> Flow:
    """Load what is known of the key. `again`: after somebody else was first with a write."""
    state, context = call.state, call.context
    if state is None or call.blind or (state.redelivered is False and not state.fresh and not again):
        return
    stored = yield Load(call.key or "")
    history = history_of(stored)
    if isinstance(history, Exception):
        # Go on without it, and store nothing over what cannot be seen.
        call.blind, call.fault = True, history
        yield Report("load", history)
        return
    mine = context._history
    call.version = None if stored is None else stored.version
    if history is not None:
        yield from _read(call, history)
    elif again:
        context._history = None
    if mine is not None:
        _keep_own(context._facts(), mine)


def _keep_own(theirs: History, mine: History) -> None:
    """What this call itself has said or seen, and nobody has stored.

    Its veto, and the live exception behind a stored description.
    """
    if mine.own_veto is not None:
        seen, said = mine.own_veto
        # A withdrawal takes back the veto that it saw, and no other.
        if said is not None or theirs.veto == seen:
            theirs.veto, theirs.own_veto = said, mine.own_veto
    if mine._attributes is not None:
        mine._attributes.say_to(theirs.attributes)
    last = mine.last_error
    if (
        isinstance(last, BaseException)
        and not isinstance(last, StoredError)
        and theirs.last_error == StoredError.of(last)
    ):
        theirs.last_error = last


def history_of(stored: Any) -> History | Exception | None:
    """The history in what a cache gave; the fault if it gave none, or one that cannot be read."""
    if stored is None or isinstance(stored, Exception):
        return stored
    try:
        return History.from_json(stored.snapshot)
    except Exception as fault:  # noqa: BLE001 - whatever is wrong with it: it is not ours to overwrite
        return fault


def _read(call: Call, history: History) -> Flow:
    """Take a loaded history for the item's own: or know it for a completion mark, or begin anew after it."""
    context, state = call.context, call.state
    assert state is not None  # noqa: S101 - only stateful calls have a history
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
    _forget_own_flights(call, history)
    for flight in history.in_flight:
        running = yield Probe(flight.owner)
        # What is certainly running is believed; of the others the source may know, or the lease decides.
        if running is False or (running is not True and (state.redelivered is True or flight.until <= now)):
            _crashed(call, history, flight, now)
    context.attempt = history.failures + 1


def _forget_own_flights(call: Call, history: History) -> None:
    """A flight of this call that it does not know of was stored by a write that seemed to fail.

    It is no attempt of its own.
    """
    own = (flight for flight in history.in_flight if flight.owner == call.owner and flight.fence != call.flight)
    for flight in own:
        history.land(flight.fence)


def _crashed(call: Call, history: History, flight: Flight, now: float) -> None:
    """An attempt that never ended is a failed attempt; a recovery that never ended is a failed recovery."""
    history.land(flight.fence)
    if flight.recovery:
        history.recovery_failures += 1
        return
    history.crashes += 1
    count(call, StoredError.of_crash(flight.fence, flight.owner), now)


def take_over(call: Call, stored: Any) -> bool:
    """Go on with the history that somebody else stored, keeping the user's attributes of this call.

    Whether there was one.
    """
    context = call.context
    mine, theirs = context._facts(), history_of(stored)
    if isinstance(theirs, Exception):
        return False
    call.version = None if stored is None else stored.version
    context._history = history = theirs or History()
    history.fence = max(history.fence, mine.fence)
    _keep_own(history, mine)
    _forget_own_flights(call, history)
    return theirs is not None


# -- reserving


def reserve(call: Call) -> Flow:
    """Store that an attempt is running, if it is to be journaled. False: somebody else stored something first."""
    state, context = call.state, call.context
    if state is None or call.blind:
        return True
    if state.journal == "never" or (state.journal == "redelivered" and state.redelivered is False):
        if context._history is not None:
            context._history.fence += 1 if context._history.fence else 0
        return True
    return (yield from take_off(call, recovery=False))


def take_off(call: Call, *, recovery: bool) -> Flow:
    """Store a flight. False: somebody else stored something first."""
    context = call.context
    now = yield NOW
    history = context._facts()
    _begun(call, history)
    history.fence = max(history.fence + 1, first_fence(now))
    history.in_flight = (*history.in_flight, Flight(history.fence, call.owner, now, now + call.plan.lease, recovery))
    # Known before it is answered: whoever is interrupted in the middle of the write withdraws it.
    call.flight = history.fence
    saved = yield Save(call.key or "", context.snapshot(), call.version)
    if saved is None:
        call.flight = None
        return False
    if isinstance(saved, Exception):
        # Without a reservation crashes go uncounted, but the work can be done: a store's fault changes no outcome.
        call.flight, call.doubtful = None, True
        history.land(history.fence)
        yield Report("journal", saved)
        return True
    call.version, call.seen, history.own_veto = saved, True, None
    return True


def _begun(call: Call, history: History) -> None:
    if history.started_at is None:
        history.started_at = call.context._wall_of(call.context._started)


def withdraw(call: Call) -> Flow:
    """The reserved attempt will not report: it never was one."""
    if call.flight is None:
        yield from keep_veto(call)
        return
    while call.flight is not None and (yield from _try_to_withdraw(call, call.flight)):
        pass
    call.flight = None


def _try_to_withdraw(call: Call, flight: int) -> Flow:
    """One compare-and-set of the history without the flight. True: try again, theirs still has it."""
    context, key = call.context, call.key or ""
    if call.version is not None:
        history = context._facts()
        history.land(flight)
        step: Step = Save(key, context.snapshot(), call.version) if _is_known(history) else Remove(key, call.version)
        answer = yield step
        if isinstance(answer, Exception):
            yield Report("withdraw", answer)
            return False
        if answer is not None and answer is not False:
            call.version = None if answer is True else answer
            return False
    stored = yield Load(key)
    if stored is None:
        # Settled or forgotten meanwhile: a veto of this call has nothing left to be about.
        context._facts().own_veto = None
    return take_over(call, stored) and context._facts().flight(flight) is not None


def _is_known(history: History) -> bool:
    """Whether a history says more than that nothing has happened."""
    facts = (history.failures, history.veto, history.in_flight, history.recovery_failures, history.attributes)
    return any(facts)


# -- storing a failure


def store_failure(call: Call, error: Exception) -> Flow:
    """Count the failure in the stored history, whatever others store at the same time.

    The decision that follows from it.
    """
    context = call.context
    now = yield NOW
    paid = False
    while True:
        history = context._facts()
        _begun(call, history)
        if call.flight is not None and history.flight(call.flight) is None:
            # Somebody believed this attempt dead and counted it: it is counted once.
            history.last_error = error
        else:
            count(call, error, now)
            if call.flight is not None:
                history.land(call.flight)
        decision = decide(call)
        if decision.retry and not paid:
            decision = yield from pay(call, decision)
            paid = decision.retry
        history.not_before = now + decision.delay if decision.retry and decision.delay > 0 else None
        history.exhausted, history.reason = not decision.retry, decision.reason
        history.fence = history.fence or first_fence(now)
        if (yield from _try_to_store(call, error)):
            call.flight = None
            return decision


def _try_to_store(call: Call, error: Exception) -> Flow:
    """One compare-and-set of the history.

    False: somebody else was first, and theirs was read; True: it is stored, or cannot be.
    """
    context, key = call.context, call.key or ""
    try:
        snapshot = context.snapshot()
    except Exception as fault:  # noqa: BLE001 - what the user keeps in attributes must not hide the business error
        yield from _not_stored(call, error, fault)
        return True
    saved = call.fault if call.blind else (yield Save(key, snapshot, call.version))
    if isinstance(saved, Exception):
        yield from _not_stored(call, error, saved)
        return True
    if saved is not None:
        call.version, call.seen, context._facts().own_veto = saved, True, None
        return True
    stored = yield Load(key)
    theirs = history_of(stored)
    if isinstance(theirs, Exception):
        yield from _not_stored(call, error, theirs)
        return True
    if theirs is not None and theirs.completed_at is not None:
        # Somebody else has completed the item: nothing is stored over that, and nothing more is tried.
        context.duplicate = True
        return True
    if not take_over(call, stored):
        # Settled, forgotten or evicted meanwhile: nobody can have counted this attempt.
        call.flight = None
    return False


def _not_stored(call: Call, error: Exception, fault: BaseException) -> Flow:
    """The failure could not be stored: its exception says so, and goes on its way."""
    call.context.fault = fault
    # Not every exception can carry a note: one that is frozen goes on its way without.
    with suppress(Exception):
        error.add_note(
            f"retrykit: this failure of {call.plan.name!r} was not stored: {type(fault).__name__}: {message_of(fault)}"
        )
    yield Report("store", fault)


def keep_veto(call: Call) -> Flow:
    """Store a veto that was spoken in this call, when nothing else is going to be stored."""
    context, key = call.context, call.key or ""
    while not call.blind and _says_veto(context):
        saved = yield Save(key, context.snapshot(), call.version)
        if saved is None:
            saved = yield Load(key)
            if saved is None and call.seen:
                # As in `_try_to_withdraw`.
                context._facts().own_veto = None
                return
            if not isinstance(saved, Exception):
                take_over(call, saved)
                continue
        context._facts().own_veto = None
        if isinstance(saved, Exception):
            yield Report("veto", saved)
        else:
            call.version = saved


def _says_veto(context: RetryContext) -> bool:
    """Whether this call has spoken a veto that nobody has stored, of an item that nobody has completed."""
    history = context._history
    return (
        history is not None and history.own_veto is not None and history.completed_at is None and not context.duplicate
    )


# -- settling


def _has_to_settle(call: Call) -> bool:
    if call.key is None or call.blind or call.settled:
        return False
    return call.plan.remember is not None or call.version is not None or call.doubtful


def _settling(call: Call, *, joined: bool) -> Flow:
    """One try to bring the stored history to its end: a completion mark, or nothing left."""
    context, key, remember = call.context, call.key or "", call.plan.remember
    if remember is None:
        return True if call.version is None else (yield Remove(key, call.version, joined=joined))
    now = yield NOW
    mark = History(
        failures=context.retry_count,
        fence=context.fence,
        recovered=context.recovered,
        completed_at=now,
        expires_at=now + remember,
    )
    return (yield Save(key, mark.to_json(call.plan.name, context.json_key), call.version, joined=joined))


def settle(call: Call) -> Flow:
    """Settle the history after a confirmed outcome, unless that was done within the transaction."""
    while _has_to_settle(call):
        if call.doubtful:
            call.doubtful = False
            stored = yield Load(call.key or "")
            call.version = getattr(stored, "version", None)
        answer = yield from _settling(call, joined=False)
        if isinstance(answer, Exception):
            yield Report("settle", answer)
            return
        if answer is not None and answer is not False:
            return
        stored = yield Load(call.key or "")
        if isinstance(stored, Exception) or (stored is None and call.plan.remember is None):
            return
        # Gone, but not settled by anybody: evicted or forgotten. The mark is still to be made.
        call.version = None if stored is None else stored.version


def settle_within(call: Call) -> Flow:
    """Settle the history inside the work's own transaction, if the cache can join it.

    The outcome if somebody else had it.
    """
    if not _has_to_settle(call):
        return None
    joined = yield JOIN
    if joined is not True:
        if isinstance(joined, Exception):
            yield Report("join", joined)
        return None
    while True:
        answer = yield from _settling(call, joined=True)
        if isinstance(answer, Exception):
            return raising(CommitInDoubtError, call, answer)
        if answer is not None and answer is not False:
            call.settled = True
            return None
        stored = yield Load(call.key or "", joined=True)
        outcome = _overtaken(call, stored)
        if outcome is not None:
            return outcome


def _overtaken(call: Call, stored: Any) -> Any:
    """Somebody else changed the history while the attempt ran: may it still settle?"""
    theirs = history_of(stored)
    if isinstance(theirs, Exception):
        return raising(CommitInDoubtError, call, theirs)
    if theirs is not None and theirs.completed_at is not None:
        call.context.duplicate = True
        return ANSWER_NOTHING
    if call.flight is not None and theirs is not None and theirs.flight(call.flight) is None:
        reason = "it was believed dead, counted as a crash and overtaken; its work is rolled back"
        return raising(TerminatedRetryError, call, None, reason=reason)
    call.version = None if stored is None else stored.version
    return None
