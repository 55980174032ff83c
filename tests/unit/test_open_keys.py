"""First deliveries that are not looked up one by one: the open histories are asked for once a connection."""

from __future__ import annotations

import attrs
import pytest

from retrykit import ContextCacheError, MapRetryContextCache, RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.messaging import ListenerContainer, open_keys, park
from retrykit.messaging.memory import MemoryBroker

ORDERS = "/queue/orders"
PATIENCE = 20.0
QUICK = ExponentialBackOffPolicy(initial=0.001, max_interval=0.01)


class Forgetful(MemoryBroker):
    """A broker whose flag is true while a connection lives."""

    forget = False

    def connect(self, *, consume=True):
        session = super().connect(consume=consume)
        own = attrs.evolve(session.capabilities, trustworthy_flag=False, flags_while_connected=True)
        real, receive = type(session), session.receive

        class Flagging(real):
            capabilities = own

        def received(timeout=None):
            message = receive(timeout)
            return attrs.evolve(message, redelivered=False) if message is not None and self.forget else message

        session.__class__ = Flagging
        session.receive = received
        return session


class Forgotten(Forgetful):
    """One that was just started again."""

    forget = True


class Asked(MapRetryContextCache):
    """A cache that writes down what it is asked of."""

    def __init__(self, fault=None):
        super().__init__()
        self.log, self.fault = [], fault

    def load(self, key):
        self.log.append("load")
        return super().load(key)

    def save(self, key, snapshot, expected):
        self.log.append("save")
        return super().save(key, snapshot, expected)

    def open_keys(self, prefix, limit):
        self.log.append("open keys")
        if self.fault is not None:
            raise self.fault
        return super().open_keys(prefix, limit)


def consume(broker, handler, cache, **options):
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3), context_cache=cache)
    made = ListenerContainer(broker, handler, template=template, reconnect=QUICK, recover=park("/queue/p"), **options)
    with made:
        assert broker.wait_until_empty(PATIENCE)


def with_history(cache, failures):
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=5), context_cache=cache)

    def fail(context):
        raise OSError

    for _ in range(failures):
        with pytest.raises(OSError, match=r"^$"):
            template.execute(fail, state=RetryState(key=(ORDERS, "m-1")))
    cache.log.clear()


def test_first_deliveries_that_succeed_cost_the_store_nothing_but_one_question():
    broker, cache = Forgetful(ORDERS), Asked()
    for _ in range(10):
        broker.publish("x")
    consume(broker, lambda _: None, cache)
    assert cache.log == ["open keys"]


def test_redelivered_message_is_looked_up():
    broker, cache, calls = Forgetful(ORDERS), Asked(), []

    def handler(message):
        calls.append(message.text)
        raise ValueError

    broker.publish("x")
    consume(broker, handler, cache)
    assert (len(calls), cache.log[:3]) == (3, ["open keys", "save", "load"])


def test_message_with_an_open_history_is_looked_up_although_the_broker_has_forgotten_that_it_was_delivered():
    broker, cache, attempts = Forgotten(ORDERS), Asked(), []
    with_history(cache, failures=2)
    broker.publish("x", id="m-1")
    consume(broker, lambda _, context: attempts.append(context.attempt), cache)
    assert attempts == [3]


class Flagless(MemoryBroker):
    """A broker whose flag is worth nothing."""

    def connect(self, *, consume=True):
        session = super().connect(consume=consume)
        real, own = type(session), attrs.evolve(session.capabilities, trustworthy_flag=False)

        class Unflagged(real):
            capabilities = own

        session.__class__ = Unflagged
        return session


@pytest.mark.parametrize(("failures", "log"), [(0, []), (1, ["load", "load", "load"])])
def test_nothing_is_looked_up_in_a_memory_of_the_process_that_is_empty(failures, log):
    broker, cache = Flagless(ORDERS), Asked()
    with_history(cache, failures)
    for _ in range(3):
        broker.publish("x")
    consume(broker, lambda _: None, cache)
    assert cache.log == log


def test_a_memory_that_has_a_method_where_ours_says_that_it_is_empty_is_looked_into(monkeypatch):
    broker, cache = Flagless(ORDERS), Asked()
    monkeypatch.setattr(Asked, "is_empty", lambda _: False)
    broker.publish("x")
    consume(broker, lambda _: None, cache)
    assert cache.log == ["load"]


@pytest.mark.parametrize("reason", ["too many", "fault", "no such verb"])
def test_every_message_is_looked_up_where_the_open_histories_are_not_known(monkeypatch, reason, caplog):
    broker = Forgetful(ORDERS)
    cache = Asked(ContextCacheError("no route") if reason == "fault" else None)
    with_history(cache, failures=1)
    if reason == "too many":
        monkeypatch.setattr(open_keys, "LIMIT", 0)
    if reason == "no such verb":
        monkeypatch.setattr(Asked, "open_keys", None)
    broker.publish("x")
    consume(broker, lambda _: None, cache)
    assert "load" in cache.log
    assert ("no route" in caplog.text) == (reason == "fault")
