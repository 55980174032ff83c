"""The circuit breaker: its transitions, and calls through it."""

from __future__ import annotations

import asyncio
import logging

import pytest

from retrykit import (
    AsyncRetryTemplate,
    CircuitBreakerRetryPolicy,
    ExhaustedRetryError,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    RetryState,
    RetryTemplate,
    circuit_breaker,
)
from retrykit.breaker import MAX_CALLS
from retrykit.circuit import CLOSED
from tests.doubles import BrokenCache, Fails, ManualClock

BREAKER = CircuitBreakerRetryPolicy(failure_threshold=2, open_timeout=5, reset_timeout=20)


def recorded(breaker, *outcomes, state=CLOSED, at=100.0):
    for outcome in outcomes:
        state = breaker.record(state, outcome, at)
    return state


def test_it_opens_when_the_threshold_is_reached():
    assert recorded(BREAKER, "failure")["state"] == "closed"
    assert recorded(BREAKER, "failure", "failure") == {"state": "open", "since": 100.0}


def test_a_success_between_failures_does_not_count_against_it():
    assert recorded(BREAKER, "failure", "success")["state"] == "closed"
    assert recorded(BREAKER, "failure", "success", "failure")["state"] == "open"


def test_failures_outside_the_window_are_forgotten():
    state = BREAKER.record(CLOSED, "failure", 100.0)
    assert BREAKER.record(state, "failure", 105.5) == {"state": "closed", "calls": [[105.5, True]]}


def test_with_a_rate_failures_must_be_that_share_of_the_calls():
    breaker = CircuitBreakerRetryPolicy(failure_threshold=2, failure_rate=0.5)
    assert recorded(breaker, "success", "success", "success", "failure", "failure")["state"] == "closed"
    assert recorded(breaker, "success", "success", "failure", "failure")["state"] == "open"


def test_the_window_remembers_a_bounded_number_of_calls():
    state = recorded(CircuitBreakerRetryPolicy(), *["success"] * (MAX_CALLS + 10))
    assert len(state["calls"]) == MAX_CALLS


def test_a_closed_circuit_lets_everybody_through():
    assert BREAKER.admit(CLOSED, 100.0) == (CLOSED, None)


def test_an_open_circuit_refuses_until_the_reset_timeout():
    state = {"state": "open", "since": 100.0}
    same, refusal = BREAKER.admit(state, 119.0)
    assert same == state
    assert not refusal.retry
    assert refusal.reason == "CircuitBreakerRetryPolicy: the circuit is open; ask again in 1.000 s"
    assert BREAKER.admit(state, 120.0) == ({"state": "half-open", "since": 120.0, "trials": 1}, None)


def test_a_half_open_circuit_lets_its_trials_through_and_nobody_else():
    breaker = CircuitBreakerRetryPolicy(half_open_max_calls=2)
    state = {"state": "half-open", "since": 100.0, "trials": 1}
    second, refusal = breaker.admit(state, 101.0)
    assert (second["trials"], refusal) == (2, None)
    third, refusal = breaker.admit(second, 101.0)
    assert third == second
    assert "half-open, its trial calls are under way" in refusal.reason


def test_trials_that_never_ended_do_not_keep_the_gate_shut():
    state = {"state": "half-open", "since": 100.0, "trials": 1}
    assert BREAKER.admit(state, 120.0) == ({"state": "half-open", "since": 120.0, "trials": 1}, None)


def test_a_trial_decides():
    state = {"state": "half-open", "since": 100.0, "trials": 1}
    assert BREAKER.record(state, "success", 101.0) == CLOSED
    assert BREAKER.record(state, "failure", 101.0) == {"state": "open", "since": 101.0}
    assert BREAKER.record(state, "cancelled", 101.0) == {**state, "trials": 0}
    assert BREAKER.record(CLOSED, "cancelled", 101.0) == CLOSED


def test_a_call_that_ends_after_the_circuit_opened_changes_nothing():
    state = {"state": "open", "since": 100.0}
    assert BREAKER.record(state, "success", 101.0) == BREAKER.record(state, "failure", 101.0) == state


def test_it_asks_its_delegate_about_attempts():
    assert CircuitBreakerRetryPolicy(MaxAttemptsRetryPolicy(7)).max_attempts == 7


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"failure_threshold": 0}, ValueError),
        ({"failure_rate": 0}, ValueError),
        ({"failure_rate": 1.5}, ValueError),
        ({"failure_rate": "1"}, TypeError),
        ({"open_timeout": 0}, ValueError),
        ({"reset_timeout": None}, TypeError),
        ({"half_open_max_calls": True}, TypeError),
        ({"delegate": MaxAttemptsRetryPolicy}, TypeError),
    ],
    ids=str,
)
def test_bad_values_are_refused_at_once(options, error):
    (argument,) = options
    with pytest.raises(error, match=rf"^{argument}: must be"):
        CircuitBreakerRetryPolicy(**options)


# -- calls through it


def template(cache=None, kind=RetryTemplate, **options):
    breaker = CircuitBreakerRetryPolicy(MaxAttemptsRetryPolicy(1), failure_threshold=2, reset_timeout=20, **options)
    clock = ManualClock()
    return kind(name="peer", retry_policy=breaker, clock=clock, context_cache=cache or MapRetryContextCache()), clock


def fail_twice(through):
    for _ in range(2):
        with pytest.raises(OSError, match="down"):
            through.execute(Fails(OSError("down")))


def test_an_open_circuit_spares_the_patient_and_asks_the_recovery():
    through, _ = template()
    fail_twice(through)
    callback = Fails()
    assert through.execute(callback, lambda context: context.decision.reason).startswith("CircuitBreakerRetryPolicy")
    with pytest.raises(ExhaustedRetryError, match="the circuit is open"):
        through.execute(callback)
    assert callback.calls == 0


def test_a_trial_that_succeeds_closes_the_circuit():
    through, clock = template()
    fail_twice(through)
    clock.sleep(20)
    assert through.execute(Fails()) == "done"
    with pytest.raises(OSError, match="once"):
        through.execute(Fails(OSError("once")))
    assert through.execute(Fails()) == "done"


def test_a_trial_that_fails_opens_it_again():
    through, clock = template()
    fail_twice(through)
    clock.sleep(20)
    with pytest.raises(OSError, match="still down"):
        through.execute(Fails(OSError("still down")))
    with pytest.raises(ExhaustedRetryError):
        through.execute(Fails())


def test_one_trial_at_a_time():
    through, clock = template()
    fail_twice(through)
    clock.sleep(20)

    def trial(context):
        with pytest.raises(ExhaustedRetryError, match="trial calls are under way"):
            through.execute(Fails())
        return "healthy"

    assert through.execute(trial) == "healthy"


def test_p9_a_cancelled_trial_gives_its_place_back():
    through, clock = template()
    fail_twice(through)
    clock.sleep(20)

    def cancelled(context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        through.execute(cancelled)
    assert through.execute(Fails()) == "done"


def test_circuits_of_templates_with_other_names_are_other_circuits():
    cache = MapRetryContextCache()
    through, _ = template(cache)
    fail_twice(through)
    other = RetryTemplate(name="other", retry_policy=through.retry_policy, context_cache=cache, clock=ManualClock())
    assert other.execute(Fails()) == "done"
    again = RetryTemplate(name="peer", retry_policy=through.retry_policy, context_cache=cache, clock=ManualClock())
    with pytest.raises(ExhaustedRetryError):
        again.execute(Fails())


def test_a_store_that_fails_leaves_the_circuit_closed_and_says_so(caplog):
    for verb in ("load", "save"):
        through, _ = template(BrokenCache(**{verb: RuntimeError("no store")}))
        with caplog.at_level(logging.ERROR, "retrykit"), pytest.raises(OSError, match="down"):
            through.execute(Fails(OSError("down")))
        assert through.execute(Fails()) == "done"
    assert "fault in circuit breaker" in caplog.text


def test_callers_that_change_the_circuit_at_once_lose_no_failure():
    class Contended(MapRetryContextCache):
        contention = 1

        def save(self, key, snapshot, expected):
            if self.contention and expected is not None:
                self.contention -= 1
                super().save(key, dict(super().load(key).snapshot), expected)
            return super().save(key, snapshot, expected)

    through, _ = template(Contended())
    fail_twice(through)
    with pytest.raises(ExhaustedRetryError):
        through.execute(Fails())


def test_an_item_with_a_history_is_refused_without_losing_it():
    through, clock = template()
    stateful = RetryTemplate(
        name="peer",
        retry_policy=CircuitBreakerRetryPolicy(failure_threshold=2, reset_timeout=20),
        clock=clock,
        context_cache=through.context_cache,
    )
    for _ in range(2):
        with pytest.raises(OSError, match="down"):
            stateful.execute(Fails(OSError("down")), state=RetryState(key="m-1"))
    with pytest.raises(ExhaustedRetryError, match="the circuit is open"):
        stateful.execute(Fails(), state=RetryState(key="m-1"))
    assert stateful.history("m-1").retry_count == 2


def test_it_works_for_coroutines():
    through, clock = template(kind=AsyncRetryTemplate)

    async def main():
        for _ in range(2):
            with pytest.raises(OSError, match="down"):
                await through.execute(Fails(OSError("down")))
        with pytest.raises(ExhaustedRetryError):
            await through.execute(Fails())
        clock.sleep(20)
        return await through.execute(Fails())

    assert asyncio.run(main()) == "done"


def test_the_decorator_makes_one_attempt_a_call_and_recovers_when_it_is_open():
    calls = []

    @circuit_breaker(failure_threshold=2, reset_timeout=60, name="decorated peer")
    def ask(question):
        calls.append(question)
        raise OSError("down")

    for _ in range(2):
        with pytest.raises(OSError, match="down"):
            ask("?")

    @ask.recover
    def answer(error, question):
        return f"no idea: {question}"

    assert ask("why") == "no idea: why"
    assert calls == ["?", "?"]
    assert ask.template.name == "decorated peer"


def test_the_decorator_works_bare_and_refuses_what_it_does_not_know():
    @circuit_breaker
    def ask(question):
        return question

    assert ask("?") == "?"
    assert ask.template.retry_policy == CircuitBreakerRetryPolicy(MaxAttemptsRetryPolicy(1))
    with pytest.raises(TypeError, match="max_attempts"):
        circuit_breaker(max_attempts=3)
