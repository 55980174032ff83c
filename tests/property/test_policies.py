"""Policies and back-offs are pure questions about facts that JSON carries: whoever asks gets the same answer."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from retrykit import (
    AlwaysRetryPolicy,
    BudgetRetryPolicy,
    CircuitBreakerRetryPolicy,
    CompositeRetryPolicy,
    ErrorHintBackOffPolicy,
    ExceptionClassifierRetryPolicy,
    ExponentialBackOffPolicy,
    FixedBackOffPolicy,
    MaxAttemptsRetryPolicy,
    NeverRetryPolicy,
    NoBackOffPolicy,
    PredicateRetryPolicy,
    RetryBudget,
    RetryContext,
    RetryListener,
    RetryState,
    RetryTemplate,
    ScheduleBackOffPolicy,
    SimpleRetryPolicy,
    TimeoutRetryPolicy,
    UniformRandomBackOffPolicy,
)
from retrykit.cache import canonical_key
from retrykit.errors import CodecError
from retrykit.failure import ErrorSummary, StoredError
from retrykit.history import FORMAT, Flight, History, Tally
from retrykit.key import key_from_json, key_to_json
from retrykit.policy import every, names_of


class Throttled(ConnectionError):
    """An error of ours, between others."""

    retry_after = 3


ERRORS = (
    ConnectionError,
    ConnectionResetError,
    Throttled,
    TimeoutError,
    OSError,
    LookupError,
    KeyError,
    ValueError,
    RuntimeError,
    Exception,
)
error_types = st.sampled_from(ERRORS)
some_types = st.lists(error_types, max_size=3).map(tuple)
limits = st.none() | st.integers(1, 5)


def is_about_a_connection(error: BaseException) -> bool:
    return "builtins.ConnectionError" in names_of(error)


simple = st.builds(
    SimpleRetryPolicy,
    limits,
    st.lists(error_types, min_size=1, max_size=3).map(tuple),
    no_retry_for=some_types,
    traverse_causes=st.booleans(),
    not_recoverable=some_types,
    default=st.none() | st.booleans(),
)
plain = (
    simple
    | st.builds(MaxAttemptsRetryPolicy, limits)
    | st.just(AlwaysRetryPolicy())
    | st.just(NeverRetryPolicy())
    | st.just(PredicateRetryPolicy(is_about_a_connection))
)


def composed(inner: Any) -> Any:
    return (
        st.builds(CompositeRetryPolicy, st.lists(inner, min_size=1, max_size=3).map(tuple), optimistic=st.booleans())
        | st.builds(ExceptionClassifierRetryPolicy, st.dictionaries(error_types, inner, max_size=3), inner)
        | st.builds(CircuitBreakerRetryPolicy, inner, failure_threshold=st.just(1_000))
    )


policies = st.recursive(plain, composed, max_leaves=5)
timed = st.builds(TimeoutRetryPolicy, st.floats(0.001, 100)) | st.builds(
    BudgetRetryPolicy, st.builds(RetryBudget, st.just(0.5), st.just(2.0))
)


@st.composite
def errors(draw: Any) -> Exception:
    """An error with up to two causes."""
    error = draw(error_types)(draw(st.text(max_size=5)))
    cause = error
    for _ in range(draw(st.integers(0, 2))):
        cause.__cause__ = draw(error_types)("a cause")
        cause = cause.__cause__
    return error


class Asker(RetryListener):
    """Asks when a failure has just been counted."""

    def __init__(self, ask: Any) -> None:
        self.ask = ask
        self.asked = 0

    def on_error(self, context: Any, error: Exception, decision: Any) -> None:
        try:
            self.ask(context)
            self.asked += 1
        except AssertionError as wrong:
            # Raised here it would be logged and nothing else.
            self.wrong = wrong

    wrong: AssertionError | None = None


def after_each_failure(policy: Any, failures: list[Exception], ask: Any) -> None:
    """Deliver an item that fails in these ways, and ask after each."""
    asker = Asker(ask)
    template = RetryTemplate(name="asked", retry_policy=policy, listeners=(asker,))
    for failure in failures:

        def fail(context: Any, failure: Exception = failure) -> None:
            raise failure

        with pytest.raises(Exception):  # noqa: B017, PT011 - the failure, or that there is no further attempt
            template.execute(fail, state=RetryState(key="m"))
    if asker.wrong is not None:
        raise asker.wrong
    assert asker.asked > 0


def facts(decision: Any) -> tuple[Any, ...]:
    return decision.retry, decision.delay, decision.reason, decision.recoverable, tuple(map(facts, decision.clauses))


@given(st.recursive(plain | timed, composed, max_leaves=5), st.lists(errors(), min_size=1, max_size=4))
def test_asking_a_policy_twice_gives_the_same_answer_and_changes_nothing(policy, failures):
    def ask(context: Any) -> None:
        before = context.snapshot()
        first, second = policy.decide(context), policy.decide(context)
        assert facts(first) == facts(second)
        assert first == second
        assert context.snapshot() == before

    after_each_failure(policy, failures, ask)


@given(policies, st.lists(errors(), min_size=1, max_size=4))
@settings(max_examples=200)
def test_a_policy_decides_the_same_about_a_history_that_went_through_json(policy, failures):
    def ask(context: Any) -> None:
        reloaded = RetryContext.from_snapshot(json.loads(json.dumps(context.snapshot())))
        assert isinstance(reloaded.last_error, StoredError)
        now, then = policy.decide(context), policy.decide(reloaded)
        assert (then.retry, then.delay, then.recoverable) == (now.retry, now.delay, now.recoverable)
        # A predicate is asked once for each failure: of a recorded one it says what came of it.
        if not any(isinstance(part, PredicateRetryPolicy) for part in every(policy)):
            assert facts(then) == facts(now)

    after_each_failure(policy, failures, ask)


@given(policies)
def test_a_policy_lets_the_first_attempt_be_made(policy):
    seen = []
    RetryTemplate(retry_policy=policy).execute(seen.append)
    assert len(seen) == 1


# -- back-offs


def failed(times: int, *, key: Any = "m", last_delay: float | None = None, error: Any = None) -> Any:
    """A context as back-offs see it."""
    return SimpleNamespace(name="asked", key=key, retry_count=times, last_delay=last_delay, last_error=error)


intervals = st.floats(0.001, 1e6)
exponential = st.builds(ExponentialBackOffPolicy, intervals, st.floats(1, 10), intervals, seed=st.integers(0, 2**32))


@given(exponential, st.integers(1, 10**9))
def test_exponential_intervals_grow_to_their_cap_and_never_beyond(policy, failure):
    now, later = policy.delay(failed(failure)), policy.delay(failed(failure + 1))
    assert 0 < now <= later <= policy.max_interval
    assert policy.delay(failed(1)) == min(policy.initial, policy.max_interval)


@given(exponential, st.integers(1, 10**6), st.floats(0, 1))
def test_jitter_spreads_the_interval_after_the_cap(policy, failure, fraction):
    import attrs

    interval = policy.delay(failed(failure))
    assert 0 <= attrs.evolve(policy, jitter="full").delay(failed(failure)) <= interval
    assert interval / 2 <= attrs.evolve(policy, jitter="equal").delay(failed(failure)) <= interval
    spread = attrs.evolve(policy, jitter=fraction).delay(failed(failure))
    assert interval * (1 - fraction) * 0.999999 <= spread <= interval * (1 + fraction) * 1.000001


@given(exponential, st.integers(1, 100), st.none() | intervals)
def test_decorrelated_jitter_stays_between_the_first_interval_and_the_cap(policy, failure, last):
    import attrs

    decorrelated = attrs.evolve(policy, jitter="decorrelated")
    delay = decorrelated.delay(failed(failure, last_delay=last))
    assert min(policy.initial, policy.max_interval) * 0.999999 <= delay <= policy.max_interval


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=5), st.integers(1, 10**6))
def test_a_schedule_is_followed_and_its_last_interval_repeats(schedule, failure):
    assert ScheduleBackOffPolicy(schedule).delay(failed(failure)) == schedule[min(failure, len(schedule)) - 1]


@given(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)).map(sorted), st.integers(1, 100))
def test_random_intervals_lie_between_their_bounds(bounds, failure):
    assert bounds[0] <= UniformRandomBackOffPolicy(*bounds).delay(failed(failure)) <= bounds[1] * 1.000001
    assert NoBackOffPolicy().delay(failed(failure)) == 0
    assert FixedBackOffPolicy(bounds[0]).delay(failed(failure)) == bounds[0]


@given(st.none() | st.floats() | st.integers() | st.timedeltas() | st.just("soon"), st.floats(0.001, 1e4))
@example(timedelta(seconds=-1), 1.0)
@example(float("nan"), 1.0)
def test_a_hint_is_followed_within_its_bounds_or_not_at_all(hint, most):
    policy = ErrorHintBackOffPolicy(FixedBackOffPolicy(0.5), hint=lambda _: hint, max_interval=most)
    assume(not isinstance(hint, str))
    delay = policy.delay(failed(1, error=ValueError()))
    assert 0 <= delay <= max(most, 0.5)


SEEDED = """
from types import SimpleNamespace
from retrykit import *
policies = [ExponentialBackOffPolicy(jitter=jitter, seed=7) for jitter in ("full", "equal", "decorrelated", 0.3)]
policies.append(UniformRandomBackOffPolicy(seed=7))
print([p.delay(SimpleNamespace(name="n", key=key, retry_count=n, last_delay=0.2, last_error=None))
       for p in policies for key in ("a", 7, b"b", ("a", 7), None) for n in range(1, 5)])
"""


def test_p13_seeded_jitter_is_the_same_in_every_process():
    printed = {
        subprocess.run(
            [sys.executable, "-c", SEEDED], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
    drawn = json.loads(printed.pop())
    assert len(set(drawn)) > len(drawn) * 0.9, "different items and failures draw different numbers"


# -- snapshots

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
instants = st.none() | st.floats(0, 4e9)
keys = st.recursive(
    st.text(max_size=8) | st.integers() | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
any_text = st.text(st.characters(exclude_categories=()), max_size=8)


@st.composite
def stored_errors(draw: Any) -> StoredError:
    cause = draw(st.none() | st.builds(StoredError, st.text(min_size=1, max_size=5), st.text(max_size=5)))
    return StoredError(
        draw(st.text(min_size=1, max_size=5)),
        draw(st.text(max_size=5)),
        classes=("a", "b"),
        traceback="trace",
        cause=cause,
    )


@st.composite
def histories(draw: Any) -> History:
    return History(
        failures=draw(st.integers(0, 100)),
        crashes=draw(st.integers(0, 100)),
        fence=draw(st.integers(0, 2**60)),
        started_at=draw(instants),
        first_failed_at=draw(instants),
        last_failed_at=draw(instants),
        not_before=draw(instants),
        last_delay=draw(instants),
        last_error=draw(st.none() | stored_errors()),
        errors=tuple(
            draw(
                st.lists(
                    st.builds(ErrorSummary, st.integers(1, 9), st.text(max_size=3), st.text(max_size=3), instants),
                    max_size=3,
                )
            )
        ),
        in_flight=tuple(
            draw(
                st.lists(
                    st.builds(
                        Flight, st.integers(1, 9), st.text(max_size=3), st.floats(0, 9), st.floats(0, 9), st.booleans()
                    ),
                    max_size=2,
                )
            )
        ),
        veto=draw(st.none() | st.text(min_size=1, max_size=5)),
        exhausted=draw(st.booleans()),
        recovered=draw(st.booleans()),
        recovery_failures=draw(st.integers(0, 9)),
        reason=draw(st.text(max_size=5)),
        completed_at=draw(instants),
        expires_at=draw(instants),
        _tallies=draw(
            st.dictionaries(st.text(max_size=3), st.builds(Tally, st.integers(0, 9), st.floats(0, 9)), max_size=2)
        ),
    )


@given(histories(), keys, st.dictionaries(st.text(max_size=3), json_values, max_size=3))
def test_a_snapshot_goes_through_json_and_back_unchanged(history, key, attributes):
    history.attributes.update(attributes)
    snapshot = json.loads(json.dumps(history.to_json("asked", key_to_json(key))))
    context = RetryContext.from_snapshot(snapshot)
    assert json.loads(json.dumps(context.snapshot())) == snapshot
    assert (context.name, context.key, context.retry_count) == ("asked", key, history.failures)
    assert type(context.key) is type(key)
    assert context.attributes == attributes


@given(st.integers(FORMAT + 1, 10**9), histories())
def test_a_snapshot_of_a_later_format_is_refused(later, history):
    with pytest.raises(CodecError, match="upgrade"):
        RetryContext.from_snapshot({**history.to_json("asked", "m"), "format": later})


@given(
    histories(),
    st.sampled_from(
        [*sorted(History(failures=1).to_json("asked", "m")), "last_error", "errors", "in_flight", "tallies"]
    ),
    json_values,
)
@example(History(failures=1), "retry_count", "many")
@example(History(failures=1), "key", {"bytes": 7})
@example(History(failures=1), "key", [None, 1.5])
@example(History(failures=1), "key", True)
def test_a_damaged_snapshot_gives_a_codec_error_or_a_context_and_nothing_else(history, field, value):
    try:
        context = RetryContext.from_snapshot({**history.to_json("asked", "m"), field: value})
    except CodecError:
        return
    context.snapshot()


# -- keys


@given(st.tuples(any_text.filter(bool), keys | any_text), st.tuples(any_text.filter(bool), keys | any_text))
@settings(max_examples=500)
@example(("a", "b"), ("a/b", ""))
@example(("a", ("b,/1:c",)), ("a", ("b", "c")))
@example(("a", (1, (2,))), ("a", (1, 2)))
@example(("a", "7"), ("a", 7))
@example(("a", b"7"), ("a", "37"))
@example(("a", "%0A"), ("a", "\n"))
@example(("a", "\ud800"), ("a", "%ED%A0%80"))
@example(("a", ()), ("a", ("",)))
@example(("a", "x" * 600), ("a", canonical_key("a", "x" * 600).removeprefix("a/")))
@example(("a", "x" * 600), ("a", "x" * 601))
@example(("é", "x"), ("%C3%A9", "x"))
def test_p12_different_names_or_keys_have_different_canonical_texts(one, other):
    same = one == other and repr(one) == repr(other)
    texts = canonical_key(*one), canonical_key(*other)
    assert (texts[0] == texts[1]) is same


@given(
    any_text.filter(bool) | st.just("n" * 80),
    keys | any_text | st.text(min_size=500, max_size=700) | st.binary(max_size=2_000),
)
@example("é" * 80, "\ud800" * 300)
def test_a_canonical_text_is_bounded_printable_and_stays_the_same(name, key):
    text = canonical_key(name, key)
    assert len(text) <= 600
    assert text.isprintable()
    text.encode()
    assert canonical_key(name, key) == text


@given(keys)
def test_a_key_goes_through_json_and_back_unchanged(key):
    back = key_from_json(json.loads(json.dumps(key_to_json(key))))
    assert repr(back) == repr(key)
