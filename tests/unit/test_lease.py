"""Leases of long attempts: renewed while they run, in a store that processes share."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest
import trio

from retrykit import (
    AsyncRetryTemplate,
    MapRetryContextCache,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    TerminatedRetryError,
)
from retrykit import lease as leases
from retrykit.clock import StoreClock
from retrykit.errors import AttemptsInFlightError
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
        if "lease" in snapshot and self.faults:
            raise self.faults.pop()
        saved = super().save(key, snapshot, expected)
        if "lease" in snapshot and saved is not None:
            self.renewals.append(snapshot["until"])
            self.renewed.release()
        return saved

    def joined(self, transaction):
        return self if transaction == "session" else None


class HangingStore(SharedStore):
    """A store that hangs at the first renewal, until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.hangs, self.goes_on = threading.Event(), threading.Event()

    def save(self, key, snapshot, expected):
        if "lease" in snapshot:
            self.hangs.set()
            assert self.goes_on.wait(DEADLINE)
        return super().save(key, snapshot, expected)


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
    assert store.load(KEY) is None
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
    assert store.load(KEY) is None


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
    assert store.load(KEY) is None
    assert len(store.renewals) >= 2


def test_keeper_begins_anew_in_a_forked_child():
    before = leases._keeper
    leases._begin_anew()
    assert leases._keeper is not before
    store = SharedStore()
    RetryTemplate(context_cache=store, lease=LEASE).execute(lambda _: await_renewals(store, 1), state=STATE)


def test_history_is_left_alone_while_the_lease_is_renewed():
    store, versions = SharedStore(), []
    template = RetryTemplate(context_cache=store, lease=LEASE)

    def work(_):
        versions.append(store.load(KEY).version)
        await_renewals(store, 2)
        versions.append(store.load(KEY).version)

    template.execute(work, state=STATE)
    assert versions[0] == versions[1]


def test_attempt_whose_lease_is_renewed_is_believed_by_others_after_its_first_lease():
    store, seen = SharedStore(), []

    def work(_):
        stored = store.load(KEY)
        flight = {**stored.snapshot["in_flight"][0], "owner": "elsewhere/b/n/1/2/3", "until": time.time() - 1}
        store.save(KEY, {**stored.snapshot, "in_flight": [flight]}, stored.version)
        await_renewals(store, 1)
        try:
            template.execute(seen.append, state=RetryState(key="m-1"))
        except AttemptsInFlightError as error:
            seen.append(type(error))

    one = SimpleRetryPolicy(max_attempts=1)
    template = RetryTemplate(context_cache=store, lease=LEASE, retry_policy=one)
    template.execute(work, state=STATE)
    assert seen == [AttemptsInFlightError]


def test_store_that_hangs_holds_up_the_leases_of_no_other():
    hanging, healthy = HangingStore(), SharedStore()
    slow, fast = (RetryTemplate(context_cache=store, lease=LEASE) for store in (hanging, healthy))

    def outer(_):
        assert hanging.hangs.wait(DEADLINE)
        fast.execute(lambda _: await_renewals(healthy, 3), state=STATE)
        hanging.goes_on.set()

    slow.execute(outer, state=STATE)
    assert len(healthy.renewals) >= 3


def test_call_whose_renewal_raises_ends_the_renewals_of_no_other(caplog):
    class Broken:
        tries = threading.Semaphore(0)

        def renew(self):
            self.tries.release()
            raise RuntimeError("out of memory")

    store = SharedStore()
    release = leases.hold(Broken(), store, LEASE, asynchronous=False)
    assert Broken.tries.acquire(timeout=DEADLINE)
    RetryTemplate(context_cache=store, lease=LEASE).execute(lambda _: await_renewals(store, 2), state=STATE)
    assert Broken.tries.acquire(timeout=DEADLINE)
    release()
    assert "out of memory" in caplog.text


def test_attempt_is_told_when_its_lease_is_over_and_could_not_be_renewed(lost):
    store, seen = SharedStore(), []
    store.faults = [OSError("no route")] * 1_000

    def work(context):
        assert lost.wait(DEADLINE)
        seen.append(context.lease_lost)

    # Nobody has overtaken it, so it counts after all.
    RetryTemplate(context_cache=store, lease=LEASE).execute(work, state=STATE)
    assert seen == [True]
    assert store.load(KEY) is None


def test_lease_of_a_recovery_that_is_tried_again_is_renewed_too():
    store, log = SharedStore(), []
    template = RetryTemplate(context_cache=store, lease=LEASE)
    template.veto("m-1", "poison")

    class FailsOnce(Transaction):
        def __enter__(self):
            super().__enter__()
            return "of another database"

        def __exit__(self, kind, error, trace):
            super().__exit__(kind, error, trace)
            if error is None and log.count("commit") == 1:
                raise OSError("deferred constraint")

    def recover(_):
        # The one before has been answered, so what comes now is a new one.
        while store.renewed.acquire(blocking=False):
            pass
        await_renewals(store, 1)

    template.execute(lambda _: None, recover, state=STATE, transaction=FailsOnce(log))
    assert log == ["begin", "commit", "begin", "commit"]
