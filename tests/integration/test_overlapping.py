"""The next message is handled while the broker confirms that the one before is acknowledged; and when it is not."""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import closing, nullcontext

import attrs
import pytest

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.listener import RetryListener
from retrykit.messaging import Discard, ListenerContainer
from retrykit.messaging.recoverers import ID
from retrykit.messaging.stomp import StompBroker
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import AsyncRetryTemplate, RetryTemplate
from tests import waiting
from tests.servers.proxy import TcpProxy

PATIENCE = 60.0
QUICK = ExponentialBackOffPolicy(initial=0.01, max_interval=0.2, jitter="full")


def publish(server, queue, texts):
    with closing(StompBroker(server.url).connect(consume=False)) as session:
        for text in texts:
            session.send(queue, text.encode(), {"content-type": "text/plain", ID: f"{queue} {text}"})
        session.commit()


class Consumer:
    """Notes which message was handled in which generation of the connection; `work` may do more."""

    def __init__(self, url, queue, work=lambda _message: None, *, kind=RetryTemplate, prefetch=10, **options):
        self.handled = []
        self.work = work
        profile = options.pop("profile", None)
        facts = {name: options.pop(name) for name in ("listeners", "remember_completed") if name in options}
        self.container = ListenerContainer(
            StompBroker(url, destination=queue, prefetch=prefetch, profile=profile, receipt_timeout=0.3),
            self.handle if kind is RetryTemplate else self.async_handle,
            template=kind(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3), **facts),
            reconnect=QUICK,
            **options,
        )

    def handle(self, message):
        self.handled.append((message.text, self.container.counters.generations))
        self.work(message)

    async def async_handle(self, message):
        self.handle(message)

    def texts(self):
        return [text for text, _ in list(self.handled)]

    def wait_for(self, condition):
        waiting.until(condition, PATIENCE, lambda: f"{self.container.counters} {self.handled}")

    def wait_for_the_end(self, server, queue):
        self.wait_for(lambda: server.depth(queue) == 0)


def with_late_receipts(server, queue, late="1", **options):
    """Handle "1" and "2", where the receipt of what comes after `late` does not come on the first connection."""
    slowed = []

    def slow_down_once(message):
        if message.text == late and not slowed:
            slowed.append(True)
            server.delay_receipts(PATIENCE)

    consumer = Consumer(server.url, queue, slow_down_once, **options)
    publish(server, queue, ["1", "2"])
    try:
        with consumer.container:
            consumer.wait_for(lambda: consumer.container.counters.in_doubt)
            server.clear_faults()
            consumer.wait_for(lambda: {"1", "2"} <= set(consumer.texts()))
            consumer.wait_for_the_end(server, queue)
    finally:
        server.clear_faults()
    return consumer


@pytest.mark.parametrize("kind", [RetryTemplate, AsyncRetryTemplate])
def test_the_next_message_at_hand_is_handled_before_the_last_one_is_confirmed(embedded_rabbit, queue, kind):
    consumer = with_late_receipts(embedded_rabbit, queue, kind=kind)
    # The second one was not acknowledged before the first one was confirmed, and so it came again.
    assert consumer.handled == [("1", 1), ("2", 1), ("2", 2)]
    counters = consumer.container.counters
    assert (counters.received, counters.in_doubt, counters.acknowledged) == (3, 2, 1)


class Heard(RetryListener):
    """Somebody who is told of successes."""


def replies(message):
    message.send(f"{message.destination}.done", b"done")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"transaction": nullcontext}, id="a transaction"),
        pytest.param({"remember_completed": 60}, id="completion marks"),
        pytest.param({"listeners": (Heard(),)}, id="a listener"),
        pytest.param({"prefetch": 1}, id="nothing else at hand"),
        pytest.param({"prefetch": 1, "profile": "generic"}, id="nothing else wanted"),
    ],
)
def test_where_something_hangs_on_the_confirmation_it_is_waited_for(embedded_rabbit, queue, options):
    consumer = with_late_receipts(embedded_rabbit, queue, **options)
    assert consumer.handled == [("1", 1), ("2", 2)]
    assert consumer.container.counters.in_doubt == 1


def test_on_a_broker_with_transactions_each_commit_is_waited_for(embedded, queue):
    consumer = with_late_receipts(embedded, queue)
    assert consumer.handled == [("1", 1), ("2", 2)]


def test_the_history_of_an_earlier_failure_is_kept_until_the_success_is_confirmed(embedded_rabbit, queue):
    keys = []

    def fail_once(message):
        keys.append(message.key)
        if len(keys) == 1:
            raise ConnectionError("once")
        embedded_rabbit.delay_receipts(PATIENCE)

    consumer = Consumer(embedded_rabbit.url, queue, fail_once)
    publish(embedded_rabbit, queue, ["1"])
    try:
        with consumer.container:
            consumer.wait_for(lambda: consumer.container.counters.in_doubt)
            embedded_rabbit.clear_faults()
    finally:
        embedded_rabbit.clear_faults()
    assert consumer.texts() == ["1", "1"]
    assert consumer.container.template.history(keys[0]).retry_count == 1


def test_the_last_acknowledgement_is_confirmed_before_a_container_has_stopped(embedded_rabbit, queue):
    consumer = Consumer(embedded_rabbit.url, queue)
    publish(embedded_rabbit, queue, [str(number) for number in range(50)])
    with consumer.container:
        consumer.wait_for(lambda: len(consumer.handled) == 50)
    counters = consumer.container.counters
    assert (counters.acknowledged, counters.in_doubt) == (50, 0)
    assert embedded_rabbit.depth(queue) == 0


def test_a_container_that_stops_at_once_says_what_is_in_doubt(embedded_rabbit, queue):
    stuck, gate = threading.Event(), threading.Event()

    def hang(message):
        if message.text == "1":
            embedded_rabbit.delay_receipts(PATIENCE)
        else:
            stuck.set()
            gate.wait(PATIENCE)

    consumer = Consumer(embedded_rabbit.url, queue, hang)
    publish(embedded_rabbit, queue, ["1", "2"])
    try:
        consumer.container.start()
        assert stuck.wait(PATIENCE)
        consumer.container.stop(now=True)
        consumer.wait_for(lambda: consumer.container.counters.in_doubt)
    finally:
        gate.set()
        embedded_rabbit.clear_faults()
        consumer.container.wait(PATIENCE)
    assert consumer.container.counters.acknowledged == 0
    assert embedded_rabbit.depth(queue) == 1


def test_a_send_that_is_refused_after_an_acknowledgement_is_still_the_refused_one(embedded_rabbit, queue):
    bad = f"/nowhere{queue}"

    def send_once(message):
        if message.text == "2" and consumer.texts().count("2") == 1:
            message.send(bad, b"x")

    consumer = Consumer(embedded_rabbit.url, queue, send_once)
    publish(embedded_rabbit, queue, ["1", "2"])
    with consumer.container:
        consumer.wait_for(lambda: consumer.texts().count("2") == 2)
        consumer.wait_for_the_end(embedded_rabbit, queue)
    counters = consumer.container.counters
    assert consumer.texts() == ["1", "2", "2"]
    assert (counters.rolled_back, counters.in_doubt, counters.acknowledged) == (1, 0, 2)


@pytest.mark.parametrize("real", ["embedded_rabbit", "rabbitmq"])
def test_a_connection_that_is_cut_repeats_at_most_two_messages_and_loses_none(request, queue, real):
    server, chance, cuts = request.getfixturevalue(real), random.Random(7), []
    numbers = [str(number) for number in range(300)]
    with TcpProxy(server.port) as proxy:

        def cut_sometimes(_message):
            if chance.random() < 0.03 and len(cuts) < 8:
                cuts.append(proxy.cut())

        consumer = Consumer(proxy.via(server.url), queue, cut_sometimes)
        publish(server, queue, numbers)
        with consumer.container:
            consumer.wait_for(lambda: set(consumer.texts()) == set(numbers))
    handled = Counter(consumer.texts())
    assert cuts
    assert set(handled) == set(numbers)
    assert sum(handled.values()) <= len(numbers) + 2 * len(cuts)


ENDS = ("acknowledged", "duplicates", "parked", "republished", "discarded", "rolled_back", "withheld", "in_doubt")


class Trouble:
    """What happens while a message is handled, by chance: most of the time nothing."""

    def __init__(self, server, proxy, queue, seed):
        self.chance, self.lock, self.queue = random.Random(seed), threading.Lock(), queue
        self.failures = Counter()
        self.done = set()
        self.cuts = [proxy.cut, server.drop_before_receipt, server.drop_before_commit] * 3

    def handle(self, message, context):
        with self.lock:
            what = self.chance.choices(["nothing", "cut", "fail", "send", "discard", "note"], [50, 8, 15, 8, 5, 8])[0]
            if what == "cut" and self.cuts:
                self.cuts.pop(self.chance.randrange(len(self.cuts)))()
        if what == "fail":
            self.failures[message.text] += 1
            raise ConnectionError("by chance")
        if what == "send":
            message.send(f"{self.queue}.done", b"done")
        if what == "note":
            context.attributes["noted"] = True
        self.done.add(message.text)
        return Discard("by chance") if what == "discard" else None

    async def async_handle(self, message, context):
        return self.handle(message, context)


@pytest.mark.parametrize("profile", ["rabbitmq", "generic"])
@pytest.mark.parametrize("workers", [(RetryTemplate, 1), (RetryTemplate, 3), (AsyncRetryTemplate, 3)])
def test_every_delivery_is_counted_once_and_none_is_lost_whatever_happens(embedded_rabbit, queue, profile, workers):
    kind, concurrency = workers
    texts = {str(number) for number in range(60)}
    with TcpProxy(embedded_rabbit.port) as proxy:
        trouble = Trouble(embedded_rabbit, proxy, queue, seed=11)
        container = ListenerContainer(
            StompBroker(proxy.via(embedded_rabbit.url), destination=queue, prefetch=5, profile=profile),
            trouble.handle if kind is RetryTemplate else trouble.async_handle,
            template=kind(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3)),
            recover=lambda message, _: trouble.done.add(message.text),
            reconnect=ExponentialBackOffPolicy(initial=0.001, max_interval=0.01),
            concurrency=concurrency,
        )
        publish(embedded_rabbit, queue, sorted(texts))
        try:
            with container:
                # What ends at once loses nothing either.
                waiting.until(lambda: len(trouble.done) > 30, PATIENCE, lambda: container.counters)
                container.stop(now=True)
            first = container.counters
            with attrs.evolve(container) as again:
                waiting.until(lambda: embedded_rabbit.depth(queue) == 0, PATIENCE, lambda: again.counters)
        finally:
            embedded_rabbit.clear_faults()
    for counters in (first, again.counters):
        assert sum(getattr(counters, end) for end in ENDS) == counters.received, counters
    assert trouble.done == texts
    assert max(trouble.failures.values()) <= 3
