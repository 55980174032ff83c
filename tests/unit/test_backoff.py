"""How long to wait before the next attempt."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit import (
    BackOffPolicy,
    ErrorHintBackOffPolicy,
    ExponentialBackOffPolicy,
    FixedBackOffPolicy,
    NoBackOffPolicy,
    RetryTemplate,
    ScheduleBackOffPolicy,
    UniformRandomBackOffPolicy,
)
from retrykit.backoff import retry_after
from tests.doubles import Fails, ManualClock, pickled

KINDS = [
    NoBackOffPolicy(),
    FixedBackOffPolicy(2),
    UniformRandomBackOffPolicy(1, 2, seed=3),
    ExponentialBackOffPolicy(jitter="full", seed=3),
    ScheduleBackOffPolicy([1, 2]),
    ErrorHintBackOffPolicy(),
]
JITTERS = [None, "full", "equal", "decorrelated", 0, 0.25, 1.0]


def after(failures, error=None, *, last_delay=None, name="orders", key="m-1"):
    return SimpleNamespace(retry_count=failures, last_error=error, last_delay=last_delay, name=name, key=key)


def series(policy, length=5):
    return [policy.delay(after(n)) for n in range(1, length + 1)]


@pytest.mark.parametrize("policy", KINDS, ids=lambda policy: type(policy).__name__)
def test_every_kind_is_a_value(policy):
    assert isinstance(policy, BackOffPolicy)
    assert policy == attrs.evolve(policy)
    assert hash(policy) == hash(attrs.evolve(policy))
    assert pickled(policy) == policy
    assert repr(policy).startswith(type(policy).__name__ + "(")
    assert len(repr(policy)) < 250


@pytest.mark.parametrize("policy", KINDS, ids=lambda policy: type(policy).__name__)
def test_asking_twice_gives_the_same_answer(policy):
    if not isinstance(policy, ErrorHintBackOffPolicy):
        assert series(policy) == series(policy)


def test_no_back_off_and_a_fixed_one():
    assert series(NoBackOffPolicy(), 2) == [0, 0]
    assert series(FixedBackOffPolicy(timedelta(seconds=2)), 2) == [2.0, 2.0]


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 50))
def test_a_random_interval_lies_between_its_bounds(low, width, failure):
    policy = UniformRandomBackOffPolicy(low, low + width)
    assert low <= policy.delay(after(failure)) <= low + width * (1 + 1e-9)


def test_the_upper_bound_is_not_below_the_lower_one():
    with pytest.raises(ValueError, match=r"max_interval: must be at least min_interval=2, not 1.0"):
        UniformRandomBackOffPolicy(2, 1)


def test_the_exponential_series_is_springs_and_capped():
    assert series(ExponentialBackOffPolicy(1, 3, 10)) == [1, 3, 9, 10, 10]
    assert series(ExponentialBackOffPolicy()) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])


def test_a_series_without_end_stays_at_its_cap():
    assert ExponentialBackOffPolicy(1, 2, 30).delay(after(100_000)) == 30


def test_an_attempt_before_any_failure_waits_the_first_interval():
    assert ExponentialBackOffPolicy(1).delay(after(0)) == 1
    assert ScheduleBackOffPolicy([4, 5]).delay(after(0)) == 4


@pytest.mark.parametrize("jitter", JITTERS)
@given(failure=st.integers(1, 40), seed=st.none() | st.integers(0, 9), last=st.none() | st.floats(0, 100))
def test_jitter_stays_within_its_bounds(jitter, failure, seed, last):
    policy = ExponentialBackOffPolicy(0.5, 2, 10, jitter=jitter, seed=seed)
    interval = policy.interval(failure)
    low, high = {
        None: (interval, interval),
        "full": (0, interval),
        "equal": (interval / 2, interval),
        "decorrelated": (0.5, min(10, max(0.5, 3 * max(0.5, last or 0.5)))),
    }.get(jitter, (interval * (1 - (jitter if isinstance(jitter, int | float) else 0)), interval * 2))
    assert low - 1e-9 <= policy.delay(after(failure, last_delay=last)) <= high + 1e-9


def test_p13_a_seed_repeats_its_draws_for_the_same_item_and_failure_only():
    policy = ExponentialBackOffPolicy(jitter="full", seed=1)
    assert series(policy) == series(attrs.evolve(policy))
    assert policy.delay(after(1)) != policy.delay(after(1, key="m-2"))
    assert policy.delay(after(1)) != policy.delay(after(1, name="invoices"))
    assert policy.delay(after(1)) != attrs.evolve(policy, seed=2).delay(after(1))


def test_without_a_seed_callers_are_spread():
    policy = ExponentialBackOffPolicy(jitter="full")
    assert len({policy.delay(after(1)) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("jitter", "error"),
    [
        ("half", ValueError),
        (1.5, ValueError),
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (True, TypeError),
        ([], TypeError),
    ],
    ids=repr,
)
def test_a_jitter_that_is_none_is_refused(jitter, error):
    with pytest.raises(error, match="jitter: must be None, one of 'full', 'equal', 'decorrelated', or a fraction"):
        ExponentialBackOffPolicy(jitter=jitter)


def test_a_schedule_goes_through_its_intervals_and_repeats_the_last():
    assert series(ScheduleBackOffPolicy([1, timedelta(seconds=2), 4.5])) == [1, 2, 4.5, 4.5, 4.5]
    assert series(ScheduleBackOffPolicy(), 11) == [1, 2, 3, 5, 8, 13, 21, 34, 55, 55, 55]


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        ((), ValueError),
        ([1, -1], ValueError),
        ("12", TypeError),
        (3, TypeError),
        ({1, 2}, TypeError),
        ({1: 2}, TypeError),
    ],
    ids=repr,
)
def test_a_schedule_that_is_none_is_refused(schedule, error):
    with pytest.raises(error, match="schedule: must be"):
        ScheduleBackOffPolicy(schedule)


class Throttled(Exception):
    def __init__(self, hint=None, headers=None):
        super().__init__("too many requests")
        if hint is not None:
            self.retry_after = hint
        if headers is not None:
            self.response = SimpleNamespace(headers=headers)


@pytest.mark.parametrize(
    ("error", "delay"),
    [
        (Throttled(7), 7),
        (Throttled(timedelta(seconds=3)), 3),
        (Throttled("12"), 12),
        (Throttled(headers={"Retry-After": "5"}), 5),
        (Throttled(900), 300),
        (Throttled(0), 0),
    ],
    ids=["number", "timedelta", "text", "header", "capped", "zero"],
)
def test_the_error_says_how_long_to_wait(error, delay):
    assert ErrorHintBackOffPolicy(FixedBackOffPolicy(1)).delay(after(1, error)) == delay


@pytest.mark.parametrize(
    "error",
    [
        None,
        OSError(),
        Throttled(-1),
        Throttled(float("nan")),
        Throttled(float("inf")),
        Throttled(True),
        Throttled("Wed, 21 Oct 2026 07:28:00 GMT"),
        Throttled(headers={}),
        Throttled("²"),
        Throttled("9" * 400),
        Throttled(10**400),
        Throttled(headers=["Retry-After: 5"]),
    ],
    ids=[
        "no error",
        "no hint",
        "negative",
        "nan",
        "inf",
        "bool",
        "date",
        "no header",
        "no number",
        "beyond floats",
        "beyond all bounds",
        "no mapping",
    ],
)
def test_without_a_usable_hint_the_fallback_says_it(error):
    assert ErrorHintBackOffPolicy(FixedBackOffPolicy(1)).delay(after(1, error)) == 1


@pytest.mark.parametrize("hint", ["soon", True, [5], object()], ids=type)
def test_a_hint_that_is_no_duration_counts_as_none(hint):
    assert ErrorHintBackOffPolicy(FixedBackOffPolicy(1), lambda _: hint).delay(after(1, OSError())) == 1


def test_a_hint_that_raises_counts_as_none_and_is_logged(caplog):
    def hint(error):
        raise KeyError("wait")

    template = RetryTemplate(back_off_policy=ErrorHintBackOffPolicy(FixedBackOffPolicy(1), hint), clock=ManualClock())
    assert template.execute(Fails(OSError())) == "done"
    assert "hint could not be read" in caplog.text
    assert "KeyError: 'wait'" in caplog.text


def test_the_hint_can_be_the_users_own_function():
    policy = ErrorHintBackOffPolicy(FixedBackOffPolicy(1), lambda error: error.args[0], 60)
    assert policy.delay(after(1, OSError(30))) == 30
    assert retry_after(OSError(30)) is None
