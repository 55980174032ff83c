"""What is left of a history that its store has dropped, and that its count goes on from there."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit import (
    CodecError,
    CompositeRetryPolicy,
    ExhaustedRetryError,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    PredicateRetryPolicy,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
)
from retrykit.cli.contexts import _evicted
from retrykit.cli.screen import Screen
from retrykit.context import RetryContext
from retrykit.errors import CacheCapacityError
from retrykit.eviction import Eviction
from retrykit.histories import Histories
from retrykit.history import History
from retrykit.tombstone import CLOSING, CUT, SEAM, checked_tombstones, cuttable, entombed, epitaph
from tests.doubles import ManualClock, pickled

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def encode(value):
    return json.dumps(value, separators=(",", ":"))


def fail(context):
    raise OSError("down")


def deliver(template, callback=fail, key="m-1", recover=None, **state):
    """One delivery; its value or its error."""
    try:
        return template.execute(callback, recover, state=RetryState(key=key, **state))
    except Exception as error:
        return error


def evicting(**options):
    return MapRetryContextCache(1, on_full="evict_oldest", tombstones=10, **options)


def push_out(cache):
    """Another item's history takes the only place."""
    deliver(RetryTemplate(name="others", context_cache=cache), key="other")


# -- bad input


@pytest.mark.parametrize(
    ("tombstones", "lasts", "words"),
    [
        (-1, None, "tombstones: must be 0 or more, not -1"),
        (True, None, "tombstones: must be an int or None, not bool True"),
        (1.5, None, "tombstones: must be an int or None, not float 1.5"),
        (None, 0, "tombstone_time_to_live: must be more than 0 seconds, not 0"),
        (None, "1h", "tombstone_time_to_live: must be seconds"),
    ],
)
def test_bounds_that_make_no_sense_are_refused_by_name(tombstones, lasts, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        checked_tombstones(tombstones, lasts)
    assert str(caught.value).startswith(words)


def test_bounds_that_make_sense_are_given_back_in_seconds():
    assert checked_tombstones(0, timedelta(days=1)) == {"tombstones": 0, "tombstone_time_to_live": 86_400.0}
    assert checked_tombstones(None, None) == {"tombstones": None, "tombstone_time_to_live": None}


# -- the text that can be cut

TEXT = st.text(max_size=300)
ERROR = {"type": TEXT, "message": TEXT, "classes": st.lists(TEXT), "traceback": TEXT}
ERRORS = st.recursive(
    st.fixed_dictionaries({}, optional=ERROR),
    lambda causes: st.fixed_dictionaries({"cause": causes}, optional=ERROR),
    max_leaves=3,
)
SNAPSHOTS = st.fixed_dictionaries(
    {},
    optional={
        "format": st.just(1),
        "retry_count": st.integers(),
        "key": TEXT,
        "last_error": ERRORS,
        "errors": st.lists(ERRORS),
        "attributes": st.dictionaries(TEXT, TEXT),
    },
)


def cut(text):
    """What every store does to a text, in words of its own."""
    if text == "{}":
        return "{" + epitaph(5.0, "capacity")[1:]
    kept, found, _ = text.partition(CUT)
    if not found and SEAM in text:
        return text.partition(SEAM)[0] + epitaph(5.0, "capacity")
    return (kept + CLOSING if found else text)[:-1] + epitaph(5.0, "capacity")


@given(SNAPSHOTS)
def test_text_that_can_be_cut_is_the_snapshot_and_what_is_left_is_its_tombstone(snapshot):
    text = cuttable(snapshot, encode)
    assert json.loads(text) == snapshot
    left = json.loads(cut(text))
    expected = entombed(snapshot, 5.0, "capacity")
    assert left == (expected if CUT in text or SEAM in text else {**snapshot, "evicted": expected["evicted"]})


def test_what_real_failures_leave_is_cut_and_much_smaller():
    cache = MapRetryContextCache()
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(9))

    def keeps(context):
        context.attributes["basket"] = ["apples"] * 100
        raise OSError("down")

    for _ in range(4):
        deliver(template, keeps)
    text = cuttable(cache.load("retry/m-1").snapshot, encode)
    left = cut(text)
    assert len(left) < len(text) / 3 < 1_000
    assert not {"errors", "attributes"} & json.loads(left).keys()


def test_message_of_the_last_error_stays_and_the_words_of_its_causes_fall():
    link = {"type": "T", "classes": ["T", "S"], "message": "long" * 100, "traceback": "…"}
    snapshot = {"retry_count": 1, "last_error": {**link, "cause": {**link, "cause": link}}}
    bare = {"type": "T", "classes": ["T", "S"]}
    kept = entombed(snapshot, 1.0, "capacity")["last_error"]
    assert kept == {**bare, "message": "long" * 100, "cause": {**bare, "cause": bare}}


@pytest.mark.parametrize("indent", [None, 0, 1, "\t"])
def test_nobody_who_writes_json_by_other_means_marks_where_it_may_be_cut(indent):
    snapshot = {"retry_count": 1, "last_error": {"classes": ["a", "b"], "message": CUT}, "errors": [{}, {"a": 1}]}
    text = json.dumps(snapshot, indent=indent)
    assert (CUT in text, SEAM in text) == (False, False)


# -- what a history says of it


def test_eviction_survives_json_and_pickling_and_is_read_in_a_line():
    history = History.from_json({"format": 1, "retry_count": 3, "evicted": {"at": NOON.timestamp(), "by": "capacity"}})
    assert history.evicted == Eviction(NOON, "capacity", 3)
    history.failures = 4
    again = History.from_json(history.to_json("orders", "m-1"))
    assert again.evicted == history.evicted == pickled(history.evicted)
    assert str(again.evicted) == (
        "3 failures counted before its history was evicted at 2026-11-22 12:00:00+00:00, by capacity"
    )
    assert str(Eviction(NOON, "time_to_live", 1)).startswith("1 failure counted")


@pytest.mark.parametrize(
    "damaged",
    [{"at": 1.0}, {"at": "noon", "by": "capacity"}, {"at": 1e300, "by": "capacity"}, {"at": 1.0, "by": "me"}, [1]],
    ids=str,
)
def test_damaged_note_of_an_eviction_is_a_codec_error(damaged):
    with pytest.raises(CodecError, match="damaged"):
        History.from_json({"format": 1, "retry_count": 1, "evicted": damaged})


# -- the count goes on


@pytest.mark.parametrize("flag", [True, None, False])
def test_p5_eviction_grants_no_attempt_more_than_the_policy_says(flag):
    cache, calls = evicting(), []
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(3))

    def attempt(context):
        calls.append((context.attempt, context.evicted and context.evicted.failures))
        raise OSError("down")

    for _ in range(8):
        deliver(template, attempt, recover=lambda _: "parked", redelivered=flag, recover_on_redelivery=False)
        push_out(cache)
        if len(calls) == 3:
            break
    # Who says that it is a first delivery has nothing looked up: its failure meets the tombstone when it is stored.
    assert calls == ([(1, None)] * 3 if flag is False else [(1, None), (2, 1), (3, 2)])
    assert cache.load("retry/m-1") is None


def test_p5_threads_whose_histories_push_each_other_out_make_exactly_the_allowed_attempts():
    cache, calls, parked = MapRetryContextCache(2, on_full="evict_oldest", tombstones=100), [], []
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(3))

    def deliver_all(keys):
        for key in keys:
            while key not in parked:
                deliver(
                    template,
                    lambda _, key=key: calls.append(key) or fail(None),
                    key,
                    lambda _, key=key: parked.append(key),
                    redelivered=True,
                    recover_on_redelivery=False,
                )

    keys = [[f"{thread}/{number}" for number in range(5)] for thread in range(4)]
    threads = [threading.Thread(target=deliver_all, args=(own,)) for own in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(parked) == sorted(key for own in keys for key in own)
    assert Counter(calls) == dict.fromkeys(parked, 3)


def test_what_is_known_of_an_evicted_item_is_told_in_the_decision_the_log_and_to_operators():
    cache = evicting()
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(3))
    deliver(template)
    deliver(template)
    push_out(cache)
    told = Histories(cache).get("retry/m-1")
    assert (told.retry_count, told.evicted.failures, told.evicted.by) == (2, 2, "capacity")
    assert told.to_json()["evicted"] == {"at": told.evicted.at.isoformat(), "by": "capacity", "failures": 2}
    assert "(the store was full), with 2 failed" in _evicted(Screen(None, NOON), told)
    deliver(template)
    words = "attempt 3 of 3 (2 failures counted before its history was evicted at"
    assert words in Histories(cache).get("retry/m-1").why
    error = deliver(template)
    assert type(error) is ExhaustedRetryError
    assert str(error).count("2 failures counted before") == 1


def test_history_that_nothing_evicted_says_nothing_of_it():
    cache, seen = MapRetryContextCache(), []
    template = RetryTemplate(context_cache=cache)
    deliver(template, lambda context: seen.append(context.evicted) or fail(context))
    summary = Histories(cache).get("retry/m-1")
    assert (seen, summary.evicted, _evicted(Screen(None, NOON), summary)) == ([None], None, None)


def test_p4_veto_that_had_to_be_evicted_still_forbids():
    cache = evicting()
    template = RetryTemplate(context_cache=cache)

    def forbid(context):
        context.veto("poison")
        raise OSError("down")

    deliver(template, forbid)
    cache.save("others/1", {"veto": "too", "retry_count": 1}, None)
    assert [key for key, _ in cache.items()] == ["others/1"]
    error = deliver(template, lambda _: pytest.fail("it was vetoed"))
    assert isinstance(error, Exception)
    assert RetryContext.from_snapshot(cache.load("retry/m-1").snapshot).veto_reason == "poison"


def wrapped(_):
    raise RuntimeError("wrapped") from ConnectionError("down")


@pytest.mark.parametrize(
    ("policy", "attempts", "recovered"),
    [
        (SimpleRetryPolicy(4, retry_for=ConnectionError, traverse_causes=True), 4, True),
        (SimpleRetryPolicy(4, no_retry_for=ConnectionError, traverse_causes=True), 1, True),
        (SimpleRetryPolicy(2, not_recoverable=ConnectionError), 2, False),
        (PredicateRetryPolicy(lambda error: error is None or "wrapped" in str(error)), 5, False),
    ],
    ids=["retry for", "no retry for", "not recoverable", "predicate"],
)
@pytest.mark.parametrize("evicts", [True, False])
def test_policies_decide_by_the_causes_as_they_would_without_an_eviction(policy, attempts, recovered, evicts):
    cache, calls, parked = evicting() if evicts else MapRetryContextCache(), [], []
    template = RetryTemplate(context_cache=cache, retry_policy=policy)
    for _ in range(5):
        if not parked:
            deliver(template, lambda _: calls.append(1) or wrapped(_), recover=parked.append, redelivered=True)
            push_out(cache)
    assert (len(calls), bool(parked)) == (attempts, recovered)


def test_branches_of_a_composed_policy_count_on_and_still_know_the_last_error():
    cache = evicting()
    composed = CompositeRetryPolicy(
        [MaxAttemptsRetryPolicy(9), SimpleRetryPolicy(2, retry_for=OSError)], optimistic=False
    )
    template = RetryTemplate(context_cache=cache, retry_policy=composed)
    deliver(template)
    push_out(cache)
    last = []
    deliver(template, lambda context: last.append(context.last_error) or fail(context))
    assert (last[0].type, last[0].traceback) == ("builtins.OSError", "")
    assert type(deliver(template)) is ExhaustedRetryError


def test_running_attempt_whose_history_is_evicted_is_still_known_and_settles_exactly():
    cache, versions = evicting(), []
    template = RetryTemplate(context_cache=cache)

    def work(context):
        push_out(cache)
        snapshot = cache.load("retry/m-1").snapshot
        versions.append((len(snapshot["in_flight"]), "evicted" in snapshot))
        return "done"

    assert deliver(template, work) == "done"
    assert versions == [(1, True)]
    assert cache.load("retry/m-1") is None


def test_fence_grows_on_across_an_eviction():
    cache, fences = evicting(), []
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(9), clock=ManualClock())
    for _ in range(4):
        deliver(template, lambda context: fences.append(context.fence) or fail(context))
        push_out(cache)
    assert fences == sorted(set(fences))


def test_fresh_item_under_an_evicted_key_begins_anew():
    cache, attempts = evicting(), []
    template = RetryTemplate(context_cache=cache)
    deliver(template)
    push_out(cache)
    deliver(template, lambda context: attempts.append((context.attempt, context.evicted)) or fail(context), fresh=True)
    assert attempts == [(1, None)]
    assert Histories(cache).get("retry/m-1").retry_count == 1


@pytest.mark.parametrize("attempts", [1, 9])
def test_reason_tells_of_the_last_eviction_only(attempts):
    cache, clock = evicting(), ManualClock()
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(attempts), clock=clock)
    others = attrs.evolve(template, name="others")
    for _ in range(4):
        error = deliver(template, recover=fail, redelivered=True)
        deliver(others, key="other", fresh=True)
        clock.elapsed += 60
    why = Histories(cache).get("retry/m-1").why
    assert "counted before its history was evicted" in why
    assert (why.count("counted before"), str(error).count("counted before") <= 1) == (1, True)


# -- the bounds of tombstones in memory


def test_veto_of_an_item_that_was_never_seen_buries_no_history_at_the_beginning_of_time():
    cache, attempts = evicting(), []
    template = RetryTemplate(name="orders", context_cache=cache, retry_policy=SimpleRetryPolicy(5))
    for _ in range(2):
        deliver(template, lambda context: attempts.append(context.attempt) or fail(context))
    Histories(cache).veto(("orders", "other"), "poison")
    assert cache.load("orders/m-1").snapshot["evicted"]["at"] > 1.7e9
    assert cache.expire() == 0
    deliver(template, lambda context: attempts.append(context.attempt) or fail(context))
    assert attempts == [1, 2, 3]


def test_history_that_is_evicted_while_others_are_read_is_not_among_them():
    cache = MapRetryContextCache(2, on_full="evict_oldest")
    for key in "ab":
        cache.save(key, {"retry_count": 1}, None)
    items = cache.items()
    assert next(items)[0] == "a"
    cache.save("c", {"retry_count": 1}, None)
    cache.save("d", {"retry_count": 1}, None)
    assert list(items) == []


def test_history_past_its_time_leaves_a_tombstone_that_goes_when_its_own_time_is_over():
    cache = MapRetryContextCache(time_to_live=10, tombstone_time_to_live=100)
    cache.save("a", {"retry_count": 2, "last_failed_at": 5.0}, None)
    assert cache.expire(15.0) == 1
    assert cache.load("a").snapshot["evicted"] == {"at": 15.0, "by": "time_to_live"}
    assert list(cache.items()) == []
    assert cache.expire(114.0) == 0
    assert cache.expire(115.0) == 1
    assert cache.load("a") is None


def test_p5_memory_does_not_seem_empty_while_its_only_history_becomes_a_tombstone(monkeypatch):
    cache, seen = MapRetryContextCache(1, on_full="evict_oldest"), []

    def look(*facts):
        # As another worker may, who does not wait for the lock.
        seen.append(cache.is_empty)
        return entombed(*facts)

    monkeypatch.setattr("retrykit.cache.entombed", look)
    for key in ("a", "b"):
        cache.save(key, {"format": 1, "name": "orders", "key": key, "retry_count": 1}, None)
    assert seen == [False]


def test_there_are_no_more_tombstones_than_asked_and_the_oldest_go():
    cache = MapRetryContextCache(1, on_full="evict_oldest", tombstones=2)
    for key in "abcde":
        cache.save(key, {"retry_count": 1}, None)
    assert [key for key in "abcde" if cache.load(key) is not None] == ["c", "d", "e"]
    assert sorted(cache.open_keys("", 3)) == ["c", "d", "e"]
    assert len(cache) == 1


def test_there_are_as_many_tombstones_as_histories_unless_somebody_says_otherwise():
    few, none = MapRetryContextCache(2, time_to_live=1), MapRetryContextCache(2, time_to_live=1, tombstones=0)
    for cache in (few, none):
        for number in range(6):
            cache.save(f"{number}", {"retry_count": 1, "started_at": 10.0 * number}, None)
    assert [len(cache.open_keys("", 9)) for cache in (few, none)] == [4, 2]
    cache = MapRetryContextCache(7, tombstones=3, tombstone_time_to_live=9)
    assert pickled(cache).bounds == cache.bounds
    assert cache.bounds != MapRetryContextCache(7).bounds


def test_tombstone_takes_a_place_when_it_becomes_a_history_again():
    cache = MapRetryContextCache(1, on_full="evict_oldest")
    version = cache.save("a", {"retry_count": 1}, None)
    cache.save("b", {"retry_count": 1}, None)
    assert cache.load("a").version == version
    assert cache.save("a", {"retry_count": 2}, version) is not None
    assert [key for key, _ in cache.items()] == ["a"]
    assert cache.load("b").snapshot["evicted"]["by"] == "capacity"


def test_full_cache_that_rejects_has_no_place_for_a_tombstone_and_keeps_it():
    cache = MapRetryContextCache(1, time_to_live=10)
    version = cache.save("a", {"retry_count": 1, "last_failed_at": 1.0}, None)
    cache.expire(20.0)
    cache.save("b", {"retry_count": 1, "last_failed_at": 20.0}, None)
    with pytest.raises(CacheCapacityError):
        cache.save("a", {"retry_count": 2, "last_failed_at": 21.0}, version)
    assert cache.load("a").snapshot["retry_count"] == 1
    assert cache.save("a", {"completed_at": 21.0}, version) is not None


def test_tombstone_can_be_forgotten_and_another_version_of_it_wins_nothing():
    cache = evicting()
    version = cache.save("a", {"retry_count": 1}, None)
    cache.save("b", {"retry_count": 1}, None)
    assert cache.save("a", {}, None) is None
    assert cache.save("a", {}, version + 1) is None
    assert cache.remove("a", version + 1) is False
    assert cache.remove("a", version) is True
    assert cache.load("a") is None
