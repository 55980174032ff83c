"""A container that is to stop waits for no server that does not answer."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import partial

import pytest

from retrykit.messaging import BrokerUnavailableError, ListenerContainer
from retrykit.messaging.connecting import connected
from retrykit.messaging.memory import MemoryBroker
from retrykit.template import RetryTemplate
from tests import waiting

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
