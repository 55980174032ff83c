"""A store's clock as seen from here: bounded by when it was asked and answered."""

from __future__ import annotations

import time

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit import MapRetryContextCache, RetryState, RetryTemplate
from retrykit.clock import StoreClock

AHEAD = 3600.0


class SharedCache(MapRetryContextCache):
    """A cache in memory whose store has a clock of its own, an hour ahead."""

    def __init__(self):
        super().__init__()
        self.store_clock = StoreClock()

    def load(self, key):
        self.look()
        return super().load(key)

    def look(self):
        sent = time.monotonic()
        self.store_clock.observe(sent, time.time() + AHEAD, time.monotonic())


def test_clock_that_was_never_observed_says_so():
    clock = StoreClock()
    assert not clock.known
    assert "not observed" in repr(clock)
    with pytest.raises(ValueError, match="not been observed"):
        clock.time()


def test_time_lies_between_what_was_asked_and_answered():
    clock, sent = StoreClock(), time.monotonic()
    clock.observe(sent, 1_000.0, sent + 0.25)
    passed = time.monotonic() - sent
    assert 999.7 <= clock.time() - passed <= 1_000.1


DELAY = st.floats(0.001, 5)


@given(offset=st.floats(-1e6, 1e6), delays=st.lists(st.tuples(DELAY, DELAY), min_size=1))
def test_more_observations_never_lead_away_from_the_truth(offset, delays):
    clock, now = StoreClock(), time.monotonic()
    widths = []
    for before, after in delays:
        clock.observe(now, now + before + offset, now + before + after)
        low, high = clock._distance
        assert low - 1e-6 <= offset <= high + 1e-6
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_observation_that_contradicts_replaces_what_was_known():
    clock, now = StoreClock(), time.monotonic()
    clock.observe(now, 1_000.0, now + 0.001)
    clock.observe(now, 5_000.0, now + 0.001)
    assert 4_999.0 < clock.time() < 5_010.0


def test_template_takes_the_time_of_the_store_and_falls_back_to_its_own():
    cache = SharedCache()
    template = RetryTemplate(name="orders", context_cache=cache)
    assert abs(template.time() - time.time()) < 60
    cache.look()
    assert abs(template.time() - time.time() - AHEAD) < 60
    assert abs(attrs.evolve(template, context_cache=MapRetryContextCache()).time() - time.time()) < 60


def test_store_that_can_be_asked_is_asked_once_before_anything_else_was():
    asked = []

    def ask():
        asked.append(1)
        now = time.monotonic()
        clock.observe(now, time.time() + AHEAD, time.monotonic())

    cache = MapRetryContextCache()
    cache.store_clock = clock = StoreClock(ask)
    template = RetryTemplate(name="orders", context_cache=cache)
    fences = []
    for _ in range(2):
        template.execute(lambda context: fences.append(context.fence), state=RetryState(key="m-1", redelivered=False))
    assert asked == [1]
    assert min(fences) > (time.time() + AHEAD - 60) * 1_000_000


def test_histories_carry_the_time_of_the_store():
    cache = SharedCache()
    template = RetryTemplate(name="orders", context_cache=cache)

    def fail(context):
        raise LookupError

    with pytest.raises(LookupError):
        template.execute(fail, state=RetryState(key="m-1"))
    snapshot = cache.load(template.key_of("m-1")).snapshot
    assert snapshot["last_failed_at"] - time.time() > AHEAD - 60
    assert snapshot["fence"] > (time.time() + AHEAD - 60) * 1_000_000
