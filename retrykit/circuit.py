"""Asking and telling the circuit breakers: their state is in the cache, and is changed by compare-and-set."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from retrykit.breaker import CLOSED, State, is_state, ticket_of
from retrykit.call import Call, Flow
from retrykit.decision import allowed
from retrykit.errors import CodecError
from retrykit.policy import Branch, RetryDecision
from retrykit.steps import NOW, Load, Report, Save


def admit(call: Call) -> Flow:
    """Ask for an attempt to be let through; the refusal of the first breaker that is open, else None."""
    tickets: Any = ()
    for number, breaker in enumerate(call.plan.breakers):
        state, refusal = yield from _shift(call, number, breaker.admit)
        if refusal is not None:
            # What the others have let through is not made.
            yield from record(call, "cancelled")
            return _about_the_failure(call, refusal)
        # After each: when the call is cancelled here, what was let through so far is given back.
        call.admitted = tickets = (*tickets, None if state is None else ticket_of(state))
    return None


def _about_the_failure(call: Call, refusal: RetryDecision) -> RetryDecision:
    """Whether the last failure may be recovered is its own property, whoever refuses the next attempt."""
    if call.context.last_error is None:
        return refusal
    return attrs.evolve(refusal, recoverable=allowed(call, Branch(call.context, "", paid=True)).recoverable)


def record(call: Call, outcome: Literal["success", "failure", "cancelled"]) -> Flow:
    """Tell how the attempt that was let through ended."""
    tickets: Any = call.admitted or ()
    nothing: Any = ()
    call.admitted = nothing
    for number, ticket in enumerate(tickets):
        breaker = call.plan.breakers[number]

        def transition(state: State, now: float, breaker: Any = breaker, ticket: Any = ticket) -> Any:
            return breaker.record(state, outcome, now, ticket), None

        yield from _shift(call, number, transition)


def _shift(call: Call, number: int, transition: Any) -> Flow:
    """Change the state of a breaker, as often as others change it in between: the new state and the verdict.

    No state if the store has a fault: that lets the call through.
    """
    key = f"{call.plan.breaker_key}{number}"
    while True:
        stored = yield Load(key)
        if isinstance(stored, Exception):
            yield Report("circuit breaker", stored)
            return None, None
        now = yield NOW
        found = CLOSED if stored is None else stored.snapshot.get("breaker")
        changed, verdict = transition((yield from _readable(found)), now)
        if changed == found:
            return changed, verdict
        snapshot = {"format": 1, "name": call.plan.name, "key": None, "retry_count": 0, "breaker": dict(changed)}
        saved = yield Save(key, snapshot, None if stored is None else stored.version)
        if isinstance(saved, Exception):
            yield Report("circuit breaker", saved)
            return None, verdict
        if saved is not None:
            return changed, verdict


def _readable(found: Any) -> Flow:
    """The state that was found; a closed circuit in place of one that cannot be read."""
    if is_state(found):
        return found
    yield Report("circuit breaker", CodecError(reason=f"the circuit's state is damaged, it is closed: {found!r:.80}"))
    return CLOSED
