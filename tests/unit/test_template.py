"""The templates: stateless, stateful, with a transaction of their own, sync and async."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import logging
import traceback
from datetime import UTC, datetime, timedelta

import attrs
import pytest
import trio

from retrykit import (
    AlwaysRetryPolicy,
    AsyncRetryTemplate,
    BackOffInterruptedError,
    CacheCapacityError,
    ContextCacheError,
    ExhaustedRetryError,
    FixedBackOffPolicy,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    NeverRetryPolicy,
    PredicateRetryPolicy,
    RecoveryFailedError,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    TerminatedRetryError,
    TimeoutRetryPolicy,
    current_context,
    retryable,
)
from retrykit.context import _bound
from retrykit.errors import AttemptsInFlightError, CommitInDoubtError
from retrykit.failure import StoredError
from retrykit.messaging.logs import facts_of
from retrykit.owner import begin
from retrykit.template import short_cut
from tests.doubles import (
    EPOCH,
    AsyncCache,
    AsyncEars,
    AsyncTransaction,
    BrokenCache,
    BrokenClock,
    Ears,
    Fails,
    ManualClock,
    Transaction,
    pickled,
)

ERROR = OSError("broken")


class Sync:
    """A sync template called as it is."""

    kind = RetryTemplate

    @staticmethod
    def run(template, *args, **kwargs):
        return template.execute(*args, **kwargs)


class OnAsyncio:
    """An async template called on asyncio."""

    kind = AsyncRetryTemplate

    @staticmethod
    def run(template, *args, **kwargs):
        async def main():
            return await template.execute(*args, **kwargs)

        return asyncio.run(main())


class OnTrio(OnAsyncio):
    """An async template called on trio."""

    @staticmethod
    def run(template, *args, **kwargs):
        async def main():
            return await template.execute(*args, **kwargs)

        return trio.run(main)


@pytest.fixture(params=[Sync, OnAsyncio, OnTrio], ids=lambda way: way.__name__)
def way(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["short cut", "whole flow"])
def shortened(request):
    with short_cut(request.param):
        yield request.param


def deliver(way, template, callback, recover=None, **state):
    """One delivery; its value or its error."""
    transaction = state.pop("transaction", None)
    try:
        return way.run(
            template, callback, recover, state=RetryState(**({"key": "m-1"} | state)), transaction=transaction
        )
    except Exception as error:
        return error


# -- values


def test_a_template_is_a_value():
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(5), listeners=[])
    assert template == RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(5))
    assert template != attrs.evolve(template, name="other")
    assert attrs.evolve(template, throw_last=True).throw_last
    assert template != AsyncRetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(5))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        template.name = "other"


def test_its_repr_is_short_and_keeps_what_is_stored_to_itself():
    template = RetryTemplate(name="orders")
    deliver(Sync, template, Fails(OSError("secret")))
    assert repr(template).startswith("RetryTemplate(name='orders', retry_policy=SimpleRetryPolicy(max_attempts=3")
    assert "secret" not in repr(template)
    assert len(repr(template)) < 800


@pytest.mark.parametrize("kind", [RetryTemplate, AsyncRetryTemplate])
def test_a_pickled_template_is_equal_works_and_leaves_its_memory_behind(kind):
    template = kind(
        name="orders", retry_policy=MaxAttemptsRetryPolicy(2), remember_completed=timedelta(hours=1), listeners=[Ears()]
    )
    template = attrs.evolve(template, listeners=())
    way = Sync if kind is RetryTemplate else OnAsyncio
    deliver(way, template, Fails(ERROR))
    for other in (pickled(template), copy.deepcopy(template)):
        assert other == template
        assert other.key_of("m-1") == "orders/m-1"
        assert len(other.context_cache) == 0
        assert way.run(other, Fails(ERROR)) == "done"
    assert template.remember_completed == 3600.0


def test_a_copied_template_shares_its_memory():
    template = RetryTemplate()
    assert attrs.evolve(template, throw_last=True).context_cache is template.context_cache


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": ""}, ValueError),
        ({"name": 3}, TypeError),
        ({"retry_policy": SimpleRetryPolicy}, TypeError),
        ({"back_off_policy": 3}, TypeError),
        ({"context_cache": {}}, TypeError),
        ({"listeners": 3}, TypeError),
        ({"listeners": [Ears]}, TypeError),
        ({"clock": 3}, TypeError),
        ({"throw_last": 1}, TypeError),
        ({"recovery_policy": None}, TypeError),
        ({"remember_completed": 0}, ValueError),
        ({"lease": None}, TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [RetryTemplate, AsyncRetryTemplate])
def test_bad_values_are_refused_at_once(kind, options, error):
    (argument,) = options
    with pytest.raises(error, match=rf"^{argument}: must be"):
        kind(**options)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("callback", 3), ("callback", None), ("recover", 3), ("state", "m-1"), ("state", RetryState), ("transaction", 3)],
)
@pytest.mark.parametrize("state", [None, RetryState(key="k")], ids=["stateless", "stateful"])
def test_a_bad_argument_is_refused_before_anything_runs(way, argument, value, state):
    callback = Fails()
    arguments = {"callback": callback, "recover": None, "state": state, "transaction": None} | {argument: value}
    with pytest.raises(TypeError, match=rf"^{argument}: must be"):
        way.run(way.kind(), **arguments)
    assert callback.calls == 0


def test_a_bad_recovery_is_told_even_where_the_first_attempt_failed():
    with pytest.raises(TypeError, match=r"^recover: must be callable"):
        RetryTemplate().execute(Fails(ERROR), 3)


# -- stateless


def test_it_gives_the_value_of_the_first_attempt_that_succeeds(way, shortened):
    callback = Fails(ERROR, ERROR)
    assert way.run(way.kind(clock=ManualClock()), callback) == "done"
    assert callback.attempts == [1, 2, 3]


def test_p8_an_exhausted_stateless_call_raises_the_last_exception_itself(way, shortened):
    errors = [OSError(str(n)) for n in range(3)]
    with pytest.raises(OSError, match="2") as caught:
        way.run(way.kind(), Fails(*errors))
    assert caught.value is errors[2]
    assert "__call__" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]


def test_a_recovery_replaces_the_outcome(way, shortened):
    def recover(context):
        return (context.retry_count, context.last_error is ERROR, context.exhausted, context.recovered)

    assert way.run(way.kind(), Fails(*[ERROR] * 3), recover) == (3, True, True, False)


def test_coroutines_are_awaited():
    async def attempt(context):
        await asyncio.sleep(0)
        if context.attempt < 3:
            raise ERROR
        return context.attempt

    async def recover(context):
        await asyncio.sleep(0)
        return "instead"

    assert OnAsyncio.run(AsyncRetryTemplate(), attempt) == 3
    assert OnAsyncio.run(AsyncRetryTemplate(retry_policy=NeverRetryPolicy()), attempt, recover) == "instead"


def test_pauses_are_slept_between_attempts_and_not_after_the_last(way, shortened):
    clock = ManualClock()
    template = way.kind(back_off_policy=FixedBackOffPolicy(2), clock=clock)
    with pytest.raises(OSError, match="broken"):
        way.run(template, Fails(*[ERROR] * 3))
    assert clock.slept == [2, 2]


def test_a_deadline_is_not_slept_past(way):
    clock = ManualClock()
    template = way.kind(retry_policy=TimeoutRetryPolicy(5), back_off_policy=FixedBackOffPolicy(2), clock=clock)
    callback = Fails(*[ERROR] * 9)
    reason = way.run(template, callback, lambda context: context.decision.reason)
    assert clock.slept == [2, 2]
    assert reason == "TimeoutRetryPolicy: 4.000 s + pause 2.000 s of 5 s"


def test_a_decision_says_when(way):
    clock = ManualClock()
    decisions = []

    class Watching(Ears):
        def on_error(self, context, error, decision):
            decisions.append(decision)

    way.run(way.kind(back_off_policy=FixedBackOffPolicy(2), clock=clock, listeners=[Watching()]), Fails(ERROR))
    assert [(d.retry, d.delay, d.next_at) for d in decisions] == [(True, 2, datetime.fromtimestamp(EPOCH + 2, UTC))]


def test_a_delay_of_the_policy_comes_before_that_of_the_back_off(way):
    class Slowly:
        def decide(self, context):
            return attrs.evolve(AlwaysRetryPolicy().decide(context), delay=7.0)

    clock = ManualClock()
    way.run(way.kind(retry_policy=Slowly(), back_off_policy=FixedBackOffPolicy(2), clock=clock), Fails(ERROR))
    assert clock.slept == [7]


class Interrupted(ManualClock):
    def sleep(self, seconds):
        raise InterruptedError("shutting down")


def test_an_interrupted_pause_says_so_and_recovers_nothing(way, shortened):
    template = way.kind(back_off_policy=FixedBackOffPolicy(2), clock=Interrupted())
    recovered = []
    with pytest.raises(BackOffInterruptedError, match=r"The pause of 2.0 s") as caught:
        way.run(template, Fails(ERROR), recovered.append)
    assert type(caught.value.__cause__) is InterruptedError
    assert recovered == []


class Exits(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), Exits()], ids=repr)
def test_p9_what_is_no_exception_passes_at_once_and_counts_nothing(error, shortened):
    callback = Fails(error)
    with pytest.raises(type(error)) as caught:
        RetryTemplate().execute(callback, lambda _: "instead")
    assert caught.value is error
    assert callback.contexts[0].retry_count == 0
    assert current_context() is None


def test_p9_a_cancelled_task_passes_at_once(shortened):
    ears = AsyncEars()
    template = AsyncRetryTemplate(listeners=[ears] if not shortened else [])

    async def main():
        task = asyncio.create_task(template.execute(lambda _: asyncio.sleep(30)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [event[0] for event in ears.log] == ([] if shortened else ["open", "close"])


def test_p9_a_cancelled_scope_of_trio_passes_at_once():
    ears = Ears()

    async def asleep(context):
        await trio.sleep_forever()

    async def main():
        with trio.move_on_after(0) as scope:
            await AsyncRetryTemplate(listeners=[ears]).execute(asleep)
        return scope.cancelled_caught

    assert trio.run(main)
    assert [event[0] for event in ears.log] == ["open", "close"]


def test_p9_a_cancellation_in_a_pause_passes_too(way):
    class Exiting(ManualClock):
        def sleep(self, seconds):
            raise Exits

    ears = Ears()
    template = way.kind(back_off_policy=FixedBackOffPolicy(1), clock=Exiting(), listeners=[ears])
    with pytest.raises(Exits):
        way.run(template, Fails(ERROR))
    assert [event[0] for event in ears.log] == ["open", "on_error", "close"]


# -- faults of parts change no outcome


def broken(*arguments):
    raise RuntimeError("broken part")


def test_a_policy_that_raises_means_no(way, shortened):
    template = way.kind(retry_policy=PredicateRetryPolicy(broken))
    with pytest.raises(OSError, match="broken"):
        way.run(template, Fails(ERROR))
    reason = way.run(template, Fails(ERROR), lambda context: context.decision.reason)
    assert reason == "the retry policy raised RuntimeError: broken part"


def test_a_back_off_that_raises_means_no(way, shortened):
    class Broken:
        delay = broken

    reason = way.run(way.kind(back_off_policy=Broken()), Fails(ERROR), lambda context: context.decision.reason)
    assert reason == "the back-off policy raised RuntimeError: broken part"


def test_p11_a_clock_that_fails_is_reported_and_worked_around(way, caplog):
    with caplog.at_level(logging.ERROR, "retrykit"):
        template = way.kind(clock=BrokenClock())
        assert way.run(template, Fails(ERROR)) == "done"
        assert deliver(way, template, Fails(ERROR)) is ERROR
        assert deliver(way, template, Fails()) == "done"
    assert "fault in clock, the operation goes on" in caplog.text


def test_a_recovery_is_tried_again_as_its_own_policy_says(way, shortened):
    recover = Fails(ValueError("r1"), ValueError("r2"), value="instead")
    assert way.run(way.kind(), Fails(*[ERROR] * 3), recover) == "instead"
    assert recover.calls == 3


def test_p3_a_recovery_that_fails_for_good_raises_and_never_runs_the_callback_again(way, shortened):
    callback, recover = Fails(*[ERROR] * 3), Fails(*[ValueError(f"r{n}") for n in range(9)])
    template = way.kind(recovery_policy=MaxAttemptsRetryPolicy(2))
    with pytest.raises(RecoveryFailedError, match="failed 2 times") as caught:
        way.run(template, callback, recover)
    assert str(caught.value.__cause__) == "r1"
    assert caught.value.failure == ERROR
    assert (callback.calls, recover.calls) == (3, 2)


def test_a_recovery_policy_that_raises_means_no(way):
    template = way.kind(recovery_policy=PredicateRetryPolicy(broken))
    with pytest.raises(RecoveryFailedError, match="failed 1 times"):
        way.run(template, Fails(*[ERROR] * 3), Fails(ValueError()))


def test_the_recoverys_policy_sees_the_failures_of_the_recovery():
    seen = []

    def again(error):
        seen.append((type(error), current_context()))
        return len(seen) < 3

    template = RetryTemplate(recovery_policy=PredicateRetryPolicy(again))
    with pytest.raises(RecoveryFailedError):
        template.execute(Fails(*[ERROR] * 3), Fails(*[ValueError()] * 9))
    assert [kind for kind, _ in seen] == [ValueError] * 3


def test_an_interpreter_exit_in_a_recovery_passes(way):
    with pytest.raises(Exits):
        way.run(way.kind(retry_policy=NeverRetryPolicy()), Fails(ERROR), Fails(Exits()))


def test_not_recoverable_failures_are_not_recovered(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1, not_recoverable=OSError))
    with pytest.raises(OSError, match="broken"):
        way.run(template, Fails(ERROR), lambda _: "instead")


# -- stateful


def test_a_stateful_failure_is_rethrown_and_the_next_delivery_goes_on(way):
    template, callback = way.kind(), Fails(ERROR, ERROR)
    assert deliver(way, template, callback) is ERROR
    assert deliver(way, template, callback) is ERROR
    assert deliver(way, template, callback) == "done"
    assert callback.attempts == [1, 2, 3]
    assert len(template.context_cache) == 0


def test_springs_rule_recovers_at_the_next_delivery(way):
    template, callback = way.kind(retry_policy=SimpleRetryPolicy(2)), Fails(ERROR, ERROR)
    park = Fails(value="parked")
    assert [deliver(way, template, callback, park) for _ in range(3)] == [ERROR, ERROR, "parked"]
    assert type(park.contexts[0].last_error) is StoredError
    assert len(template.context_cache) == 0


def test_a_session_of_our_own_recovers_at_once(way):
    template, callback = way.kind(retry_policy=SimpleRetryPolicy(2)), Fails(ERROR, ERROR)
    given = {"recover_on_redelivery": False}
    assert [deliver(way, template, callback, lambda _: "parked", **given) for _ in range(2)] == [ERROR, "parked"]


def test_without_a_recovery_an_exhausted_item_is_answered_the_same_way_for_ever(way):
    template, callback = way.kind(retry_policy=SimpleRetryPolicy(1)), Fails(ERROR)
    assert deliver(way, template, callback) is ERROR
    for _ in range(2):
        error = deliver(way, template, callback)
        assert type(error) is ExhaustedRetryError
        assert (error.attempts, error.key, error.name) == (1, "m-1", "retry")
        assert error.__cause__ == StoredError.of(ERROR)
    assert callback.calls == 1


def test_throw_last_raises_the_last_failure_instead(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1), throw_last=True)
    assert deliver(way, template, Fails(ERROR), recover_on_redelivery=False) is ERROR
    assert deliver(way, template, Fails()) == StoredError.of(ERROR)


def test_a_failure_that_needs_no_roll_back_is_tried_again_in_place(way):
    template, callback = way.kind(), Fails(ERROR, ERROR)
    assert deliver(way, template, callback, rollback_for=lambda _: False) == "done"
    assert callback.calls == 3


def test_a_predicate_that_raises_cannot_say_that_no_roll_back_is_needed(way):
    assert deliver(way, way.kind(), Fails(ERROR), rollback_for=broken) is ERROR


def test_without_a_key_failures_are_rethrown_and_nothing_is_remembered(way):
    template, callback = way.kind(), Fails(ERROR, ERROR)
    assert deliver(way, template, callback, key=None) is ERROR
    assert deliver(way, template, callback, key=None) is ERROR
    assert callback.attempts == [1, 1]


def test_without_a_key_the_last_failure_of_an_own_session_recovers(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1))
    assert deliver(way, template, Fails(ERROR), lambda _: "parked", key=None, recover_on_redelivery=False) == "parked"


@pytest.mark.parametrize("fresh", [True, "keep_veto"])
def test_a_fresh_item_leaves_failures_behind_and_a_veto_only_if_it_is_not_told_to_keep_it(way, fresh):
    template, callback = way.kind(retry_policy=SimpleRetryPolicy(2)), Fails(*[ERROR] * 9)
    deliver(way, template, callback)
    assert deliver(way, template, callback, fresh=fresh) is ERROR
    assert callback.attempts == [1, 1]
    RetryTemplate(context_cache=template.context_cache).veto("m-1", "closed")
    outcome = deliver(way, template, callback, fresh=fresh)
    if fresh is True:
        assert (outcome, callback.attempts) == (ERROR, [1, 1, 1])
    else:
        assert (type(outcome), outcome.reason) == (TerminatedRetryError, "vetoed: closed")
        assert callback.attempts == [1, 1]


def test_a_fresh_item_under_an_old_key_begins_anew(way):
    template, callback = way.kind(retry_policy=SimpleRetryPolicy(2)), Fails(*[ERROR] * 9)
    for _ in range(2):
        deliver(way, template, callback)
    assert deliver(way, template, callback, fresh=True) is ERROR
    assert callback.attempts == [1, 2, 1]


def test_a_first_delivery_asks_the_store_nothing(way):
    template = way.kind(context_cache=BrokenCache(load=RuntimeError("asked"), save=RuntimeError("asked")))
    assert deliver(way, template, Fails(), redelivered=False) == "done"


def test_a_first_delivery_that_fails_is_remembered(way):
    template, callback = way.kind(), Fails(ERROR)
    assert deliver(way, template, callback, redelivered=False) is ERROR
    assert deliver(way, template, callback, redelivered=True) == "done"
    assert callback.attempts == [1, 2]


def test_a_first_delivery_that_was_none_still_counts_on(way):
    template, callback = way.kind(), Fails(ERROR, ERROR)
    deliver(way, template, callback)
    assert deliver(way, template, callback, redelivered=False) is ERROR
    assert template.context_cache.load("retry/m-1").snapshot["retry_count"] == 2


def test_a_pause_that_is_due_is_spent_at_the_next_delivery_before_the_transaction(way):
    clock, log = ManualClock(), []
    template = way.kind(back_off_policy=FixedBackOffPolicy(10), clock=clock)
    transaction = Transaction(log)
    assert deliver(way, template, Fails(ERROR), transaction=transaction) is ERROR
    assert clock.slept == []
    clock.elapsed += 4
    clock.sleep = log.append
    assert deliver(way, template, Fails(), transaction=transaction) == "done"
    assert log == ["begin", "roll back", 6, "begin", "commit"]


def test_a_pause_that_is_over_is_not_spent(way):
    clock = ManualClock()
    template = way.kind(back_off_policy=FixedBackOffPolicy(10), clock=clock)
    deliver(way, template, Fails(ERROR))
    clock.elapsed += 11
    assert deliver(way, template, Fails()) == "done"
    assert clock.slept == []


def test_an_interrupted_wait_makes_no_attempt_and_keeps_the_history(way):
    template = way.kind(back_off_policy=FixedBackOffPolicy(10), clock=Interrupted())
    deliver(way, template, Fails(ERROR))
    callback = Fails()
    assert type(deliver(way, template, callback)) is BackOffInterruptedError
    assert callback.calls == 0
    assert len(template.context_cache) == 1


def test_p2_p3_a_history_is_kept_when_its_recovery_fails_and_the_recovery_comes_again(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1), recovery_policy=NeverRetryPolicy())
    callback, park = Fails(ERROR), Fails(ValueError("no"), value="parked")
    deliver(way, template, callback, park)
    error = deliver(way, template, callback, park)
    assert type(error) is RecoveryFailedError
    assert deliver(way, template, callback, park) == "parked"
    assert (callback.calls, park.calls) == (1, 2)


def test_a_veto_before_any_failure_terminates(way):
    template = way.kind()

    def attempt(context):
        context.veto("poison")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deliver(way, template, attempt)
    error = deliver(way, template, Fails())
    assert type(error) is TerminatedRetryError
    assert "vetoed: poison" in str(error)


@pytest.mark.parametrize("verb", ["load", "save"])
def test_p11_a_store_that_fails_changes_no_outcome(way, verb, caplog):
    cache = BrokenCache(**{verb: ContextCacheError("no store")})
    template = way.kind(context_cache=cache)
    error = OSError("mine")
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, template, Fails(error)) is error
        assert deliver(way, template, Fails()) == "done"
    assert error.__notes__ == ["retrykit: this failure of 'retry' was not stored: ContextCacheError: no store"]
    # The second fault of an outage is no news.
    assert f"fault in {verb if verb == 'load' else 'journal'}" in caplog.text


def test_p11_a_store_that_cannot_forget_is_reported(way, caplog):
    template = way.kind(context_cache=BrokenCache(remove=RuntimeError("no")))
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, template, Fails()) == "done"
    assert "fault in settle" in caplog.text


def test_p6_a_full_cache_hides_nothing(way):
    template = way.kind(context_cache=MapRetryContextCache(1))
    deliver(way, template, Fails(ERROR), key="a")
    error = OSError("mine")
    assert deliver(way, template, Fails(error), key="b") is error
    assert "CacheCapacityError" in error.__notes__[0]
    with pytest.raises(CacheCapacityError):
        template.context_cache.save("retry/b", {}, None)


def test_attributes_that_cannot_be_stored_hide_nothing(way, caplog):
    def attempt(context):
        dict.__setitem__(context.attributes, "bad", object())
        raise ERROR

    class Strict(MapRetryContextCache):
        def save(self, key, snapshot, expected):
            if "bad" in snapshot.get("attributes", {}):
                raise TypeError("not JSON")
            return super().save(key, snapshot, expected)

    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, way.kind(context_cache=Strict()), attempt) is ERROR
    assert "fault in store" in caplog.text


def test_a_history_that_cannot_be_read_is_not_overwritten(way, caplog):
    cache = MapRetryContextCache()
    later = {"format": 99, "retry_count": 7}
    cache.save("retry/m-1", later, None)
    template = way.kind(context_cache=cache)
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, template, Fails(ERROR)) is ERROR
        assert deliver(way, template, Fails()) == "done"
    assert cache.load("retry/m-1").snapshot == later
    assert "format 99" in caplog.text


def test_asynchronous_stores_are_awaited():
    template = AsyncRetryTemplate(context_cache=AsyncCache(), retry_policy=SimpleRetryPolicy(2))

    async def main():
        first = await _outcome(template.execute(Fails(ERROR), state=RetryState(key="m-1")))
        history = await template.history("m-1")
        await template.veto("m-1", "poison")
        vetoed = (await template.history("m-1")).veto_reason
        await template.withdraw_veto("m-1")
        second = await _outcome(template.execute(Fails(), state=RetryState(key="m-1")))
        await template.veto("m-2", "early")
        return first, history.retry_count, vetoed, second, await template.forget("m-2"), await template.forget("m-2")

    assert asyncio.run(main()) == (ERROR, 1, "poison", "done", True, False)


async def _outcome(awaitable):
    try:
        return await awaitable
    except Exception as error:
        return error


def test_an_asynchronous_store_is_refused_by_a_sync_template():
    with pytest.raises(TypeError, match=r"context_cache: .*AsyncRetryTemplate takes both.*AsyncCache"):
        RetryTemplate(context_cache=AsyncCache())


# -- operators


def test_operators_can_look_veto_withdraw_and_forget():
    template = RetryTemplate(name="orders")
    assert template.history("m-1") is None
    deliver(Sync, template, Fails(ERROR))
    assert (template.history("m-1").retry_count, template.history("m-1").name) == (1, "orders")
    template.veto("m-1", "poison")
    callback = Fails()
    assert deliver(Sync, template, callback, lambda c: c.veto_reason) == "poison"
    assert callback.calls == 0
    template.veto("m-2", "early")
    assert type(deliver(Sync, template, callback, key="m-2")) is TerminatedRetryError
    template.withdraw_veto("m-2")
    assert deliver(Sync, template, callback, key="m-2") == "done"
    assert template.forget("m-2") is False
    deliver(Sync, template, Fails(ERROR))
    assert template.forget("m-1") is True
    assert template.history("m-1") is None


def test_an_operator_who_is_not_the_first_to_write_tries_again():
    class Contended(MapRetryContextCache):
        lost = 0

        def save(self, key, snapshot, expected):
            if self.lost == 0:
                self.lost = 1
                return None
            return super().save(key, snapshot, expected)

    template = RetryTemplate(context_cache=Contended())
    template.veto("m-1", "poison")
    assert template.history("m-1").veto_reason == "poison"


@pytest.mark.parametrize(("reason", "error"), [(3, TypeError), ("", ValueError), (None, TypeError)])
def test_a_veto_from_outside_needs_a_reason(reason, error):
    with pytest.raises(error, match=r"^reason: must be"):
        RetryTemplate().veto("m-1", reason)
    with pytest.raises(error, match=r"^reason: must be"):
        asyncio.run(AsyncRetryTemplate().veto("m-1", reason))


def test_a_bad_key_is_refused():
    for verb in (RetryTemplate().history, RetryTemplate().forget, RetryTemplate().key_of):
        with pytest.raises(TypeError, match=r"^key: must be"):
            verb(1.5)


# -- transactions


def test_the_transaction_of_an_attempt_is_the_templates(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log)
    callback = Fails(ERROR)
    sessions = []

    def attempt(context):
        sessions.append(context.transaction)
        return callback(context)

    assert way.run(way.kind(), attempt, transaction=transaction) == "done"
    assert log == ["begin", "roll back", "begin", "commit"]
    assert sessions == ["session", "session"]
    assert callback.contexts[0].transaction is None


def test_a_plain_transaction_serves_an_async_template():
    log = []
    assert OnAsyncio.run(AsyncRetryTemplate(), Fails(), transaction=Transaction(log)) == "done"
    assert log == ["begin", "commit"]


def test_p2_a_commit_that_fails_is_a_failed_attempt(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log, commit=OSError("deferred constraint"))
    template, callback = way.kind(retry_policy=SimpleRetryPolicy(2)), Fails()
    for _ in range(2):
        assert str(deliver(way, template, callback, transaction=transaction)) == "deferred constraint"
    assert type(deliver(way, template, callback, transaction=transaction)) is ExhaustedRetryError
    assert callback.attempts == [1, 2]


def test_a_transaction_that_cannot_begin_is_a_failed_attempt(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log, begin=OSError("no connection"))
    callback = Fails()
    template = way.kind(retry_policy=SimpleRetryPolicy(2))
    with pytest.raises(OSError, match="no connection"):
        way.run(template, callback, transaction=transaction)
    assert log == ["begin", "begin"]
    assert callback.calls == 0


def test_a_roll_back_that_fails_hides_nothing(way, caplog):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log, rollback=RuntimeError("gone"))
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, way.kind(), Fails(ERROR), transaction=transaction) is ERROR
    assert "fault in RollBack" in caplog.text


def test_a_transaction_that_raises_what_it_was_given_has_done_its_work(way, caplog):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log, rollback=ERROR)
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, way.kind(), Fails(ERROR), transaction=transaction) is ERROR
    assert caplog.text == ""


def test_a_commit_in_doubt_counts_nothing(way):
    log = []
    doubt = CommitInDoubtError()
    transaction = (Transaction if way is Sync else AsyncTransaction)(log, commit=doubt)
    template = way.kind()
    assert deliver(way, template, Fails(), transaction=transaction) is doubt
    assert len(template.context_cache) == 0
    deliver(way, template, Fails(ERROR))
    assert deliver(way, template, Fails(), transaction=transaction) is doubt
    assert template.context_cache.load("retry/m-1").snapshot["retry_count"] == 1


def test_a_recovery_has_a_transaction_of_its_own(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log)
    template = way.kind(retry_policy=NeverRetryPolicy())
    recover = Fails(ValueError("r1"), value="parked")
    assert (
        deliver(way, template, Fails(ERROR), recover, transaction=transaction, recover_on_redelivery=False) == "parked"
    )
    assert log == ["begin", "roll back", "begin", "roll back", "begin", "commit"]


def test_p9_an_exit_rolls_back(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log)
    with pytest.raises(Exits):
        way.run(way.kind(), Fails(Exits()), transaction=transaction)
    assert log == ["begin", "roll back"]


# -- completion marks


def test_a_completion_mark_answers_later_duplicates(way):
    clock = ManualClock()
    template, callback = way.kind(remember_completed=60, clock=clock), Fails()
    assert deliver(way, template, callback) == "done"
    assert deliver(way, template, callback) is None
    assert callback.calls == 1
    clock.elapsed += 61
    assert deliver(way, template, callback) == "done"


def test_a_fresh_item_is_no_duplicate(way):
    template, callback = way.kind(remember_completed=60), Fails()
    deliver(way, template, callback)
    assert deliver(way, template, callback, fresh=True) == "done"


def test_listeners_of_a_duplicate_are_told(way):
    ears = Ears()
    seen = []

    class Watching(Ears):
        def close(self, context, error):
            seen.append(context.duplicate)

    template = way.kind(remember_completed=60, listeners=[ears, Watching()])
    deliver(way, template, Fails())
    deliver(way, template, Fails())
    assert [event[0] for event in ears.log] == ["open", "on_success", "close", "open", "close"]
    assert seen == [False, True]


def test_a_recovered_item_is_complete_too(way):
    template = way.kind(retry_policy=NeverRetryPolicy(), remember_completed=60)
    park = Fails(value="parked")
    assert deliver(way, template, Fails(ERROR), park, recover_on_redelivery=False) == "parked"
    assert deliver(way, template, Fails(), park) is None
    assert template.context_cache.load("retry/m-1").snapshot["recovered"] is True


# -- attempts elsewhere, and deaths


def test_what_this_process_knows_to_be_running_is_running_whatever_the_source_and_the_lease_say(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1))
    leave_running(template.context_cache, owner=begin(), until=EPOCH - 1)
    callback = Fails(ERROR)
    assert type(deliver(way, template, callback, redelivered=True)) is AttemptsInFlightError
    assert callback.attempts == []


def test_an_attempt_that_never_ended_counts_as_a_crash(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(2))
    leave_running(template.context_cache, owner="elsewhere/1/2/3")
    callback = Fails(ERROR)
    assert deliver(way, template, callback, redelivered=True) is ERROR
    assert callback.attempts == [2]
    history = template.context_cache.load("retry/m-1").snapshot
    assert (history["retry_count"], history["crashes"]) == (2, 1)
    assert history["errors"][0]["type"] == "retrykit.Crash"


def told_of_deaths(caplog):
    return [record for record in caplog.records if "retrykit.Crash" in record.getMessage()]


@pytest.mark.parametrize("journal", ["redelivered", "never"])
def test_a_crash_is_told_when_it_is_counted(way, caplog, journal):
    template = way.kind(retry_policy=SimpleRetryPolicy(3))
    leave_running(template.context_cache, owner="elsewhere/1/2/3")
    assert deliver(way, template, Fails(ERROR), redelivered=True, journal=journal) is ERROR
    assert deliver(way, template, Fails(), redelivered=True) == "done"
    (line,) = told_of_deaths(caplog)
    assert (line.name, line.levelname) == ("retrykit", "WARNING")
    assert line.getMessage() == (
        "retry key='m-1' attempt 1 failed: retrykit.Crash: attempt with fence 1 never ended; it was made by "
        "elsewhere/1/2/3; retry at once (SimpleRetryPolicy: attempt 1 of 3 failed)"
    )
    assert facts_of(line) == {
        "name": "retry",
        "key": "m-1",
        "attempt": 1,
        "retry": True,
        "delay": 0.0,
        "reason": "SimpleRetryPolicy: attempt 1 of 3 failed",
        "error": "retrykit.Crash",
        "error_message": "attempt with fence 1 never ended; it was made by elsewhere/1/2/3",
    }


def test_a_crash_that_was_the_last_attempt_is_told_before_the_recovery(way, caplog):
    template = way.kind(retry_policy=SimpleRetryPolicy(2))
    leave_running(template.context_cache, owner="elsewhere/1/2/3", count=2)
    told = deliver(way, template, Fails(), lambda _: list(told_of_deaths(caplog)), redelivered=True)
    facts = [facts_of(line) for line in told]
    assert [(fact["attempt"], fact["retry"]) for fact in facts] == [(1, False), (2, False)]


def test_a_recovery_that_never_ended_is_told(way, caplog):
    template = way.kind(retry_policy=SimpleRetryPolicy(1))
    leave_running(template.context_cache, owner="elsewhere/1/2/3", recovery=True, failures=1)
    assert deliver(way, template, Fails(), lambda _: "parked", redelivered=True) == "parked"
    (line,) = told_of_deaths(caplog)
    assert "attempt 1 was the last one, and the recovery after it failed: retrykit.Crash: recovery" in line.getMessage()
    assert (facts_of(line)["error"], facts_of(line)["retry"]) == ("retrykit.Crash", False)


def test_a_crash_that_somebody_else_has_counted_meanwhile_is_told_by_them_alone(caplog):
    class Overtaken(MapRetryContextCache):
        """The first to store anything is overtaken by another one."""

        other = False

        def save(self, key, snapshot, expected):
            other, self.other = self.other, False
            if other:
                assert template.execute(Fails(), state=state) == "done"
            return super().save(key, snapshot, expected)

    state = RetryState(key="m-1", redelivered=True)
    cache = Overtaken()
    leave_running(cache, owner="elsewhere/1/2/3")
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(3))
    cache.other = True
    assert template.execute(Fails(), state=state) == "done"
    assert len(told_of_deaths(caplog)) == 1


def leave_running(cache, owner, *, until=EPOCH + 9e9, recovery=False, failures=0, count=1):
    """Store a history with attempts that have not ended."""
    flights = [
        {"fence": fence, "owner": owner, "since": 0.0, "until": until, "recovery": recovery}
        for fence in range(failures + 1, failures + 1 + count)
    ]
    snapshot = {"format": 1, "name": "retry", "key": "m-1", "retry_count": failures, "fence": failures + count}
    if failures:
        snapshot |= {"last_error": {"type": "builtins.OSError", "message": "x"}}
    assert cache.save("retry/m-1", snapshot | {"in_flight": flights}, None)


def test_an_attempt_that_runs_elsewhere_is_neither_counted_nor_repeated_beyond_the_limit(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(2))
    leave_running(template.context_cache, owner=begin(), count=2)
    callback = Fails()
    error = deliver(way, template, callback, lambda _: "parked")
    assert type(error) is AttemptsInFlightError
    assert (callback.calls, error.running) == (0, 2)


def test_an_attempt_elsewhere_leaves_room_for_another(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(2))
    leave_running(template.context_cache, owner=begin())
    assert deliver(way, template, Fails()) == "done"


def test_an_attempt_whose_lease_is_over_was_a_crash(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1), clock=ManualClock())
    leave_running(template.context_cache, owner="elsewhere", until=EPOCH - 1)
    error = deliver(way, template, Fails())
    assert type(error) is ExhaustedRetryError
    assert error.__cause__.crash


def test_a_recovery_that_never_ended_comes_again(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1))
    leave_running(template.context_cache, owner="elsewhere", recovery=True, failures=1)
    assert deliver(way, template, Fails(), lambda _: "parked", redelivered=True) == "parked"


def test_a_recovery_that_runs_elsewhere_is_left_to_it(way):
    template = way.kind(retry_policy=SimpleRetryPolicy(1))
    leave_running(template.context_cache, owner=begin(), recovery=True, failures=1)
    assert type(deliver(way, template, Fails(), lambda _: "parked")) is AttemptsInFlightError


def test_an_interpreter_exit_withdraws_the_reservation(way):
    template = way.kind()
    with pytest.raises(Exits):
        deliver(way, template, Fails(Exits()))
    assert len(template.context_cache) == 0
    deliver(way, template, Fails(ERROR))
    with pytest.raises(Exits):
        deliver(way, template, Fails(Exits()))
    snapshot = template.context_cache.load("retry/m-1").snapshot
    assert (snapshot["retry_count"], snapshot.get("in_flight")) == (1, None)


def test_without_a_journal_nothing_is_reserved(way):
    class Counting(MapRetryContextCache):
        saves = 0

        def save(self, key, snapshot, expected):
            self.saves += 1
            return super().save(key, snapshot, expected)

    template = way.kind(context_cache=Counting())
    assert deliver(way, template, Fails(), journal="never") == "done"
    assert template.context_cache.saves == 0
    assert deliver(way, template, Fails(), journal="always", redelivered=False) == "done"
    assert template.context_cache.saves == 1
    fences = []
    for _ in range(2):
        assert deliver(way, template, Fails(ERROR), journal="never") is ERROR
        fences.append(template.context_cache.load("retry/m-1").snapshot["fence"])
    assert fences[0] < fences[1]
    assert "in_flight" not in template.context_cache.load("retry/m-1").snapshot


def test_a_recovery_may_have_a_deadline():
    template = RetryTemplate(retry_policy=NeverRetryPolicy(), recovery_policy=TimeoutRetryPolicy(60))
    assert template.execute(Fails(ERROR), Fails(ValueError(), value="parked")) == "parked"


def test_p9_a_second_interruption_does_not_stop_the_tidying_up(way):
    ears = Ears()
    first, second = Exits("first"), Exits("second")
    transaction = (Transaction if way is Sync else AsyncTransaction)([], rollback=second)
    with pytest.raises(Exits, match="first"):
        way.run(way.kind(listeners=[ears]), Fails(first), transaction=transaction)
    assert ears.log[-1] == ("close", first)


def test_p9_the_transaction_of_a_cancelled_task_is_rolled_back():
    log = []

    async def attempt(context):
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        OnAsyncio.run(AsyncRetryTemplate(), attempt, transaction=AsyncTransaction(log))
    assert log == ["begin", "roll back"]


# -- exceptions that resist


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class NotedError(Exception):
    """An exception that no note can be added to."""

    __notes__ = ()


class WordlessError(Exception):
    """An exception that cannot be put into words."""

    def __str__(self):
        raise RuntimeError("no words")


def test_p8_an_exception_that_is_frozen_is_retried_and_raised_itself(way, shortened):
    errors = [FrozenError(n) for n in range(3)]
    callback = Fails(*errors)
    with pytest.raises(FrozenError) as caught:
        way.run(way.kind(), callback)
    assert caught.value is errors[2]
    assert callback.calls == 3


def test_p8_an_exception_that_is_frozen_is_rethrown_itself_and_remembered(way):
    template, error = way.kind(), FrozenError(1)
    assert deliver(way, template, Fails(error)) is error
    assert template.context_cache.load("retry/m-1").snapshot["retry_count"] == 1


@pytest.mark.parametrize("error", [FrozenError(1), NotedError()], ids=["frozen", "noted"])
def test_p8_an_exception_that_takes_no_note_is_raised_itself_when_it_cannot_be_stored(way, error, caplog):
    template = way.kind(context_cache=BrokenCache(save=OSError("full")))
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, template, Fails(error)) is error
    assert "fault in store" in caplog.text


class Wordless:
    """A policy and a back-off that fail without words."""

    def decide(self, context):
        raise WordlessError

    def delay(self, context):
        raise WordlessError


@pytest.mark.parametrize(
    "options",
    [{"retry_policy": Wordless()}, {"back_off_policy": Wordless()}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("state", [None, RetryState(key="m-1")], ids=["stateless", "stateful"])
def test_p8_a_policy_that_fails_without_words_hides_nothing(way, shortened, options, state):
    callback = Fails(ERROR)
    with pytest.raises(OSError, match="broken") as caught:
        way.run(way.kind(**options), callback, state=state)
    assert caught.value is ERROR
    assert callback.calls == 1


@pytest.mark.parametrize("verb", ["load", "save", "remove"])
def test_p11_a_store_that_fails_without_words_hides_nothing(way, verb, caplog):
    template = way.kind(context_cache=BrokenCache(**{verb: WordlessError()}))
    error = ValueError("mine")
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(way, template, Fails(error)) is error
        assert deliver(way, template, Fails()) == "done"
    assert "fault in" in caplog.text
    notes = getattr(error, "__notes__", [])
    assert ["WordlessError" in note for note in notes] == ([] if verb == "remove" else [True])


# -- managers of both kinds


class Dual:
    """A context manager of both kinds."""

    def __enter__(self):
        return "sync"

    def __exit__(self, kind, error, trace):
        pass

    async def __aenter__(self):
        return "async"

    async def __aexit__(self, kind, error, trace):
        pass


def test_a_manager_of_both_kinds_is_entered_as_the_template_can(way):
    seen = []

    def callback(context):
        seen.append(context.transaction)

    way.run(way.kind(), callback, transaction=Dual)
    assert seen == ["sync" if way is Sync else "async"]


def test_a_transaction_that_is_none_may_be_a_nullcontext(way):
    callback = Fails()
    assert way.run(way.kind(), callback, transaction=contextlib.nullcontext) == "done"
    assert callback.calls == 1


# -- vetoes of several people


def test_p4_a_veto_that_a_call_gave_and_withdrew_takes_no_others_veto_with_it():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(50))

    def callback(context):
        context.veto("mine")
        context.withdraw_veto()
        template.veto("m-1", "the operator's")
        raise ERROR

    assert deliver(Sync, template, callback) is ERROR
    assert template.history("m-1").veto_reason == "the operator's"


class Withdraws(Ears):
    """Withdraws the veto that it finds, and lets somebody else write before the next save."""

    def __init__(self, meanwhile):
        super().__init__()
        self.meanwhile = meanwhile

    def open(self, context):
        super().open(context)
        context.withdraw_veto()
        self.meanwhile()


def touch(cache):
    """Somebody else stores what is stored."""
    stored = cache.load("retry/m-1")
    assert cache.save("retry/m-1", stored.snapshot, stored.version)


def test_p4_a_withdrawal_is_not_lost_when_somebody_else_writes_first():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(50))
    template.veto("m-1", "poison")
    listener = Withdraws(lambda: touch(template.context_cache))
    callback = Fails(ERROR)
    assert deliver(Sync, attrs.evolve(template, listeners=[listener]), callback) is ERROR
    assert callback.calls == 1
    assert template.history("m-1").veto_reason is None


def test_p4_a_withdrawal_that_nobody_has_stored_is_not_lost_when_somebody_else_writes_first():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(50))
    template.veto("m-1", "poison")

    def callback(context):
        touch(template.context_cache)
        raise ERROR

    listener = Withdraws(lambda: None)
    assert deliver(Sync, attrs.evolve(template, listeners=[listener]), callback, journal="never") is ERROR
    assert template.history("m-1").veto_reason is None


def test_p4_a_withdrawal_takes_back_the_veto_that_it_saw_and_no_other():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(50))
    template.veto("m-1", "poison")
    listener = Withdraws(lambda: template.veto("m-1", "still poison"))
    callback = Fails()
    assert type(deliver(Sync, attrs.evolve(template, listeners=[listener]), callback)) is TerminatedRetryError
    assert callback.calls == 0
    assert template.history("m-1").veto_reason == "still poison"


# -- telling, time, and asking


def test_p9_an_interruption_in_close_tells_no_listener_twice_and_forgets_none(way):
    log = []

    class Interrupted(Ears):
        def close(self, context, error):
            super().close(context, error)
            if error is None:
                raise Exits

    template = way.kind(listeners=[Ears(log, "first"), Interrupted(log, "last")])
    with pytest.raises(Exits):
        way.run(template, Fails())
    assert [event[0] for event in log if event[1] == "close"] == ["last", "first"]


class OddClock(ManualClock):
    """A clock whose named hand gives what is no time."""

    def __init__(self, hand, instant):
        super().__init__()
        self.odd = {hand: instant}

    def time(self):
        return self.odd.get("time", super().time())

    def monotonic(self):
        return self.odd.get("monotonic", super().monotonic())


IN_PLACE = RetryState(key="m-1", rollback_for=lambda _: False)


@pytest.mark.parametrize("instant", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("hand", ["time", "monotonic"])
def test_p11_a_clock_that_gives_no_time_changes_no_outcome(way, hand, instant):
    for state in (None, IN_PLACE):
        clock = OddClock(hand, instant)
        template = way.kind(clock=clock, back_off_policy=FixedBackOffPolicy(2))
        assert way.run(template, Fails(ERROR), state=state) == "done"
        assert clock.slept == [2]


@pytest.mark.parametrize("instant", [None, "noon"])
def test_p11_a_clock_that_gives_no_time_of_day_changes_no_outcome(way, instant):
    template = way.kind(clock=OddClock("time", instant), back_off_policy=FixedBackOffPolicy(2))
    assert way.run(template, Fails(ERROR), state=IN_PLACE) == "done"


def test_asking_for_the_context_again_and_again_keeps_nothing():
    failures = [ERROR]

    @retryable
    def fetch():
        if failures:
            raise failures.pop()
        found = {current_context() for _ in range(100)}
        return len(found), len(_bound.get())

    contexts, bound = fetch()
    assert contexts == 1
    assert bound < 10
