"""`TombstoneContract`: the suite that a `RetryContextCache` must pass besides that leaves tombstones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrykit.cache import RetryContextCache, StoredContext
from retrykit.errors import CacheCapacityError
from retrykit.testing.cache_contract import ContextCacheContract, _count_up, _together
from retrykit.tombstone import entombed


class TombstoneContract(ContextCacheContract):
    """`ContextCacheContract`, and what a cache promises that leaves a tombstone of each history that a bound drops.

    `make_cache` is given more options: `time_to_live`, `tombstones` (how many at most, 0: none) and
    `tombstone_time_to_live`, both times in seconds. What a tombstone says is `retrykit.tombstone.entombed`.
    """

    def _evicting(self, directory: Path, **options: Any) -> RetryContextCache:
        """A cache with room for two histories."""
        return self.make_cache(directory, **{"capacity": 2, "on_full": "evict_oldest", "tombstones": 10} | options)

    def test_history_that_is_evicted_leaves_a_tombstone(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path)
        saved(cache, "a/1", _HISTORY)
        saved(cache, "a/2", {"retry_count": 1})
        saved(cache, "a/3", {"retry_count": 1})
        stone = found(cache, "a/1").snapshot
        at = stone["evicted"]["at"]
        assert isinstance(at, int | float)
        assert dict(stone) == entombed(_HISTORY, at, "capacity")
        assert not {"errors", "attributes"} & stone.keys()
        assert "traceback" not in stone["last_error"]

    def test_tombstone_keeps_what_policies_classify_by_of_each_cause(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=1)
        saved(cache, "a/1", _HISTORY)
        saved(cache, "a/2", {"retry_count": 1})
        last = found(cache, "a/1").snapshot["last_error"]
        names = {"type": _ERROR["type"], "classes": _ERROR["classes"]}
        assert last == {**names, "message": "down", "cause": {**names, "cause": {**names, "crash": True}}}

    def test_tombstone_is_no_history_but_its_key_is_open(self, tmp_path: Path) -> None:
        cache: Any = self._evicting(tmp_path)
        for number in range(4):
            saved(cache, f"a/{number}", {"retry_count": 1})
        assert [key for key, _ in cache.items("a/")] == ["a/2", "a/3"]
        if hasattr(cache, "open_keys"):
            assert sorted(cache.open_keys("a/", 4)) == [f"a/{number}" for number in range(4)]
            assert cache.open_keys("a/", 3) is None

    def test_tombstone_of_anything_is_a_snapshot(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=1)
        odd: dict[str, dict[str, Any]] = {
            "empty": {},
            "only an error": {"last_error": {"type": "T", "traceback": "x"}},
            "nothing to cut": {"retry_count": 1, "last_error": {"type": "T", "message": "m"}},
            "odd text": {"retry_count": 1, "last_error": {"type": ",\n", "message": "\x00\ud800", "traceback": '"}'}},
            "nothing kept of the error": {"retry_count": 1, "last_error": {"traceback": "x"}, "attributes": {"a": {}}},
        }
        for key, snapshot in odd.items():
            saved(cache, key, snapshot)
        saved(cache, "last", {})
        for key, snapshot in odd.items():
            stone = dict(found(cache, key).snapshot)
            evicted = stone.pop("evicted")
            assert evicted["by"] == "capacity"
            kept = entombed(snapshot, 0.0, "capacity")
            # What there is little of may stay as it was.
            assert stone in (snapshot, {fact: value for fact, value in kept.items() if fact != "evicted"})

    def test_tombstone_is_a_known_key_and_becomes_a_history_again_by_compare_and_set(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path)
        for number in range(3):
            saved(cache, f"a/{number}", {"retry_count": number})
        assert cache.save("a/0", {"retry_count": 7}, None) is None
        version = found(cache, "a/0").version
        second = saved(cache, "a/0", {"retry_count": 1}, version)
        assert second != version
        assert cache.save("a/0", {"retry_count": 7}, version) is None
        assert dict(found(cache, "a/0").snapshot) == {"retry_count": 1}
        assert [key for key, _ in cache.items()] == ["a/0", "a/2"], "what comes back needs room as a new key does"
        assert found(cache, "a/1").snapshot["evicted"]["by"] == "capacity"

    def test_completion_mark_takes_the_place_of_a_tombstone_without_room(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path)
        for number in range(3):
            saved(cache, f"a/{number}", {"retry_count": number})
        saved(cache, "a/0", {"completed_at": 1.0, "expires_at": 2.0}, found(cache, "a/0").version)
        assert [key for key, _ in cache.items()] == ["a/0", "a/1", "a/2"]

    def test_tombstone_is_removed_as_a_history_is(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=1)
        for key in ("a/1", "a/2", "a/3"):
            saved(cache, key, {"retry_count": 1})
        assert cache.remove("a/1", found(cache, "a/1").version + 1) is False
        assert cache.remove("a/1", found(cache, "a/1").version) is True
        assert cache.remove("a/2") is True
        assert (cache.load("a/1"), cache.load("a/2")) == (None, None)
        saved(cache, "a/1", {"retry_count": 1})

    def test_there_are_at_most_so_many_tombstones_and_the_oldest_go(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=1, tombstones=2)
        for number in range(6):
            saved(cache, f"a/{number}", {"retry_count": 1})
        assert [number for number in range(6) if cache.load(f"a/{number}") is not None] == [3, 4, 5]

    def test_expire_leaves_no_more_tombstones_than_there_may_be(self, tmp_path: Path) -> None:
        cache: Any = self._evicting(tmp_path, capacity=20, time_to_live=10, tombstones=2)
        for number in range(9):
            saved(cache, f"a/{number}", {"retry_count": 1, "last_failed_at": 4e9 + number})
        assert cache.expire(4e9 + 15.0) == 6
        assert sum(cache.load(f"a/{number}") is not None for number in range(6)) == 2
        assert [key for key, _ in cache.items()] == ["a/6", "a/7", "a/8"]

    def test_history_that_is_vetoed_grows_old_when_its_veto_has_ended(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=9, time_to_live=10)
        history = {"retry_count": 1, "last_failed_at": 4e9, "veto": "poison"}
        saved(cache, "for a time", {**history, "veto_until": 4e9 + 20.0})
        saved(cache, "for a shorter time", {**history, "veto_until": 4e9 + 5.0})
        saved(cache, "for good", history)
        assert [cache.expire(4e9 + later) for later in (9.0, 10.0, 19.0, 20.0, 99.0)] == [0, 1, 0, 1, 0]
        assert [key for key, _ in cache.items()] == ["for good"]

    def test_attributes_fall_also_where_there_is_no_error(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=1)
        kept: dict[str, Any] = {"retry_count": 1, "veto": "poison", "last_error": {"type": "T", "crash": True}}
        for key, snapshot in {"crash": kept, "veto": {"retry_count": 0, "veto": "poison"}}.items():
            saved(cache, key, {**snapshot, "attributes": {"basket": ["apples"] * 100}, "errors": [{}]})
            saved(cache, f"{key} pushed out", {"retry_count": 1, "veto": "too"})
            assert {fact: value for fact, value in found(cache, key).snapshot.items() if fact != "evicted"} == snapshot

    def test_tombstones_are_read_in_the_order_of_their_keys(self, tmp_path: Path) -> None:
        cache: Any = self._evicting(tmp_path, capacity=1)
        if not hasattr(cache, "evicted"):
            return
        for key in ("b/2", "a/3", "b/1", "b/3", "a/1", "c"):
            saved(cache, key, {"retry_count": 1})
        saved(cache, "mark", {"completed_at": 1.0})
        assert [key for key, _ in cache.evicted()] == ["a/1", "a/3", "b/1", "b/2", "b/3"]
        assert [key for key, _ in cache.evicted("b/", "b/1")] == ["b/2", "b/3"]
        assert all(stored == found(cache, key) for key, stored in cache.evicted("a/"))
        assert cache.remove("a/1")
        saved(cache, "a/3", {"retry_count": 2}, found(cache, "a/3").version)
        assert [key for key, _ in cache.evicted("a/")] == []

    def test_cache_that_is_told_to_leaves_no_tombstone(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=1, time_to_live=10, tombstones=0)
        saved(cache, "a/1", {"retry_count": 1, "last_failed_at": 4e9})
        saved(cache, "a/2", {"retry_count": 1, "last_failed_at": 4e9})
        assert cache.expire(4e9 + 10.0) == 1
        assert (cache.load("a/1"), cache.load("a/2")) == (None, None)

    def test_history_past_its_time_leaves_a_tombstone_with_a_time_of_its_own(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, time_to_live=10, tombstone_time_to_live=100)
        history = {"retry_count": 2, "last_failed_at": 4e9}
        saved(cache, "a/1", history)
        saved(cache, "a/2", {"completed_at": 4e9, "expires_at": 4e9 + 5.0})
        assert cache.expire(4e9 + 10.0) == 2
        assert dict(found(cache, "a/1").snapshot) == entombed(history, 4e9 + 10.0, "time_to_live")
        assert list(cache.items()) == []
        assert cache.expire(4e9 + 109.0) == 0
        assert cache.expire(4e9 + 110.0) == 1
        assert cache.load("a/1") is None

    def test_tombstone_without_a_time_of_its_own_stays(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, time_to_live=10, tombstone_time_to_live=None)
        saved(cache, "a/1", {"retry_count": 2, "last_failed_at": 1.0})
        assert cache.expire(4e9) == 1
        assert cache.expire(9e9) == 0
        assert found(cache, "a/1").snapshot["evicted"]["by"] == "time_to_live"

    def test_veto_that_had_to_be_evicted_is_still_found(self, tmp_path: Path) -> None:
        cache: Any = self._evicting(tmp_path, capacity=1)
        for key in ("a/1", "a/2"):
            saved(cache, key, {"retry_count": 1, "veto": f"{key} is poison"})
        assert found(cache, "a/1").snapshot["veto"] == "a/1 is poison"
        if hasattr(cache, "vetoed"):
            assert sorted(cache.vetoed(["a/1", "a/2", "a/3"])) == ["a/1", "a/2"]

    def test_full_cache_that_rejects_keeps_a_tombstone_for_which_it_has_no_room(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path, capacity=1, on_full="reject", time_to_live=10)
        saved(cache, "a/1", {"retry_count": 3, "last_failed_at": 4e9})
        cache.expire(4e9 + 10.0)
        saved(cache, "a/2", {"retry_count": 1, "last_failed_at": 4e9 + 10.0})
        version = found(cache, "a/1").version
        refused(lambda: cache.save("a/1", {"retry_count": 4, "last_failed_at": 4e9 + 11.0}, version))
        assert found(cache, "a/1").snapshot["retry_count"] == 3
        assert cache.remove("a/2")
        saved(cache, "a/1", {"retry_count": 4, "last_failed_at": 4e9 + 11.0}, found(cache, "a/1").version)

    def test_threads_that_evict_each_other_s_histories_lose_no_count(self, tmp_path: Path) -> None:
        cache = self._evicting(tmp_path)
        _together(4, lambda n: _count_up(cache, f"a/{n}", self.rounds))
        counts = [found(cache, f"a/{n}").snapshot["retry_count"] for n in range(4)]
        assert counts == [self.rounds] * 4


def saved(cache: RetryContextCache, key: str, snapshot: dict[str, Any], expected: int | None = None) -> int:
    """Save, which must win."""
    version = cache.save(key, snapshot, expected)
    assert version is not None, f"{key!r} was not saved"
    return version


def found(cache: RetryContextCache, key: str) -> StoredContext:
    """Load, which must find something."""
    stored = cache.load(key)
    assert stored is not None, f"nothing is stored under {key!r}"
    return stored


def refused(save: Callable[[], Any]) -> None:
    """The store must be too full."""
    try:
        save()
    except CacheCapacityError:
        return
    raise AssertionError("CacheCapacityError was not raised")


_ERROR = {"type": "builtins.OSError", "message": "down", "classes": ["builtins.OSError"], "traceback": "Traceback…\n"}
_HISTORY: dict[str, Any] = {
    "format": 1,
    "name": "orders",
    "key": ["m", 1, {"bytes": "00ff"}],
    "retry_count": 2,
    "crashes": 1,
    "fence": 1763700000123456,
    "first_failed_at": 1763700000.125,
    "last_failed_at": 1763700000.25,
    "not_before": 1763700010.5,
    "exhausted": True,
    "reason": "attempt 2 of 2",
    "last_error": {**_ERROR, "cause": {**_ERROR, "cause": {**_ERROR, "crash": True}}},
    "errors": [{"attempt": 1, "type": "OSError", "message": "down", "at": 1763700000.25}],
    "in_flight": [{"fence": 7, "owner": "host/boot/1", "since": 1763700000.5, "until": 1763700030.5}],
    "tallies": {"0": [2, 0.5]},
    "attributes": {"seen": 3},
}
