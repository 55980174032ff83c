"""The listener container on the in-process broker, with handlers that are plain functions and with coroutines."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import signal
import sys
import threading
import weakref
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import attrs
import pytest

from retrykit.backoff import ExponentialBackOffPolicy, FixedBackOffPolicy
from retrykit.cache import MapRetryContextCache
from retrykit.errors import ContextCacheError, ExhaustedRetryError
from retrykit.front import FrontContextCache
from retrykit.listener import RetryListener
from retrykit.messaging import (
    BrokerUnavailableError,
    Capabilities,
    Discard,
    ListenerContainer,
    Message,
    NoStableIdError,
    Park,
    Redeliver,
    Republish,
    discard,
    lifetime,
    park,
    republish,
)
from retrykit.messaging.in_hand import in_hand_of
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.patience import Patience
from retrykit.messaging.stomp import StompBroker
from retrykit.policy import SimpleRetryPolicy
from retrykit.state import RetryState
from retrykit.template import AsyncRetryTemplate, RetryTemplate
from retrykit.testing import StompServer
from tests import waiting
from tests.doubles import BrokenCache, ManualClock

ORDERS = "/queue/orders"
PARKED = "/queue/orders.parked"
PATIENCE = 20.0
ONE_PAUSE = FixedBackOffPolicy(3600)
QUICK = ExponentialBackOffPolicy(initial=0.001, max_interval=0.01)


# Each test runs with plain functions and with coroutines: what it says of the container holds for both.
TEMPLATES = {"plain": RetryTemplate, "coroutine": AsyncRetryTemplate}
PRESENT = {"kind": "plain"}


def plain_only(test):
    """A test about something that is the same for both, or that coroutines do otherwise (`test_async_container`)."""
    test.kinds = ["plain"]
    return test


def pytest_generate_tests(metafunc):
    metafunc.parametrize("kind", getattr(metafunc.function, "kinds", TEMPLATES), indirect=True)


@pytest.fixture(autouse=True)
def kind(request, monkeypatch):
    monkeypatch.setitem(PRESENT, "kind", request.param)
    return request.param


@pytest.fixture
def broker():
    return MemoryBroker(ORDERS)


def template(max_attempts=3, **options):
    make = TEMPLATES[PRESENT["kind"]]
    return make(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=max_attempts), **options)


def container(broker, handler, **options):
    given = {"template": template(), "reconnect": QUICK} | options
    if given["template"].asynchronous:
        handler = awaited(handler)
        given |= {"transaction": opened_later(given.get("transaction")), "recover": awaited(given.get("recover"))}
    return ListenerContainer(broker, handler, **given)


def awaited(function):
    """The same as a coroutine function, which lets others have their turn first."""
    if function is None:
        return None

    @functools.wraps(function, updated=())
    async def later(*arguments, **keywords):
        await asyncio.sleep(0)
        return function(*arguments, **keywords)

    return later


def opened_later(transaction):
    """The same as an asynchronous context manager."""
    if transaction is None:
        return None

    @asynccontextmanager
    async def begin():
        await asyncio.sleep(0)
        with transaction() as given:
            yield given

    return begin


def consume(broker, handler, **options):
    """Consume until nothing is left; the container afterwards."""
    made = container(broker, handler, **options)
    with made:
        assert broker.wait_until_empty(PATIENCE), f"left: {broker.messages()}"
    return made


class Database:
    """A transaction factory that records what happens to its transactions; `commits_that_fail` raise."""

    def __init__(self, commits_that_fail=0):
        self.log = []
        self.open = 0
        self.commits_that_fail = commits_that_fail

    @contextmanager
    def begin(self):
        self.open += 1
        try:
            yield self
            if self.commits_that_fail:
                self.commits_that_fail -= 1
                raise RuntimeError("deferred constraint")
        except BaseException:
            self.log.append("rollback")
            raise
        else:
            self.log.append("commit")
        finally:
            self.open -= 1


def failing(times, error=ConnectionError):
    """A handler that fails the first `times` calls; `calls` records the texts."""

    def handler(message):
        handler.calls.append(message.text)
        if len(handler.calls) <= times:
            raise error(f"failure {len(handler.calls)}")

    handler.calls = []
    return handler


# -- outcomes


def test_a_handled_message_is_acknowledged(broker):
    broker.publish("1")
    broker.publish("2")
    handler = failing(0)
    counters = consume(broker, handler).counters
    assert handler.calls == ["1", "2"]
    assert (counters.received, counters.acknowledged, counters.generations) == (2, 2, 1)


@plain_only
def test_messages_of_one_id_that_nobody_flags_wait_for_each_other():
    # The id is their producer's, and the history this process's own.
    busy, most, lock, enough = 0, 0, threading.Lock(), threading.Event()

    def handler(message):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        enough.wait(0.2)
        with lock:
            busy -= 1
        raise ConnectionError

    with StompServer(profile="rabbitmq") as server:
        source, recovered = StompBroker(server.url, destination="/queue/orders"), []
        recover = lambda message, _: recovered.append(message)  # noqa: E731
        with container(source, handler, template=template(2), concurrency=4, recover=recover) as made:
            waiting.until(lambda: made.connected == 4, PATIENCE)
            for _ in range(4):
                server.publish("/queue/orders", b"x", {"amqp-message-id": "o-1"})
            waiting.until(lambda: recovered, PATIENCE)
            enough.set()
    assert most == 1


def test_a_message_that_comes_again_while_it_is_handled_uses_up_no_more_than_its_attempts():
    calls, recovered = [], []

    def handler(message):
        calls.append(message.redelivered)
        if len(calls) == 1:
            server.drop_connections()
            waiting.until(lambda: made.counters.withheld, PATIENCE)
        raise ConnectionError

    with StompServer(profile="rabbitmq") as server:
        source = StompBroker(server.url, destination="/queue/orders")
        server.publish("/queue/orders", b"x", {"amqp-message-id": "o-1"})
        recover = lambda message, _: recovered.append(message)  # noqa: E731
        with container(source, handler, template=template(2), concurrency=3, recover=recover) as made:
            waiting.until(lambda: recovered, PATIENCE)
    assert len(calls) == 2


def test_a_history_that_others_share_has_every_attempt_of_an_unknown_delivery_reserved():
    class Noting(MapRetryContextCache):
        shared = True

        def save(self, key, snapshot, expected):
            reserved.extend([1 + snapshot["retry_count"]] if snapshot.get("in_flight") else [])
            return super().save(key, snapshot, expected)

    reserved, handler = [], failing(1)
    with StompServer(profile="rabbitmq") as server:
        source = StompBroker(server.url, destination="/queue/orders")
        server.publish("/queue/orders", b"x", {"amqp-message-id": "o-1"})
        with container(source, handler, template=template(context_cache=Noting())):
            waiting.until(lambda: len(handler.calls) == 2 and not server.depth("/queue/orders"), PATIENCE)
    assert reserved == [1, 2]


@plain_only
def test_messages_in_hand_are_told_apart_by_the_history_they_are_in():
    class Shared(MapRetryContextCache):
        shared = True

    one, other, shared = MapRetryContextCache(), MapRetryContextCache(), Shared()
    assert in_hand_of(one) is in_hand_of(one)
    assert in_hand_of(one) is not in_hand_of(other)
    assert in_hand_of(FrontContextCache(one)) is in_hand_of(FrontContextCache(one)) is in_hand_of(one)
    assert in_hand_of(shared) is None
    assert in_hand_of(one).take("k")
    assert not in_hand_of(one).take("k")
    in_hand_of(one).leave("k")
    assert in_hand_of(one).take("k")


def test_a_handler_may_take_the_context_too(broker):
    broker.publish("1", id="o-1")
    seen = []
    consume(broker, lambda message, context: seen.append((message.text, context.attempt, context.key)))
    assert seen == [("1", 1, (ORDERS, "o-1"))]


def test_messages_of_another_broker_are_no_duplicates():
    remembering = template(remember_completed=60)
    for _ in range(2):
        broker = MemoryBroker(ORDERS)
        broker.publish("x")
        assert consume(broker, failing(0), template=remembering).counters.acknowledged == 1


def test_a_handler_may_take_the_context_by_its_name(broker):
    broker.publish("1")
    seen = []

    def by_name(message, *, context):
        seen.append((message.text, context.attempt))

    def any_number(*messages, context=None, **_others):
        seen.append((messages[0].text, context.attempt))

    consume(broker, by_name)
    broker.publish("2")
    consume(broker, any_number)
    assert seen == [("1", 1), ("2", 1)]


@pytest.mark.parametrize("make", ["coroutine", "generator", "asynchronous_generator", "future"])
def test_a_handler_whose_work_has_not_run_has_failed(broker, make):
    ran = []

    async def work(message):
        ran.append(message)

    def steps(message):
        ran.append((yield))

    async def asynchronous_steps(message):
        ran.append(message)
        yield

    def future(_message):
        return asyncio.Future(loop=loop)

    loop = asyncio.new_event_loop()
    makers = {"coroutine": work, "generator": steps, "asynchronous_generator": asynchronous_steps, "future": future}
    broker.publish("x")
    hidden = lambda message: makers[make](message)  # noqa: E731, PLW0108 - nobody can see what it returns
    counters = consume(broker, hidden, recover=park(PARKED)).counters
    loop.close()
    assert (counters.acknowledged, counters.parked, ran) == (0, 1, [])
    (parked,) = broker.at(PARKED).messages()
    assert "which has not run" in parked.headers["retrykit-error"]
    assert parked.headers["retrykit-attempts"] == "3"


def test_a_recovery_that_has_not_run_has_failed(broker, caplog):
    async def later(message, context):
        raise AssertionError

    broker.publish("x")
    hidden = lambda message, context: later(message, context)  # noqa: E731, PLW0108 - as above
    made = container(broker, failing(9), recover=hidden, reconnect=ONE_PAUSE)
    with made:
        wait_for(lambda: made.counters.withheld == 1)
    assert [left.text for left in broker.messages()] == ["x"]
    assert "recover returned a coroutine" in caplog.text


def test_a_flaky_message_is_redelivered_until_it_succeeds(broker):
    broker.publish("x")
    handler = failing(2)
    cache = MapRetryContextCache()
    counters = consume(broker, handler, template=template(context_cache=cache)).counters
    assert handler.calls == ["x"] * 3
    assert (counters.rolled_back, counters.redelivered, counters.acknowledged) == (2, 2, 1)
    assert list(cache.items()) == []


def test_each_failure_rolls_the_database_back_before_the_next_attempt(broker):
    broker.publish("x")
    database = Database()
    consume(broker, failing(2), transaction=database.begin)
    assert database.log == ["rollback", "rollback", "commit"]


def test_the_handler_gets_the_transaction_in_its_context(broker):
    broker.publish("x")
    database = Database()
    seen = []
    consume(broker, lambda _message, context: seen.append(context.transaction), transaction=database.begin)
    assert seen == [database]


def test_a_poison_message_is_parked_once_with_its_history(broker):
    broker.publish("bad", {"content-type": "text/plain"}, id="o-1")
    broker.publish("good")
    handled = []

    def handler(message):
        handled.append(message.text)
        if message.text == "bad":
            raise ValueError("it is bad")

    counters = consume(broker, handler, recover=park(PARKED)).counters
    assert sorted(handled) == ["bad", "bad", "bad", "good"]
    (parked,) = broker.at(PARKED).messages()
    assert parked.body == b"bad"
    assert parked.headers["content-type"] == "text/plain"
    assert parked.headers["retrykit-attempts"] == "3"
    assert parked.headers["retrykit-error"] == "it is bad"
    assert parked.headers["retrykit-error-type"] == "builtins.ValueError"
    assert parked.headers["retrykit-id"] == "o-1"
    assert "3 of 3" in parked.headers["retrykit-reason"]
    assert (counters.parked, counters.rolled_back, counters.acknowledged) == (1, 2, 1)


def test_failures_that_were_dealt_with_are_kept_alive_by_nothing(broker, caplog):
    # A record of a failure holds it, and pytest holds the records.
    caplog.set_level(logging.CRITICAL, "retrykit.messaging")
    failures = []

    class Failure(Exception):
        pass

    def noted(failure):
        failures.append(weakref.ref(failure))
        return failure

    def handler(message):
        raise noted(Failure(message.text))

    broker.publish("x")
    gc.collect()
    gc.disable()
    try:
        consume(broker, handler, recover=park(PARKED))
        left = [failure() for failure in failures]
    finally:
        gc.enable()
    assert left == [None] * 3


def test_messages_that_were_dealt_with_are_kept_alive_by_nothing(broker, caplog):
    # A record of a failure holds it, and pytest holds the records.
    caplog.set_level(logging.CRITICAL, "retrykit.messaging")
    messages = []

    def handler(message):
        messages.append(weakref.ref(message))
        if message.text == "bad":
            raise ValueError
        message.send("/queue/done", b"done")

    for text in ("good", "bad", "good"):
        broker.publish(text)
    gc.collect()
    gc.disable()
    try:
        consume(broker, handler, recover=park(PARKED))
        left = [message() for message in messages]
    finally:
        gc.enable()
    assert left == [None] * 5


def test_the_recovery_of_the_last_attempt_needs_no_further_delivery(broker):
    broker.publish("bad")
    counters = consume(broker, failing(9), recover=park(PARKED)).counters
    assert counters.received == 3


def test_a_commit_that_fails_is_a_failed_attempt(broker):
    broker.publish("x")
    database = Database(commits_that_fail=2)
    handler = failing(0)
    counters = consume(broker, handler, transaction=database.begin, recover=park(PARKED)).counters
    assert handler.calls == ["x"] * 3
    assert database.log == ["rollback", "rollback", "commit"]
    assert (counters.rolled_back, counters.acknowledged, counters.parked) == (2, 1, 0)


def test_a_message_whose_commit_always_fails_is_parked(broker):
    broker.publish("x")
    database = Database(commits_that_fail=3)
    consume(broker, failing(0), transaction=database.begin, recover=park(PARKED))
    assert database.log == ["rollback", "rollback", "rollback", "commit"]
    assert len(broker.at(PARKED).messages()) == 1


def test_what_a_failed_recovery_sent_is_undone_with_it(broker):
    broker.publish("x")
    # Three attempts fail, then the commit of the first recovery does: its copy must not be there twice.
    database = Database()
    commits = []

    @contextmanager
    def begin():
        with database.begin() as transaction:
            yield transaction
            commits.append(1)
            if len(commits) == 1:
                raise RuntimeError("recovery's commit fails once")

    consume(broker, failing(9), transaction=begin, recover=park(PARKED))
    assert len(broker.at(PARKED).messages()) == 1


def test_discarding_and_republishing_settle_the_message(broker):
    broker.publish("1")
    counters = consume(broker, failing(9), recover=discard("nobody wants it")).counters
    assert counters.discarded == 1
    broker.publish("2", {"correlation-id": "c"}, id="o-2")
    counters = consume(broker, failing(9), recover=republish("/queue/elsewhere")).counters
    assert counters.republished == 1
    (copy,) = broker.at("/queue/elsewhere").messages()
    assert (copy.body, copy.headers["correlation-id"], copy.id) == (b"2", "c", "o-2")


def test_any_callable_can_recover(broker):
    broker.publish("x")
    seen = []
    consume(broker, failing(9), recover=lambda message, context: seen.append((message.text, context.retry_count)))
    assert seen == [("x", 3)]


def test_a_handler_may_settle_its_message_itself(broker):
    broker.publish("x")
    assert consume(broker, lambda _message: Discard("not for us")).counters.discarded == 1


@pytest.mark.parametrize("settlement", [Park, Republish])
def test_facts_of_the_original_travel_in_no_settlement(broker, settlement):
    broker.publish("x", {"expires": "17", "message-id": "1", "receipt": "r", "AMQ_SCHEDULED_DELAY": "5", "a": "b"})
    consume(broker, lambda message: settlement(PARKED, headers=message.headers))
    (copy,) = broker.at(PARKED).messages()
    assert copy.headers.pop("retrykit-id").startswith("m-")
    assert copy.headers == {"AMQ_SCHEDULED_DELAY": "5", "a": "b"}


def test_a_handler_that_asks_for_redelivery_by_its_result_is_told_how(broker):
    broker.publish("x")
    consume(broker, lambda _message: Redeliver(1.0), recover=park(PARKED))
    (parked,) = broker.at(PARKED).messages()
    assert "raise an exception" in parked.headers["retrykit-error"]


def test_a_vetoed_message_is_parked_at_once(broker):
    broker.publish("x")

    def handler(message, context):
        context.veto("wrong tenant")
        raise ValueError("no")

    counters = consume(broker, handler, recover=park(PARKED)).counters
    assert (counters.received, counters.parked) == (1, 1)
    (parked,) = broker.at(PARKED).messages()
    assert parked.headers["retrykit-reason"] == "vetoed: wrong tenant"


def test_a_recovery_that_fails_is_tried_again_at_later_deliveries_without_the_handler(broker):
    broker.publish("x")
    handler = failing(9)
    tries = []

    def recover(message, context):
        tries.append(1)
        if len(tries) <= 4:
            raise OSError("no space left")

    counters = consume(broker, handler, recover=recover).counters
    assert len(handler.calls) == 3
    assert len(tries) == 5
    assert counters.withheld == 1


def test_an_exhausted_message_without_recovery_stays_at_the_broker(broker, caplog):
    broker.publish("x")
    handler = failing(9)
    made = container(broker, handler)
    with made:
        wait_for(lambda: made.counters.withheld >= 3)
    assert len(handler.calls) == 3
    (left,) = broker.messages()
    assert left.body == b"x"
    assert "3 of 3; there is no recover= to say what becomes of it" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", "y"), "destination: must be a non-empty text"),
        ((None, "y"), "destination: must be a str"),
        (("/queue/next", 7), "body: must be bytes or a str"),
        (("/queue/next", "y", {"n": 1}), "headers: must be a mapping of str to str"),
    ],
)
def test_what_cannot_be_sent_is_refused_where_it_is_sent(broker, arguments, words):
    refused = []

    def handler(message):
        try:
            message.send(*arguments)
        except (TypeError, ValueError) as error:
            refused.append(str(error))

    broker.publish("x")
    consume(broker, handler)
    assert [words in text for text in refused] == [True]


def test_what_a_handler_leaves_behind_can_send_no_more(broker):
    broker.publish("x")
    left = []
    consume(broker, left.append)
    with pytest.raises(RuntimeError, match="its handler has returned"):
        left[0].send("/queue/next", "y")
    assert broker.at("/queue/next").messages() == ()


def test_the_message_of_a_failed_attempt_sends_nothing_in_the_next_one(broker):
    broker.publish("x")
    attempts, refused = [], []

    def handler(message, context):
        attempts.append(message)
        if context.attempt == 1:
            raise ConnectionError
        with pytest.raises(RuntimeError, match="its handler has returned"):
            attempts[0].send("/queue/next", "of the first")
        refused.append(message.body)
        message.send("/queue/next", "of the second")

    consume(broker, handler, template=template(back_off_policy=FixedBackOffPolicy(0.001)))
    assert refused == [b"x"]
    assert [message.body for message in broker.at("/queue/next").messages()] == [b"of the second"]


# -- messages that are held up


def poisoned(message):
    if message.text == "bad":
        raise ValueError("it is bad")


def full_cache():
    cache = MapRetryContextCache(capacity=1)
    cache.save("another", {"name": "another"}, None)
    return cache


def test_a_message_that_nobody_recovers_holds_up_one_consumer_only(broker):
    broker.publish("bad")
    for number in range(50):
        broker.publish(f"{number}")
    made = container(broker, poisoned, template=template(max_attempts=1), concurrency=2, reconnect=ONE_PAUSE)
    with made:
        wait_for(lambda: made.counters.acknowledged == 50)
    assert (made.counters.withheld, made.counters.generations) == (1, 2)
    assert [left.text for left in broker.messages()] == ["bad"]


@pytest.mark.parametrize(("reconnect", "back_off"), [(3600, 0), (0, 3600)])
def test_a_failure_that_cannot_be_stored_is_not_repeated_without_a_pause(broker, caplog, reconnect, back_off):
    broker.publish("bad")
    made = container(
        broker,
        poisoned,
        template=template(context_cache=full_cache(), back_off_policy=FixedBackOffPolicy(back_off)),
        reconnect=FixedBackOffPolicy(reconnect),
        recover=park(PARKED),
        concurrency=2,
    )
    with made:
        wait_for(lambda: made.counters.withheld == 1)
        broker.publish("good")
        wait_for(lambda: made.counters.acknowledged == 1)
    assert (made.counters.received, made.counters.withheld) == (2, 1)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len([text for text in errors if "could not be read or stored" in text and "3600 s" in text]) == 1


def test_a_message_that_was_withheld_is_parked_when_its_failures_can_be_stored_again(broker):
    broker.publish("bad")
    cache = full_cache()
    made = container(broker, poisoned, template=template(context_cache=cache), recover=park(PARKED))
    with made:
        wait_for(lambda: made.counters.withheld >= 3)
        cache.remove("another")
        assert broker.wait_until_empty(PATIENCE)
    assert made.counters.parked == 1


@plain_only
def test_an_outage_of_the_store_is_one_traceback_and_lines(broker, caplog):
    broker.publish("good")
    cache = BrokenCache(load=ContextCacheError("no store"), save=ContextCacheError("no store"))
    made = container(broker, failing(9), template=template(context_cache=cache), journal="always", recover=park(PARKED))
    with made:
        wait_for(lambda: made.counters.withheld >= 3)
        cache.faults.clear()
        assert broker.wait_until_empty(PATIENCE)
    lines = [(record.getMessage(), record.exc_info) for record in caplog.records if record.levelno >= logging.WARNING]
    # The message is parked in the end, with the traceback of its own failure.
    assert [line[1] is not None for line in lines] == [True] + [False] * (len(lines) - 2) + [True]
    withheld = [text.partition(" s")[2] for text, _ in lines if "is withheld for" in text]
    why = "its history could not be read or stored, so no attempt is counted: ContextCacheError: no store; it was Conn"
    assert withheld[0].startswith(f": {why}")
    assert withheld[2].startswith(f" (3 times now): {why}")
    assert len([text for text, _ in lines if "works again" in text]) == 1


def test_a_pause_that_a_lost_connection_cuts_short_is_taken_at_the_next_delivery(broker):
    broker.publish("bad")
    calls = []

    def handler(message):
        calls.append(message.text)
        raise ValueError

    made = container(broker, handler, template=template(context_cache=full_cache()), reconnect=ONE_PAUSE)
    with made:
        wait_for(lambda: made.counters.withheld == 1)
        broker.drop_connections()
        wait_for(lambda: made.counters.received == 2)
    assert calls == ["bad"]
    assert (made.counters.withheld, len(broker.messages())) == (2, 1)


@plain_only
def test_the_pauses_of_a_withheld_message_grow_whatever_is_handled_in_between():
    patience = Patience(ExponentialBackOffPolicy(initial=1.0, multiplier=2.0, max_interval=5.0))
    grown = [patience.withhold("orders", key, 0.0) for key in ("a", "a", "b", "a", "a", "b")]
    assert grown == [1.0, 2.0, 1.0, 4.0, 5.0, 2.0]
    patience.forgive("a")
    assert patience.withhold("orders", "a", 0.5) == 1.0
    assert patience.withhold("orders", "a", 30.0) == 30.0


@plain_only
def test_what_is_known_of_withheld_messages_is_bounded():
    patience = Patience(ExponentialBackOffPolicy(initial=1.0, multiplier=2.0))
    for number in range(10_001):
        patience.withhold("orders", number, 0.0)
    assert [patience.withhold("orders", key, 0.0) for key in (0, 10_000)] == [1.0, 2.0]


# -- duplicates and doubts


def test_a_delivery_of_a_completed_message_is_acknowledged_without_the_handler(broker):
    remembering = template(remember_completed=60)
    handler = failing(0)
    for _ in range(2):
        broker.publish("x", id="the-same")
        made = consume(broker, handler, template=remembering)
    assert handler.calls == ["x"]
    assert (made.counters.duplicates, made.counters.acknowledged) == (1, 0)


@pytest.mark.parametrize(("fate", "runs"), [("done", 1), ("undone", 2)])
def test_a_commit_in_doubt_counts_nothing_and_drops_the_connection(broker, fate, runs):
    broker.publish("x")
    broker.doubt_next_commit(fate)
    handler = failing(0)
    counters = consume(broker, handler, template=template(max_attempts=1), recover=park(PARKED)).counters
    assert handler.calls == ["x"] * runs
    assert (counters.in_doubt, counters.parked, counters.acknowledged) == (1, 0, runs - 1)


def test_a_completion_mark_answers_what_a_commit_in_doubt_delivers_again(broker):
    # The mark is kept in another place than the work here, so it is only written when the commit is confirmed.
    broker.publish("x")
    broker.doubt_next_commit("undone")
    handler = failing(0)
    consume(broker, handler, template=template(remember_completed=60))
    assert handler.calls == ["x"] * 2


@pytest.mark.parametrize("fate", ["done", "undone"])
def test_a_parking_in_doubt_parks_once(broker, fate):
    broker.publish("x")
    broker.doubt_next_commit(fate)
    handler = failing(9)
    consume(broker, handler, recover=park(PARKED))
    assert len(handler.calls) == 3
    assert len(broker.at(PARKED).messages()) == 1


def test_a_connection_lost_while_the_handler_runs_rolls_the_database_back(broker):
    broker.publish("x")
    database = Database()
    calls = []

    def handler(message):
        calls.append(1)
        if len(calls) == 1:
            broker.drop_connections()

    made = consume(broker, handler, transaction=database.begin, template=template(max_attempts=1))
    assert database.log == ["rollback", "commit"]
    assert (made.counters.in_doubt, made.counters.generations) == (1, 2)


# -- lifetime


wait_for = partial(waiting.until, seconds=PATIENCE, look=0.002)


def test_stopping_finishes_the_message_in_hand_and_takes_no_other(broker):
    broker.publish("1")
    broker.publish("2")
    running, go_on = threading.Event(), threading.Event()
    handled = []

    def handler(message):
        running.set()
        assert go_on.wait(PATIENCE)
        handled.append(message.text)

    made = container(broker, handler)
    made.start()
    assert running.wait(PATIENCE)
    made.stop()
    assert not made.wait(0.01)
    go_on.set()
    assert made.wait(PATIENCE)
    assert handled == ["1"]
    assert [message.text for message in broker.messages()] == ["2"]


def test_stopping_at_once_commits_nothing_more(broker):
    broker.publish("1")
    running, go_on = threading.Event(), threading.Event()
    database = Database()

    def handler(message):
        running.set()
        assert go_on.wait(PATIENCE)

    made = container(broker, handler, transaction=database.begin)
    made.start()
    assert running.wait(PATIENCE)
    made.stop(now=True)
    go_on.set()
    assert made.wait(PATIENCE)
    assert database.log == ["rollback"]
    assert [message.text for message in broker.messages()] == ["1"]


def test_stopping_ends_a_pause_and_keeps_the_history(broker):
    class Held(MemoryBroker):
        """Cannot delay by itself, so that the worker holds the message."""

        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            rollback = session.rollback
            session.rollback = lambda message=None, _delay=0.0: rollback(message)
            return session

    held = Held(ORDERS)
    held.publish("x")
    cache = MapRetryContextCache()
    slow = template(context_cache=cache, back_off_policy=FixedBackOffPolicy(3600))
    made = container(held, failing(9), template=slow)
    with made:
        wait_for(lambda: made.counters.received == 2)
    assert [stored.snapshot["retry_count"] for _, stored in cache.items()] == [1]
    assert len(held.messages()) == 1


def test_a_broker_that_can_wait_is_given_the_delay(broker):
    broker.publish("slow")
    broker.publish("next")
    handler = failing(1)
    slow = template(back_off_policy=FixedBackOffPolicy(0.2))
    consume(broker, handler, template=slow)
    assert handler.calls == ["slow", "next", "slow"]


@pytest.mark.parametrize("able", [True, False])
def test_a_delay_longer_than_any_wait_disturbs_nobody(able):
    class Impatient(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            rollback = session.rollback
            session.rollback = lambda message=None, delay=0.0: rollback(message, delay if able else 0.0)
            return session

    patient = Impatient(ORDERS)
    patient.publish("bad")
    endless = template(back_off_policy=FixedBackOffPolicy(1e11))
    made = container(patient, poisoned, template=endless, concurrency=2)
    with made:
        wait_for(lambda: made.counters.rolled_back == 1)
        patient.publish("good")
        wait_for(lambda: made.counters.acknowledged == 1)
    assert made.counters.generations == 2


def test_a_container_is_used_once(broker):
    made = container(broker, failing(0))
    with made:
        pass
    with pytest.raises(RuntimeError, match="used once"):
        made.start()


def test_a_container_that_never_started_can_be_stopped(broker):
    made = container(broker, failing(0))
    made.stop()
    assert made.wait(0)


def test_a_lost_connection_is_made_again(broker):
    handler = failing(0)
    made = container(broker, handler)
    with made:
        wait_for(lambda: made.connected == 1)
        broker.drop_connections()
        broker.publish("x")
        assert broker.wait_until_empty(PATIENCE)
    assert handler.calls == ["x"]
    assert made.counters.generations == 2


def test_a_broker_that_is_not_there_is_waited_for(broker):
    broker.refuse_connections()
    broker.publish("x")
    handler = failing(0)
    made = container(broker, handler)
    with made:
        broker.refuse_connections(False)
        assert broker.wait_until_empty(PATIENCE)
    assert handler.calls == ["x"]


def test_stopping_ends_the_wait_for_a_broker(broker):
    broker.refuse_connections()
    with container(broker, failing(0), reconnect=FixedBackOffPolicy(3600)) as made:
        pass
    assert made.counters.generations == 0


def test_a_message_without_a_stable_id_stops_the_container_loudly(broker):
    class Anonymous(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            session.receive = self.refuse
            return session

        def refuse(self, timeout=None):
            raise NoStableIdError(destination=ORDERS, broker=self.name, remedy="set one")

    made = container(Anonymous(ORDERS), failing(0), concurrency=2)
    made.start()
    with pytest.raises(NoStableIdError, match="set one"):
        made.wait(PATIENCE)


def test_what_is_no_failure_of_the_handler_stops_the_container_and_gives_the_message_back(broker):
    broker.publish("x")

    def handler(message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), container(broker, handler) as made:
        made.wait(PATIENCE)
    assert len(broker.messages()) == 1


@pytest.mark.parametrize(("code", "words"), [(5, "5"), (0, "0"), (None, ""), ("usage: …", "'usage: …'")])
def test_an_exit_of_the_handler_is_a_failed_attempt_like_others(broker, code, words, caplog):
    caplog.set_level(logging.INFO, "retrykit.messaging")
    broker.publish("x")
    broker.publish("good")
    causes, last = [], []

    def handler(message):
        if message.text == "x":
            sys.exit(code)

    def recover(message, context):
        last.append(context.last_error)
        return Park(PARKED)

    class Heard(RetryListener):
        def on_error(self, context, error, decision):
            causes.append(error.__cause__)

    made = consume(broker, handler, recover=recover, template=template(listeners=[Heard()]))
    assert [type(cause) for cause in causes] == [SystemExit] * 3
    assert str(last[0]) == f"The handler called sys.exit({words})."
    assert isinstance(causes[0], SystemExit)
    assert causes[0].code == code
    assert (made.counters.parked, made.counters.rolled_back, made.counters.acknowledged) == (1, 2, 1)
    assert caplog.text.count("an attempt has failed: HandlerExitError(") == 2
    assert (made.error, made.counters.generations) == (None, 1)


def test_an_exit_of_the_recovery_is_a_failed_recovery_like_others(broker):
    broker.publish("x")
    tries = []

    def recover(message, context):
        tries.append(message)
        if len(tries) == 1:
            sys.exit(1)

    made = consume(broker, failing(9), recover=recover, template=template(max_attempts=1))
    assert len(tries) == 2
    assert made.counters.recovered == 1


@plain_only
def test_several_workers_share_the_messages(broker):
    for number in range(40):
        broker.publish(str(number))
    together = threading.Barrier(4)
    worker = threading.local()
    handled = []

    def handler(message):
        if not hasattr(worker, "met"):
            worker.met = together.wait(PATIENCE)
        handled.append(message.text)

    made = consume(broker, handler, concurrency=4)
    assert sorted(handled, key=int) == [str(number) for number in range(40)]
    assert made.counters.generations == 4


def test_a_signal_drains_the_container(broker):
    broker.publish("1")
    broker.publish("2")
    handled = []

    def handler(message):
        if not handled:
            os.kill(os.getpid(), signal.SIGTERM)
        handled.append(message.text)
        wait_for(made._stopping.is_set)

    before = signal.getsignal(signal.SIGTERM)
    made = container(broker, handler)
    made.run()
    assert handled == ["1"]
    assert len(broker.messages()) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_another_thread_is_given_drains_the_container_too(broker):
    broker.publish("1")
    made = container(broker, lambda _message: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    assert made.run() is True
    assert broker.messages() == ()


@plain_only
def test_a_second_signal_stops_at_once(broker, monkeypatch):
    monkeypatch.setattr(lifetime, "SEPARATE", 0.0)
    broker.publish("1")
    go_on = threading.Event()
    database = Database()

    def handler(message):
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(made._stopping.is_set)
        os.kill(os.getpid(), signal.SIGTERM)
        assert go_on.wait(PATIENCE)

    made = container(broker, handler, transaction=database.begin)
    made.run()
    assert [message.text for message in broker.messages()] == ["1"]
    assert database.open == 1
    go_on.set()
    assert made.wait(PATIENCE)
    assert database.log == ["rollback"]


@plain_only
def test_signals_of_one_moment_are_one_signal(broker, caplog):
    broker.publish("1")
    caplog.set_level(logging.INFO, "retrykit.messaging")
    database, handled = Database(), []

    def handler(message):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            wait_for(made._stopping.is_set)
        wait_for(lambda: "that one again" in caplog.text)
        handled.append(message.text)

    made = container(broker, handler, transaction=database.begin)
    assert made.run() is True
    assert (handled, database.log, broker.messages()) == (["1"], ["commit"], ())
    assert caplog.text.count("that one again") == 1


def test_running_outside_the_main_thread_ends_when_stopped(broker):
    broker.publish("1")
    made = container(broker, failing(0))
    running = threading.Thread(target=made.run)
    running.start()
    assert broker.wait_until_empty(PATIENCE)
    made.stop()
    running.join(PATIENCE)
    assert not running.is_alive()


# -- bad arguments


async def coroutine(message):
    pass


def generator(message):
    yield


async def asynchronous_generator(message):
    yield


class CallableCoroutine:
    async def __call__(self, message):
        pass


def needs_a_session(message, *, session):
    pass


@plain_only
@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"broker": "stomp://localhost"}, "broker.*stomp://localhost"),
        ({"handler": 7}, "handler.*7"),
        ({"handler": coroutine}, "handler.*coroutine"),
        ({"handler": generator}, "handler.*generator"),
        ({"handler": asynchronous_generator}, "handler.*generator"),
        ({"handler": CallableCoroutine()}, "handler.*coroutine"),
        ({"handler": functools.partial(CallableCoroutine.__call__, None)}, "handler.*coroutine"),
        ({"handler": lambda: None}, "handler.*message"),
        ({"handler": needs_a_session}, "handler.*message, context"),
        ({"handler": lambda _message, _other, *, context: context}, "handler.*message, context"),
        ({"recover": coroutine}, "recover.*coroutine"),
        ({"handler": lambda _one, _two, _three: None}, "handler.*message, context"),
        ({"template": None}, "template.*None"),
        ({"transaction": 7}, "transaction.*7"),
        ({"recover": "/queue/p"}, "recover.*/queue/p"),
        ({"concurrency": 0}, "concurrency.*0"),
        ({"concurrency": "2"}, "concurrency.*'2'"),
        ({"reconnect": 1.0}, r"reconnect.*1\.0"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(broker, change, names):
    given = {"broker": broker, "handler": failing(0), "template": template()} | change
    with pytest.raises((ValueError, TypeError), match=names):
        ListenerContainer(given.pop("broker"), given.pop("handler"), **given)


@plain_only
def test_a_refused_connection_says_who_refused(broker):
    broker.refuse_connections()
    with pytest.raises(BrokerUnavailableError, match="memory:/queue/orders"):
        broker.connect()


@plain_only
def test_capabilities_claim_nothing_by_themselves():
    assert Capabilities() == Capabilities(
        delayed_redelivery=False,
        atomic_send_and_ack=False,
        stable_ids=False,
        trustworthy_flag=False,
        flags_while_connected=False,
        counts_deliveries=False,
    )


def test_a_session_that_gives_no_key_stops_the_container_too(broker):
    class Keyless(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            receive = session.receive
            session.receive = lambda timeout=None: attrs.evolve(receive(timeout), key=None)
            return session

    keyless = Keyless(ORDERS)
    keyless.publish("x")
    made = container(keyless, failing(0))
    made.start()
    with pytest.raises(NoStableIdError, match="key"):
        made.wait(PATIENCE)
    assert len(keyless.messages()) == 1


def test_a_nested_retry_error_of_the_handler_is_its_failure(broker):
    broker.publish("x")
    calls = []

    def handler(message):
        calls.append(message.text)
        if len(calls) < 3:
            RetryTemplate(throw_last=False).execute(failing_stateless, state=RetryState(key="inner", fresh=True))

    def failing_stateless(context):
        raise ExhaustedRetryError(reason="inner")

    counters = consume(broker, handler).counters
    assert (counters.rolled_back, counters.withheld, counters.acknowledged) == (2, 0, 1)


@plain_only
@pytest.mark.parametrize(("lived", "pauses"), [(9.0, [3600]), (10.0, [])])
def test_a_connection_that_lived_long_is_made_again_at_once_though_it_brought_nothing(broker, lived, pauses, caplog):
    clock = ManualClock()
    made = container(broker, poisoned, template=template(clock=clock), reconnect=FixedBackOffPolicy(3600))
    with made:
        wait_for(lambda: made.connected == 1)
        clock.elapsed += lived
        broker.drop_connections()
        wait_for(lambda: made.counters.generations == 2 and made.connected == 1)
    assert clock.slept == pauses
    (line,) = [text for text in caplog.messages if "was lost" in text]
    assert line.startswith("orders: The connection to the broker ")
    assert line.endswith("dropped by the broker; deliveries settled before that: 0 (try 1)")


def test_a_worker_whose_database_cannot_be_reached_pauses(broker):
    broker.publish("x")
    database = Database()
    tries = []

    def begin():
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("no database")
        return database.begin()

    counters = consume(broker, failing(0), transaction=begin).counters
    assert (counters.withheld, counters.acknowledged, counters.generations) == (1, 1, 1)


def test_a_virtual_clock_spends_the_pauses(broker):
    class Instant:
        def __init__(self):
            self.now = 1_700_000_000.0
            self.slept = []

        def time(self):
            return self.now

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.slept.append(seconds)
            self.now += seconds

        async def async_sleep(self, seconds):
            self.sleep(seconds)

    class Impatient(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            rollback = session.rollback
            session.rollback = lambda message=None, _delay=0.0: rollback(message)
            return session

    clock = Instant()
    impatient = Impatient(ORDERS)
    impatient.publish("x")
    handler = failing(2)
    consume(impatient, handler, template=template(clock=clock, back_off_policy=FixedBackOffPolicy(3600)))
    assert handler.calls == ["x"] * 3
    assert clock.slept == [3600.0, 3600.0]


# -- one id, two messages


@plain_only
def test_message_with_the_id_of_a_failed_one_is_counted_for_itself_and_reported(broker, caplog):
    shared, key = template(), (ORDERS, "m-1")
    first = Message(destination=ORDERS, body=b"first")

    def fails(context):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        shared.execute(fails, state=RetryState(key=key, fingerprint=first.fingerprint))
    broker.publish("second", id="m-1")
    handler = failing(2)
    assert consume(broker, handler, template=shared).counters.acknowledged == 1
    assert handler.calls == ["second"] * 3
    assert shared.history(key).retry_count == 1
    assert "two items" in caplog.text


def test_message_with_the_id_of_a_completed_one_is_not_taken_for_its_duplicate(broker):
    calls = []
    remembering = template(remember_completed=60.0)
    broker.publish("first", id="m-1")
    broker.publish("second", id="m-1")
    broker.publish("first", id="m-1")
    consume(broker, lambda message: calls.append(message.text), template=remembering)
    assert calls == ["first", "second"]


def test_collision_of_another_template_is_the_handlers_own_failure(broker):
    inner, calls = RetryTemplate(name="inner"), []

    def handler(message):
        calls.append(message.text)
        state = RetryState(key="k", fingerprint=str(len(calls)))
        inner.execute(fails, state=state)

    def fails(context):
        raise ConnectionError

    broker.publish("x")
    consume(broker, handler, recover=park(PARKED))
    assert calls == ["x"] * 3
    assert len(broker.at(PARKED).messages()) == 1


def test_copy_sent_to_its_own_queue_is_not_taken_for_a_duplicate(broker):
    calls = []

    def handler(message):
        calls.append(message.id)
        return Republish(ORDERS, headers={"retrykit-id": message.id}) if len(calls) == 1 else None

    broker.publish("x")
    consume(broker, handler, template=template(remember_completed=60.0))
    assert len(calls) == len(set(calls)) == 2


@pytest.mark.parametrize(
    "recover", [park, discard, republish, len, "park"], ids=["park", "discard", "republish", "len", "text"]
)
def test_a_recovery_that_could_not_be_called_is_refused_when_it_is_given(broker, recover):
    with pytest.raises(TypeError, match=r"recover: must be callable with \(message, context\)"):
        ListenerContainer(broker, failing(9), template=RetryTemplate(name="orders"), recover=recover)
