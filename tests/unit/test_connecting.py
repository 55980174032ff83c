"""A container that is to stop waits for no server that does not answer."""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
import weakref
from functools import partial

import pytest

from retrykit.backoff import FixedBackOffPolicy
from retrykit.messaging import BrokerUnavailableError, ListenerContainer, LoginRefusedError
from retrykit.messaging.connecting import connected
from retrykit.messaging.memory import MemoryBroker
from retrykit.template import RetryTemplate
from tests import waiting
from tests.doubles import ManualClock

PATIENCE = 20.0
wait_for = partial(waiting.until, seconds=PATIENCE)


class Slow(MemoryBroker):
    """Connects when it is allowed to."""

    def __init__(self):
        super().__init__("/queue/orders")
        vars(self).update(asked=threading.Event(), answer=threading.Event(), made=[])

    def connect(self, *, consume=True):
        self.asked.set()
        assert self.answer.wait(PATIENCE)
        session = super().connect(consume=consume)
        session.closed = threading.Event()
        close = session.close
        session.close = lambda *, wait=True: (close(wait=wait), session.closed.set())
        self.made.append(session)
        return session


@pytest.mark.parametrize("now", [False, True], ids=["in good order", "at once"])
def test_stopping_waits_for_no_server_and_keeps_no_connection_that_comes_later(now):
    broker = Slow()
    container = ListenerContainer(broker, print, template=RetryTemplate(name="orders"), concurrency=2)
    container.start()
    assert broker.asked.wait(PATIENCE)
    began = time.monotonic()
    container.stop(now=now)
    assert container.wait(PATIENCE)
    assert time.monotonic() - began < 2
    broker.answer.set()
    wait_for(lambda: broker.made and all(session.closed.is_set() for session in broker.made))
    assert container.counters.generations == 0


def test_what_connecting_raises_is_raised_and_kept_alive_by_nothing():
    errors = [BrokerUnavailableError(broker="it", reason="none")]

    def refuse():
        raise errors[0]

    with pytest.raises(BrokerUnavailableError) as caught:
        connected(refuse, threading.Event())
    assert caught.value is errors[0]
    known = weakref.ref(errors.pop())
    del caught
    gc.disable()
    try:
        wait_for(lambda: known() is None)
    finally:
        gc.enable()


def test_a_session_that_is_there_is_given_although_it_is_to_stop():
    # The worker hands it to the container, which closes it in good order.
    stopping = threading.Event()
    stopping.set()
    assert connected(lambda: "session", stopping) == "session"


def test_an_error_of_a_connection_that_nobody_wants_disturbs_nobody(caplog):
    asked, answer, stopping = threading.Event(), threading.Event(), threading.Event()

    def refuse():
        asked.set()
        assert answer.wait(PATIENCE)
        raise BrokerUnavailableError(broker="it", reason="too late")

    stopping.set()
    caplog.set_level("DEBUG")
    assert connected(refuse, stopping) is None
    answer.set()
    wait_for(lambda: "too late" in caplog.text)


class Away(MemoryBroker):
    """Is there when it is said to be."""

    def __init__(self):
        super().__init__("/queue/orders")
        vars(self).update(fault=BrokerUnavailableError(broker="it", reason="refused"), tries=0)

    def connect(self, *, consume=True):
        vars(self)["tries"] += 1
        if self.fault is not None:
            raise self.fault
        return super().connect(consume=consume)


def test_a_broker_that_is_away_is_told_once_then_now_and_then_and_that_it_is_back(caplog):
    caplog.set_level(logging.WARNING, "retrykit.messaging")
    broker, clock = Away(), ManualClock()
    template = RetryTemplate(name="orders", clock=clock)

    def told():
        return [record.getMessage() for record in caplog.records]

    with ListenerContainer(broker, print, template=template, reconnect=FixedBackOffPolicy(0.5)) as container:
        wait_for(lambda: len(told()) >= 3)
        vars(broker)["fault"] = LoginRefusedError(broker="it", reason="who are you?")
        wait_for(lambda: "who are you?" in caplog.text)
        vars(broker)["fault"] = None
        wait_for(lambda: container.connected == 1)
    facts = [record.retrykit for record in caplog.records]
    unavailable = {"name": "orders", "error": "retrykit.messaging.errors.BrokerUnavailableError", "delay": 0.5}
    assert (facts[0], facts[-1]) == (unavailable, {"name": "orders"})
    first, *lines, back = told()
    assert first == "orders: No connection to the broker it could be made: refused (try 1); the next one is in 0.5 s"
    assert re.fullmatch(r"orders: connected to .* again, after \d\d.* s and \d+ tries that failed", back)
    reminder = re.compile(r"\(try \d+; not connected for \d\d.* s, \d+ tries\); the next one is in 0.5 s$")
    news = [line for line in lines if not reminder.search(line)]
    assert len(news) == 1
    assert news[0].startswith("orders: The broker it did not let us in: who are you? (try ")
    assert 2 <= len(lines) - len(news) < broker.tries / 5


def test_workers_that_share_a_broker_tell_once_that_it_is_away(caplog):
    broker, options = Away(), {"concurrency": 3, "reconnect": FixedBackOffPolicy(0.001)}
    with ListenerContainer(broker, print, template=RetryTemplate(name="orders"), **options):
        wait_for(lambda: broker.tries > 20)
    assert len(caplog.records) == 1


def test_what_is_known_of_a_broker_that_is_away_ends_with_the_container(caplog):
    broker = Away()
    for number in (1, 2):
        with ListenerContainer(broker, print, template=RetryTemplate(name="orders")):
            wait_for(lambda: len(caplog.records) >= number)  # noqa: B023 - called here
    assert [record.getMessage().count("(try 1);") for record in caplog.records] == [1, 1]
