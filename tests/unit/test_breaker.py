"""The circuit breaker: its transitions, and calls through it."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit import (
    AsyncRetryTemplate,
    CircuitBreakerRetryPolicy,
    CompositeRetryPolicy,
    ExhaustedRetryError,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    circuit_breaker,
)
from retrykit.breaker import CLOSED, MAX_ENTRIES, SLOTS, is_state, ticket_of
from tests.doubles import BrokenCache, Fails, ManualClock

BREAKER = CircuitBreakerRetryPolicy(failure_threshold=2, open_timeout=5, reset_timeout=20)
RATED = CircuitBreakerRetryPolicy(failure_threshold=2, failure_rate=0.5, open_timeout=5)
OPEN = {"state": "open", "generation": 1, "since": 100.0}
HALF_OPEN = {"state": "half-open", "generation": 2, "since": 100.0, "trials": 1, "round": 0}


def recorded(breaker, *outcomes, state=CLOSED, at=100.0):
    for outcome in outcomes:
        state = breaker.record(state, outcome, at, ticket_of(state))
    return state


def test_it_opens_when_the_threshold_is_reached():
    assert recorded(BREAKER, "failure")["state"] == "closed"
    assert recorded(BREAKER, "failure", "failure") == OPEN


def test_a_success_between_failures_does_not_count_against_it():
    assert recorded(BREAKER, "failure", "success")["state"] == "closed"
    assert recorded(BREAKER, "failure", "success", "failure")["state"] == "open"


def test_failures_outside_the_window_are_forgotten():
    state = recorded(BREAKER, "failure")
    assert recorded(BREAKER, "failure", state=state, at=105.5) == {**CLOSED, "calls": [[105.5, 1, 1]]}


def test_with_a_rate_failures_must_be_that_share_of_the_calls():
    assert recorded(RATED, "success", "success", "success", "failure", "failure")["state"] == "closed"
    assert recorded(RATED, "success", "success", "failure", "failure")["state"] == "open"


def test_successes_are_written_only_where_a_share_is_wanted():
    assert recorded(BREAKER, "success") is CLOSED
    assert recorded(RATED, "success")["calls"] == [[100.0, 1, 0]]


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=400))
def test_the_window_remembers_a_bounded_number_of_entries_and_every_call_in_it(pauses):
    breaker = CircuitBreakerRetryPolicy(failure_threshold=1_000, failure_rate=1.0, open_timeout=5)
    state, now, instants = CLOSED, 1.7e9, []
    for pause in pauses:
        now += pause
        instants.append(now)
        state = recorded(breaker, "failure", state=state, at=now)
    assert is_state(state)
    assert len(state["calls"]) <= MAX_ENTRIES
    made = sum(calls for _, calls, _ in state["calls"])
    at_least = sum(instant > now - 5 for instant in instants)
    assert at_least <= made <= sum(instant > now - 5 - 5 / SLOTS - 1e-6 for instant in instants)


def test_a_threshold_above_every_number_of_entries_is_reached():
    breaker = CircuitBreakerRetryPolicy(failure_threshold=1_001, open_timeout=5)
    state = CLOSED
    for number in range(1_001):
        assert state["state"] == "closed"
        state = recorded(breaker, "failure", state=state, at=100.0 + number / 1_000)
    assert state["state"] == "open"


def test_a_closed_circuit_lets_everybody_through():
    assert BREAKER.admit(CLOSED, 100.0) == (CLOSED, None)


def test_an_open_circuit_refuses_until_the_reset_timeout():
    same, refusal = BREAKER.admit(OPEN, 119.0)
    assert same == OPEN
    assert not refusal.retry
    assert refusal.reason == "CircuitBreakerRetryPolicy: the circuit is open; ask again in 1.000 s"
    assert BREAKER.admit(OPEN, 120.0) == ({**HALF_OPEN, "since": 120.0}, None)


def test_a_half_open_circuit_lets_its_trials_through_and_nobody_else():
    breaker = CircuitBreakerRetryPolicy(half_open_max_calls=2)
    second, refusal = breaker.admit(HALF_OPEN, 101.0)
    assert (second["trials"], refusal) == (2, None)
    third, refusal = breaker.admit(second, 101.0)
    assert third == second
    assert "half-open, its trial calls are under way" in refusal.reason


def test_trials_that_never_ended_do_not_keep_the_gate_shut():
    assert BREAKER.admit(HALF_OPEN, 120.0) == ({**HALF_OPEN, "since": 120.0, "round": 1}, None)


def test_a_trial_decides():
    trial = ticket_of(HALF_OPEN)
    assert BREAKER.record(HALF_OPEN, "success", 101.0, trial) == {**CLOSED, "generation": 3}
    assert BREAKER.record(HALF_OPEN, "failure", 101.0, trial) == {**OPEN, "generation": 3, "since": 101.0}
    assert BREAKER.record(HALF_OPEN, "cancelled", 101.0, trial) == {**HALF_OPEN, "trials": 0}
    assert BREAKER.record(CLOSED, "cancelled", 101.0, ticket_of(CLOSED)) == CLOSED


@pytest.mark.parametrize("outcome", ["success", "failure", "cancelled"])
@pytest.mark.parametrize("state", [OPEN, HALF_OPEN, {**CLOSED, "generation": 3}], ids=["open", "half-open", "closed"])
def test_a_call_of_an_earlier_generation_changes_nothing(state, outcome):
    assert BREAKER.record(state, outcome, 101.0, ticket_of(CLOSED)) == state


def test_a_trial_of_an_earlier_round_decides_but_gives_no_place_back():
    late, renewed = ticket_of(HALF_OPEN), BREAKER.admit(HALF_OPEN, 120.0)[0]
    assert BREAKER.record(renewed, "success", 121.0, late)["state"] == "closed"
    assert BREAKER.record(renewed, "failure", 121.0, late)["state"] == "open"
    assert BREAKER.record(renewed, "cancelled", 121.0, late) == renewed


def test_a_call_that_was_let_through_unasked_counts_while_the_circuit_is_closed():
    assert BREAKER.record(CLOSED, "failure", 101.0)["calls"] == [[101.0, 1, 1]]
    assert BREAKER.record(HALF_OPEN, "success", 101.0) == HALF_OPEN
    assert BREAKER.record(OPEN, "failure", 101.0) == OPEN


def test_a_clock_that_is_set_back_makes_nobody_wait_longer_than_the_timeout():
    for state in (OPEN, {**HALF_OPEN, "trials": 1}):
        since, refusal = BREAKER.admit(state, 10.0)
        assert since["since"] == 10.0
        assert refusal.reason.endswith("ask again in 20.000 s")
        assert BREAKER.admit(since, 30.0)[1] is None
    state = recorded(BREAKER, "failure", state=recorded(BREAKER, "failure"), at=10.0)
    assert state["state"] == "open"
    state = recorded(RATED, "success", "success", "success", "failure", at=10.0, state=recorded(RATED, "failure"))
    assert [entry[0] for entry in state["calls"]] == [10.0] * 5
    assert recorded(RATED, "success", state=state, at=16.0)["calls"] == [[16.0, 1, 0]]


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        {},
        {"state": "closed", "calls": []},
        {**CLOSED, "calls": None},
        {**CLOSED, "calls": [[1.0, True]]},
        {**CLOSED, "calls": [[1.0, 1, "many"]]},
        {**OPEN, "since": "x"},
        {**OPEN, "since": float("nan")},
        {**OPEN, "state": "ajar"},
        {**HALF_OPEN, "trials": None},
    ],
    ids=str,
)
def test_what_is_no_state_is_known_for_it(damaged):
    assert not is_state(damaged)


@pytest.mark.parametrize("state", [CLOSED, OPEN, HALF_OPEN], ids=["closed", "open", "half-open"])
def test_every_state_goes_through_json(state):
    assert is_state(json.loads(json.dumps(state)))


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


@pytest.mark.parametrize("breaker", [{}, {"breaker": {"state": "ajar"}}, {"breaker": {**OPEN, "since": "x"}}], ids=str)
def test_a_damaged_circuit_is_closed_reported_and_mended(caplog, breaker):
    cache = MapRetryContextCache()
    through, _ = template(cache)
    cache.save("peer@breaker0", {"format": 1} | breaker, None)
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert through.execute(Fails()) == "done"
        assert caplog.text.count("is damaged, it is closed") == 1
    assert cache.load("peer@breaker0").snapshot["breaker"] == CLOSED


def test_a_call_from_before_the_circuit_opened_does_not_speak_for_the_trial():
    through, clock = template()

    def trial(context):
        with pytest.raises(ExhaustedRetryError, match="trial calls are under way"):
            through.execute(Fails())
        return "healthy"

    def old(context):
        fail_twice(through)
        clock.sleep(20)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        through.execute(old)
    assert through.execute(trial) == "healthy"

    def late(context):
        fail_twice(through)
        clock.sleep(20)
        state, _ = through.retry_policy.admit(circuit(through), clock.time())
        through.context_cache.save("peer@breaker0", {"format": 1, "breaker": state}, version(through))
        return "from long ago"

    assert through.execute(late) == "from long ago"
    assert circuit(through)["state"] == "half-open"


def circuit(through):
    return through.context_cache.load("peer@breaker0").snapshot["breaker"]


def version(through):
    return through.context_cache.load("peer@breaker0").version


def test_of_two_breakers_the_one_that_let_a_trial_through_gets_it_back_when_the_other_refuses():
    first = CircuitBreakerRetryPolicy(MaxAttemptsRetryPolicy(1), failure_threshold=2, reset_timeout=20)
    second = CircuitBreakerRetryPolicy(MaxAttemptsRetryPolicy(1), failure_threshold=2, reset_timeout=30)
    clock, cache = ManualClock(), MapRetryContextCache()
    through = RetryTemplate(
        name="peer", retry_policy=CompositeRetryPolicy([first, second]), clock=clock, context_cache=cache
    )
    fail_twice(through)
    clock.sleep(20)
    with pytest.raises(ExhaustedRetryError, match="the circuit is open"):
        through.execute(Fails())
    assert (circuit(through)["state"], circuit(through)["trials"]) == ("half-open", 0)
    clock.sleep(10)
    assert through.execute(Fails()) == "done"


def test_a_refusal_knows_whether_the_failure_may_be_recovered():
    strict = SimpleRetryPolicy(5, not_recoverable=ValueError)
    through = RetryTemplate(
        name="peer", retry_policy=CircuitBreakerRetryPolicy(strict, failure_threshold=1), clock=ManualClock()
    )
    recovered = []
    with pytest.raises(ValueError, match="bad"):
        through.execute(Fails(ValueError("bad")), recovered.append)
    assert recovered == []
    assert through.execute(Fails(), lambda context: context.decision.recoverable) is True


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
