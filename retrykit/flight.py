"""Attempts that are running: reserved before they are made, believed in while their lease lasts, withdrawn without an
outcome. See the essay in `retrykit.flow` for the why.
"""

from __future__ import annotations

from typing import Any

from retrykit.call import Call, Flow
from retrykit.context import first_fence
from retrykit.history import FORMAT, Flight
from retrykit.key import lease_key
from retrykit.memory import begun, history_of, is_known, journals, keep_veto, make_out, take_over, tell_deaths
from retrykit.steps import HOLD, NOW, Load, Remove, Report, Save, Step


def reserve(call: Call) -> Flow:
    """Store that an attempt is running, if it is to be journaled. False: somebody else stored something first."""
    if journals(call):
        return (yield from take_off(call, recovery=False))
    history = call.context._history
    if history is not None and not call.blind:
        history.fence += 1 if history.fence else 0
        yield from tell_deaths(call)
    return True


def take_off(call: Call, *, recovery: bool) -> Flow:
    """Store a flight. False: somebody else stored something first."""
    context = call.context
    yield from make_out(call)
    now = yield NOW
    history = context._facts()
    begun(call, history)
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
    call.version, call.seen, call.recent, history.own_veto = saved, True, False, None
    if call.deaths:
        yield from tell_deaths(call)
    if call.plan.renews:
        call.reporting, call.believed_until, call.lease_version = False, now + call.plan.lease, None
        yield HOLD
    return True


def withdraw(call: Call) -> Flow:
    """The reserved attempt will not report: it never was one."""
    call.reporting = True
    if call.key is None:
        return
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
        step: Step = Save(key, context.snapshot(), call.version) if is_known(history) else Remove(key, call.version)
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


def renew(call: Call) -> Flow:
    """Believe in the running attempt for another lease.

    False: somebody believed it dead already. None: somebody may do so now, because it could not be renewed in time.

    Driven beside the attempt, by a keeper of leases. What is written has a key of its own: the work's transaction may
    have a snapshot in which the history is to be settled, and must not find that changed.
    """
    now = yield NOW
    stored = yield Load(call.key or "")
    history = history_of(stored)
    flight = call.flight
    if call.reporting or flight is None:
        return True
    if isinstance(history, Exception) or isinstance(now, Exception):
        return (yield from _not_renewed(call, history if isinstance(history, Exception) else now, now))
    if history is None or history.flight(flight) is None:
        # Unless the call itself has just brought it to its end.
        return call.reporting or call.flight != flight
    return (yield from _extend(call, flight, now))


def _extend(call: Call, flight: int, now: float) -> Flow:
    """Store until when the attempt is to be believed in."""
    key, until = lease_key(call.plan.name, call.key or "", flight), now + call.plan.lease
    lease = {"format": FORMAT, "name": call.plan.name, "key": None, "retry_count": 0, "lease": flight, "until": until}
    # Kept as completion marks are: it takes no history's place, and goes by itself.
    lease |= {"completed_at": now, "expires_at": until + call.plan.lease}
    saved = yield Save(key, lease, call.lease_version)
    if saved is None:
        # A write that seemed to fail was made after all, or it was pruned.
        found = yield Load(key)
        saved = yield Save(key, lease, getattr(found, "version", None))
    if not isinstance(saved, int):
        return (yield from _not_renewed(call, saved, now))
    call.lease_version, call.believed_until = saved, until
    return True


def _not_renewed(call: Call, fault: Any, now: Any) -> Flow:
    """True while the attempt is still believed in although its lease could not be renewed."""
    if isinstance(fault, Exception):
        yield Report("renew", fault)
    return True if isinstance(now, Exception) or now < call.believed_until else None
