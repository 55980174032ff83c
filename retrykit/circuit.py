"""Asking and telling the circuit breakers: their state is in the cache, and is changed by compare-and-set."""

from __future__ import annotations

from typing import Any

from retrykit.call import Call, Flow
from retrykit.steps import NOW, Load, Report, Save

CLOSED: Any = {"state": "closed", "calls": []}


def admit(call: Call) -> Flow:
    """Ask for an attempt to be let through; the refusal of the first breaker that is open, else None."""
    for number, breaker in enumerate(call.plan.breakers):
        refusal = yield from _shift(call, number, breaker.admit)
        if refusal is not None:
            return refusal
    call.admitted = True
    return None


def record(call: Call, outcome: str) -> Flow:
    """Tell how the attempt that was let through ended: "success", "failure" or "cancelled"."""
    call.admitted = False
    for number, breaker in enumerate(call.plan.breakers):
        yield from _shift(call, number, lambda state, now, breaker=breaker: (breaker.record(state, outcome, now), None))


def _shift(call: Call, number: int, transition: Any) -> Flow:
    """Change the state of a breaker, as often as others change it in between. A store's fault lets the call through."""
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
        snapshot = {"format": 1, "name": call.plan.name, "key": None, "retry_count": 0, "breaker": dict(changed)}
        saved = yield Save(key, snapshot, None if stored is None else stored.version)
        if saved is not None:
            if isinstance(saved, Exception):
                yield Report("circuit breaker", saved)
            return verdict
