"""What the container does otherwise where handlers are coroutines; what is the same for both is in `test_container`."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import attrs
import pytest

from retrykit import AsyncRetryTemplate, RetryTemplate, SimpleRetryPolicy, current_context
from retrykit.backoff import ExponentialBackOffPolicy, FixedBackOffPolicy
from retrykit.cache import MapRetryContextCache
from retrykit.messaging import Consumers, ContainerGroup, ListenerContainer, Message, Park, lifetime, park
from retrykit.messaging.coroutines import desk, loop
from retrykit.messaging.errors import LoopEndedError
from retrykit.messaging.memory import MemoryBroker
from tests import waiting
from tests.doubles import AsyncCache

ORDERS = "/queue/orders"
PARKED = "/queue/orders.parked"
PATIENCE = 20.0
QUICK = ExponentialBackOffPolicy(initial=0.001, max_interval=0.01)


@pytest.fixture
def broker():
    return MemoryBroker(ORDERS)


def template(max_attempts=3, **options):
    return AsyncRetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=max_attempts), **options)


def container(broker, handler, **options):
    return ListenerContainer(broker, handler, **{"template": template(), "reconnect": QUICK} | options)


def consume(broker, handler, **options):
    made = container(broker, handler, **options)
    with made:
        assert broker.wait_until_empty(PATIENCE), f"left: {broker.messages()}"
    return made


wait_for = partial(waiting.until, seconds=PATIENCE, look=0.002)


class Database:
    """A factory of asynchronous transactions that records what happens to them; `committing` is awaited by commits."""

    def __init__(self, committing=None):
        self.log = []
        self.committing = committing

    @asynccontextmanager
    async def begin(self):
        self.log.append("begin")
        try:
            yield self
            if self.committing is not None:
                await self.committing()
        except BaseException:
            self.log.append("rollback")
            raise
        self.log.append("commit")


class Endless:
    """A handler that waits until it is cancelled."""

    def __init__(self):
        self.running = threading.Event()
        self.cancelled = 0

    async def handle(self, message):
        self.running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def has_happened(event):
    assert await asyncio.to_thread(event.wait, PATIENCE)


async def nothing(message):
    pass


def bodies(broker, destination=ORDERS):
    return [message.body for message in broker.at(destination).messages()]


# -- one loop, several workers


def test_handlers_of_all_workers_run_at_the_same_time_on_one_loop(broker):
    for number in range(8):
        broker.publish(str(number))
    together = asyncio.Barrier(4)
    threads, loops = set(), set()

    async def handler(message):
        await asyncio.wait_for(together.wait(), PATIENCE)
        threads.add(threading.current_thread())
        loops.add(asyncio.get_running_loop())

    made = consume(broker, handler, concurrency=4)
    assert (made.counters.acknowledged, made.counters.generations) == (8, 4)
    assert (len(threads), len(loops)) == (1, 1)
    assert threading.main_thread() not in threads


def test_loop_and_its_thread_end_with_the_container(broker):
    broker.publish("x")
    threads = []

    async def handler(message):
        threads.append(threading.current_thread())

    consume(broker, handler)
    assert not threads[0].is_alive()


def test_session_is_used_by_its_own_worker_alone(broker):
    used = set()

    class Watched(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            for verb in ("receive", "send", "flush", "commit", "rollback", "pause"):
                setattr(session, verb, functools.partial(self.note, getattr(session, verb)))
            return session

        def note(self, verb, *arguments, **keywords):
            used.add((verb.__name__, threading.current_thread().name))
            return verb(*arguments, **keywords)

    watched = Watched(ORDERS)
    watched.publish("x")

    async def handler(message, context):
        message.send("/queue/next", "y")
        if context.attempt == 1:
            raise ConnectionError

    consume(watched, handler, template=template(back_off_policy=FixedBackOffPolicy(0.001)))
    assert {verb for verb, _ in used} >= {"receive", "send", "flush", "commit", "rollback"}
    assert {name for _, name in used} == {"retrykit-orders-1"}


def test_each_handler_has_its_own_context_around_it(broker):
    for number in range(4):
        broker.publish(str(number), id=str(number))
    together = asyncio.Barrier(4)
    seen = []

    async def handler(message, context):
        await asyncio.wait_for(together.wait(), PATIENCE)
        child = asyncio.create_task(look())
        seen.append((message.id, current_context() is context, await child is context, context.key))

    async def look():
        return current_context()

    consume(broker, handler, concurrency=4)
    assert sorted(seen) == [(str(number), True, True, (ORDERS, str(number))) for number in range(4)]


def test_containers_of_a_group_share_a_loop_and_others_do_not(broker):
    loops = {}

    def consumer(name):
        async def handler(message):
            loops[name] = asyncio.get_running_loop()

        at = broker.at(f"/queue/{name}")
        at.publish("x")
        return container(at, handler, template=attrs.evolve(template(), name=name))

    alone = consumer("c")
    with ContainerGroup([consumer("a"), consumer("b")]), alone:
        wait_for(lambda: len(loops) == 3)
    assert loops["a"] is loops["b"]
    assert loops["a"] is not loops["c"]


def test_loop_that_is_blocked_is_told_of(broker, caplog, monkeypatch):
    monkeypatch.setattr(loop, "LOOK", 0.05)
    broker.publish("x")

    async def handler(message):
        await asyncio.sleep(0)  # the watch has begun
        time.sleep(0.2)  # noqa: ASYNC251 - that is what it is about
        await asyncio.sleep(0.06)

    consume(broker, handler)
    assert "the event loop of the handlers was blocked for 0." in caplog.text
    assert f" s or up to {loop.LOOK:g} s more: " in caplog.text


def test_loop_that_stays_blocked_is_told_of_meanwhile_and_once(broker, caplog, monkeypatch):
    monkeypatch.setattr(loop, "LOOK", 0.02)
    monkeypatch.setattr(desk, "PATIENCE", 0.01)
    broker.publish("x")
    looks, go_on = [], threading.Event()

    async def handler(message):
        assert go_on.wait(PATIENCE)

    made = container(broker, handler)
    look = made.loop.look
    monkeypatch.setattr(made.loop, "look", lambda: looks.append(look()))
    with made:
        wait_for(lambda: "the event loop of the handlers is blocked: " in caplog.text)
        seen = len(looks)
        wait_for(lambda: len(looks) > seen + 3)
        go_on.set()
        assert broker.wait_until_empty(PATIENCE)
    assert caplog.text.count("is blocked: ") == 1


def test_exit_of_something_else_on_the_loop_stops_the_container(broker):
    broker.publish("x")

    async def handler(message):
        asyncio.get_running_loop().call_soon(sys.exit, 3)
        await asyncio.Event().wait()

    cache = MapRetryContextCache()
    made = container(broker, handler, template=template(context_cache=cache))
    made.start()
    with pytest.raises(SystemExit):
        made.wait(PATIENCE)
    wait_for(lambda: made.health().consumers[0].connected == 0)
    assert bodies(broker) == [b"x"]
    assert list(cache.items()) == []


def test_loop_that_has_ended_starts_no_other_container(broker):
    async def handler(message):
        asyncio.get_running_loop().call_soon(sys.exit, 3)

    broker.at("/queue/a").publish("x")
    first = container(broker.at("/queue/a"), handler, template=attrs.evolve(template(), name="a"))
    endless = Endless()
    broker.at("/queue/b").publish("x")
    second = container(broker.at("/queue/b"), endless.handle, template=attrs.evolve(template(), name="b"))
    third = container(broker.at("/queue/c"), nothing, lifespan=Life([]))
    # Not as a group, which would stop them all.
    one_loop, reasons = loop.HandlerLoop(), []
    one_loop.join(reasons.append)
    for one in (first, second, third):
        one.loop = one_loop
    second.start()
    assert endless.running.wait(PATIENCE)
    first.start()
    wait_for(lambda: one_loop.over)
    third.start()
    with pytest.raises(SystemExit):
        third.wait(PATIENCE)
    for one in (first, second):
        with pytest.raises(SystemExit):
            one.wait(PATIENCE)
    with pytest.raises(SystemExit):
        one_loop.leave(reasons.append)
    assert bodies(broker, "/queue/b") == [b"x"]


@asynccontextmanager
async def token_that_cannot_be_refreshed():
    async def refresh():
        raise ConnectionError("no token")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(refresh())
        yield


@asynccontextmanager
async def background_task_that_exits():
    async def leave():
        sys.exit(3)

    task = asyncio.create_task(leave())
    yield
    await task


@asynccontextmanager
async def lifespan_that_hangs_while_something_else_exits():
    asyncio.get_running_loop().call_soon(sys.exit, 3)
    await asyncio.Event().wait()
    yield


@pytest.mark.parametrize(
    ("lifespan", "reason"),
    [
        (token_that_cannot_be_refreshed, ExceptionGroup),
        (background_task_that_exits, SystemExit),
        (lifespan_that_hangs_while_something_else_exits, SystemExit),
    ],
)
def test_loop_that_ends_by_itself_ends_containers_that_have_nothing_to_do(broker, lifespan, reason, caplog):
    plain_one = ListenerContainer(broker.at("/queue/plain"), plain, template=RetryTemplate(name="plain"))
    made = [
        container(broker.at("/queue/a"), nothing, lifespan=lifespan, template=attrs.evolve(template(), name="a")),
        container(broker.at("/queue/b"), nothing, lifespan=Life([]), concurrency=2),
        plain_one,
    ]
    group = ContainerGroup(made)
    group.start()
    with pytest.raises(reason):
        group.wait(PATIENCE)
    states = [one.health().consumers[0].state for one in made]
    # The second one may have been stopped by the first before it was told.
    assert (states[0], states[2]) == ("failed", "finished")
    assert caplog.text.count("the container gives up") == states.count("failed")
    # Its last act is to tell the containers.
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "retrykit-loop"])


def test_loop_whose_tasks_are_all_cancelled_ends_the_container_and_says_so(broker):
    async def handler(message):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.Event().wait()

    broker.publish("x")
    made = container(broker, handler)
    made.start()
    with pytest.raises(RuntimeError, match="something has cancelled all of its tasks"):
        made.wait(PATIENCE)
    assert (made.counters.received, made.counters.rolled_back, bodies(broker)) == (1, 0, [b"x"])


def test_message_that_comes_to_an_ended_loop_goes_back_and_is_not_blamed(broker, caplog):
    class Late(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            receive = session.receive

            def late():
                message = receive()
                made.loop.tell(fail.set)
                wait_for(lambda: made.loop.over)
                return message

            session.receive = late
            return session

    @asynccontextmanager
    async def lifespan():
        async def fails():
            await fail.wait()
            raise ConnectionError

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fails())
            yield

    late, fail = Late(ORDERS), asyncio.Event()
    late.publish("x")
    made = container(late, nothing, lifespan=lifespan)
    made.start()
    with pytest.raises(ExceptionGroup):
        made.wait(PATIENCE)
    assert (made.counters.received, made.counters.rolled_back, bodies(late)) == (1, 0, [b"x"])
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_each_who_comes_to_an_ended_loop_is_told_why_in_an_exception_of_its_own():
    reasons = []
    one_loop = loop.HandlerLoop()
    one_loop.join(reasons.append)
    desk = one_loop.desk()
    desk.run(lambda: asyncio.get_running_loop().call_soon(sys.exit, 3) and None)
    wait_for(lambda: reasons)
    errors = []
    for _ in range(2):
        with pytest.raises(LoopEndedError) as raised:
            desk.run(nothing)
        errors.append(raised.value)
    assert errors[0] is not errors[1]
    assert [error.__cause__ for error in errors] == reasons * 2
    one_loop.join(reasons.append)
    assert reasons[0] is reasons[1]
    one_loop.leave(reasons.append)
    with pytest.raises(SystemExit):
        one_loop.leave(reasons.append)


def test_plain_handlers_need_no_asyncio():
    code = """
import sys
from retrykit import RetryTemplate
from retrykit.messaging import Consumers, ContainerGroup, ListenerContainer
from retrykit.messaging.memory import MemoryBroker

broker, handled = MemoryBroker("/queue/a"), []
broker.publish("x")
with ContainerGroup([ListenerContainer(broker, handled.append, template=RetryTemplate())]):
    assert broker.wait_until_empty(20)
Consumers(broker, template=RetryTemplate()).add("/queue/b", handled.append)
assert len(handled) == 1
assert "asyncio" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- what goes with what


async def coroutine(message, context=None):
    pass


class CallableCoroutine:
    async def __call__(self, message, context):
        pass


def plain(message):
    pass


def generator(message, context=None):
    yield


async def asynchronous_generator(message, context=None):
    yield


@pytest.mark.parametrize(
    ("template", "change", "names"),
    [
        (RetryTemplate(), {"handler": coroutine}, "handler.*RetryTemplate.*AsyncRetryTemplate.*coroutine"),
        (RetryTemplate(), {"handler": CallableCoroutine()}, "handler.*AsyncRetryTemplate.*CallableCoroutine"),
        (RetryTemplate(), {"handler": plain, "recover": coroutine}, "recover.*AsyncRetryTemplate.*coroutine"),
        (RetryTemplate(), {"handler": plain, "lifespan": coroutine}, "lifespan.*AsyncRetryTemplate"),
        (template(), {"handler": plain}, "handler.*async def.*AsyncRetryTemplate.*plain"),
        (template(), {"handler": functools.partial(plain)}, "handler.*async def.*AsyncRetryTemplate.*plain"),
        (template(), {"handler": asynchronous_generator}, "handler.*async def.*asynchronous_generator"),
        (template(), {"handler": coroutine, "recover": generator}, "recover.*yield.*generator"),
        (template(), {"handler": coroutine, "recover": asynchronous_generator}, "recover.*yield.*generator"),
        (template(), {"handler": coroutine, "lifespan": 7}, "lifespan.*7"),
    ],
)
def test_functions_that_do_not_go_with_the_template_are_refused_by_name(broker, template, change, names):
    handler = change["handler"]
    options = {name: value for name, value in change.items() if name != "handler"}
    with pytest.raises((TypeError, ValueError), match=names):
        ListenerContainer(broker, handler, template=template, **options)


@pytest.mark.parametrize(
    "handler", [coroutine, CallableCoroutine(), functools.partial(coroutine), functools.partial(CallableCoroutine())]
)
def test_whatever_is_called_and_awaited_can_handle(broker, handler):
    broker.publish("x")
    assert consume(broker, handler).counters.acknowledged == 1


@pytest.mark.parametrize("kind", ["plain function", "coroutine function"])
def test_recoveries_may_be_both(broker, kind):
    broker.publish("bad")

    async def fails(message):
        raise ValueError("it is bad")

    async def later(message, context):
        await asyncio.sleep(0)
        return park(PARKED)(message, context)

    consume(broker, fails, recover=later if kind == "coroutine function" else park(PARKED))
    (parked,) = broker.at(PARKED).messages()
    assert (parked.body, parked.headers["retrykit-attempts"]) == (b"bad", "3")


def test_plain_context_managers_are_transactions_too(broker):
    broker.publish("x")
    seen = []

    @contextmanager
    def begin():
        yield "session"
        seen.append("commit")

    async def handler(message, context):
        seen.append(context.transaction)

    consume(broker, handler, transaction=begin)
    assert seen == ["session", "commit"]


@pytest.mark.parametrize("kind", ["asynchronous", "coroutine", "none"])
def test_transaction_that_a_plain_template_cannot_enter_stops_the_container(broker, kind):
    async def begin():
        raise AssertionError

    broker.publish("x")
    makers = {"asynchronous": Database().begin, "coroutine": begin, "none": lambda: None}
    calls = []
    made = ListenerContainer(broker, calls.append, template=RetryTemplate(), transaction=makers[kind])
    made.start()
    with pytest.raises(TypeError, match="AsyncRetryTemplate" if kind == "asynchronous" else "context manager, not"):
        made.wait(PATIENCE)
    assert (calls, bodies(broker)) == ([], [b"x"])


def test_asynchronous_cache_answers_duplicates_and_forgets_what_succeeded(broker):
    calls, cache = [], AsyncCache()

    async def handler(message):
        calls.append(message.text)
        if len(calls) < 3:
            raise ConnectionError

    remembering = template(context_cache=cache, remember_completed=60)
    broker.publish("x", id="the-same")
    consume(broker, handler, template=remembering)
    broker.publish("x", id="the-same")
    assert consume(broker, handler, template=remembering).counters.duplicates == 1
    assert calls == ["x"] * 3


# -- what is sent


def test_sends_are_there_in_order_after_the_handler_and_with_the_ids_that_plain_handlers_give(broker):
    def plain(message):
        for number in range(3):
            message.send("/queue/next", str(number), {"n": str(number)})

    async def handler(message):
        for number in range(3):
            message.send("/queue/next", str(number), {"n": str(number)})
            await asyncio.sleep(0)
            assert bodies(broker, "/queue/next") == []

    def sent(made, handler, **options):
        made.publish("x", id="m-1")
        consume(made, handler, **options)
        return [(copy.body, copy.headers) for copy in made.at("/queue/next").messages()]

    there = sent(broker, handler)
    assert [body for body, _ in there] == [b"0", b"1", b"2"]
    assert there == sent(MemoryBroker(ORDERS), plain, template=RetryTemplate(name="orders"))


def test_what_a_failed_attempt_sent_is_not_sent(broker):
    broker.publish("x")

    async def handler(message, context):
        message.send("/queue/next", f"attempt {context.attempt}")
        if context.attempt < 3:
            raise ConnectionError

    consume(broker, handler)
    assert bodies(broker, "/queue/next") == [b"attempt 3"]


def test_sends_of_threads_that_the_handler_waits_for_are_sent(broker):
    broker.publish("x")

    async def handler(message):
        await asyncio.to_thread(message.send, "/queue/next", "y")

    consume(broker, handler)
    assert bodies(broker, "/queue/next") == [b"y"]


def test_task_that_outlives_its_handler_can_send_no_more(broker):
    broker.publish("x")
    failures = []

    async def sends_late(message, begun):
        begun.set_result(None)
        while True:
            try:
                await asyncio.sleep(0)
                message.send("/queue/late", "y")
            except RuntimeError as error:
                failures.append(str(error))
                return

    async def handler(message):
        begun = asyncio.get_running_loop().create_future()
        handler.task = asyncio.create_task(sends_late(message, begun))
        await begun

    database, cache = Database(lambda: asyncio.sleep(0.01)), AsyncCache()
    consume(broker, handler, transaction=database.begin, template=template(context_cache=cache, remember_completed=60))
    assert failures == ["a message can send while it is handled, and its handler has returned"]


def test_task_of_a_failed_attempt_sends_nothing_with_the_recovery(broker):
    broker.publish("poison")
    recovering, tried = asyncio.Event(), asyncio.Event()
    failures = []

    async def bill(message):
        await recovering.wait()
        with suppress(RuntimeError):
            message.send("/queue/bills", "of the attempt that failed")
            failures.append("it was sent")
        tried.set()

    async def check(message):
        raise ValueError("it is poison")

    async def handler(message):
        await asyncio.gather(check(message), bill(message))

    async def recover(message, context):
        recovering.set()
        await asyncio.wait_for(tried.wait(), PATIENCE)
        return Park(PARKED, reason="poison")

    made = consume(broker, handler, template=template(max_attempts=1), recover=recover)
    assert (failures, made.counters.parked) == ([], 1)
    assert (bodies(broker, PARKED), bodies(broker, "/queue/bills")) == ([b"poison"], [])


def test_send_that_the_session_cannot_make_is_a_failed_attempt(broker):
    class Picky(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            send = session.send

            def picky(destination, body, headers):
                if destination == "/queue/next":
                    raise ValueError("not there")
                send(destination, body, headers)

            session.send = picky
            return session

    picky = Picky(ORDERS)
    picky.publish("x")
    database = Database()

    async def handler(message):
        message.send("/queue/next", "y")

    consume(picky, handler, recover=park(PARKED), transaction=database.begin)
    (parked,) = picky.at(PARKED).messages()
    assert (parked.headers["retrykit-error"], parked.headers["retrykit-attempts"]) == ("not there", "3")
    assert database.log == ["begin", "rollback"] * 3 + ["begin", "commit"]


def test_handler_may_settle_its_message_itself(broker):
    broker.publish("x")

    async def handler(message):
        return Park(PARKED, reason="not for us")

    assert consume(broker, handler).counters.parked == 1


# -- stopping


def test_stopping_lets_the_handlers_finish(broker):
    for number in range(3):
        broker.publish(str(number))
    go_on, running, handled = threading.Event(), [], []

    async def handler(message):
        running.append(message.text)
        await has_happened(go_on)
        handled.append(message.text)

    made = container(broker, handler, concurrency=2)
    made.start()
    wait_for(lambda: len(running) == 2)
    made.stop()
    assert not made.wait(0.01)
    go_on.set()
    assert made.wait(PATIENCE)
    assert sorted(handled) == ["0", "1"]
    assert bodies(broker) == [b"2"]


@pytest.mark.parametrize("journal", ["redelivered", "always", "never"])
def test_stopping_at_once_cancels_handlers_and_counts_nothing(broker, journal):
    for number in range(2):
        broker.publish(str(number))
    endless = [Endless(), Endless()]
    database, cache = Database(), MapRetryContextCache()

    async def handler(message):
        await endless[int(message.text)].handle(message)

    made = container(
        broker,
        handler,
        template=template(max_attempts=1, context_cache=cache),
        transaction=database.begin,
        recover=park(PARKED),
        concurrency=2,
        journal=journal,
    )
    made.start()
    assert all(one.running.wait(PATIENCE) for one in endless)
    made.stop(now=True)
    assert made.wait(PATIENCE)
    assert [one.cancelled for one in endless] == [1, 1]
    assert sorted(database.log) == ["begin"] * 2 + ["rollback"] * 2
    assert sorted(bodies(broker)) == [b"0", b"1"]
    assert list(cache.items()) == []
    assert (made.counters.withheld, made.counters.rolled_back, made.counters.parked) == (2, 0, 0)


def test_stopping_one_container_of_a_group_at_once_cancels_its_own_handlers_only(broker):
    first, second = Endless(), Endless()
    containers = []
    for name, endless in (("a", first), ("b", second)):
        at = broker.at(f"/queue/{name}")
        at.publish("x")
        containers.append(container(at, endless.handle, template=attrs.evolve(template(), name=name)))
    group = ContainerGroup(containers)
    group.start()
    assert first.running.wait(PATIENCE)
    assert second.running.wait(PATIENCE)
    containers[0].stop(now=True)
    assert containers[0].wait(PATIENCE)
    assert (first.cancelled, second.cancelled) == (1, 0)
    group.stop(now=True)
    assert group.wait(PATIENCE)
    assert (first.cancelled, second.cancelled) == (1, 1)


def test_stopping_at_once_does_not_cut_a_commit_in_two(broker):
    committing, go_on = threading.Event(), threading.Event()

    async def commit():
        committing.set()
        await has_happened(go_on)

    broker.publish("x")
    database = Database(commit)
    made = container(broker, nothing, transaction=database.begin)
    made.start()
    assert committing.wait(PATIENCE)
    made.stop(now=True)
    go_on.set()
    assert made.wait(PATIENCE)
    # The connection had gone, so nobody knows whether the message was acknowledged: it comes again.
    assert database.log == ["begin", "commit"]
    assert (made.counters.in_doubt, bodies(broker)) == (1, [b"x"])


def test_handler_that_was_to_begin_when_all_stops_does_not(broker):
    beginning, go_on = threading.Event(), threading.Event()
    calls, log = [], []

    @asynccontextmanager
    async def begin():
        beginning.set()
        await has_happened(go_on)
        try:
            yield
        except asyncio.CancelledError:
            log.append("rollback")
            raise

    async def handler(message):
        calls.append(message)

    broker.publish("x")
    made = container(broker, handler, transaction=begin)
    made.start()
    assert beginning.wait(PATIENCE)
    made.stop(now=True)
    go_on.set()
    assert made.wait(PATIENCE)
    assert (calls, log, bodies(broker)) == ([], ["rollback"], [b"x"])


def test_handler_that_does_not_let_itself_be_cancelled_commits_nothing(broker):
    running = threading.Event()

    async def handler(message):
        running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    broker.publish("x")
    database = Database()
    made = container(broker, handler, transaction=database.begin)
    made.start()
    assert running.wait(PATIENCE)
    made.stop(now=True)
    assert made.wait(PATIENCE)
    assert (database.log, bodies(broker)) == (["begin", "rollback"], [b"x"])


def test_second_signal_cancels_and_leaves_the_coroutine_a_moment_to_put_things_straight(broker, monkeypatch):
    monkeypatch.setattr(lifetime, "SEPARATE", 0.0)
    broker.publish("x")
    database, cache = Database(), MapRetryContextCache()

    async def handler(message):
        os.kill(os.getpid(), signal.SIGTERM)
        await has_happened(made._stopping)
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)  # takes a while

    made = container(
        broker, handler, template=template(context_cache=cache), transaction=database.begin, journal="always"
    )
    began = time.monotonic()
    assert made.run() is False
    assert time.monotonic() - began < PATIENCE / 2
    assert database.log == ["begin", "rollback"]
    assert list(cache.items()) == []
    assert bodies(broker) == [b"x"]


def test_handler_that_awaited_what_was_cancelled_has_failed(broker):
    broker.publish("x")

    async def handler(message):
        task = asyncio.create_task(asyncio.Event().wait())
        task.cancel()
        await task

    consume(broker, handler, recover=park(PARKED))
    (parked,) = broker.at(PARKED).messages()
    assert parked.headers["retrykit-attempts"] == "3"
    assert "had been cancelled" in parked.headers["retrykit-error"]


def test_timeout_inside_a_handler_is_a_failure_like_others(broker):
    broker.publish("x")

    async def handler(message):
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    consume(broker, handler, recover=park(PARKED))
    (parked,) = broker.at(PARKED).messages()
    assert parked.headers["retrykit-error-type"] == "builtins.TimeoutError"


@pytest.mark.parametrize("how", ["clean-up", "wrapped"])
def test_handler_that_fails_when_it_is_cancelled_has_been_cancelled(broker, how, caplog):
    broker.publish("x")
    running = threading.Event()

    async def handler(message):
        running.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            if how == "wrapped":
                raise RuntimeError("the partner") from error
            raise
        finally:
            if how == "clean-up":
                raise ConnectionError("the partner")

    cache = MapRetryContextCache()
    made = container(broker, handler, template=template(max_attempts=1, context_cache=cache), recover=park(PARKED))
    made.start()
    assert running.wait(PATIENCE)
    made.stop(now=True)
    assert made.wait(PATIENCE)
    assert (made.counters.rolled_back, list(cache.items()), bodies(broker)) == (0, [], [b"x"])
    assert "what was cancelled has ended with" in caplog.text


def test_process_that_was_told_twice_to_stop_ends_although_a_call_in_a_thread_hangs():
    code = """
import asyncio, os, signal, sys, threading
from retrykit import AsyncRetryTemplate
from retrykit.messaging import ListenerContainer, container, lifetime
from retrykit.messaging.memory import MemoryBroker

def hangs():
    os.kill(os.getpid(), signal.SIGTERM)
    made._stopping.wait(20)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()

async def handler(message):
    await asyncio.to_thread(hangs)

container.FAREWELL = 0.05
lifetime.SEPARATE = 0.0
broker = MemoryBroker("/queue/a")
broker.publish("x")
made = ListenerContainer(broker, handler, template=AsyncRetryTemplate())
sys.exit(4 if made.run() is False else 5)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 4


def test_task_that_was_cancelled_already_is_left_to_clean_up(broker):
    broker.publish("x")
    log = []

    async def cleans_up():
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(2_000):
                await asyncio.sleep(0)
            log.append("clean")

    async def handler(message):
        handler.task = asyncio.create_task(cleans_up())
        await asyncio.sleep(0)
        handler.task.cancel()
        made.stop()

    made = container(broker, handler)
    made.start()
    assert made.wait(PATIENCE)
    assert log == ["clean"]


def test_task_that_does_not_let_itself_be_cancelled_is_told_of_and_not_waited_for(broker, monkeypatch, caplog):
    monkeypatch.setattr(loop, "FAREWELL", 0.05)
    broker.publish("x")
    go_on, left = asyncio.Event(), []

    async def clings():
        left.append((threading.current_thread(), asyncio.get_running_loop()))
        while not go_on.is_set():
            with suppress(asyncio.CancelledError):
                await go_on.wait()

    async def handler(message):
        handler.task = asyncio.create_task(clings())

    consume(broker, handler)
    assert "does not end when it is cancelled: <Task" in caplog.text
    assert "is left alone" in caplog.text
    ((thread, its_loop),) = left
    its_loop.call_soon_threadsafe(go_on.set)
    thread.join(PATIENCE)
    assert not thread.is_alive()


# -- what belongs to the loop


class Life:
    """A lifespan that records what happens."""

    def __init__(self, log, *, fails_at=None):
        self.log = log
        self.fails_at = fails_at

    @asynccontextmanager
    async def __call__(self):
        self.log.append(("open", asyncio.get_running_loop(), asyncio.current_task()))
        if self.fails_at == "open":
            raise ConnectionError("no database")
        yield
        self.log.append(("close", asyncio.get_running_loop(), asyncio.current_task()))
        if self.fails_at == "close":
            raise ConnectionError("no database any more")


def test_lifespan_is_around_all_deliveries_on_their_loop_in_one_task(broker):
    broker.publish("x")
    log = []

    async def handler(message):
        log.append(("handle", asyncio.get_running_loop(), None))

    consume(broker, handler, lifespan=Life(log))
    assert [event for event, *_ in log] == ["open", "handle", "close"]
    assert len({used for _, used, _ in log}) == 1
    assert log[0][2] is log[2][2]


def test_lifespan_that_containers_of_a_group_share_is_entered_once(broker):
    log = []
    life = Life(log)
    consumers = Consumers(broker, template=template(), lifespan=life, reconnect=QUICK)
    consumers.add("/queue/a", nothing)
    consumers.add("/queue/b", nothing)
    consumers.add("/queue/c", plain, template=RetryTemplate(name="plain"))
    for name in "abc":
        broker.at(f"/queue/{name}").publish("x")
    with consumers as group:
        wait_for(lambda: group.counters.acknowledged == 3)
        assert [event for event, *_ in log] == ["open"]
    assert [event for event, *_ in log] == ["open", "close"]


def test_lifespan_that_fails_is_told_once_and_nothing_is_consumed(broker, caplog):
    broker.publish("x")
    log = []
    made = container(broker, nothing, lifespan=Life(log, fails_at="open"), concurrency=3)
    with pytest.raises(ConnectionError, match="no database"):
        made.run()
    assert (made.counters.generations, bodies(broker)) == (0, [b"x"])
    assert [event for event, *_ in log] == ["open"]
    assert len([record for record in caplog.records if record.levelname == "CRITICAL"]) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "retrykit-loop"]


@pytest.mark.parametrize("grace", [None, 0.0])
def test_signal_cancels_a_lifespan_that_hangs_while_it_is_entered(broker, grace):
    ends = []

    @asynccontextmanager
    async def hangs():
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        yield

    made = container(broker, nothing, lifespan=hangs, concurrency=2)
    assert made.run(grace=grace) in {True, grace is None}
    assert made.wait(PATIENCE)
    assert (ends, made.error) == (["cancelled"], None)


def test_lifespan_is_entered_for_those_who_still_want_it(broker):
    entering, go_on, log = threading.Event(), asyncio.Event(), []

    @asynccontextmanager
    async def lifespan():
        entering.set()
        await go_on.wait()
        yield
        log.append("left")

    first = container(broker.at("/queue/a"), nothing, lifespan=lifespan, template=attrs.evolve(template(), name="a"))
    second = container(broker, nothing, lifespan=lifespan)
    group = ContainerGroup([first, second])
    group.start()
    assert entering.wait(PATIENCE)
    first.stop(now=True)
    assert first.wait(PATIENCE)
    second.loop.tell(go_on.set)
    broker.publish("x")
    assert broker.wait_until_empty(PATIENCE)
    group.stop()
    assert group.wait(PATIENCE)
    assert log == ["left"]


def test_lifespan_that_nobody_wants_any_more_may_fail_and_is_entered_anew(broker, caplog):
    entering, log = threading.Event(), []

    @asynccontextmanager
    async def lifespan():
        log.append("open")
        if len(log) == 1:
            entering.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise ConnectionError("no clean end")
        yield

    one_loop = loop.HandlerLoop()
    other = container(broker.at("/queue/b"), nothing)
    made = [
        container(broker, nothing, lifespan=lifespan, template=attrs.evolve(template(), name=name)) for name in "ab"
    ]
    for one in (other, *made):
        one.loop = one_loop
    with other:
        made[0].start()
        assert entering.wait(PATIENCE)
        made[0].stop(now=True)
        assert made[0].wait(PATIENCE)
        broker.publish("x")
        with made[1]:
            assert broker.wait_until_empty(PATIENCE)
    assert log == ["open", "open"]
    assert "nobody waited for any more has ended with ConnectionError" in caplog.text


def test_lifespan_that_fails_stops_the_others_of_its_group(broker):
    made = [
        container(broker.at("/queue/a"), nothing, template=attrs.evolve(template(), name="a")),
        container(broker.at("/queue/b"), nothing, lifespan=Life([], fails_at="open")),
    ]
    with pytest.raises(ConnectionError, match="no database"):
        ContainerGroup(made).run()
    assert [one.health().consumers[0].state for one in made] == ["finished", "failed"]


def test_lifespan_that_cannot_be_left_is_told_at_the_end(broker):
    made = container(broker, nothing, lifespan=Life([], fails_at="close"))
    broker.publish("x")
    made.start()
    assert broker.wait_until_empty(PATIENCE)
    made.stop()
    with pytest.raises(ConnectionError, match="any more"):
        made.wait(PATIENCE)
    assert made.counters.acknowledged == 1


# -- the registry


def test_coroutine_function_registers_like_any_other(broker):
    consumers = Consumers(broker, template=template())
    seen = []

    @consumers.consumer(ORDERS, concurrency=2)
    async def handle(message, context):
        seen.append((message.text, context.name))

    broker.publish("x")
    with consumers as group:
        wait_for(lambda: group.counters.acknowledged == 1)
    asyncio.run(handle(Message(destination=ORDERS, body=b"y"), current_context_of("orders.orders")))
    assert seen == [("x", "orders.orders"), ("y", "orders.orders")]


def current_context_of(name):
    return attrs.make_class("Context", {"name": attrs.field()})(name)


def test_registry_says_which_kind_of_function_its_template_takes(broker):
    with pytest.raises(TypeError, match=r"handler.*AsyncRetryTemplate"):
        Consumers(broker, template=RetryTemplate()).consumer(ORDERS)(nothing)
    with pytest.raises(TypeError, match=r"handler.*async def"):
        Consumers(broker, template=template()).consumer(ORDERS)(plain)
