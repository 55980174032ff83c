"""The block style."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging

import pytest
import trio

from retrykit import (
    AsyncRetryTemplate,
    BackOffInterruptedError,
    ExhaustedRetryError,
    FixedBackOffPolicy,
    MapRetryContextCache,
    NeverRetryPolicy,
    RetryError,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    current_context,
)
from tests.doubles import AsyncEars, AsyncTransaction, Ears, Fails, ManualClock, Transaction

ERROR = OSError("broken")


class Sync:
    """A loop over a sync template."""

    kind = RetryTemplate

    @staticmethod
    def loop(template, body, **options):
        for attempt in template.attempts(**options):
            with attempt as context:
                body(context)


class OnAsyncio:
    """A loop over an async template, on asyncio."""

    kind = AsyncRetryTemplate
    runs = staticmethod(asyncio.run)

    @classmethod
    def loop(cls, template, body, **options):
        async def main():
            async for attempt in template.attempts(**options):
                async with attempt as context:
                    body(context)

        cls.run(main)

    @staticmethod
    def run(main):
        asyncio.run(main())


class OnTrio(OnAsyncio):
    """A loop over an async template, on trio."""

    @staticmethod
    def run(main):
        trio.run(main)


@pytest.fixture(params=[Sync, OnAsyncio, OnTrio], ids=lambda way: way.__name__)
def way(request):
    return request.param


class Body:
    """The body of a block that raises the given errors in turn."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.attempts = []
        self.contexts = []

    def __call__(self, context):
        self.attempts.append(context.attempt)
        self.contexts.append(context)
        assert current_context() is context
        if self.errors:
            raise self.errors.pop(0)


def test_the_loop_ends_after_the_first_attempt_that_succeeds(way):
    body = Body(ERROR, ERROR)
    way.loop(way.kind(), body)
    assert body.attempts == [1, 2, 3]
    assert body.contexts[0].closed
    assert current_context() is None


def test_p8_the_last_failure_leaves_the_block_as_it_is(way):
    errors = [OSError(str(n)) for n in range(3)]
    body = Body(*errors)
    with pytest.raises(OSError, match="2") as caught:
        way.loop(way.kind(), body)
    assert caught.value is errors[2]
    assert caught.value.__cause__ is None
    assert current_context() is None


def test_pauses_are_spent_between_attempts(way):
    clock = ManualClock()
    way.loop(way.kind(back_off_policy=FixedBackOffPolicy(2), clock=clock), Body(ERROR, ERROR))
    assert clock.slept == [2, 2]


def test_an_interrupted_pause_raises_from_the_loop(way):
    class Interrupted(ManualClock):
        def sleep(self, seconds):
            raise InterruptedError

    with pytest.raises(BackOffInterruptedError):
        way.loop(way.kind(back_off_policy=FixedBackOffPolicy(2), clock=Interrupted()), Body(ERROR))


def test_listeners_hear_of_it(way):
    ears = Ears()
    way.loop(way.kind(listeners=[ears]), Body(ERROR))
    assert ears.log == [("open",), ("on_error", ERROR, True), ("on_success", None), ("close", None)]


class Exits(BaseException):
    pass


def test_p9_what_is_no_exception_leaves_at_once(way):
    ears, body = Ears(), Body(Exits())
    with pytest.raises(Exits):
        way.loop(way.kind(listeners=[ears]), body)
    assert body.contexts[0].retry_count == 0
    assert [event[0] for event in ears.log] == ["open", "close"]
    assert current_context() is None


def test_a_break_and_a_return_leave_quietly(way):
    log = []

    def leave(template):
        for attempt in template.attempts():
            with attempt:
                log.append("returned")
                return

    leave(RetryTemplate())
    for attempt in RetryTemplate().attempts():
        with attempt:
            pass
        break
    assert log == ["returned"]
    assert current_context() is None


def test_an_attempt_that_is_not_entered_is_an_error(way):
    calls = []

    def sync():
        for _ in RetryTemplate().attempts():
            calls.append(1)

    async def main():
        async for _ in AsyncRetryTemplate().attempts():
            calls.append(1)

    with pytest.raises(RetryError, match="an attempt was not made: enter each one"):
        sync() if way is Sync else way.run(main)
    assert calls == [1]


def test_a_stateful_block_rethrows_and_goes_on_at_the_next_delivery(way):
    template, body = way.kind(), Body(ERROR, ERROR)
    state = RetryState(key="m-1")
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            way.loop(template, body, state=state)
    way.loop(template, body, state=state)
    assert body.attempts == [1, 2, 3]
    assert len(template.context_cache) == 0


def test_an_exhausted_item_raises_before_any_attempt(way):
    template, body = way.kind(retry_policy=NeverRetryPolicy()), Body(ERROR)
    with pytest.raises(OSError, match="broken"):
        way.loop(template, body, state=RetryState(key="m-1"))
    with pytest.raises(ExhaustedRetryError):
        way.loop(template, body, state=RetryState(key="m-1"))
    assert body.attempts == [1]


def test_an_own_session_raises_the_exhaustion_from_the_last_failure(way):
    template = way.kind(retry_policy=NeverRetryPolicy())
    with pytest.raises(ExhaustedRetryError) as caught:
        way.loop(template, Body(ERROR), state=RetryState(key="m-1", recover_on_redelivery=False))
    assert caught.value.__cause__ is ERROR


def test_a_duplicate_makes_no_attempt(way):
    template, body = way.kind(remember_completed=60), Body()
    for _ in range(2):
        way.loop(template, body, state=RetryState(key="m-1"))
    assert body.attempts == [1]


def test_a_pause_that_is_due_is_spent_before_the_first_attempt(way):
    clock = ManualClock()
    template, body = way.kind(back_off_policy=FixedBackOffPolicy(5), clock=clock), Body(ERROR)
    with pytest.raises(OSError, match="broken"):
        way.loop(template, body, state=RetryState(key="m-1"))
    way.loop(template, body, state=RetryState(key="m-1"))
    assert clock.slept == [5]


def test_a_veto_ends_the_loop(way):
    def body(context):
        context.veto("poison")
        raise ERROR

    with pytest.raises(OSError, match="broken"):
        way.loop(way.kind(), body)


def test_each_attempt_has_its_transaction(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log)
    way.loop(way.kind(), Body(ERROR), transaction=transaction)
    assert log == ["begin", "roll back", "begin", "commit"]


def test_a_commit_that_fails_is_a_failed_attempt(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log, commit=ValueError("constraint"))
    body = Body()
    with pytest.raises(ValueError, match="constraint"):
        way.loop(way.kind(retry_policy=SimpleRetryPolicy(2)), body, transaction=transaction)
    assert body.attempts == [1, 2]


def test_a_transaction_that_cannot_begin_is_a_failed_attempt(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log, begin=ValueError("no connection"))
    body = Body()
    with pytest.raises(ValueError, match="no connection"):
        way.loop(way.kind(retry_policy=SimpleRetryPolicy(2)), body, transaction=transaction)
    assert (log, body.attempts) == (["begin", "begin"], [])


def test_an_exit_rolls_back(way):
    log = []
    transaction = (Transaction if way is Sync else AsyncTransaction)(log)
    with pytest.raises(Exits):
        way.loop(way.kind(), Body(Exits()), transaction=transaction)
    assert log == ["begin", "roll back"]


def test_a_store_that_fails_changes_no_outcome(way, caplog):
    class Broken:
        def load(self, key):
            raise OSError("no store")

        save = remove = load

    with caplog.at_level(logging.ERROR, "retrykit"), pytest.raises(ValueError, match="mine"):
        way.loop(way.kind(context_cache=Broken()), Body(ValueError("mine")), state=RetryState(key="m-1"))
    assert "fault in load" in caplog.text


@pytest.mark.parametrize(("argument", "value"), [("state", "m-1"), ("transaction", 3)])
def test_a_bad_argument_is_refused_before_the_loop(argument, value):
    for template in (RetryTemplate(), AsyncRetryTemplate()):
        with pytest.raises(TypeError, match=rf"^{argument}: must be"):
            template.attempts(**{argument: value})


def test_a_loop_that_is_left_early_is_over():
    ears, body = Ears(), Body()
    for attempt in RetryTemplate(listeners=[ears]).attempts():
        with attempt as context:
            body(context)
        break
    assert [event[0] for event in ears.log] == ["open", "on_success", "close"]
    assert body.contexts[0].closed
    failing = Body(ERROR)
    for attempt in RetryTemplate().attempts():
        with attempt as context:
            failing(context)
        break
    del attempt
    assert failing.contexts[0].closed


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_loop_leaves_no_garbage(failures):
    def loop(template):
        with contextlib.suppress(ValueError):
            Sync.loop(template, Body(*[ValueError(str(n)) for n in range(failures)]))

    def garbage(template):
        gc.collect()
        gc.disable()
        try:
            loop(template)
            return gc.collect()
        finally:
            gc.enable()

    template = RetryTemplate()
    loop(template)
    # A thread that an earlier test has left may leave some of its own now and then; ours would be there each time.
    assert 0 in [garbage(template) for _ in range(5)]


# -- interruptions outside of the block


class ExitsInPauses(ManualClock):
    """A clock that is interrupted whenever it sleeps."""

    def sleep(self, seconds):
        raise Exits


def test_p9_an_interruption_in_a_pause_closes_the_call_and_makes_no_attempt(way):
    ears, body = Ears(), Body(ERROR)
    with pytest.raises(Exits) as caught:
        way.loop(way.kind(back_off_policy=FixedBackOffPolicy(1), clock=ExitsInPauses(), listeners=[ears]), body)
    assert ears.log == [("open",), ("on_error", ERROR, True), ("close", caught.value)]
    assert (body.attempts, body.contexts[0].closed) == ([1], True)


def test_p9_an_interruption_in_the_pause_before_the_first_attempt_keeps_the_history(way):
    template, body = way.kind(back_off_policy=FixedBackOffPolicy(1), clock=ExitsInPauses()), Body(ERROR)
    state = RetryState(key="m-1")
    with pytest.raises(OSError, match="broken"):
        way.loop(template, body, state=state)
    ears = Ears()
    again = way.kind(
        back_off_policy=FixedBackOffPolicy(1),
        clock=ExitsInPauses(),
        listeners=[ears],
        context_cache=template.context_cache,
    )
    with pytest.raises(Exits):
        way.loop(again, body, state=state)
    assert [event[0] for event in ears.log] == ["open", "close"]
    stored = template.context_cache.load("retry/m-1").snapshot
    assert (stored["retry_count"], stored.get("in_flight", [])) == (1, [])


class ExitsAtSave(MapRetryContextCache):
    """A cache that is interrupted once, before the save with the given number."""

    number = 0

    def save(self, key, snapshot, expected):
        self.number -= 1
        if self.number == 0:
            raise Exits
        return super().save(key, snapshot, expected)


@pytest.mark.parametrize("number", [1, 2], ids=["reserved", "stored"])
def test_p9_an_interruption_while_something_is_stored_leaves_no_reservation(way, number):
    ears, body, cache = Ears(), Body(ERROR), ExitsAtSave()
    cache.number = number
    with pytest.raises(Exits):
        way.loop(way.kind(context_cache=cache, listeners=[ears]), body, state=RetryState(key="m-1"))
    assert [event[0] for event in ears.log] == ["open", "close"]
    stored = cache.load("retry/m-1")
    assert stored is None or "in_flight" not in stored.snapshot
    callback = Fails()
    assert RetryTemplate(context_cache=cache).execute(callback, state=RetryState(key="m-1")) == "done"
    assert callback.contexts[0].crashes == 0


def test_p9_an_interruption_in_a_listener_closes_the_call(way):
    class Interrupted(Ears):
        def on_error(self, context, error, decision):
            raise Exits

    ears = Interrupted()
    with pytest.raises(Exits) as caught:
        way.loop(way.kind(listeners=[ears]), Body(ERROR))
    assert ears.log == [("open",), ("close", caught.value)]


class AwaitingEars(AsyncEars):
    """As `AsyncEars`, but closing it awaits something first."""

    def __init__(self, pause):
        super().__init__()
        self.pause = pause

    async def close(self, context, error):
        await self.pause()
        await super().close(context, error)


class CancelledInPauses(ManualClock):
    """A clock whose sleeper is cancelled."""

    def __init__(self, cancel):
        super().__init__()
        self.cancel = cancel

    async def async_sleep(self, seconds):
        await self.cancel()


def test_p9_a_task_that_is_cancelled_in_a_pause_closes_the_call():
    async def cancel():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    ears = AwaitingEars(lambda: asyncio.sleep(0))
    clock = CancelledInPauses(cancel)
    template = AsyncRetryTemplate(back_off_policy=FixedBackOffPolicy(1), clock=clock, listeners=[ears])
    with pytest.raises(asyncio.CancelledError):
        OnAsyncio.loop(template, Body(ERROR))
    assert [event[0] for event in ears.log] == ["open", "on_error", "close"]


def test_p9_a_scope_of_trio_that_is_cancelled_in_a_pause_closes_the_call():
    ears = AwaitingEars(trio.lowlevel.checkpoint)

    async def main():
        with trio.CancelScope() as scope:

            async def cancel():
                scope.cancel()
                await trio.lowlevel.checkpoint()

            clock = CancelledInPauses(cancel)
            template = AsyncRetryTemplate(back_off_policy=FixedBackOffPolicy(1), clock=clock, listeners=[ears])
            async for attempt in template.attempts():
                async with attempt:
                    raise ERROR
        return scope.cancelled_caught

    assert trio.run(main)
    assert [event[0] for event in ears.log] == ["open", "on_error", "close"]


# -- loops that are left between two attempts


def left_before_an_attempt(way, template, **options):
    """Leave the loop in front of its first attempt."""

    def sync():
        for _ in template.attempts(**options):
            break

    async def main():
        async for _ in template.attempts(**options):
            break

    sync() if way is Sync else way.run(main)


def test_a_loop_that_is_left_before_its_first_attempt_closes_the_call(way):
    ears = Ears()
    left_before_an_attempt(way, way.kind(listeners=[ears]))
    assert [event[0] for event in ears.log] == ["open", "close"]


def test_a_loop_that_is_left_before_its_first_attempt_reserves_nothing(way):
    template, state = way.kind(), RetryState(key="m-1")
    for _ in range(3):
        left_before_an_attempt(way, template, state=state)
        assert len(template.context_cache) == 0
    body = Body()
    way.loop(template, body, state=state)
    assert body.attempts == [1]


def test_a_loop_that_is_left_before_a_later_attempt_closes_the_call_and_keeps_the_failures_before_it():
    ears = Ears()
    template = RetryTemplate(listeners=[ears])
    for attempt in template.attempts(state=RetryState(key="m-1", rollback_for=lambda _: False)):
        if ears.log[-1][0] == "on_error":
            break
        with attempt:
            raise ERROR
    assert [event[0] for event in ears.log] == ["open", "on_error", "close"]
    stored = template.context_cache.load("retry/m-1").snapshot
    assert (stored["retry_count"], stored.get("crashes", 0), stored.get("in_flight", [])) == (1, 0, [])


def test_an_interruption_between_the_loop_and_its_block_reserves_nothing():
    template = RetryTemplate()

    def interrupted():
        for _ in template.attempts(state=RetryState(key="m-1")):
            raise Exits

    with pytest.raises(Exits):
        interrupted()
    assert len(template.context_cache) == 0
