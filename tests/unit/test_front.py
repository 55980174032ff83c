"""A shared store with this process's memory in front of it."""

from __future__ import annotations

import asyncio

import attrs
import pytest

from retrykit import (
    AsyncRetryTemplate,
    ExhaustedRetryError,
    FixedBackOffPolicy,
    FrontContextCache,
    InconsistentKeyError,
    MapRetryContextCache,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
)
from retrykit.cache import StoredContext
from retrykit.clock import StoreClock
from retrykit.testing import TombstoneContract
from tests.doubles import Fails, ManualClock, pickled

KEY = "retry/m-1"
ERROR = OSError("broken")


class Store(MapRetryContextCache):
    """A store that writes down what it is asked."""

    def __init__(self, **options):
        super().__init__(**options)
        self.log = []

    def load(self, key):
        self.log.append("load")
        return super().load(key)

    def save(self, key, snapshot, expected):
        self.log.append("save")
        return super().save(key, snapshot, expected)


class AsyncStore:
    """The same, asynchronous."""

    def __init__(self):
        self.real = Store()

    async def load(self, key):
        return self.real.load(key)

    async def save(self, key, snapshot, expected):
        return self.real.save(key, snapshot, expected)

    async def remove(self, key, expected=None):
        return self.real.remove(key, expected)


class TestFrontOfAMap(TombstoneContract):
    def make_cache(self, directory, **options):
        return FrontContextCache(MapRetryContextCache(**options))


def deliver(template, work, recover=None, **state):
    try:
        return template.execute(work, recover, state=RetryState(key="m-1", **{"redelivered": True} | state))
    except Exception as error:
        return error


def two_processes(**options):
    """Two templates of two processes on one store, each with a front of its own."""
    store = Store()
    policy = SimpleRetryPolicy(max_attempts=options.pop("max_attempts", 5))
    return store, *(
        RetryTemplate(context_cache=FrontContextCache(store), retry_policy=policy, **options) for _ in range(2)
    )


def test_redelivery_to_the_process_that_failed_reads_nothing():
    store, template, _ = two_processes()
    deliver(template, Fails(ERROR))
    store.log.clear()
    assert deliver(template, Fails(ERROR)) is ERROR
    assert store.log == ["save", "save"]
    assert template.history("m-1").retry_count == 2


def test_failures_in_another_process_are_counted_although_they_were_not_remembered():
    store, ours, theirs = two_processes(max_attempts=4)
    for template in (ours, theirs, ours):
        deliver(template, Fails(ERROR))
    attempts = []

    def fail(context):
        attempts.append(context.attempt)
        raise ERROR

    for template in (theirs, ours):
        deliver(template, fail, lambda _: "recovered")
    assert attempts == [4]
    assert len(store) == 0


def test_exhaustion_that_is_remembered_is_looked_up_before_anything_follows_from_it():
    _, ours, theirs = two_processes(max_attempts=1)
    deliver(ours, Fails(ERROR))
    assert isinstance(deliver(ours, Fails()), ExhaustedRetryError)
    assert theirs.forget("m-1")
    assert deliver(ours, Fails()) == "done"


def test_pause_that_another_process_made_pointless_is_not_taken():
    clock = ManualClock()
    _, ours, theirs = two_processes(back_off_policy=FixedBackOffPolicy(60), clock=clock)
    deliver(ours, Fails(ERROR))
    theirs.forget("m-1")
    assert deliver(ours, Fails()) == "done"
    assert clock.slept == []


def test_veto_in_another_process_takes_effect_at_the_next_delivery():
    _, ours, theirs = two_processes()
    deliver(ours, Fails(ERROR))
    theirs.veto("m-1", "poison")
    ran = []
    deliver(ours, ran.append)
    assert ran == []
    theirs.withdraw_veto("m-1")
    assert deliver(ours, Fails()) == "done"


def test_item_that_another_process_completed_is_not_run_again():
    _, ours, theirs = two_processes(remember_completed=60.0)
    deliver(ours, Fails(ERROR))
    assert deliver(theirs, Fails()) == "done"
    ran = []
    assert deliver(ours, ran.append) is None
    assert ran == []


def test_another_items_key_is_found_out_in_the_store():
    _, ours, theirs = two_processes()
    deliver(ours, Fails(ERROR), fingerprint="a")
    assert isinstance(deliver(ours, Fails(), fingerprint="b"), InconsistentKeyError)
    theirs.forget("m-1")
    assert deliver(ours, Fails(), fingerprint="b") == "done"


@pytest.mark.parametrize("state", [{"journal": "never"}, {"redelivered": False, "fresh": True}])
def test_without_a_reservation_the_store_is_read(state):
    store, ours, _ = two_processes()
    deliver(ours, Fails(ERROR))
    store.log.clear()
    deliver(ours, Fails(ERROR), **state)
    assert store.log[0] == "load"


def test_front_remembers_those_used_last_and_no_marks():
    store = Store()
    front = FrontContextCache(store, capacity=2)
    for number in range(3):
        front.save(f"retry/{number}", {"retry_count": number}, None)
    front.save("retry/mark", {"completed_at": 1.0}, None)
    assert [front.recent(f"retry/{n}") is not None for n in (0, 1, 2, "mark")] == [False, True, True, False]
    assert front.recent("retry/1").version == store.load("retry/1").version


def test_what_is_remembered_is_nobody_elses_to_change():
    front = FrontContextCache(Store())
    given = {"attributes": {"seen": [1]}}
    front.save(KEY, given, None)
    given["attributes"]["seen"].append(2)
    front.recent(KEY).snapshot["attributes"]["seen"].append(3)
    assert front.recent(KEY).snapshot == {"attributes": {"seen": [1]}}


def test_what_could_not_be_stored_is_not_remembered():
    store = Store()
    front = FrontContextCache(store)
    version = front.save(KEY, {"retry_count": 1}, None)
    assert front.save(KEY, {"retry_count": 9}, version + 1) is None
    assert front.recent(KEY) is None


def test_everything_else_is_the_stores():
    store = Store(capacity=7, on_full="evict_oldest")
    store.store_clock = StoreClock()
    front = FrontContextCache(store)
    assert (front.on_full, front.store_clock) == ("evict_oldest", store.store_clock)
    assert not hasattr(front, "joined")
    assert pickled(FrontContextCache(MapRetryContextCache(7), 3)).capacity == 3
    with pytest.raises(TypeError, match="store"):
        FrontContextCache(None)


def test_asynchronous_store_stays_asynchronous():
    async def main():
        store = AsyncStore()
        template = AsyncRetryTemplate(context_cache=FrontContextCache(store))
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                await template.execute(Fails(ERROR), state=RetryState(key="m-1", redelivered=True))
        return store.real.log, (await template.history("m-1")).retry_count

    assert asyncio.run(main()) == (["load", "save", "save", "save", "save", "load"], 2)


def test_remembered_is_a_stored_context():
    front = FrontContextCache(Store())
    version = front.save(KEY, {"retry_count": 1}, None)
    assert front.recent(KEY) == StoredContext({"retry_count": 1}, version)
    assert "FrontContextCache" in repr(front)
    assert attrs.fields(FrontContextCache).capacity.default == 10_000


def test_fresh_item_begins_anew_although_others_failed_on_the_old_one_meanwhile():
    _, ours, theirs = two_processes(max_attempts=3)
    deliver(ours, Fails(ERROR))
    for _ in range(2):
        deliver(theirs, Fails(ERROR))
    attempts = []
    deliver(ours, lambda context: attempts.append(context.attempt), fresh=True)
    assert attempts == [1]
