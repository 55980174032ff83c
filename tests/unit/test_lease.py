"""Leases of long attempts: renewed while they run, in a store that processes share."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest
import trio

from retrykit import AsyncRetryTemplate, MapRetryContextCache, RetryState, RetryTemplate, TerminatedRetryError
from retrykit import lease as leases
from retrykit.clock import StoreClock
from tests.doubles import Transaction

KEY = "retry/m-1"
LEASE = 0.03
DEADLINE = 20.0
STATE = RetryState(key="m-1", redelivered=True)


class SharedStore(MapRetryContextCache):
    """A store that processes share; whoever waits for the next renewal is told of it."""

    shared = True

    def __init__(self):
        super().__init__()
        self.store_clock = StoreClock()
        now = time.monotonic()
        self.store_clock.observe(now, time.time(), time.monotonic())
        self.renewals = []
        self.renewed = threading.Semaphore(0)
        self.faults = []

    def save(self, key, snapshot, expected):
        stored = self.load(key)
        before, after = (until_of(stored.snapshot) if stored else None), until_of(snapshot)
        if before is not None and after is not None and after > before:
            if self.faults:
                raise self.faults.pop()
            self.renewals.append(after)
            self.renewed.release()
        return super().save(key, snapshot, expected)

    def joined(self, transaction):
        return self if transaction == "session" else None


class AsyncSharedStore:
    """The same, asynchronous."""

    def __init__(self):
        self.real = SharedStore()
        self.store_clock = self.real.store_clock
        self.renewed = []

    async def load(self, key):
        return self.real.load(key)

    async def save(self, key, snapshot, expected):
        saved = self.real.save(key, snapshot, expected)
        if len(self.real.renewals) >= 2:
            for event in self.renewed:
                event.set()
        return saved

    async def remove(self, key, expected=None):
        return self.real.remove(key, expected)


def until_of(snapshot):
    flights = snapshot.get("in_flight")
    return flights[0]["until"] if flights else None


def await_renewals(store, number):
    for _ in range(number):
        assert store.renewed.acquire(timeout=DEADLINE)


@pytest.fixture
def lost(caplog):
    """An event: somebody was told that the lease is lost."""
    event = threading.Event()

    class Told(logging.Handler):
        def emit(self, record):
            if "lease" in record.getMessage():
                event.set()

    handler, logger = Told(), logging.getLogger("retrykit")
    logger.addHandler(handler)
    yield event
    logger.removeHandler(handler)


def held():
    return list(leases._keeper._held.values())


def test_lease_of_a_long_attempt_is_renewed_again_and_again_and_its_success_settles_the_history():
    store = SharedStore()
    template = RetryTemplate(context_cache=store, lease=LEASE)
    assert template.execute(lambda _: await_renewals(store, 3), state=STATE) is None
    assert store.renewals == sorted(set(store.renewals))
    assert len(store) == 0
    assert held() == []


def test_failure_after_renewals_is_counted_once():
    store = SharedStore()

    def fail(context):
        await_renewals(store, 2)
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        RetryTemplate(context_cache=store, lease=LEASE).execute(fail, state=STATE)
    snapshot = store.load(KEY).snapshot
    assert (snapshot["retry_count"], snapshot.get("in_flight")) == (1, None)


def test_renewal_that_fails_is_reported_and_tried_again(caplog):
    store = SharedStore()
    store.faults = [OSError("no route"), OSError("no route")]
    template = RetryTemplate(context_cache=store, lease=LEASE)
    assert template.execute(lambda _: await_renewals(store, 1), state=STATE) is None
    assert len([record for record in caplog.records if "renew" in record.getMessage()]) == 2


def test_attempt_that_was_believed_dead_is_told_and_its_work_is_rolled_back(lost):
    store, log = SharedStore(), []
    template = RetryTemplate(context_cache=store, lease=LEASE)
    seen = []

    def work(context):
        stored = store.load(KEY)
        store.save(KEY, {**stored.snapshot, "in_flight": [], "retry_count": 1}, stored.version)
        assert lost.wait(DEADLINE)
        seen.append(context.lease_lost)

    with pytest.raises(TerminatedRetryError, match="believed dead"):
        template.execute(work, state=STATE, transaction=Transaction(log))
    assert (seen, log) == ([True], ["begin", "roll back"])
    assert store.load(KEY).snapshot["retry_count"] == 1


def test_recovery_that_takes_long_keeps_its_lease_too():
    store = SharedStore()
    template = RetryTemplate(context_cache=store, lease=LEASE)
    template.veto("m-1", "poison")
    assert template.execute(lambda _: None, lambda _: await_renewals(store, 2), state=STATE) is None
    assert len(store) == 0


def test_store_of_one_process_renews_nothing():
    seen = []
    template = RetryTemplate(lease=LEASE)
    template.execute(lambda _: seen.extend(held()), state=STATE)
    assert seen == []


def test_calls_of_several_templates_are_renewed_each_in_its_own_time():
    slow, fast = SharedStore(), SharedStore()
    patient, hasty = RetryTemplate(context_cache=slow, lease=3600), RetryTemplate(context_cache=fast, lease=LEASE)

    def outer(_):
        hasty.execute(lambda _: await_renewals(fast, 2), state=STATE)

    patient.execute(outer, state=STATE)
    assert slow.renewals == []
    assert len(fast.renewals) >= 2


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_task_of_the_loop_renews_where_the_store_is_asynchronous(library):
    async def main():
        store = AsyncSharedStore()
        event = asyncio.Event() if library == "asyncio" else trio.Event()
        store.renewed.append(event)

        async def work(_):
            await event.wait()
            return "done"

        template = AsyncRetryTemplate(context_cache=store, lease=LEASE)
        assert await template.execute(work, state=STATE) == "done"
        return store.real

    store = asyncio.run(asyncio.wait_for(main(), DEADLINE)) if library == "asyncio" else trio.run(main)
    assert len(store) == 0
    assert len(store.renewals) >= 2


def test_keeper_begins_anew_in_a_forked_child():
    before = leases._keeper
    leases._begin_anew()
    assert leases._keeper is not before
    store = SharedStore()
    RetryTemplate(context_cache=store, lease=LEASE).execute(lambda _: await_renewals(store, 1), state=STATE)
