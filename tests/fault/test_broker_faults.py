"""What a broker may do to its clients besides dying: refuse them, hold back what they send, be faster than they are."""

from __future__ import annotations

import logging
import threading
import uuid
from collections import Counter, defaultdict
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import pytest

from retrykit import ExponentialBackOffPolicy, RetryTemplate, SimpleRetryPolicy
from retrykit.messaging import ListenerContainer
from retrykit.messaging.stomp import StompBroker
from tests import waiting
from tests.servers import RabbitMq, Wire

PATIENCE = 90.0
QUICK = ExponentialBackOffPolicy(initial=0.02, max_interval=0.3, jitter="full")
PREFETCH = 5
MANY = 100
SOME = 30
LARGE = 10_000


@pytest.fixture(params=["activemq", "rabbitmq"])
def broker(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def queue():
    return f"/queue/patient.{uuid.uuid4().hex[:12]}"


def publish(broker, queue, count):
    with closing(StompBroker(broker.url).connect(consume=False)) as session:
        for number in range(count):
            session.send(queue, b"%d" % number, {"content-type": "text/plain"})
        session.commit()


def container(url, queue, handler, **options):
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3))
    return ListenerContainer(
        StompBroker(url, destination=queue, **options), handler, template=template, reconnect=QUICK
    )


until = partial(waiting.until, seconds=PATIENCE, look=0.02)


# -- back-pressure


def test_a_slow_consumer_is_sent_no_more_than_its_prefetch_and_others_get_the_rest(broker, queue):
    gate, seen = threading.Event(), []

    def slowly(message):
        assert gate.wait(PATIENCE)
        seen.append(message.text)

    slow = container(broker.url, queue, slowly, prefetch=PREFETCH)
    fast = container(broker.url, queue, lambda message: seen.append(message.text))
    with slow:
        until(lambda: slow.connected == 1)
        publish(broker, queue, MANY)
        until(lambda: slow.counters.received == 1)
        with fast:
            until(lambda: len(seen) >= MANY - PREFETCH)
            assert slow.counters.received == 1
            gate.set()
            until(lambda: len(seen) == MANY)
    assert Counter(seen) == {str(number): 1 for number in range(MANY)}
    assert slow.counters.acknowledged >= 1


# -- flow control


@contextmanager
def no_room(broker, out):
    """The broker takes nothing more that is sent to this queue, until the block ends; it says nothing of it."""
    if isinstance(broker, RabbitMq):
        broker.control("set_vm_memory_high_watermark", "0")
        try:
            yield
        finally:
            broker.control("set_vm_memory_high_watermark", "0.4")
        return
    with Wire(broker.host, broker.port) as wire:
        for _ in range(20):
            # Its memory for one queue is full after some of these, and then no receipt comes any more.
            wire.send("SEND", bytes(LARGE), destination=out, persistent="true", filler="true", content_length=LARGE)
        yield


def received(broker, queue, enough):
    """What comes from a queue until it is enough: the ids by number."""
    found = defaultdict(list)
    with Wire(broker.host, broker.port, virtual_host=None) as wire:
        wire.subscribe(queue, prefetch=10)
        while not enough(found):
            frame = wire.message(PATIENCE)
            wire.send("ACK", id=frame["ack"])
            if "filler" not in frame.headers:
                found[frame.body].append(frame["retrykit-id"])
        wire.ask("UNSUBSCRIBE", id="1")
    return found


def test_sends_that_the_broker_holds_back_are_in_doubt_and_lost_in_no_case(broker, queue):
    out = queue.replace("patient", "limited")
    publish(broker, queue, SOME)
    consumer = container(
        broker.url, queue, lambda message: message.send(out, message.body), receipt_timeout=1.0, connect_timeout=10.0
    )
    with ExitStack() as running:
        with no_room(broker, out):
            running.enter_context(consumer)
            until(lambda: consumer.counters.in_doubt > 1)
        found = received(broker, out, lambda found: len(found) == SOME)
        until(lambda: consumer.counters.acknowledged == SOME)
    assert found.keys() == {b"%d" % number for number in range(SOME)}
    assert all(len(set(ids)) == 1 for ids in found.values())


# -- credentials


def test_wrong_credentials_are_told_and_tried_again_until_they_are_right(rabbitmq, queue, caplog):
    publish(rabbitmq, queue, 1)
    caplog.set_level(logging.DEBUG)
    seen = []
    wrong = rabbitmq.url.replace(rabbitmq.password, "open-sesame")
    refused = container(wrong, queue, lambda message: seen.append(message.text))
    with refused:
        until(lambda: sum("did not let us in" in text for text in caplog.messages) >= 2)
        assert (refused.connected, refused.counters.generations) == (0, 0)
    assert "sesame" not in caplog.text
    assert seen == []
    with container(rabbitmq.url, queue, lambda message: seen.append(message.text)):
        until(lambda: seen == ["0"])
