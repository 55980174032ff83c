"""The promises one by one: what the machine has found once, and what it does not reach."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from retrykit import (
    AsyncRetryTemplate,
    ExhaustedRetryError,
    FixedBackOffPolicy,
    MapRetryContextCache,
    NoBackOffPolicy,
    RecoveryFailedError,
    RetryListener,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    TimeoutRetryPolicy,
    current_context,
    retryable,
)
from retrykit.cache import canonical_key
from retrykit.errors import CacheCapacityError
from tests.property.test_flow_machine import Machine, Rules
from tests.property.world import Failed, Script

DEFAULTS = {
    "limit": 3,
    "back_off": NoBackOffPolicy(),
    "remember": None,
    "joins": False,
    "awaits": True,
    "fronted": False,
}


@contextmanager
def machine(**rules):
    made = Machine(Rules(**DEFAULTS | rules))
    try:
        yield made
    finally:
        made.close()


def delivered(*scripts, **rules):
    """Deliver one after the other, under the eyes of the model; the machine afterwards."""
    with machine(**rules) as made:
        for script in scripts:
            made.deliver(script)
    return made


RUNNERS = ("sync", "asyncio", "trio")


# -- found by the machine


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("redelivered", [None, False])
def test_p9_a_cancelled_attempt_is_rolled_back_withdrawn_and_closed(runner, redelivered):
    script = Script(runner=runner, redelivered=redelivered, transactional=True, works=("is cancelled",))
    made = delivered(script, attrs.evolve(script, works=("ok",)))
    assert made.stored("orders", "m-1") is None


@pytest.mark.parametrize("runner", RUNNERS)
def test_p9_a_transaction_that_did_not_begin_is_not_left_when_the_pause_is_cancelled(runner):
    script = Script(
        runner=runner, transactional=True, in_place=True, transactions=("does not begin",), pause="is cancelled"
    )
    delivered(script, back_off=FixedBackOffPolicy(5.0))


@pytest.mark.parametrize("redelivered", [None, True, False])
@pytest.mark.parametrize("runner", RUNNERS)
def test_p4_a_veto_in_an_attempt_that_is_cancelled_or_in_doubt_is_kept(runner, redelivered):
    cancelled = Script(runner=runner, redelivered=redelivered, works=("vetoes, is cancelled",))
    assert delivered(cancelled).stored("orders", "m-1").snapshot["veto"] == "by the work"
    doubtful = Script(
        runner=runner,
        redelivered=redelivered,
        works=("vetoes ok",),
        transactional=True,
        transactions=("in doubt, not done",),
    )
    assert delivered(doubtful).stored("orders", "m-1").snapshot["veto"] == "by the work"


@pytest.mark.parametrize("event", ["open", "on_error"])
@pytest.mark.parametrize("redelivered", [None, False])
def test_p4_a_veto_by_a_listener_is_kept(event, redelivered):
    made = delivered(Script(redelivered=redelivered, works=("fails",), faults={(event, 0): "vetoes"}))
    assert made.stored("orders", "m-1").snapshot["veto"] == f"by {event}"


def test_p4_a_veto_by_a_listener_is_kept_while_other_attempts_are_in_flight():
    died = Script(redelivered=None, faults={("death", 5): "elsewhere"})
    vetoed = Script(redelivered=None, faults={("open", 0): "vetoes"})
    made = delivered(died, vetoed, limit=1)
    assert made.watcher.events == []
    assert made.stored("orders", "m-1").snapshot["veto"] == "by open"


def test_p4_a_veto_that_was_withdrawn_during_the_recovery_stays_withdrawn():
    template = RetryTemplate(name="orders")
    template.veto("m", "by an operator")

    def recover(context):
        template.withdraw_veto("m")
        raise Failed

    with pytest.raises(RecoveryFailedError):
        template.execute(lambda _: None, recover, state=RetryState(key="m"))
    history = template.history("m")
    assert history is None or not history.vetoed
    assert template.execute(lambda _: "work", state=RetryState(key="m", redelivered=True)) == "work"


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("redelivered", [None, True])
def test_p5_a_failure_whose_history_vanished_meanwhile_is_counted_as_the_first(runner, redelivered):
    script = Script(runner=runner, redelivered=redelivered, works=("fails",), faults={("save", 1): "settles"})
    assert delivered(script).stored("orders", "m-1").snapshot["retry_count"] == 1


@pytest.mark.parametrize("redelivered", [None, True])
def test_p5_a_reservation_that_was_stored_by_a_write_that_seemed_to_fail_is_no_second_failure(redelivered):
    script = Script(
        redelivered=redelivered, works=("fails", "fails"), in_place=True, faults={("save", 0): "raises when it is done"}
    )
    assert delivered(script, limit=2).stored("orders", "m-1").snapshot["retry_count"] == 2


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("limit", [1, 3])
def test_p2_an_item_that_somebody_else_completed_meanwhile_is_neither_tried_again_nor_recovered(in_place, limit):
    script = Script(
        redelivered=True,
        works=("fails",),
        recoveries=("ok",),
        in_place=in_place,
        recover_now=True,
        faults={("save", 1): "completes"},
    )
    made = delivered(script, remember=60.0, limit=limit)
    assert "recovery" not in made.watcher.events
    assert made.watcher.events.count("attempt") == 1
    assert "completed_at" in made.stored("orders", "m-1").snapshot


@pytest.mark.parametrize("works", [("fails", "fails", "fails"), ("fails", "fails fatally")])
def test_p3_a_recovery_that_fails_never_runs_the_callback_again(works):
    first = [Script(works=(work,)) for work in works]
    later = Script(redelivered=True, works=("ok",), recoveries=("fails",))
    made = delivered(*first, later, later, attrs.evolve(later, recoveries=("is cancelled",)), later)
    assert made.watcher.events == ["recovery"] * 3
    assert made.stored("orders", "m-1").snapshot["recovery_failures"] == 9


# -- time


class BrokenClock:
    """A clock that cannot be read at all; pauses are written down and take no time."""

    def __init__(self, *broken):
        self.broken = broken
        self.pauses = []

    def time(self):
        if "time" in self.broken:
            raise OSError("no time")
        return time.time()

    def monotonic(self):
        if "monotonic" in self.broken:
            raise OSError("no time")
        return time.monotonic()

    def sleep(self, seconds):
        self.pauses.append(seconds)

    async def async_sleep(self, seconds):
        self.pauses.append(seconds)


def fail(context):
    raise Failed


@pytest.mark.parametrize("broken", [("time",), ("monotonic",), ("time", "monotonic")])
def test_p11_a_clock_that_cannot_be_read_changes_neither_outcome_nor_count(broken):
    cache = MapRetryContextCache()
    good = RetryTemplate(context_cache=cache, back_off_policy=FixedBackOffPolicy(5), clock=BrokenClock())
    bad = attrs.evolve(good, clock=BrokenClock(*broken))
    state = RetryState(key="m")
    for template in (good, bad, bad):
        with pytest.raises(Failed):
            template.execute(fail, state=state)
    assert all(0 < pause < 6 for pause in (*good.clock.pauses, *bad.clock.pauses))
    assert good.history("m").retry_count == 3
    assert abs(good.history("m").last_failed_at.timestamp() - time.time()) < 3600
    assert bad.execute(fail, lambda _: "substitute", state=state) == "substitute"


@pytest.mark.parametrize("broken", [("time",), ("monotonic",), ("time", "monotonic")])
def test_p11_a_clock_that_cannot_be_read_changes_no_stateless_outcome(broken):
    clock = BrokenClock(*broken)
    policies = {"retry_policy": SimpleRetryPolicy(3), "back_off_policy": FixedBackOffPolicy(0.5)}
    heard = []

    class Hearing(RetryListener):
        def on_error(self, context, error, decision):
            heard.append(decision.retry)

    with pytest.raises(Failed):
        RetryTemplate(clock=clock, listeners=(Hearing(),), **policies).execute(fail)
    assert (clock.pauses, heard) == ([0.5, 0.5], [True, True, False])
    with pytest.raises(Failed):
        RetryTemplate(clock=clock, **policies).execute(fail)
    assert len(clock.pauses) == 4


class StutteringClock(BrokenClock):
    """A clock that cannot be read once."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def monotonic(self):
        self.when -= 1
        if self.when == 0:
            raise OSError("no time")
        return time.monotonic()


@pytest.mark.parametrize("when", [1, 2, 3])
def test_p11_a_clock_that_cannot_be_read_once_does_not_bring_a_deadline_nearer(when):
    template = RetryTemplate(retry_policy=TimeoutRetryPolicy(60), clock=StutteringClock(when))
    outcomes = iter([Failed(), Failed(), None])

    def work(context):
        if (outcome := next(outcomes)) is not None:
            raise outcome
        return "work"

    assert template.execute(work) == "work"


def test_p11_a_wall_clock_that_is_set_back_makes_no_pause_longer_than_the_back_off_asked_for():
    with machine(back_off=FixedBackOffPolicy(5.0)) as made:
        made.deliver(Script(works=("fails",)))
        made.jump(-86_400)
        made.deliver(Script(redelivered=True))
    assert made.watcher.events == [("pause", 5.0), "attempt"]


@pytest.mark.parametrize("delay", [1e12, float(2**62)])
def test_p11_a_pause_beyond_the_calendar_hides_no_business_error(delay):
    template = RetryTemplate(back_off_policy=FixedBackOffPolicy(delay), clock=BrokenClock())
    with pytest.raises(Failed):
        template.execute(fail, state=RetryState(key="m"))
    with pytest.raises(Failed):
        template.execute(fail)


# -- a full cache


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["fails", "fails", "ok"])), max_size=25),
    st.integers(1, 4),
)
def test_p6_a_full_cache_never_makes_a_known_key_forget_and_never_hides_the_error(deliveries, capacity):
    cache = MapRetryContextCache(capacity)
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(100))
    known = {}
    for key, word in deliveries:
        error = Failed()

        def work(context, word=word, error=error):
            if word == "fails":
                raise error

        state = RetryState(key=key, redelivered=True)
        if word == "ok":
            template.execute(work, state=state)
            known.pop(key, None)
            continue
        with pytest.raises(Failed) as caught:
            template.execute(work, state=state)
        assert caught.value is error
        if key in known or len(known) < capacity:
            known[key] = known.get(key, 0) + 1
            assert not hasattr(error, "__notes__")
        else:
            assert CacheCapacityError.__name__ in error.__notes__[0]
    stored = {key: context.retry_count for key in "abcdef" if (context := template.history(key))}
    assert stored == known


def test_p12_templates_of_different_names_share_a_cache_and_no_history():
    cache = MapRetryContextCache()
    one, other = (RetryTemplate(name=name, context_cache=cache) for name in ("orders", "orders/eu"))
    with pytest.raises(Failed):
        one.execute(fail, state=RetryState(key="eu/m"))
    other.veto("m", "no")
    assert other.history("eu/m") is None
    assert not one.history("eu/m").vetoed
    assert canonical_key("orders", "eu/m") != canonical_key("orders/eu", "m")


# -- the user's exception


def frames_of(error):
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return files


def sync_template(fail):
    RetryTemplate().execute(lambda _: fail())


def sync_template_with_listeners(fail):
    RetryTemplate(listeners=(RetryListener(),)).execute(lambda _: fail())


def stateful(fail):
    RetryTemplate().execute(lambda _: fail(), state=RetryState(key="m"))


def stateful_first(fail):
    RetryTemplate().execute(lambda _: fail(), state=RetryState(key="m", redelivered=False))


def decorated(fail):
    @retryable
    def work(number):
        fail()

    work(1)


def decorated_stateful(fail):
    @retryable(key=lambda number: number)
    def work(number):
        fail()

    work(1)


def block(fail):
    for attempt in RetryTemplate().attempts():
        with attempt:
            fail()


def stateful_block(fail):
    for attempt in RetryTemplate().attempts(state=RetryState(key="m")):
        with attempt:
            fail()


def in_asyncio(fail):
    async def work(context):
        await asyncio.sleep(0)
        fail()

    asyncio.run(AsyncRetryTemplate().execute(work))


def in_trio(fail):
    async def work(context):
        await trio.lowlevel.checkpoint()
        fail()

    trio.run(AsyncRetryTemplate().execute, work)


def decorated_in_asyncio(fail):
    @retryable
    async def work(number):
        await asyncio.sleep(0)
        fail()

    asyncio.run(work(1))


PATHS = (
    sync_template,
    sync_template_with_listeners,
    stateful,
    stateful_first,
    decorated,
    decorated_stateful,
    block,
    stateful_block,
    in_asyncio,
    in_trio,
    decorated_in_asyncio,
)


@pytest.mark.parametrize("path", PATHS)
def test_p8_the_users_exception_arrives_as_the_same_object_with_its_frames_and_at_most_two_of_ours(path):
    made = []

    def innermost():
        made.append(Failed(len(made)))
        raise made[-1]

    with pytest.raises(Failed) as caught:
        path(innermost)
    assert caught.value is made[-1]
    assert caught.value.__cause__ is None
    files = frames_of(caught.value)
    assert files[-1] == __file__
    assert sum("/retrykit/" in file or "<retry" in file for file in files) <= 2, files
    names = [entry.name for entry in caught.traceback]
    assert names[-1] == "innermost"


def test_p8_our_errors_are_chained_to_the_last_failure():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(1), recovery_policy=SimpleRetryPolicy(1))
    made = []

    def work(context):
        made.append(Failed())
        raise made[-1]

    state = RetryState(key="m", recover_on_redelivery=False)
    with pytest.raises(ExhaustedRetryError) as exhausted:
        template.execute(work, state=state)
    assert exhausted.value.__cause__ is made[-1]
    with pytest.raises(RecoveryFailedError) as failed:
        template.execute(work, work, state=state)
    assert failed.value.__cause__ is made[-1]


# -- garbage


@pytest.fixture
def garbage():
    """What a call has left in cycles, for the collector, since `begin` was called."""
    gc.collect()
    gc.disable()

    def found():
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        left = [
            thing for thing in gc.garbage if type(thing).__module__.startswith("retrykit") or isinstance(thing, Failed)
        ]
        left += [
            thing
            for thing in gc.garbage
            if type(thing).__name__ in ("frame", "generator") and "/retrykit/" in repr(thing)
        ]
        gc.garbage.clear()
        return [repr(thing) for thing in left]

    yield found
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


SYNC_PATHS = tuple(path for path in PATHS if "asyncio" not in path.__name__ and "trio" not in path.__name__)


def raise_failed():
    raise Failed


@pytest.mark.parametrize("fails", [True, False], ids=["fails", "succeeds"])
@pytest.mark.parametrize("path", SYNC_PATHS)
def test_no_call_leaves_cyclic_garbage(garbage, path, fails):
    for _ in range(2):
        gc.collect()
        with suppress(Failed):
            path(raise_failed if fails else lambda: None)
    # A decorated function and its attributes know each other: they are not a call's.
    assert [
        thing
        for thing in garbage()
        if "decorated" not in path.__name__ or ("Handlers" not in thing and "Template(" not in thing)
    ] == []


def calls_of(template):
    async def work(context):
        raise Failed

    async def once(context):
        if context.attempt == 1:
            raise Failed

    @retryable(template=template)
    async def decorated():
        raise Failed

    async def in_block():
        async for attempt in template.attempts():
            async with attempt:
                raise Failed

    state = RetryState(key="m")
    return {
        "stateless": lambda: template.execute(work),
        "once": lambda: template.execute(once),
        "stateful": lambda: template.execute(work, state=state),
        "recovered": lambda: template.execute(work, lambda _: None),
        "decorated": decorated,
        "block": in_block,
    }


@pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), trio.run], ids=["asyncio", "trio"])
@pytest.mark.parametrize("name", ["stateless", "once", "stateful", "recovered", "decorated", "block"])
def test_no_asynchronous_call_leaves_cyclic_garbage(garbage, run, name):
    async def main():
        call = calls_of(AsyncRetryTemplate(retry_policy=SimpleRetryPolicy(3)))[name]
        for _ in range(2):
            gc.collect()
            with suppress(Failed):
                await call()
        return garbage()

    assert run(main) == []


# -- the bound context


def test_p10_threads_and_tasks_that_inherit_the_context_see_it_and_leave_it_alone():
    seen = {}

    def work(context):
        def elsewhere():
            seen["thread"] = current_context()
            RetryTemplate(name="inner").execute(
                lambda inner: seen.setdefault("inner", (inner.parent, current_context() is inner))
            )
            seen["after"] = current_context()

        copied = contextvars.copy_context()
        thread = threading.Thread(target=copied.run, args=(elsewhere,))
        thread.start()
        thread.join()
        plain = threading.Thread(target=lambda: seen.setdefault("plain", current_context()))
        plain.start()
        plain.join()
        return context

    context = RetryTemplate().execute(work)
    assert seen == {"thread": context, "inner": (context, True), "after": context, "plain": None}
    assert current_context() is None


@pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), trio.run], ids=["asyncio", "trio"])
def test_p10_tasks_that_run_at_the_same_time_see_each_their_own_context(run):  # noqa: C901 - two event loops
    template = AsyncRetryTemplate()
    wrong = []

    async def pause():
        if run is trio.run:
            await trio.lowlevel.checkpoint()
        else:
            await asyncio.sleep(0)

    async def work(context):
        for _ in range(5):
            if current_context() is not context:
                wrong.append(context)
            await pause()
        if context.attempt < 3:
            raise Failed

    async def task():
        await template.execute(work)
        if current_context() is not None:
            wrong.append("after")

    async def main():
        if run is trio.run:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(task)
        else:
            await asyncio.gather(*(task() for _ in range(5)))

    run(main)
    assert wrong == []


def test_p10_nested_calls_restore_the_context_around_them_whatever_they_end_with():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(2))

    @retryable(max_attempts=2)
    def inner(error):
        assert current_context().parent is not None
        raise error

    def work(context):
        for error in (Failed, KeyboardInterrupt, GeneratorExit):
            with pytest.raises(error):
                inner(error)
            assert current_context() is context
            with pytest.raises(error):
                template.execute(lambda _, error=error: inner(error))
            assert current_context() is context
        return "work"

    assert template.execute(work) == "work"
    assert current_context() is None


def test_p10_a_generator_that_is_left_in_a_block_keeps_no_context_bound():
    def numbers():
        for attempt in RetryTemplate().attempts():
            with attempt:
                yield current_context()

    generator = numbers()
    assert next(generator) is not None
    generator.close()
    assert current_context() is None


# -- threads


@pytest.mark.parametrize("redelivered", [None, True])
def test_p5_the_count_is_exact_while_thirty_two_threads_fail_on_one_key(redelivered, quick_switches):
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(10_000))
    attempts = in_threads(32, 5, template, redelivered)
    assert attempts == 160
    assert template.history("m").retry_count == attempts


@pytest.mark.parametrize("redelivered", [None, True])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_p5_the_limit_holds_while_thirty_two_threads_fail_on_one_key(redelivered, limit, quick_switches):
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(limit))
    assert 1 <= in_threads(32, 3, template, redelivered) <= limit


@pytest.fixture
def quick_switches():
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(threads, deliveries, template, redelivered):
    """How often the callback ran: each thread delivers the one key so often."""
    start = threading.Barrier(threads)
    attempts = []

    def work(context):
        attempts.append(context)
        raise Failed

    def consume():
        start.wait()
        for _ in range(deliveries):
            with suppress(Exception):
                template.execute(work, state=RetryState(key="m", redelivered=redelivered))

    running = [threading.Thread(target=consume) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return len(attempts)


def test_p13_the_same_clock_and_seed_store_the_same_bytes():
    scripts = [Script(works=("fails",), key=key) for key in ("a", 7)] + [
        Script(key="a", redelivered=True, works=("fails fatally",))
    ]
    assert delivered(*scripts).world.trace == delivered(*scripts).world.trace


def test_p13_a_duration_given_as_timedelta_is_the_same():
    assert FixedBackOffPolicy(timedelta(seconds=2)) == FixedBackOffPolicy(2.0)
