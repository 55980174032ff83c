"""The circuit breaker: after many failures nobody asks the patient for a while, then a few ask carefully.

closed -> open (too many failures within the window) -> half-open (a few trial calls after `reset_timeout`) -> closed (a
trial succeeded) or open again (it failed). Nygard, "Release It!", 2nd ed. 2018, ch. 5.

The state is JSON data in the template's context cache, one per template name, changed by the pure functions below under
compare-and-set: threads share it, and processes whose cache is shared. Each change of the circuit begins a new
*generation*. A call is given a ticket with the generation in which it was let through, and its outcome counts in that
one only: a call that began before the circuit opened says nothing about the patient's recovery.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs

from retrykit.check import as_seconds, is_finite, more_than, whole, wrong_value
from retrykit.policy import RetryDecision, RetryPolicy, SimpleRetryPolicy, is_policy, tallies_of
from retrykit.value import Value

MAX_ENTRIES: Final = 64
"""So many instants of the window are remembered at most: beyond that, calls of one time slot become one entry."""

SLOTS: Final = 32
"""So many time slots the window then has."""

State = Mapping[str, Any]
Ticket = tuple[int, int]

CLOSED: Final[State] = {"state": "closed", "generation": 0, "calls": []}


def ticket_of(state: State) -> Ticket:
    """What a call that is let through in this state shows when it ends."""
    return state["generation"], state.get("round", 0)


def is_state(value: Any) -> bool:
    """Whether this is the state of a circuit: stores may be damaged."""
    if not isinstance(value, Mapping) or type(value.get("generation")) is not int:
        return False
    if value.get("state") == "closed":
        calls = value.get("calls")
        return isinstance(calls, list) and all(_is_entry(entry) for entry in calls)
    whole = value.get("state") == "open" or all(type(value.get(fact)) is int for fact in ("trials", "round"))
    return value.get("state") in {"open", "half-open"} and whole and _is_instant(value.get("since"))


def _is_instant(value: Any) -> bool:
    return type(value) in {int, float} and is_finite(value)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list) and len(entry) == len(("instant", "calls", "failures")) and all(map(_is_instant, entry))
    )


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
    again. While it is open, calls go to their recovery, or raise `ExhaustedRetryError`. The window is exact for few
    calls; for many it is told in 32 time slots, so that a call costs the same however many there are.
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
        if now < state["since"]:
            # The clock was set back: nobody waits longer than the timeout for that.
            state = {**state, "since": now}
        due = state["since"] + self.reset_timeout
        if state["state"] == "open":
            return (state, self._refusal("open", due - now)) if now < due else (_half_open(state, now), None)
        if now >= due:
            # Trials that never ended (their process died) do not keep the gate shut for ever.
            return {**state, "since": now, "trials": 1, "round": state["round"] + 1}, None
        if state["trials"] >= self.half_open_max_calls:
            return state, self._refusal("half-open, its trial calls are under way", due - now)
        return {**state, "trials": state["trials"] + 1}, None

    def _refusal(self, state: str, wait: float) -> RetryDecision:
        reason = f"CircuitBreakerRetryPolicy: the circuit is {state}; ask again in {wait:.3f} s"
        return RetryDecision(retry=False, reason=reason)

    def record(
        self,
        state: State,
        outcome: Literal["success", "failure", "cancelled"],
        now: float,
        ticket: Ticket | None = None,
    ) -> State:
        """A call that was let through with this ticket has ended at `now`. The new state.

        Without a ticket (the store could not be asked) it counts while the circuit is closed.
        """
        closed = state["state"] == "closed"
        generation = ticket[0] if ticket is not None else state["generation"] if closed else None
        if generation != state["generation"] or state["state"] == "open":
            return state
        if closed:
            return state if outcome == "cancelled" else self._counted(state, now, failed=outcome == "failure")
        if outcome == "cancelled":
            # A trial of an earlier round has lost its place already.
            return {**state, "trials": max(0, state["trials"] - 1)} if ticket == ticket_of(state) else state
        return _opened(state, now) if outcome == "failure" else _closed(state)

    def _counted(self, state: State, now: float, *, failed: bool) -> State:
        if not failed and self.failure_rate is None:
            # Only a share needs to know of the others.
            return state
        # What is in the future was noted before the clock was set back.
        recent = [[min(at, now), *counts] for at, *counts in state["calls"] if at > now - self.open_timeout]
        calls = [*recent, [now, 1, int(failed)]]
        if failed and self._too_many(calls):
            return _opened(state, now)
        return {**state, "calls": calls if len(calls) <= MAX_ENTRIES else self._thinned(calls)}

    def _too_many(self, calls: list[Any]) -> bool:
        made, failures = (sum(column) for column in list(zip(*calls, strict=True))[1:])
        return bool(failures >= self.failure_threshold and failures >= (self.failure_rate or 0) * made)

    def _thinned(self, calls: list[Any]) -> list[Any]:
        width = self.open_timeout / SLOTS
        slots = [list(slot) for _, slot in itertools.groupby(calls, key=lambda entry: entry[0] // width)]
        return [[slot[-1][0], sum(entry[1] for entry in slot), sum(entry[2] for entry in slot)] for slot in slots]


def _opened(state: State, now: float) -> State:
    return {"state": "open", "generation": state["generation"] + 1, "since": now}


def _half_open(state: State, now: float) -> State:
    return {"state": "half-open", "generation": state["generation"] + 1, "since": now, "trials": 1, "round": 0}


def _closed(state: State) -> State:
    return {**CLOSED, "generation": state["generation"] + 1}
