"""`ContextCacheContract`: the suite that every `RetryContextCache` must pass, retrykit's own and yours."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrykit.cache import RetryContextCache
from retrykit.errors import CacheCapacityError

DEADLINE = 120.0


class ContextCacheContract:
    """What a context cache promises, as a pytest class: subclass it as `Test…` and give it `make_cache`.

    ```python
    class TestMyCache(ContextCacheContract):
        def make_cache(self, directory, **options):
            return MyCache(directory / "histories", **options)
    ```

    `make_cache(directory, **options)` returns a new, empty cache. `directory` is an empty one of the test's own.
    `options` are `capacity` (how many histories) and `on_full` ("reject" or "evict_oldest"), or none. It is called
    once a test; what must be closed is yours to close, in a fixture of the subclass. The threads of one test share
    that one cache. For one that leaves tombstones there is more in `TombstoneContract`.
    """

    threads = 8
    rounds = 25
    many = 2_000

    def make_cache(self, directory: Path, **options: Any) -> RetryContextCache:
        """A new, empty cache: to be given by the subclass."""
        raise NotImplementedError(f"{type(self).__name__} must define make_cache(self, directory, **options)")

    # -- compare and set

    def test_key_that_was_never_saved_is_not_there(self, tmp_path: Path) -> None:
        assert self.make_cache(tmp_path).load("a/1") is None

    def test_what_was_saved_is_loaded_with_the_version_that_save_returned(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        version = cache.save("a/1", {"retry_count": 1}, None)
        stored = cache.load("a/1")
        assert stored is not None
        assert (dict(stored.snapshot), stored.version) == ({"retry_count": 1}, version)

    def test_save_that_expects_no_key_loses_when_there_is_one_and_changes_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        version = cache.save("a/1", {"retry_count": 1}, None)
        assert cache.save("a/1", {"retry_count": 7}, None) is None
        assert _content(cache) == {"a/1": ({"retry_count": 1}, version)}

    def test_save_that_expects_the_present_version_wins_and_gets_a_new_one(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        first = _saved(cache, "a/1", {"retry_count": 1})
        second = cache.save("a/1", {"retry_count": 2}, first)
        assert second not in (None, first)
        assert _content(cache) == {"a/1": ({"retry_count": 2}, second)}

    def test_save_that_expects_an_old_version_loses_and_changes_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        first = _saved(cache, "a/1", {"retry_count": 1})
        second = cache.save("a/1", {"retry_count": 2}, first)
        assert cache.save("a/1", {"retry_count": 7}, first) is None
        assert _content(cache) == {"a/1": ({"retry_count": 2}, second)}

    def test_save_that_expects_a_version_of_a_key_that_is_gone_loses_and_brings_nothing_back(
        self, tmp_path: Path
    ) -> None:
        cache = self.make_cache(tmp_path)
        version = _saved(cache, "a/1", {})
        assert cache.remove("a/1")
        assert cache.save("a/1", {"retry_count": 7}, version) is None
        assert cache.load("a/1") is None

    def test_version_of_another_key_wins_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        ours = _saved(cache, "a/1", {"of": 1})
        theirs = _saved(cache, "a/2", {"of": 2})
        theirs = _saved(cache, "a/2", {"of": 2}, theirs)
        if theirs != ours:
            assert cache.save("a/1", {}, theirs) is None
            assert cache.remove("a/1", theirs) is False
        assert _content(cache)["a/1"] == ({"of": 1}, ours)

    def test_numbers_that_never_were_versions_win_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        version = _saved(cache, "a/1", {"retry_count": 1})
        for number in (-1, 0, version + 1, version + 2**24, 2**63, 10**30):
            assert cache.save("a/1", {}, number) is None
            assert cache.remove("a/1", number) is False
        assert _content(cache) == {"a/1": ({"retry_count": 1}, version)}

    def test_versions_are_never_used_again_not_even_after_a_key_was_removed(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        seen: list[int] = []
        for _ in range(5):
            seen.append(_saved(cache, "a/1", {}))
            seen.extend(itertools.islice(_updates(cache, "a/1", seen[-1]), 3))
            assert cache.remove("a/1", seen[-1])
        assert len(set(seen)) == len(seen) == 20
        _saved(cache, "a/1", {"new": True})
        assert [cache.save("a/1", {}, version) for version in seen] == [None] * 20
        assert not any(cache.remove("a/1", version) for version in seen)

    # -- remove

    def test_remove_without_a_version_forgets_whatever_is_there(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        _saved(cache, "a/1", {})
        assert cache.remove("a/1") is True
        assert cache.load("a/1") is None
        assert cache.remove("a/1") is False

    def test_remove_with_a_version_forgets_only_that_one(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        first = _saved(cache, "a/1", {})
        second = _saved(cache, "a/1", {"retry_count": 2}, first)
        assert cache.remove("a/1", first) is False
        assert _content(cache) == {"a/1": ({"retry_count": 2}, second)}
        assert cache.remove("a/1", second) is True
        assert cache.remove("a/1", second) is False

    # -- keys and values

    def test_keys_are_compared_exactly_and_know_nothing_of_each_other(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        keys = [*_KEYS, "k" * 512, "k" * 511 + "K", "é" * 512, "😀" * 512]
        versions = {key: _saved(cache, key, {"key": key}) for key in keys}
        assert _content(cache) == {key: ({"key": key}, versions[key]) for key in keys}
        for key in keys:
            assert cache.remove(key, versions[key])
            assert cache.load(key) is None
        assert list(cache.items()) == []

    def test_json_values_come_back_as_they_were(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        _saved(cache, "a/1", _VALUES)
        stored = cache.load("a/1")
        assert stored is not None
        assert dict(stored.snapshot) == _VALUES
        assert isinstance(stored.snapshot["whole"], int)
        assert isinstance(stored.snapshot["real"], float)
        assert stored.snapshot["yes"] is True

    def test_every_fact_of_a_history_is_kept(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        version = _saved(cache, "a/1", _HISTORY)
        _saved(cache, "a/1", _HISTORY | {"retry_count": 3, "veto": None, "exhausted": True}, version)
        stored = cache.load("a/1")
        assert stored is not None
        assert dict(stored.snapshot) == _HISTORY | {"retry_count": 3, "veto": None, "exhausted": True}

    def test_changing_what_was_given_or_returned_changes_nothing_stored(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        given: dict[str, Any] = {"attributes": {"seen": [1]}}
        _saved(cache, "a/1", given)
        given["attributes"]["seen"].append(2)
        returned: Any = _content(cache)["a/1"][0]
        loaded = cache.load("a/1")
        assert loaded is not None
        for snapshot in (returned, loaded.snapshot):
            snapshot["attributes"]["seen"].append(3)
        again = cache.load("a/1")
        assert again is not None
        assert dict(again.snapshot) == {"attributes": {"seen": [1]}}

    # -- items and expiry

    def test_items_come_in_the_order_of_their_keys(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        keys = ["b/2", "a/10", "b/1", "a/2", "B/1", "é/1", "z/1", "~/1"]
        versions = {key: _saved(cache, key, {"key": key}) for key in keys}
        found = [(key, dict(stored.snapshot), stored.version) for key, stored in cache.items()]
        assert found == [(key, {"key": key}, versions[key]) for key in sorted(keys)]

    def test_items_are_those_that_begin_with_the_prefix_and_no_character_in_it_is_special(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        for key in ("a/1", "a/2", "ab/1", "A/1", "a%/1", "a_/1", "b/1"):
            _saved(cache, key, {})
        prefixes = {"a/": ["a/1", "a/2"], "a%": ["a%/1"], "a_": ["a_/1"], "b/1": ["b/1"], "c": [], "b/11": []}
        assert {prefix: [key for key, _ in cache.items(prefix)] for prefix in prefixes} == prefixes

    def test_items_go_on_after_a_key_whether_it_is_there_or_not(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        for number in (1, 2, 4, 5):
            _saved(cache, f"a/{number}", {})
        _saved(cache, "b/1", {})
        after = {"a/2": ["a/4", "a/5"], "a/3": ["a/4", "a/5"], "a/5": [], "": ["a/1", "a/2", "a/4", "a/5"], "b/0": []}
        assert {key: [found for found, _ in cache.items("a/", key)] for key in after} == after

    def test_items_may_be_removed_while_they_are_gone_through(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        for number in range(20):
            _saved(cache, f"a/{number:02}", {})
        removed = [cache.remove(key, stored.version) for key, stored in cache.items("a/")]
        assert removed == [True] * 20
        assert list(cache.items()) == []

    def test_expire_drops_what_is_past_its_time_and_nothing_else(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        _saved(cache, "a/mark", {"completed_at": 50.0, "expires_at": 100.0})
        _saved(cache, "a/later", {"completed_at": 50.0, "expires_at": 300.0})
        _saved(cache, "a/history", {"retry_count": 1, "last_failed_at": 1.0, "expires_at": None})
        assert cache.expire(99.0) == 0
        assert cache.expire(200.0) == 1
        assert cache.expire(200.0) == 0
        assert [key for key, _ in cache.items()] == ["a/history", "a/later"]

    def test_expire_drops_at_most_so_many_when_it_is_told_to(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        for number in range(5):
            _saved(cache, f"a/{number}", {"completed_at": 50.0, "expires_at": 100.0 + number})
        assert cache.expire(200.0, 2) == 2
        assert len(list(cache.items())) == 3
        assert cache.expire(200.0, 7) == 3

    def test_expire_without_a_time_goes_by_the_store_s_own_clock(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        _saved(cache, "a/over", {"completed_at": 50.0, "expires_at": 100.0})
        _saved(cache, "a/later", {"completed_at": 50.0, "expires_at": 4e9})
        assert cache.expire() == 1
        assert [key for key, _ in cache.items()] == ["a/later"]

    def test_time_of_the_last_save_is_what_counts(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        first = _saved(cache, "a/1", {"expires_at": 100.0, "completed_at": 1.0})
        _saved(cache, "a/1", {"retry_count": 1}, first)
        second = _saved(cache, "a/2", {"retry_count": 1})
        _saved(cache, "a/2", {"expires_at": 100.0, "completed_at": 1.0}, second)
        assert cache.expire(200.0) == 1
        assert [key for key, _ in cache.items()] == ["a/1"]

    def test_open_keys_are_those_of_histories_if_there_are_not_too_many(self, tmp_path: Path) -> None:
        cache: Any = self.make_cache(tmp_path)
        if not hasattr(cache, "open_keys"):
            # Whoever has come so far has pytest; whoever only imports `retrykit.testing` need not.
            import pytest

            pytest.skip("this cache has no open_keys")
        for key, snapshot in (("a/1", {}), ("a/2", {"completed_at": 1.0}), ("a/3", {"retry_count": 1}), ("b/1", {})):
            _saved(cache, key, snapshot)
        _saved(cache, "a@breaker0", {"breaker": {}})
        assert sorted(cache.open_keys("a/", 2)) == ["a/1", "a/3"]
        assert cache.open_keys("a/", 1) is None
        assert cache.open_keys("c/", 1) == []

    def test_vetoed_keys_are_found_among_many(self, tmp_path: Path) -> None:
        cache: Any = self.make_cache(tmp_path)
        if not hasattr(cache, "vetoed"):
            import pytest

            pytest.skip("this cache has no vetoed")
        kept: dict[str, Any] = {"retry_count": 0, "veto": "no, \u20ac", "attributes": {"veto": 1}}
        version = _saved(cache, "a/ä'1", kept)
        _saved(cache, "a/2", {"retry_count": 1, "attributes": {"veto": "x"}, "reason": '"veto":"x"'})
        _saved(cache, "a/3", {"veto": "not asked for"})
        _saved(cache, "A/2", {"veto": "another key"})
        lifted = _saved(cache, "a/4", {"veto": "withdrawn"})
        _saved(cache, "a/4", {"retry_count": 1}, lifted)
        found = cache.vetoed(["a/ä'1", "a/2", "a/4", *(f"a/never{number}" for number in range(self.many))])
        assert {key: (dict(stored.snapshot), stored.version) for key, stored in found.items()} == {
            "a/ä'1": (kept, version)
        }
        assert cache.vetoed([]) == {}

    # -- a full cache

    def test_full_cache_refuses_a_new_key_and_says_which_and_stores_nothing(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path, capacity=2)
        before: dict[str, Any] = {key: ({}, _saved(cache, key, {})) for key in ("a/1", "a/2")}
        error = _raised(CacheCapacityError, lambda: cache.save("a/3", {}, None))
        assert "a/3" in str(error)
        assert _content(cache) == before

    def test_full_cache_always_updates_the_keys_that_it_knows(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path, capacity=2)
        versions = {key: _saved(cache, key, {"retry_count": 1}) for key in ("a/1", "a/2")}
        updated = {key: _saved(cache, key, {"retry_count": 2}, version) for key, version in versions.items()}
        assert _content(cache) == {key: ({"retry_count": 2}, version) for key, version in updated.items()}

    def test_full_cache_tells_who_lost_a_known_key_rather_than_that_it_is_full(self, tmp_path: Path) -> None:
        for on_full in ("reject", "evict_oldest"):
            directory = tmp_path / on_full
            directory.mkdir()
            cache = self.make_cache(directory, capacity=1, on_full=on_full)
            version = _saved(cache, "a/1", {"retry_count": 1})
            assert cache.save("a/1", {}, None) is None
            assert _content(cache) == {"a/1": ({"retry_count": 1}, version)}

    def test_key_that_is_removed_makes_room(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path, capacity=2)
        for number in range(6):
            _saved(cache, f"a/{number}", {})
            assert number == 0 or cache.remove(f"a/{number - 1}")
        assert [key for key, _ in cache.items()] == ["a/5"]

    def test_full_cache_that_evicts_forgets_the_oldest_for_a_new_key_and_none_for_a_known_one(
        self, tmp_path: Path
    ) -> None:
        cache = self.make_cache(tmp_path, capacity=3, on_full="evict_oldest")
        versions = {key: _saved(cache, key, {}) for key in ("a/1", "a/2", "a/3")}
        _saved(cache, "a/3", {"retry_count": 2}, versions["a/3"])
        assert [key for key, _ in cache.items()] == ["a/1", "a/2", "a/3"]
        _saved(cache, "a/4", {})
        assert [key for key, _ in cache.items()] == ["a/2", "a/3", "a/4"]

    def test_history_that_somebody_vetoed_is_evicted_last(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path, capacity=2, on_full="evict_oldest")
        _saved(cache, "a/1", {"retry_count": 1, "veto": "poison"})
        for number in range(2, 5):
            _saved(cache, f"a/{number}", {"retry_count": 1})
        found = [key for key, _ in cache.items()]
        assert found == ["a/1", "a/4"], f"a/1 has a veto, and is to be evicted last; left: {found}"

    # -- threads

    def test_threads_that_count_on_one_key_lose_no_count(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        _together(self.threads, lambda _: _count_up(cache, "a/1", self.rounds))
        stored = cache.load("a/1")
        assert stored is not None
        assert stored.snapshot["retry_count"] == self.threads * self.rounds

    def test_threads_that_count_each_on_its_own_key_do_not_mix(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        _together(self.threads, lambda n: _count_up(cache, f"a/{n}", self.rounds))
        counts = {key: stored.snapshot["retry_count"] for key, stored in cache.items()}
        assert counts == {f"a/{n}": self.rounds for n in range(self.threads)}

    def test_key_that_is_being_updated_can_always_be_loaded(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        version = _saved(cache, "a/1", {"retry_count": 0})
        absent: list[int] = []

        def update_or_look(number: int) -> None:
            for _ in itertools.islice(_updates(cache, "a/1", version), 4 * self.rounds) if number == 0 else ():
                pass
            absent.extend(number for _ in range(4 * self.rounds) if number and cache.load("a/1") is None)

        _together(self.threads, update_or_look)
        assert not absent, "a key that was there all the time was not found"

    def test_of_threads_that_store_one_new_key_or_remove_one_version_exactly_one_wins(self, tmp_path: Path) -> None:
        cache = self.make_cache(tmp_path)
        for number in range(5):
            self._one_wins(cache, f"a/{number}")

    def _one_wins(self, cache: RetryContextCache, key: str) -> None:
        stored: list[int | None] = []
        removed: list[bool] = []
        _together(self.threads, lambda n: stored.append(cache.save(key, {"by": n}, None)))
        winners = [version for version in stored if version is not None]
        assert len(winners) == 1
        _together(self.threads, lambda _: removed.append(cache.remove(key, winners[0])))
        assert removed.count(True) == 1


_KEYS = (
    "a",
    "A",
    "a ",
    " a",
    "a/1",
    "a/1/",
    "a%",
    "a_",
    "a*",
    'a"',
    "a'",
    "a\\",
    "a;--",
    "a:b",
    "{a}",
    "[a]",
    "é",
    "e\u0301",
    "ß",
    "ss",
    "İ",
    "i",
    "日本",
    "😀",
    "orders(/a,#7)",
)

_VALUES: dict[str, Any] = {
    "text": "é 日本 😀 '\"\\ \n\t",
    "odd text": ["\x00", "\x7f", "\u2028", "\ud800", ""],
    "whole": 7,
    "large": 2**80,
    "negative": -(2**63),
    "real": 1.0,
    "exact": [0.1, 1e-300, 1.7976931348623157e308, 1763700000.123456],
    "yes": True,
    "no": False,
    "nothing": None,
    "": "empty name",
    "nested": {"list": [1, [2, {"deep": []}]], "empty": {}},
    "long": "x" * 100_000,
}

_HISTORY: dict[str, Any] = {
    "format": 1,
    "name": "orders",
    "key": ["m", 1, {"bytes": "00ff"}],
    "retry_count": 2,
    "last_failed_at": 1763700000.25,
    "not_before": 1763700010.5,
    "veto": "the customer is gone",
    "exhausted": False,
    "errors": [{"attempt": 1, "type": "ValueError", "message": "no", "at": 1763700000.25}],
    "attributes": {"seen": 3},
}


def _saved(cache: RetryContextCache, key: str, snapshot: dict[str, Any], expected: int | None = None) -> int:
    version = cache.save(key, snapshot, expected)
    assert version is not None, f"{key!r} was not saved"
    return version


def _updates(cache: RetryContextCache, key: str, version: int) -> Any:
    while True:
        version = _saved(cache, key, {"after": version}, version)
        yield version


def _content(cache: RetryContextCache) -> dict[str, tuple[dict[str, Any], int]]:
    """What is stored, and that `load` and `items` agree about it."""
    found = {key: (dict(stored.snapshot), stored.version) for key, stored in cache.items()}
    for key, (snapshot, version) in found.items():
        stored = cache.load(key)
        assert stored is not None, f"{key!r} is in items() and cannot be loaded"
        assert (dict(stored.snapshot), stored.version) == (snapshot, version)
    return found


def _count_up(cache: RetryContextCache, key: str, rounds: int) -> None:
    while rounds:
        stored = cache.load(key)
        count, expected = (0, None) if stored is None else (stored.snapshot["retry_count"], stored.version)
        if cache.save(key, {"retry_count": count + 1}, expected) is not None:
            rounds -= 1


def _raised(kind: type[Exception], call: Callable[[], object]) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def _together(threads: int, work: Callable[[int], object]) -> None:
    """Run `work(n)` in that many threads at once; the first error of any of them is raised here."""
    start = threading.Barrier(threads)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait(DEADLINE)
            work(number)
        except BaseException as error:  # noqa: BLE001 - told to the test below
            errors.append(error)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(DEADLINE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in running), "a thread did not come to an end"
