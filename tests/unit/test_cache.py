"""What the in-memory cache does beyond the contract of all caches (see test_cache_contract.py)."""

from __future__ import annotations

import copy

import pytest

from retrykit import CacheCapacityError, MapRetryContextCache, RetryContextCache, RetryTemplate, SystemClock
from retrykit.cache import SWEEP, JoinableContextCache
from tests.doubles import pickled


def test_it_is_a_cache_that_joins_nothing():
    assert isinstance(MapRetryContextCache(), RetryContextCache)
    assert not isinstance(MapRetryContextCache(), JoinableContextCache)
    assert not isinstance(SystemClock(), RetryContextCache)


def test_its_repr_is_short_and_shows_nothing_of_what_it_holds():
    cache = MapRetryContextCache(10)
    cache.save("orders/secret", {"attributes": {"password": "secret"}}, None)
    assert repr(cache) == "MapRetryContextCache(capacity=10, on_full='reject', time_to_live=None, _entries=1)"


def test_an_empty_cache_is_true_and_has_a_length():
    cache = MapRetryContextCache()
    assert cache
    assert len(cache) == 0
    cache.save("k", {}, None)
    assert len(cache) == 1


@pytest.mark.parametrize("duplicate", [pickled, copy.copy], ids=["pickled", "copied"])
def test_a_copy_has_the_same_bounds_and_is_empty(duplicate):
    cache = MapRetryContextCache(10, on_full="evict_oldest", time_to_live=5)
    cache.save("k", {}, None)
    other = duplicate(cache)
    assert other.bounds == cache.bounds
    assert len(other) == 0


def test_templates_compare_in_memory_caches_by_their_bounds():
    assert RetryTemplate(context_cache=MapRetryContextCache()) == RetryTemplate()
    assert RetryTemplate(context_cache=MapRetryContextCache(5)) != RetryTemplate()


def test_neither_side_sees_what_the_other_does_to_its_own():
    cache = MapRetryContextCache()
    mine = {"attributes": {"seen": [1]}}
    cache.save("k", mine, None)
    mine["attributes"]["seen"].append(2)
    cache.load("k").snapshot["attributes"]["seen"].append(3)
    assert cache.load("k").snapshot == {"attributes": {"seen": [1]}}


def test_p6_a_full_cache_refuses_new_keys_and_updates_known_ones():
    cache = MapRetryContextCache(1)
    version = cache.save("a", {}, None)
    with pytest.raises(CacheCapacityError, match=r"full \(1 histories\): the new key 'b'"):
        cache.save("b", {}, None)
    assert cache.save("a", {"retry_count": 2}, version) is not None


def test_a_full_cache_can_forget_what_was_stored_longest_ago():
    cache = MapRetryContextCache(2, on_full="evict_oldest")
    version = cache.save("a", {}, None)
    cache.save("b", {}, None)
    cache.save("a", {}, version)
    cache.save("c", {}, None)
    assert [key for key, _ in cache.items()] == ["a", "c"]


@pytest.mark.parametrize("instant", ["started_at", "last_failed_at"])
def test_a_full_cache_first_drops_what_is_past_its_time_by_the_clock_of_the_snapshots(instant):
    cache = MapRetryContextCache(1, time_to_live=5, tombstones=0)
    cache.save("a", {"started_at": 1.0}, None)
    with pytest.raises(CacheCapacityError):
        cache.save("b", {instant: 5.9}, None)
    assert cache.save("b", {instant: 6.0}, None) is not None
    assert cache.load("a") is None


def test_completion_marks_take_no_place_from_histories():
    cache = MapRetryContextCache(1)
    for number in range(3):
        assert cache.save(f"m-{number}", {"completed_at": 1.0, "expires_at": 2.0}, None) is not None
    assert cache.save("a", {"retry_count": 1}, None) is not None
    with pytest.raises(CacheCapacityError):
        cache.save("b", {"retry_count": 1}, None)
    assert len(cache) == len(list(cache.items())) == 4
    assert cache.expire(2.0) == 3


def test_marks_that_are_over_are_forgotten_as_others_are_stored():
    cache = MapRetryContextCache()
    for number in range(2 * SWEEP):
        cache.save(f"m-{number}", {"completed_at": float(number), "expires_at": number + 10.0}, None)
    assert len(cache) <= SWEEP + 10


def test_a_history_that_is_completed_gives_its_place_to_another():
    cache = MapRetryContextCache(1)
    version = cache.save("a", {"retry_count": 1}, None)
    marked = cache.save("a", {"completed_at": 1.0}, version)
    assert cache.save("b", {"retry_count": 1}, None) is not None
    assert cache.load("a").version == marked
    assert cache.remove("a")
    assert cache.load("a") is None


@pytest.mark.parametrize(
    ("snapshot", "dropped"),
    [
        ({"last_failed_at": 94.0}, True),
        ({"last_failed_at": 96.0}, False),
        ({"started_at": 94.0}, True),
        ({"expires_at": 99.0, "last_failed_at": 99.0}, True),
        ({"expires_at": 101.0, "last_failed_at": 1.0}, False),
        ({}, False),
    ],
    ids=str,
)
def test_what_is_past_its_time_expires(snapshot, dropped):
    cache = MapRetryContextCache(time_to_live=5, tombstones=0)
    cache.save("k", snapshot, None)
    assert cache.expire(100.0) == int(dropped)
    assert (cache.load("k") is None) is dropped


def test_without_a_time_to_live_only_marks_expire():
    cache = MapRetryContextCache()
    cache.save("history", {"last_failed_at": 1.0}, None)
    cache.save("mark", {"expires_at": 2.0}, None)
    assert cache.expire(100.0) == 1
    assert cache.load("history") is not None


def test_items_removed_while_they_are_listed_are_left_out():
    cache = MapRetryContextCache()
    for key in "abc":
        cache.save(key, {}, None)
    listed = []
    for key, _ in cache.items():
        listed.append(key)
        cache.remove("b")
    assert listed == ["a", "c"]
