"""The flow's dealings with the store: recalling a history, storing a failure. See the essay in `retrykit.flow` for the
why; `retrykit.flight` reserves attempts, `retrykit.settlement` brings histories to their end.

Every write is a compare-and-set. When it finds that somebody else was first, their facts are read and ours are applied
to them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from retrykit.cache import StoredContext
from retrykit.call import Call, Flow
from retrykit.context import RetryContext, first_fence
from retrykit.decision import count, decide, pay, standing_decision
from retrykit.errors import InconsistentKeyError
from retrykit.failure import StoredError, message_of
from retrykit.history import Flight, History
from retrykit.key import lease_key
from retrykit.state import KEEP_VETO
from retrykit.steps import NOW, Died, Load, Probe, Recent, Report, Save

# -- recalling


def recall(call: Call, *, again: bool = False) -> Flow:
    """Load what is known of the key. `again`: after somebody else was first with a write."""
    state, context = call.state, call.context
    if state is None or call.blind or (state.redelivered is False and not state.fresh and not again):
        return
    call.collision = None
    stored = yield from _look_up(call, again=again)
    history = history_of(stored)
    if isinstance(history, Exception):
        # Go on without it, and store nothing over what cannot be seen.
        call.blind, call.fault = True, history
        yield Report("load", history)
        return
    mine = context._history
    call.version, call.deaths = None if stored is None else stored.version, ()
    if history is not None:
        yield from _read(call, history)
    elif again:
        context._history = None
    if mine is not None:
        _keep_own(context._facts(), mine)


def _look_up(call: Call, *, again: bool) -> Flow:
    """What is stored; or, where a compare-and-set is going to tell whether it still holds, what was stored last."""
    call.recent = False
    assert call.state is not None  # noqa: S101 - only stateful calls look anything up
    # An old history that a fresh item is to leave behind must be the one that the store has.
    if call.plan.fronted and not again and not call.state.fresh and journals(call):
        stored = yield Recent(call.key or "")
        if isinstance(stored, StoredContext):
            call.recent = True
            return stored
    return (yield Load(call.key or ""))


def journals(call: Call) -> bool:
    """Whether an attempt of this call is reserved before it is made."""
    state = call.state
    if state is None or call.blind or state.journal == "never":
        return False
    return state.journal == "always" or state.redelivered is not False


def _keep_own(theirs: History, mine: History) -> None:
    """What this call itself has said or seen, and nobody has stored.

    Its veto, and the live exception behind a stored description.
    """
    if mine.own_veto is not None:
        seen, said, until = mine.own_veto
        # A withdrawal takes back the veto that it saw, and no other.
        if said is not None or theirs.veto == seen:
            theirs.veto, theirs.veto_until, theirs.own_veto = said, until, mine.own_veto
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
    over = history.completed_at is not None and history.expires_at is not None and history.expires_at <= now
    yield from make_out(call)
    if not (over or state.fresh) and collides(call, history):
        call.collision = history.fingerprint
        return
    if history.completed_at is not None:
        context.duplicate = not (over or state.fresh)
        context._history = history if context.duplicate else History(fence=history.fence)
        return
    history.lapse(now)
    if state.fresh and not call.seen:
        context._history = History(fence=history.fence)
        if state.fresh == KEEP_VETO:
            context._history.veto, context._history.veto_until = history.veto, history.veto_until
        call.seen = True
        return
    call.seen = True
    context._history = history
    forget_own_flights(call, history)
    for flight in history.in_flight:
        running = yield Probe(flight.owner)
        if running is None and flight.until <= now:
            yield from _see_lease(call, flight)
        # What is certainly running is believed; of the others the source may know, or the lease decides.
        if running is False or (running is not True and (state.redelivered is True or flight.until <= now)):
            _crashed(call, history, flight, now)
    context.attempt = history.failures + 1


def make_out(call: Call) -> Flow:
    """Make the fingerprint of the item's content, once, if the source gives one."""
    state = call.state
    if state is None or state.fingerprint is None or call.made_out:
        return
    call.made_out = True
    try:
        call.content = state.content()
    except Exception as fault:  # noqa: BLE001 - the source's own function; without its answer nothing is told apart
        yield Report("fingerprint", fault)


def collides(call: Call, theirs: History | None) -> bool:
    """Whether the history is that of an item with another content."""
    if theirs is None or call.content is None:
        return False
    return theirs.fingerprint is not None and theirs.fingerprint != call.content


def collision_with(call: Call, theirs: History | None) -> InconsistentKeyError | None:
    """The error that says so, if it is."""
    return collision(call, theirs.fingerprint) if theirs is not None and collides(call, theirs) else None


def collision(call: Call, stored: str | None) -> InconsistentKeyError:
    """The error that says that the key stands for an item with another content."""
    return InconsistentKeyError(name=call.plan.name, key=call.context.key, stored=stored, fingerprint=call.content)


def _see_lease(call: Call, flight: Flight) -> Flow:
    """Learn until when whoever makes the attempt has renewed its lease, if he has."""
    stored = yield Load(lease_key(call.plan.name, call.key or "", flight.fence))
    until = None if stored is None or isinstance(stored, Exception) else stored.snapshot.get("until")
    if isinstance(until, int | float):
        flight.until = max(flight.until, until)


def forget_own_flights(call: Call, history: History) -> None:
    """A flight of this call that it does not know of was stored by a write that seemed to fail.

    It is no attempt of its own.
    """
    own = (flight for flight in history.in_flight if flight.owner == call.owner and flight.fence != call.flight)
    for flight in own:
        history.land(flight.fence)


def _crashed(call: Call, history: History, flight: Flight, now: float) -> None:
    """An attempt that never ended is a failed attempt; a recovery that never ended is a failed recovery."""
    history.land(flight.fence)
    what = "recovery" if flight.recovery else "attempt"
    error = StoredError.of_crash(flight.fence, flight.owner, what)
    if flight.recovery:
        history.recovery_failures += 1
    else:
        history.crashes += 1
        count(call, error, now)
    call.deaths += ((what, history.failures, error),)


def tell_deaths(call: Call) -> Flow:
    """Say what never ended, once it is counted, or goes on to count: nobody was there to report it."""
    deaths, call.deaths = call.deaths, ()
    decision = standing_decision(call) if deaths else None
    for what, attempt, error in deaths:
        yield Died(what, attempt, error, decision)


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
    forget_own_flights(call, history)
    return theirs is not None


def begun(call: Call, history: History) -> None:
    """Note when the item was first tried, and by what it is known."""
    if history.started_at is None:
        history.started_at = call.context._wall_of(call.context._started)
    if history.fingerprint is None:
        history.fingerprint = call.content


def is_known(history: History) -> bool:
    """Whether a history says more than that nothing has happened."""
    facts = (history.failures, history.veto, history.in_flight, history.recovery_failures, history.attributes)
    return any(facts) or history.completed_at is not None


# -- storing a failure


def store_failure(call: Call, error: Exception) -> Flow:
    """Count the failure in the stored history, whatever others store at the same time.

    The decision that follows from it.
    """
    context = call.context
    call.reporting = True
    yield from make_out(call)
    now = yield NOW
    paid = False
    while True:
        history = context._facts()
        begun(call, history)
        history.lapse(now)
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
    hindrance = theirs if isinstance(theirs, Exception) else collision_with(call, theirs)
    if hindrance is not None or isinstance(theirs, Exception):
        yield from _not_stored(call, error, hindrance)
        return True
    if theirs is not None and theirs.completed_at is not None:
        # Somebody else has completed the item: nothing is stored over that, and nothing more is tried.
        context.duplicate = True
        return True
    if not take_over(call, stored):
        # Settled, forgotten or evicted meanwhile: nobody can have counted this attempt.
        call.flight = None
    return False


def _not_stored(call: Call, error: Exception, fault: Any) -> Flow:
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
            theirs = history_of(saved)
            saved = (None if isinstance(theirs, Exception) else collision_with(call, theirs)) or saved
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
