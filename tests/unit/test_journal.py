"""Reservations: what is interrupted is no attempt, what died is one, and what is running is left to run."""

from __future__ import annotations

import asyncio
import logging

import pytest
import trio

from retrykit import (
    AsyncRetryTemplate,
    CodecError,
    ExceptionClassifierRetryPolicy,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    RetryContext,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
)
from retrykit.errors import AttemptsInFlightError
from tests.doubles import EPOCH, AsyncCache, Fails, ManualClock

KEY = "retry/m-1"
STATE = RetryState(key="m-1")


class Exits(BaseException):
    pass


class WrittenFirst(MapRetryContextCache):
    """A cache whose next save writes, and then raises instead of answering."""

    fault: BaseException | None = None

    def save(self, key, snapshot, expected):
        version = super().save(key, snapshot, expected)
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        return version


def deliver(template, callback, recover=None, **state):
    """One delivery; its value or its error."""
    try:
        return template.execute(callback, recover, state=RetryState(key="m-1", **state))
    except Exception as error:
        return error


# -- reservations that are interrupted, or seem to fail


def test_p9_a_reservation_that_is_interrupted_in_the_middle_of_its_write_is_withdrawn():
    cache, callback = WrittenFirst(), Fails()
    template = RetryTemplate(context_cache=cache)
    for _ in range(3):
        cache.fault = Exits()
        with pytest.raises(Exits):
            deliver(template, callback)
        assert len(cache) == 0
    assert deliver(template, callback) == "done"
    assert callback.attempts == [1]


def test_p9_an_interrupted_reservation_leaves_the_failures_before_it():
    cache = WrittenFirst()
    template = RetryTemplate(context_cache=cache)
    assert type(deliver(template, Fails(OSError()))) is OSError
    cache.fault = Exits()
    with pytest.raises(Exits):
        deliver(template, Fails())
    stored = cache.load(KEY).snapshot
    assert (stored["retry_count"], stored.get("crashes", 0), stored.get("in_flight", [])) == (1, 0, [])


async def cancel_on_asyncio():
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


class CancelledAtSave(AsyncCache):
    """An asynchronous cache whose caller is cancelled while the first save, already written, is awaited."""

    def __init__(self, cancel):
        super().__init__()
        self.cancel = cancel

    async def save(self, key, snapshot, expected):
        version = await super().save(key, snapshot, expected)
        cancel, self.cancel = self.cancel, None
        if cancel is not None:
            await cancel()
        return version


def test_p9_a_task_that_is_cancelled_while_it_reserves_leaves_nothing():
    cache, callback = CancelledAtSave(cancel_on_asyncio), Fails()
    template = AsyncRetryTemplate(context_cache=cache)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(template.execute(callback, state=STATE))
    assert (callback.calls, len(cache.inner)) == (0, 0)


def test_p9_a_scope_of_trio_that_is_cancelled_while_it_reserves_leaves_nothing():
    callback = Fails()

    async def main():
        with trio.CancelScope() as scope:

            async def cancel():
                scope.cancel()
                await trio.lowlevel.checkpoint()

            cache = CancelledAtSave(cancel)
            await AsyncRetryTemplate(context_cache=cache).execute(callback, state=STATE)
        return len(cache.inner)

    assert trio.run(main) == 0
    assert callback.calls == 0


def test_a_reservation_whose_write_only_seemed_to_fail_is_gone_after_the_success(caplog):
    cache = WrittenFirst()
    cache.fault = OSError("timeout after the commit")
    template = RetryTemplate(context_cache=cache)
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(template, Fails()) == "done"
    assert "fault in journal" in caplog.text
    assert len(cache) == 0


def test_a_reservation_whose_write_only_seemed_to_fail_is_no_crash_beside_the_failure(caplog):
    cache = WrittenFirst()
    cache.fault = OSError("timeout after the commit")
    template = RetryTemplate(context_cache=cache)
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert type(deliver(template, Fails(ValueError()))) is ValueError
    callback = Fails()
    assert deliver(template, callback) == "done"
    assert callback.attempts == [2]
    assert callback.contexts[0].crashes == 0


# -- attempts that run elsewhere, and deaths


def test_an_attempt_that_outlives_its_lease_in_this_process_is_left_to_run():
    clock = ManualClock()
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(1), lease=10, clock=clock)
    second, recovery = Fails(), Fails(value="parked")
    seen = []

    def slow(context):
        clock.elapsed += 1_000
        seen.append(deliver(template, second, recovery))
        return "done"

    assert deliver(template, slow, recovery) == "done"
    assert type(seen[0]) is AttemptsInFlightError
    assert (second.calls, recovery.calls) == (0, 0)


def died(template, *, attempts):
    """Store attempts whose process is gone."""
    flights = [{"fence": n + 1, "owner": "elsewhere", "since": 0.0, "until": EPOCH} for n in range(attempts)]
    snapshot = {"format": 1, "name": "retry", "key": "m-1", "retry_count": 0, "fence": attempts, "in_flight": flights}
    assert template.context_cache.save(KEY, snapshot, None)


def test_p5_crashes_count_in_the_branches_of_a_classifier():
    policy = ExceptionClassifierRetryPolicy({OSError: MaxAttemptsRetryPolicy(3)})
    template, callback = RetryTemplate(retry_policy=policy), Fails(OSError(), OSError(), OSError())
    died(template, attempts=2)
    assert type(deliver(template, callback, lambda _: "parked", redelivered=True)) is OSError
    counts = deliver(template, callback, lambda context: (context.retry_count, context.crashes))
    assert counts == (3, 2)
    assert callback.attempts == [3]


# -- histories that are damaged


@pytest.mark.parametrize(
    "damage",
    [
        {"fence": "x"},
        {"not_before": "x"},
        {"completed_at": 1.0, "expires_at": "x"},
        {"last_error": "x"},
        {"veto": 5},
    ],
    ids=lambda damage: list(damage)[-1],
)
def test_p11_a_damaged_history_keeps_no_work_from_being_done_and_is_not_overwritten(damage, caplog):
    template = RetryTemplate()
    snapshot = {"format": 1, "name": "retry", "key": "m-1", "retry_count": 1} | damage
    template.context_cache.save(KEY, snapshot, None)
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(template, Fails()) == "done"
    assert "fault in load" in caplog.text
    assert template.context_cache.load(KEY).snapshot == snapshot


def test_a_flight_whose_time_is_no_number_is_a_damaged_history():
    flight = {"fence": 1, "owner": "elsewhere/1/2/3", "since": 0.0, "until": "x"}
    snapshot = {"format": 1, "name": "retry", "key": "m-1", "retry_count": 0, "in_flight": [flight]}
    with pytest.raises(CodecError, match="until of a flight"):
        RetryContext.from_snapshot(snapshot)


# -- what is stored of a failure


@pytest.mark.parametrize("redelivered", [False, None, True])
@pytest.mark.parametrize("kind", [RetryTemplate, AsyncRetryTemplate])
def test_the_stored_traceback_begins_where_the_work_begins(kind, redelivered):
    cache = AsyncCache() if kind is AsyncRetryTemplate else MapRetryContextCache()
    template, state = kind(context_cache=cache), RetryState(key="m-1", redelivered=redelivered)

    def fail(_context):
        raise ConnectionError

    async def fails(context):
        fail(context)

    def deliver():
        if kind is AsyncRetryTemplate:
            asyncio.run(template.execute(fails, state=state))
        template.execute(fail, state=state)

    with pytest.raises(ConnectionError):
        deliver()
    history = asyncio.run(template.history("m-1")) if kind is AsyncRetryTemplate else template.history("m-1")
    assert "retrykit/loops.py" not in history.last_error.traceback
    assert history.last_error.traceback.count("in fail") == 1 + (kind is AsyncRetryTemplate)
