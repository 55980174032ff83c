"""Messages that wait at their broker for the next attempt: the same messages when they come again, and never early."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from contextlib import closing, contextmanager
from itertools import pairwise

import attrs
import pytest

from retrykit.backoff import ExponentialBackOffPolicy, FixedBackOffPolicy
from retrykit.cache import MapRetryContextCache
from retrykit.messaging import DelayUnavailableError, ListenerContainer, Publisher, park
from retrykit.messaging.delays import delay_queue
from retrykit.messaging.identity import bounded
from retrykit.messaging.stomp import StompBroker
from retrykit.messaging.stomp.profiles import ACTIVEMQ, RABBITMQ
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import AsyncRetryTemplate, RetryTemplate
from retrykit.testing import StompServer
from tests.servers import RabbitMq, Wire, is_rabbit
from tests.servers.activemq import ActiveMq, activemq_missing

PATIENCE = 60.0
QUICK = ExponentialBackOffPolicy(initial=0.01, max_interval=0.2, jitter="full")
PAUSE = 0.6
HEADERS = {
    "content-type": "text/plain",
    "priority": "7",
    "reply-to": "/queue/answers",
    "correlation-id": "c-1",
    "my-header": "a:b\\c\nd größer",
    "retrykit-id": "my-id",
}


class Late:
    """A container whose handler fails for bodies that begin with "bad", in their first `failures` attempts."""

    def __init__(self, server, queue, *, failures=1, pause=PAUSE, broker=None, **options):
        self.server, self.queue, self.failures = server, queue, failures
        self.seen = []
        self.changed = threading.Condition()
        self.broker = broker or StompBroker(server.url, destination=queue)
        facts = {
            "name": "late",
            "retry_policy": SimpleRetryPolicy(max_attempts=3),
            "context_cache": MapRetryContextCache(),
        }
        template = {name: options.pop(name) for name in ("remember_completed",) if name in options}
        self.template = RetryTemplate(**facts, back_off_policy=FixedBackOffPolicy(pause), **template)
        self.options = {"delay": "schedule", "reconnect": QUICK, "recover": park(f"{queue}.parked")} | options
        self.container = self.new_container()

    def new_container(self):
        return ListenerContainer(self.broker, self.handle, template=self.template, **self.options)

    def handle(self, message, context):
        with self.changed:
            self.seen.append((time.monotonic(), message, context.attempt))
            self.changed.notify_all()
        if message.body.startswith(b"bad") and context.attempt <= self.failures:
            raise ConnectionError(message.text)

    def publish(self, *bodies, **headers):
        with closing(StompBroker(self.server.url).connect(consume=False)) as session:
            for body in bodies:
                session.send(self.queue, body, headers)
            session.commit()

    def bodies(self):
        return [message.body for _, message, _ in self.seen]

    def attempts(self, body=b"bad"):
        """Of a message: the instants, the deliveries, the numbers of its attempts."""
        found = [one for one in self.seen if one[1].body == body]
        return tuple(zip(*found, strict=True)) if found else ((), (), ())

    def wait_for(self, condition):
        with self.changed:
            deadline = time.monotonic() + PATIENCE
            while not condition():
                assert time.monotonic() < deadline, f"{self.container.counters} {self.bodies()}"
                self.changed.wait(0.05)

    def settled(self):
        counters = self.container.counters
        return counters.acknowledged + counters.parked + counters.duplicates

    @contextmanager
    def running(self):
        with self.container:
            yield self.container

    def parked(self):
        """What lies in the parking queue, taken out."""
        return taken(self.server, f"{self.queue}.parked")


def taken(server, destination, silence=0.5):
    found = []
    with closing(StompBroker(server.url, destination=destination).connect()) as session:
        while (message := session.receive(PATIENCE if not found else silence)) is not None:
            found.append(message)
            session.commit(message)
    return found


def test_other_messages_are_handled_while_one_waits_at_the_broker(server, queue):
    late = Late(server, queue)
    late.publish(b"bad", *[b"good %d" % number for number in range(5)])
    with late.running():
        late.wait_for(lambda: late.settled() == 6)
    assert late.bodies() == [b"bad", *[b"good %d" % number for number in range(5)], b"bad"]
    counters = late.container.counters
    assert (counters.postponed, counters.rolled_back, counters.withheld) == (1, 1, 0)
    assert (counters.received, counters.redelivered, counters.generations) == (7, 1, 1)


def test_a_message_that_waited_is_the_same_message_and_does_not_come_early(server, queue):
    late = Late(server, queue)
    late.publish(b"bad", **HEADERS)
    with late.running():
        late.wait_for(lambda: late.settled() == 1)
    (first, second), (original, copy), numbers = late.attempts()
    assert numbers == (1, 2)
    assert second - first >= PAUSE - 0.05
    assert (copy.id, copy.key, copy.body) == (original.id, original.key, original.body)
    assert copy.redelivered
    assert {name: copy.headers[name] for name in HEADERS} == HEADERS
    if not is_rabbit(server):
        assert copy.headers["message-id"] == original.headers["message-id"] == original.id
    transient = {"ack", "subscription", "redelivered", "timestamp", "retrykit-copy-of", "transaction", "receipt"}
    assert set(copy.headers) - transient == set(original.headers) - transient


@pytest.mark.parametrize("body", [b"bad \x00\xff\x00", b"bad" + bytes(range(256)) * 300, "bad größer".encode()])
def test_the_body_of_a_message_that_waited_is_unchanged(server, queue, body):
    late = Late(server, queue, pause=0.2)
    late.handle = lambda message, context: Late.handle(late, attrs.evolve(message, headers={}), context)
    late.container = late.new_container()
    late.publish(body)
    with late.running():
        late.wait_for(lambda: late.settled() == 1 or len(late.seen) > 1)
    assert late.bodies() == [body, body]


def test_text_that_java_writes_otherwise_is_text_in_the_copy_too(server, queue):
    text = "bad \N{GRINNING FACE} \0"
    late = Late(server, queue, pause=0.2)
    late.publish(text.encode(), **{"content-type": "text/plain"})
    with late.running():
        late.wait_for(lambda: late.settled() == 1)
    first, second = late.attempts(text.encode())[1]
    assert first.text == second.text == text
    assert ("content-length" in first.headers, "content-length" in second.headers) == (is_rabbit(server),) * 2
    assert (late.container.counters.postponed, late.container.counters.generations) == (1, 1)


def test_attempts_are_counted_over_the_copies_and_the_last_is_parked_with_its_history(server, queue):
    late = Late(server, queue, failures=9, pause=0.3)
    late.publish(b"bad", **HEADERS)
    with late.running():
        late.wait_for(lambda: late.settled() == 1)
        (parked,) = late.parked()
    _, (original, *_), numbers = late.attempts()
    assert numbers == (1, 2, 3)
    assert parked.headers["retrykit-attempts"] == "3"
    assert json.loads(parked.headers["retrykit-key"]) == list(original.key)
    assert parked.headers["retrykit-first-failed-at"] < parked.headers["retrykit-last-failed-at"]
    assert {name: parked.headers[name] for name in HEADERS if name != "my-header"} == {
        name: value for name, value in HEADERS.items() if name != "my-header"
    }
    others = json.loads(parked.headers["retrykit-other-headers"])
    for name in (*parked.headers, *others):
        assert not name.startswith(("AMQ_SCHEDULED", "x-message", "x-dead", "x-expires", "retrykit-copy")), name
    assert others["my-header"] == HEADERS["my-header"]


def test_a_message_with_a_header_that_is_too_long_for_a_copy_waits_in_its_session(server, queue, caplog):
    value = ":" * 6_000
    late = Late(server, queue, pause=0.2)
    with Wire(server.host, server.port, version="1.0", virtual_host=None if is_rabbit(server) else "localhost") as wire:
        wire.publish(queue, b"bad", **{"x-long": value, "amqp-message-id": "m-1"})
    with late.running():
        late.wait_for(lambda: late.settled() == 1)
    instants, deliveries, numbers = late.attempts()
    assert (numbers, late.container.counters.generations) == ((1, 2), 1)
    assert [message.headers["x-long"] for message in deliveries] == [value, value]
    assert instants[1] - instants[0] > 0.15
    fits = is_rabbit(server)
    assert late.container.counters.postponed == int(fits)
    assert ("longer than the 10241 bytes that the broker takes: x-long" in caplog.text) is not fits


def test_a_copy_is_no_first_delivery_to_a_worker_that_was_connected_before(server, queue):
    late = Late(server, queue, failures=9, pause=0.3, concurrency=3)
    bodies = [b"bad %d" % number for number in range(6)]
    late.publish(*bodies)
    with late.running():
        late.wait_for(lambda: late.settled() == 6)
    assert [late.attempts(body)[2] for body in bodies] == [(1, 2, 3)] * 6


@pytest.mark.parametrize("moment", ["drop_before_commit", "drop_before_receipt"])
def test_a_copy_whose_original_is_not_acknowledged_is_a_second_delivery_of_one_message(double, queue, moment):
    late = Late(double, queue, remember_completed=3600)
    late.publish(b"bad")
    getattr(double, moment)(times=1)
    try:
        with late.running():
            late.wait_for(lambda: late.settled() == (2 if moment == "drop_before_commit" else 1))
    finally:
        double.clear_faults()
    assert late.attempts()[2] == (1, 2)
    counters = late.container.counters
    assert (counters.acknowledged, counters.generations) == (1, 2)
    assert counters.duplicates == (1 if moment == "drop_before_commit" else 0)


def test_without_marks_the_second_of_the_two_is_handled_when_the_first_has_come_to_its_end(double, queue):
    late = Late(double, queue, failures=9, pause=0.2)
    late.publish(b"bad")
    double.drop_before_commit(times=1)
    try:
        with late.running():
            late.wait_for(lambda: late.settled() == 2)
            parked = late.parked()
    finally:
        double.clear_faults()
    assert sorted(late.attempts()[2]) == [1, 1, 2, 2, 3, 3]
    assert len({message.headers["retrykit-id"] for message in parked}) == 1
    assert [message.headers["retrykit-attempts"] for message in parked] == ["3", "3"]


def test_a_delay_longer_than_the_broker_keeps_is_kept_in_turns(server, queue):
    profile = attrs.evolve(RABBITMQ if is_rabbit(server) else ACTIVEMQ, longest_delay=0.4)
    late = Late(server, queue, pause=1.5, broker=StompBroker(server.url, destination=queue, profile=profile))
    late.publish(b"bad", b"good")
    with late.running():
        late.wait_for(lambda: late.settled() == 2)
    (first, second), _, numbers = late.attempts()
    assert numbers == (1, 2)
    assert second - first >= 1.45
    # Four turns, if the broker and this machine keep their times; one that comes late saves another.
    assert late.container.counters.postponed >= 2
    assert late.container.counters.rolled_back == 1


def test_a_copy_that_the_broker_refuses_leaves_the_message_to_be_waited_for(rabbit, queue, caplog):
    late = Late(rabbit, queue)
    other = delay_queue(queue.removeprefix("/queue/"), PAUSE, time.time()).name
    with Wire(rabbit.host, rabbit.port, virtual_host=None) as wire:
        wire.publish(f"/queue/{other}", b"not ours")
    late.publish(b"bad", b"good")
    with late.running():
        late.wait_for(lambda: late.settled() == 2)
    (first, second), _, numbers = late.attempts()
    assert numbers == (1, 2)
    assert second - first >= PAUSE - 0.05
    assert late.container.counters.postponed == 0
    refusals = [record for record in caplog.records if "could not be sent as a copy" in record.getMessage()]
    assert len(refusals) == 1
    assert "inequivalent arg" in refusals[0].getMessage()


def test_a_message_whose_id_no_header_can_carry_is_waited_for_in_the_session(double, queue, caplog):
    broker = StompBroker(double.url, destination=queue, identify=lambda *_: "\ud800")
    late = Late(double, queue, broker=broker, pause=0.2)
    late.publish(b"bad")
    with late.running():
        late.wait_for(lambda: late.settled() == 1)
    assert late.attempts()[2] == (1, 2)
    assert (late.container.counters.postponed, late.container.counters.generations) == (0, 1)
    assert "cannot be sent as UTF-8" in caplog.text


def test_a_copy_survives_a_crash_of_the_broker(server, queue):
    # A classic queue of RabbitMQ forgets the acknowledgement: then there are the original and its copy.
    late = Late(server, queue, pause=3.0, remember_completed=3600)
    if isinstance(server, RabbitMq):
        # Queues that were just made may not survive a crash there, nor what is in them.
        with closing(late.broker.connect()), Wire(server.host, server.port, virtual_host=None) as wire:
            waiting = delay_queue(queue.removeprefix("/queue/"), 3.0, time.time())
            wire.publish(f"/queue/{waiting.name}", b"first", **waiting.arguments, **{"amqp-message-id": "first"})
            server.keep_queues()
    late.publish(b"bad")
    with late.running():
        late.wait_for(lambda: late.container.counters.postponed == 1)
        server.kill()
        server.start()
        late.wait_for(lambda: len(late.attempts()[2]) == 2)
        late.wait_for(late.settled)
    (first, second), _, numbers = late.attempts()
    assert numbers == (1, 2)
    assert second - first >= 2.95


def test_a_message_that_is_due_when_its_process_comes_back_waits_at_the_broker(server, queue):
    late = Late(server, queue, pause=3.0)
    late.publish(b"bad")
    # What a process leaves behind that died after its failed attempt was stored, before the copy was sent.
    late.options["delay"] = "hold"
    late.container = late.new_container()
    with late.running():
        late.wait_for(lambda: late.container.counters.rolled_back == 1)
    late.options["delay"] = "schedule"
    late.container = late.new_container()
    late.publish(b"good")
    with late.running():
        late.wait_for(lambda: late.settled() == 2)
    assert late.bodies() == [b"bad", b"good", b"bad"]
    assert late.attempts()[2] == (1, 2)
    counters = late.container.counters
    assert (counters.postponed, counters.withheld, counters.rolled_back) == (1, 1, 0)


def test_a_header_of_a_producer_takes_over_no_history(server, queue):
    late = Late(server, queue, failures=9)
    late.publish(b"bad")
    with late.running():
        late.wait_for(lambda: late.container.counters.postponed == 1)
        (victim,) = late.attempts()[1]
        claim = json.dumps([victim.destination, victim.id, "", 0])
        with Wire(server.host, server.port, virtual_host=None) as producer:
            producer.publish(queue, b"other", **{"retrykit-copy-of": claim, "retrykit-id": "another"})
        late.wait_for(lambda: late.settled() == 2)
    assert late.attempts(b"other")[2] == (1,)
    assert late.attempts()[2] == (1, 2, 3)


def test_a_message_that_is_sent_with_the_headers_of_a_copy_is_one_of_its_own(double, queue):
    late = Late(double, queue, pause=0.2, remember_completed=3600)
    late.publish(b"bad")
    with late.running(), Publisher(late.broker) as publisher:
        late.wait_for(lambda: late.settled() == 1)
        copy = late.attempts()[1][1]
        # All but what brokers and publisher say themselves.
        own = {name: copy.headers[name] for name in copy.headers if name.startswith("retrykit-")}
        assert "retrykit-copy-of" in own
        publisher.send(queue, b"bad", own, id="second round")
        late.wait_for(lambda: late.settled() == 2)
    assert late.attempts()[2] == (1, 2, 1, 2)
    assert late.container.counters.duplicates == 0


def test_a_message_that_waits_is_handled_no_more_after_its_end(double, queue, caplog):
    late = Late(double, queue, failures=9, pause=0.4)
    with late.running(), Publisher(late.broker) as publisher:
        end = time.monotonic() + 0.7
        publisher.send(queue, b"bad", expires_in=0.7)
        late.wait_for(lambda: late.container.counters.postponed == 2)
        publisher.send(queue, b"good")
        late.wait_for(lambda: late.settled() == 1 and double.depth(queue) == 0)
        late.wait_for(lambda: time.monotonic() > end + 0.6)
    assert all(instant < end for instant in late.attempts()[0])
    assert late.bodies() == [b"bad", b"bad", b"good"]
    assert is_rabbit(double) == ("has expired while it waited" in caplog.text)


def test_an_id_that_is_too_long_for_copies_holds_nobody_up(embedded_rabbit, queue, caplog):
    # Whoever sends may set it, and the message is to be parked in the end, too.
    late = Late(embedded_rabbit, queue, failures=9, pause=0.1)
    late.publish(b"bad", **{"amqp-message-id": "x" * 20_000, "retrykit-id": "y" * 9_000})
    with late.running():
        late.wait_for(lambda: late.settled() == 1)
    assert late.attempts()[2] == (1, 2, 3)
    assert late.container.counters.postponed == 2
    assert "ERROR" not in {record.levelname for record in caplog.records}
    (parked,) = late.parked()
    assert parked.headers["retrykit-id"] == bounded("y" * 9_000)
    assert f"was parked in {queue}.parked as {bounded('y' * 9_000)}: " in caplog.text


@pytest.mark.parametrize("way", ["schedule", "hold"])
def test_coroutines_wait_as_functions_do(double, queue, way):
    late = Late(double, queue)

    async def handle(message, context):
        await asyncio.sleep(0)
        late.handle(message, context)

    facts = {name: getattr(late.template, name) for name in ("name", "retry_policy", "back_off_policy")}
    late.container = ListenerContainer(
        StompBroker(double.url, destination=queue, prefetch=3 if way == "hold" else 1),
        handle,
        template=AsyncRetryTemplate(**facts),
        recover=park(f"{queue}.parked"),
        delay=way,
    )
    late.publish(b"bad", b"good")
    with late.running():
        late.wait_for(lambda: late.settled() == 2)
    assert late.bodies() == [b"bad", b"good", b"bad"]
    (first, second), _, numbers = late.attempts()
    assert numbers == (1, 2)
    assert second - first >= PAUSE - 0.05
    assert late.container.counters.postponed == (way == "schedule")


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_an_activemq_without_its_scheduler_is_refused_before_a_message_is_taken(tmp_path, queue, kind):
    with unscheduled(kind, tmp_path) as server:
        late = Late(server, queue)
        late.publish(b"bad")
        with pytest.raises(DelayUnavailableError, match="schedulerSupport"), late.running():
            late.container.wait(PATIENCE)
        assert late.container.counters.received == 0
        (message,) = taken(server, queue)
        assert not message.redelivered


def test_a_scheduler_that_is_turned_off_later_makes_no_attempt_early(tmp_path, queue, monkeypatch):
    monkeypatch.setattr("retrykit.messaging.stomp.session.delays_are_ignored", lambda *_: False)
    with unscheduled("embedded", tmp_path) as server:
        late = Late(server, queue)
        late.publish(b"bad")
        with late.running():
            late.wait_for(lambda: late.settled() == 1)
        (first, second), _, numbers = late.attempts()
        assert numbers == (1, 2)
        assert second - first >= PAUSE - 0.05
        assert late.container.counters.postponed == 1


def unscheduled(kind, directory):
    return server_of(kind, directory, scheduler=False)


@contextmanager
def server_of(kind, directory, **options):
    if kind == "embedded":
        with StompServer(profile="activemq", **options) as server:
            yield server
        return
    reason = activemq_missing()
    if reason is not None:
        pytest.skip(reason)
    with ActiveMq(directory / "activemq", **options) as server:
        yield server


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_the_redelivery_plug_in_keeps_back_the_message_itself(tmp_path, queue, kind):
    with server_of(kind, tmp_path, redelivery=1.5) as server:
        late = Late(server, queue, failures=9, pause=0.5, delay="redeliver", concurrency=2)
        late.publish(b"bad", b"good 1", b"good 2", b"good 3")
        with late.running():
            late.wait_for(lambda: late.settled() == 4)
            (parked,) = late.parked()
        instants, deliveries, numbers = late.attempts()
        assert numbers == (1, 2, 3)
        assert all(later - earlier >= 1.4 for earlier, later in pairwise(instants))
        assert len({message.key for message in deliveries}) == 1
        assert all(message.redelivered for message in deliveries[1:])
        assert parked.headers["retrykit-attempts"] == "3"
        assert late.container.counters.postponed == 2


def test_a_container_says_at_the_start_where_its_messages_wait(server, queue, caplog):
    caplog.set_level(logging.INFO, "retrykit.messaging")
    late = Late(server, queue, concurrency=2)
    with late.running():
        late.wait_for(lambda: late.container.connected == 2)
    told = [record for record in caplog.records if "waits for its next attempt" in record.getMessage()]
    assert [record.levelname for record in told] == ["INFO"]
    assert "for up to 0.6 s, at the broker (delay='schedule')" in told[0].getMessage()


def test_rabbitmq_in_a_session_is_warned_of_pauses_that_it_would_not_bear(rabbit, queue, caplog):
    late = Late(rabbit, queue, pause=1_801, delay="hold")
    with late.running():
        late.wait_for(lambda: late.container.connected == 1)
    warnings = [record for record in caplog.records if "1801 s are more than the 1800 s" in record.getMessage()]
    assert [record.levelname for record in warnings] == ["WARNING"]


# -- in the session that has it


def held(server, queue, **options):
    broker = StompBroker(server.url, destination=queue, prefetch=3)
    return Late(server, queue, broker=broker, delay="hold", **options)


def test_a_session_with_room_goes_on_while_it_keeps_a_message(server, queue):
    late = held(server, queue, failures=9)
    late.publish(b"bad", *[b"good %d" % number for number in range(5)])
    with late.running():
        late.wait_for(lambda: late.settled() == 6)
        (parked,) = late.parked()
    assert late.bodies()[:6] == [b"bad", *[b"good %d" % number for number in range(5)]]
    instants, deliveries, numbers = late.attempts()
    assert numbers == (1, 2, 3)
    assert all(later - earlier >= PAUSE - 0.05 for earlier, later in pairwise(instants))
    assert len({message.key for message in deliveries}) == 1
    assert parked.headers["retrykit-attempts"] == "3"
    counters = late.container.counters
    # It stayed in hand all the time: nothing was given back, and nothing came twice.
    assert (counters.generations, counters.stale_frames, counters.postponed) == (1, 0, 0)
    assert (counters.received, counters.rolled_back, counters.withheld) == (8, 2, 0)


def test_a_session_that_is_full_of_kept_messages_waits_for_the_first(server, queue):
    late = held(server, queue, pause=0.5)
    bodies = [b"bad %d" % number for number in range(4)]
    late.publish(*bodies)
    with late.running():
        late.wait_for(lambda: late.settled() == 4)
    assert [late.attempts(body)[2] for body in bodies] == [(1, 2)] * 4


def test_a_kept_message_goes_back_when_its_session_ends(server, queue):
    late = held(server, queue, pause=30.0)
    late.publish(b"bad", b"good")
    with late.running():
        late.wait_for(lambda: late.settled() == 1)
    (message,) = taken(server, queue)
    assert message.body == b"bad"
    assert late.attempts()[2] == (1,)


def test_a_kept_message_whose_connection_is_lost_is_kept_again_when_it_comes(double, queue):
    late = held(double, queue, pause=1.5)
    late.publish(b"bad")
    with late.running():
        late.wait_for(lambda: late.container.counters.rolled_back == 1)
        double.drop_connections()
        late.wait_for(lambda: late.container.counters.generations == 2)
        late.publish(b"good")
        late.wait_for(lambda: late.settled() == 2)
    assert late.bodies() == [b"bad", b"good", b"bad"]
    assert late.attempts()[2] == (1, 2)
    assert late.attempts()[0][1] - late.attempts()[0][0] >= 1.45
    assert late.container.counters.withheld == 1


def test_what_was_kept_in_a_subscription_that_was_left_comes_from_the_broker(server, queue):
    with closing(StompBroker(server.url, destination=queue, prefetch=3).connect()) as session:
        Late(server, queue).publish(b"1", b"2")
        one, other = session.receive(PATIENCE), session.receive(PATIENCE)
        session.rollback(one, 0.3)
        session.rollback(other)
        found = [session.receive(PATIENCE), session.receive(PATIENCE)]
        assert sorted(message.body for message in found) == [b"1", b"2"]
        assert all(message.redelivered for message in found)
        for message in found:
            session.commit(message)
        assert session.receive(0.5) is None
