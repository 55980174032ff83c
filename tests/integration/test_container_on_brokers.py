"""The main job: a handler in a database transaction, fed by a broker that forgets, loses connections and dies."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from contextlib import closing
from functools import partial

import attrs
import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select
from sqlalchemy.orm import sessionmaker

from retrykit.backoff import ExponentialBackOffPolicy, FixedBackOffPolicy, NoBackOffPolicy
from retrykit.errors import CommitInDoubtError
from retrykit.messaging import (
    BrokerRefusedError,
    BrokerUnavailableError,
    ConnectionLostError,
    ListenerContainer,
    NoStableIdError,
    NotSupportedError,
    Publisher,
    Republish,
    by_content,
    by_header,
    park,
    republish,
)
from retrykit.messaging.recoverers import original_headers
from retrykit.messaging.stomp import StompBroker
from retrykit.messaging.stomp.profiles import ACTIVEMQ
from retrykit.policy import SimpleRetryPolicy
from retrykit.sql import SqlRetryContextCache, sqlite_engine
from retrykit.template import RetryTemplate
from retrykit.testing import StompServer
from tests import waiting
from tests.servers import RabbitMq, StompErrorFrame, Wire, is_rabbit
from tests.servers.rabbitmq import USER

PATIENCE = 90.0
QUICK = ExponentialBackOffPolicy(initial=0.01, max_interval=0.2, jitter="full")
SLOW_TO_FAIL = {"receipt_timeout": 20.0, "connect_timeout": 20.0}

metadata = MetaData()
effects = Table("effects", metadata, Column("number", Integer, primary_key=True), Column("body", String))


@pytest.fixture(params=["activemq", "rabbitmq"])
def real(request):
    return request.getfixturevalue(request.param)


class Job:
    """Handles numbered messages into a table: those that divide by 5 fail twice, those by 7 always."""

    def __init__(self, directory, server, queue, **options):
        self.server, self.queue, self.parked = server, queue, f"{queue}.parked"
        self.engine = sqlite_engine(f"sqlite:///{directory}/job.db")
        metadata.create_all(self.engine)
        self.cache = SqlRetryContextCache(self.engine)
        self.attempts = Counter()
        self.lock = threading.Lock()
        self.before_return = lambda _message: None
        template = RetryTemplate(
            name="orders",
            retry_policy=SimpleRetryPolicy(max_attempts=3),
            back_off_policy=ExponentialBackOffPolicy(initial=0.001, max_interval=0.01),
            context_cache=self.cache,
            remember_completed=3600,
        )
        self.container = ListenerContainer(
            StompBroker(server.url, destination=queue, **SLOW_TO_FAIL),
            self.handle,
            template=template,
            transaction=sessionmaker(self.engine).begin,
            recover=park(self.parked),
            reconnect=QUICK,
            **options,
        )

    def handle(self, message, context):
        number = int(message.text)
        with self.lock:
            self.attempts[number] += 1
        context.transaction.execute(insert(effects).values(body=message.text))
        if number % 7 == 0 or (number % 5 == 0 and context.attempt < 3):
            raise ConnectionError(f"number {number}, attempt {context.attempt}")
        self.before_return(message)

    def publish(self, numbers):
        session = StompBroker(self.server.url).connect(consume=False)
        for number in numbers:
            session.send(self.queue, str(number).encode(), {"content-type": "text/plain"})
        session.flush()
        session.commit()
        session.close()

    def make_queues(self):
        """Have the queues survive a crash of the broker, which those that were just made may not on RabbitMQ."""
        for queue in (self.queue, self.parked):
            StompBroker(self.server.url, destination=queue, **SLOW_TO_FAIL).connect().close()
        if isinstance(self.server, RabbitMq):
            self.server.keep_queues()

    def effects(self):
        with self.engine.connect() as connection:
            return Counter(int(body) for (body,) in connection.execute(select(effects.c.body)))

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE
        pause = threading.Event()
        while not condition():
            assert time.monotonic() < deadline, f"{self.container.counters} {sorted(self.effects().items())}"
            pause.wait(0.02)

    def run(self, numbers, disturb=lambda _job: None):
        """Consume the numbers to their end; what lies in the parking queue then."""
        good = {number for number in numbers if number % 7}
        poison = [number for number in numbers if number % 7 == 0]
        with self.container:
            disturb(self)
            self.wait_for(lambda: set(self.effects()) == good)
            self.wait_for(lambda: self.container.counters.parked + self.container.counters.in_doubt >= len(poison))
            parked = self.take_parked(len(poison))
        self.engine.dispose()
        return parked

    def take_parked(self, count):
        """Everything in the parking queue: the expected number, and then nothing more."""
        session = StompBroker(self.server.url, destination=self.parked, **SLOW_TO_FAIL).connect()
        found = []
        while (message := session.receive(PATIENCE if len(found) < count else 0.5)) is not None:
            found.append(message)
            session.commit(message)
        session.close()
        return found


@pytest.fixture
def job(tmp_path, server, queue):
    return Job(tmp_path, server, queue)


def check(job, numbers, parked, extra_attempts=0):
    if is_rabbit(job.server):
        # What is sent and the acknowledgement are not one transaction there: a copy may come twice, under one id.
        parked = list({message.id: message for message in parked}.values())
    assert job.effects() == Counter(number for number in numbers if number % 7)
    assert sorted(int(message.text) for message in parked) == [number for number in numbers if number % 7 == 0]
    assert all(message.headers["retrykit-attempts"] == "3" for message in parked)
    assert all(count <= 3 + extra_attempts for count in job.attempts.values()), job.attempts


def test_every_effect_happens_once_and_poison_is_parked_once(job):
    numbers = range(1, 41)
    job.publish(numbers)
    parked = job.run(numbers)
    check(job, numbers, parked)
    counters = job.container.counters
    assert (counters.parked, counters.in_doubt, counters.generations) == (5, 0, 1)
    assert parked[0].headers["content-type"] == "text/plain"
    assert parked[0].headers["retrykit-error-type"] == "builtins.ConnectionError"
    assert parked[0].headers["retrykit-error"] == "number 7, attempt 3"
    assert json.loads(parked[0].headers["retrykit-key"])[-1] == parked[0].headers["retrykit-id"]


def test_there_is_one_redelivery_for_each_failed_attempt(job):
    numbers = range(1, 11)
    job.publish(numbers)
    job.run(numbers)
    counters = job.container.counters
    # 5 and 10 fail twice, 7 three times and is parked in its third delivery.
    assert (counters.rolled_back, counters.redelivered, counters.received) == (6, 6, 16)


def test_several_workers_keep_the_count_of_each_message(tmp_path, server, queue):
    job = Job(tmp_path, server, queue, concurrency=3)
    numbers = range(1, 41)
    job.publish(numbers)
    check(job, numbers, job.run(numbers))
    assert job.container.counters.generations >= 3


def test_a_broker_killed_in_the_middle_loses_and_repeats_nothing(tmp_path, real, queue):
    job = Job(tmp_path, real, queue, concurrency=2)
    job.make_queues()
    numbers = range(1, 61)
    job.publish(numbers)

    def kill(job):
        job.wait_for(lambda: len(job.effects()) >= 10)
        real.kill()
        real.start()

    check(job, numbers, job.run(numbers, kill), extra_attempts=1)
    assert job.container.counters.generations > 2


def test_a_broker_that_comes_late_is_waited_for(tmp_path, real, queue):
    job = Job(tmp_path, real, queue)
    job.publish([1])
    real.stop()
    assert job.run([1], lambda _job: real.start()) == []
    assert job.attempts[1] == 1


@pytest.mark.parametrize("moment", ["drop_before_commit", "drop_before_receipt", "drop_after_receipt"])
def test_a_commit_that_is_not_confirmed_repeats_and_loses_nothing(tmp_path, double, queue, moment):
    job = Job(tmp_path, double, queue)
    numbers = range(1, 16)
    job.publish(numbers)
    getattr(double, moment)(times=6)
    try:
        parked = job.run(numbers)
    finally:
        double.clear_faults()
    check(job, numbers, parked)
    counters = job.container.counters
    assert counters.generations >= 7
    if moment != "drop_after_receipt":
        assert counters.in_doubt == 6
        # What the database committed and the broker did not is answered from the completion marks.
        assert (counters.duplicates > 0) == (moment == "drop_before_commit")


@pytest.mark.parametrize("moment", ["drop_before_commit", "drop_before_receipt"])
def test_a_parking_that_is_not_confirmed_parks_once(tmp_path, double, queue, moment):
    job = Job(tmp_path, double, queue)
    job.publish([7])
    getattr(double, moment)(times=1)
    try:
        parked = job.run([7])
    finally:
        double.clear_faults()
    check(job, [7], parked)
    assert job.container.counters.in_doubt == 1


def test_a_receipt_that_does_not_come_in_time_is_a_commit_in_doubt(tmp_path, double, queue):
    job = Job(tmp_path, double, queue)
    job.container.broker = StompBroker(double.url, destination=queue, receipt_timeout=0.2)
    job.publish([1, 2])

    slowed = []

    def slow_down_once(message):
        if not slowed:
            slowed.append(double.delay_receipts(60.0))

    def speed_up(job):
        job.wait_for(lambda: job.container.counters.in_doubt)
        double.clear_faults()

    job.before_return = slow_down_once
    try:
        parked = job.run([1, 2], speed_up)
    finally:
        double.clear_faults()
    check(job, [1, 2], parked)


def test_connections_cut_while_handlers_run_roll_back_and_come_again(tmp_path, double, queue):
    job = Job(tmp_path, double, queue)
    cut = []

    def cut_once(message):
        if not cut:
            cut.append(double.drop_connections())

    job.before_return = cut_once
    job.publish([1, 2, 3])
    job.run([1, 2, 3])
    assert job.effects() == {1: 1, 2: 1, 3: 1}
    assert job.container.counters.generations == 2


def test_a_handler_slower_than_the_heart_beat_keeps_its_connection(tmp_path, server, queue):
    job = Job(tmp_path, server, queue)
    job.container.broker = StompBroker(server.url, destination=queue, heart_beat=0.4)
    job.before_return = lambda _message: threading.Event().wait(1.5)
    job.publish([1])
    job.run([1])
    assert job.attempts[1] == 1
    assert job.container.counters.generations == 1


def test_a_pause_longer_than_the_heart_beat_keeps_the_connection(tmp_path, server, queue):
    job = Job(tmp_path, server, queue)
    job.container.broker = StompBroker(server.url, destination=queue, heart_beat=0.4)
    job.container.template = attrs.evolve(job.container.template, back_off_policy=FixedBackOffPolicy(1.2))
    job.publish([5])
    job.run([5])
    assert job.container.counters.generations == 1


def test_a_password_is_in_no_log(caplog):
    caplog.set_level(logging.DEBUG)
    with StompServer(user="me", password="open sesame") as server:
        url = server.url.replace("://", "://me:open%20sesame@")
        with closing(StompBroker(url, destination="/queue/a").connect()) as session:
            assert session.receive(0.01) is None
        with pytest.raises(BrokerUnavailableError) as refused:
            StompBroker(url.replace("me:", "you:"), destination="/queue/a").connect()
    assert "sesame" not in caplog.text + str(refused.value)
    assert "SUBSCRIBE" in caplog.text


def send_plainly(server, queue, body, **headers):
    """Send as somebody does who knows nothing of this library."""
    with Wire(server.host, server.port, virtual_host=None) as wire:
        wire.publish(queue, body, **headers)


def test_a_message_without_a_stable_id_stops_the_container_loudly(rabbit, queue):
    send_plainly(rabbit, queue, b"1")
    broker = StompBroker(rabbit.url, destination=queue)
    container = ListenerContainer(broker, lambda _message: None, template=RetryTemplate(name="orders"))
    container.start()
    with pytest.raises(NoStableIdError, match=r"amqp-message-id.*by_header.*by_content"):
        container.wait(PATIENCE)
    with closing(StompBroker(rabbit.url, destination=queue, identify=by_content()).connect()) as session:
        assert session.receive(PATIENCE).body == b"1", "it is lost"


def by_its_first_letter(_headers, body):
    return f"my-{body[:1].decode()}"


@pytest.mark.parametrize(
    "example",
    [
        ({"amqp_message_id": "m-1", "order": "o-1"}, None, "m-1"),
        ({"retrykit_id": "r-1"}, None, "r-1"),
        ({"amqp_message_id": "m-1", "order": "o-1"}, by_header("order"), "o-1"),
        ({"order": "o-1"}, by_header("purchase", "order"), "o-1"),
        ({}, by_content(), by_content()({}, b"1")),
        ({}, by_its_first_letter, "my-1"),
    ],
)
def test_it_is_the_users_choice_by_what_a_message_is_known_again(rabbit, queue, example):
    headers, identify, id_ = example
    send_plainly(rabbit, queue, b"1", **headers)
    broker = StompBroker(rabbit.url, destination=queue, identify=identify)
    keys = []

    def handler(message):
        keys.append(message.key)
        if len(keys) < 3:
            raise ConnectionError

    with ListenerContainer(broker, handler, template=RetryTemplate(name="orders"), reconnect=QUICK) as container:
        until(lambda: container.counters.acknowledged == 1)
    assert keys == [(queue, id_)] * 3


@pytest.mark.parametrize(("kind", "wrong"), [("embedded_rabbit", "activemq"), ("embedded", "rabbitmq")])
def test_a_profile_that_the_server_contradicts_stops_the_container(request, queue, kind, wrong):
    server = request.getfixturevalue(kind)
    send_plainly(server, queue, b"1", amqp_message_id="m-1")
    broker = StompBroker(server.url, destination=queue, profile=wrong)
    made = ListenerContainer(broker, print, template=RetryTemplate(name="orders"), reconnect=QUICK)
    with pytest.raises(NotSupportedError, match=f"profile: '{wrong}' was given, and the server calls itself"):
        made.run()
    assert server.depth(queue) == 1


def test_an_id_that_is_no_text_is_refused(embedded_rabbit, queue):
    send_plainly(embedded_rabbit, queue, b"1", amqp_message_id="m-1")
    broker = StompBroker(embedded_rabbit.url, destination=queue, identify=lambda _headers, body: int(body))
    with closing(broker.connect()) as session, pytest.raises(NoStableIdError, match="gave 1, which is no str"):
        session.receive(PATIENCE)


def test_what_identify_finds_no_id_for_is_refused_by_its_name(embedded_rabbit, queue):
    send_plainly(embedded_rabbit, queue, b"1", amqp_message_id="m-1")
    broker = StompBroker(embedded_rabbit.url, destination=queue, identify=by_header("order", "purchase"))
    with closing(broker.connect()) as session, pytest.raises(NoStableIdError, match="'order' or 'purchase'"):
        session.receive(PATIENCE)


def test_an_identify_that_raises_stops_the_container_which_says_that_it_was_that(embedded, queue):
    send_plainly(embedded, queue, b"1")
    broker = StompBroker(embedded.url, destination=queue, identify=lambda headers, _body: headers["order"])
    made = ListenerContainer(broker, print, template=RetryTemplate(name="orders"), reconnect=QUICK)
    with pytest.raises(NoStableIdError, match=r"identify= \(<function .* raised KeyError: 'order'") as caught:
        made.run(grace=PATIENCE)
    assert isinstance(caught.value.__cause__, KeyError)
    assert (made.counters.generations, embedded.depth(queue)) == (1, 1)


def test_without_one_transaction_for_both_a_copy_may_come_twice_under_one_id(tmp_path, embedded_rabbit, queue):
    job = Job(tmp_path, embedded_rabbit, queue)
    job.publish([7])
    embedded_rabbit.drop_before_receipt(times=1)
    try:
        first, second = job.run([7])
    finally:
        embedded_rabbit.clear_faults()
    assert first.id == second.id == first.headers["retrykit-id"]


def test_a_broker_that_forgets_acknowledgements_is_answered_from_the_marks(tmp_path, rabbit, queue):
    job = Job(tmp_path, rabbit, queue)
    job.make_queues()
    numbers = [1, 2, 3, 4, 7]
    job.publish(numbers)

    def crash(job):
        job.wait_for(lambda: job.container.counters.acknowledged == 4 and job.container.counters.parked == 1)
        # Within its idle moment: none of what it confirmed is written down yet.
        rabbit.kill()
        rabbit.start()
        job.wait_for(lambda: job.container.counters.duplicates >= 1)

    check(job, numbers, job.run(numbers, crash))
    assert job.attempts == {1: 1, 2: 1, 3: 1, 4: 1, 7: 3}


@pytest.mark.parametrize("declare", [{}, {"x-queue-type": "quorum"}])
def test_a_quorum_queue_tells_the_number_of_a_delivery(rabbit, queue, declare):
    counts = []

    def handler(message):
        counts.append(message.delivery_count)
        if len(counts) < 3:
            raise ConnectionError

    broker = StompBroker(rabbit.url, destination=queue, declare=declare)
    with closing(broker.connect(consume=False)) as session:
        session.send(queue, b"x", {})
        session.commit()
    with ListenerContainer(broker, handler, template=RetryTemplate(name="orders"), reconnect=QUICK) as container:
        until(lambda: container.counters.acknowledged == 1)
    assert counts == ([1, 2, 3] if declare else [None, None, None])


def send_and_commit(session, queue):
    session.send(queue, b"x", {})
    session.flush()
    session.commit()


def test_a_queue_that_was_made_with_other_arguments_is_refused_and_nothing_is_in_doubt(rabbit, queue):
    with closing(StompBroker(rabbit.url, destination=queue, declare={"x-queue-type": "quorum"}).connect()):
        pass
    # At `flush` or at `commit`: RabbitMQ may have answered what comes next before it tells.
    refused = pytest.raises(BrokerRefusedError, match=r"inequivalent arg 'x-queue-type'")
    with closing(StompBroker(rabbit.url).connect(consume=False)) as session, refused:
        send_and_commit(session, queue)


def test_the_virtual_host_is_a_choice_with_a_default(rabbitmq, queue):
    def connect(**options):
        with closing(StompBroker(rabbitmq.url, destination=queue, **options).connect()) as session:
            return session.profile.name

    assert connect() == "rabbitmq"
    assert connect(profile="rabbitmq") == "rabbitmq"
    assert connect(host="tests") == "rabbitmq"
    with pytest.raises(BrokerUnavailableError, match="Virtual host 'elsewhere' access denied"):
        connect(host="elsewhere")


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_deliveries_of_a_subscription_that_was_left_are_dropped(tmp_path, request, queue, kind):
    server = request.getfixturevalue(kind)
    job = Job(tmp_path, server, queue)
    job.container.broker = StompBroker(server.url, destination=queue, prefetch=10)
    # With a pause the message would stay in hand.
    job.container.template = attrs.evolve(job.container.template, back_off_policy=NoBackOffPolicy())
    numbers = range(1, 31)
    job.publish(numbers)
    check(job, numbers, job.run(numbers))
    assert job.container.counters.stale_frames > 0
    assert job.container.counters.generations == 1


until = partial(waiting.until, seconds=PATIENCE)


def consumer(server, queue, handler, **options):
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3), remember_completed=60)
    broker = StompBroker(server.url, destination=queue, **SLOW_TO_FAIL)
    return ListenerContainer(broker, handler, **{"template": template, "reconnect": QUICK} | options)


def test_a_send_that_the_broker_refuses_is_a_failed_attempt(embedded, queue):
    calls = []

    def handler(message):
        calls.append(message.text)
        return Republish("no.such.kind") if message.text == "bad" else None

    embedded.publish(queue, b"bad")
    embedded.publish(queue, b"good")
    with consumer(embedded, queue, handler, recover=park(f"{queue}.parked")) as container:
        until(lambda: embedded.depth(queue) == 0)
    assert calls.count("bad") == 3
    assert (container.counters.parked, container.counters.acknowledged) == (1, 1)


def test_a_parking_that_the_broker_refuses_is_a_failed_recovery(embedded, queue, caplog):
    def handler(message):
        if message.text == "bad":
            raise ConnectionError

    embedded.publish(queue, b"bad")
    embedded.publish(queue, b"good")
    slow = FixedBackOffPolicy(3600)
    container = consumer(embedded, queue, handler, recover=park("no.such.kind"), reconnect=slow, concurrency=2)
    with container:
        # The connection is gone with the refusal; the next delivery is held by one consumer, before another try.
        until(lambda: container.counters.withheld == 1)
        until(lambda: container.counters.acknowledged == 1)
    assert (container.counters.parked, container.counters.in_doubt) == (0, 0)
    assert embedded.depth(queue) == 1
    assert any("no.such.kind" in record.getMessage() for record in caplog.records if record.levelname == "ERROR")


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_a_header_that_the_broker_cannot_take_is_refused_too(request, kind, queue):
    url, profile = request.getfixturevalue(kind).url, attrs.evolve(ACTIVEMQ, longest_header=None)
    session = StompBroker(url, **SLOW_TO_FAIL, profile=profile).connect(consume=False)
    session.send(queue, b"x", {"long": "x" * (ACTIVEMQ.longest_header - len("long:"))})
    session.commit()
    # Without what the profile knows nobody would say so before the broker does.
    session.send(queue, b"x", {"long": "x" * (ACTIVEMQ.longest_header + 1 - len("long:"))})
    with pytest.raises(BrokerRefusedError, match=f"{queue}.*header length"):
        session.flush()
    with pytest.raises(ConnectionLostError):
        session.flush()
    session.close()


def parked_of(server, queue, original, **options):
    """The parked copy of one message with these headers."""
    sender = StompBroker(server.url, **SLOW_TO_FAIL).connect(consume=False)
    sender.send(queue, b"x", original)
    sender.flush()
    sender.commit()
    sender.close()

    def handler(message):
        raise ConnectionError

    with consumer(server, queue, handler, recover=park(f"{queue}.parked", **options)) as container:
        until(lambda: container.counters.parked == 1)
    reader = StompBroker(server.url, destination=f"{queue}.parked", **SLOW_TO_FAIL).connect()
    copy = reader.receive(PATIENCE)
    reader.commit(copy)
    reader.close()
    return copy


@pytest.mark.parametrize("put", [park, republish])
def test_a_header_that_is_too_long_for_a_copy_is_left_out_and_told(server, queue, put, caplog):
    # A client of STOMP 1.0 escapes nothing: what it may send is twice as long in a copy of ours.
    value, place = ":" * 6_000, f"{queue}.copies"
    login = {} if is_rabbit(server) else {"virtual_host": "localhost"}
    with Wire(server.host, server.port, version="1.0", **{"virtual_host": None} | login) as wire:
        wire.publish(queue, b"x", **{"x-long": value, "x-short": "s", "amqp-message-id": "m-1"})

    def handler(message):
        assert message.headers["x-long"] == value
        raise ConnectionError

    with consumer(server, queue, handler, recover=put(place, headers=("x-*",))) as container:
        until(lambda: container.counters.recovered == 1)
    assert (container.counters.generations, container.counters.withheld) == (1, 0)
    with closing(StompBroker(server.url, destination=place, **SLOW_TO_FAIL).connect()) as session:
        copy = session.receive(PATIENCE)
        session.commit(copy)
    left = json.loads(copy.headers.get("retrykit-left-out", "{}"))
    assert copy.headers["x-short"] == "s"
    if is_rabbit(server):
        assert (left, copy.headers["x-long"]) == ({}, value)
    else:
        assert (left, copy.headers.get("x-long")) == ({"x-long": 12_007}, None)
        assert "its copy goes without headers that are too long for it: x-long (12007 bytes)" in caplog.text


def test_headers_that_the_broker_takes_are_all_kept_in_the_copy(server, queue):
    long = {"a": "z" * 5_000, "b": "é" * 2_500, "c": '"' * 5_000, "d": "x" * 10_000}
    if is_rabbit(server):
        long["e"] = "y" * 100_000
    copy = parked_of(server, queue, long)
    assert original_headers(copy.headers).items() >= long.items()
    assert "retrykit-left-out" not in copy.headers


def test_rabbitmq_before_its_bound_is_sent_longer_headers_whether_its_profile_is_given_or_found(rabbitmq, queue):
    long = {"long": "x" * 200_000}
    for profile in (None, "rabbitmq"):
        with Publisher(StompBroker(rabbitmq.url, profile=profile)) as publisher:
            publisher.send(queue, b"x", long)
    with closing(StompBroker(rabbitmq.url, destination=queue).connect()) as session:
        for _ in range(2):
            message = session.receive(PATIENCE)
            assert message.headers["long"] == long["long"]
            session.commit(message)


@pytest.mark.parametrize("count", [150, 200])
def test_a_message_with_many_odd_headers_can_be_parked(server, queue, count):
    headers = {f"h{number}": ":\\\n:" * 5 for number in range(count)}
    assert parked_of(server, queue, headers).headers["retrykit-attempts"] == "3"


def test_a_parked_copy_does_not_expire_with_its_original(server, queue):
    at = str(int((time.time() + 3600) * 1000))
    copy = parked_of(server, queue, {"expires": at, "x-tenant": "blue"}, headers=("*",))
    assert copy.headers.get("expires", "0") != at
    assert copy.headers["x-tenant"] == "blue"
    assert at in copy.headers["retrykit-other-headers"]


def test_a_copy_does_not_carry_what_rabbitmq_would_obey_or_refuse(rabbitmq, queue):
    ours = {"user-id": USER, "expiration": "3600000", "durable": "true", "auto-delete": "false", "x-tenant": "blue"}
    copy = parked_of(rabbitmq, queue, ours, headers=("*",))
    assert copy.headers["x-tenant"] == "blue"
    assert not {"user-id", "expiration", "durable", "auto-delete"} & set(copy.headers)
    others = json.loads(copy.headers["retrykit-other-headers"])
    assert {name: others[name] for name in ("user-id", "expiration")} == {"user-id": USER, "expiration": "3600000"}


def test_a_commit_that_is_refused_is_not_in_doubt(server, queue):
    session = StompBroker(server.url, destination=queue, **SLOW_TO_FAIL).connect(consume=False)
    session.send(queue, b"x", {})
    session.flush()
    session._transaction = "nobody began it"
    # RabbitMQ does not tell what it is that it refuses: it may be either, and neither has happened.
    with pytest.raises(BrokerRefusedError, match=r"refused (a message|the commit)"):
        session.commit()
    session.close()


def test_a_send_that_is_refused_while_the_commit_is_under_way_is_in_doubt(embedded, queue):
    session = StompBroker(embedded.url, destination=queue, **SLOW_TO_FAIL).connect(consume=False)
    session.send("no.such.kind", b"x", {})
    with pytest.raises(CommitInDoubtError):
        session.commit()
    session.close()


def test_a_destination_that_is_mistyped_is_refused_since_brokers_do_as_the_profile_says(real, queue):
    mistyped = queue.replace("/queue/", "/quene/")
    with closing(Wire(real.host, real.port, virtual_host=None if is_rabbit(real) else "localhost")) as wire:
        if is_rabbit(real):
            with pytest.raises(StompErrorFrame, match="Unknown destination"):
                wire.publish(mistyped, b"lost")
        else:
            wire.publish(mistyped, b"astray")
            wire.subscribe(f"/queue/{mistyped}")
            assert wire.next(PATIENCE).body == b"astray"
    broker = StompBroker(real.url, destination=queue)
    with Publisher(broker) as publisher:
        publisher.send(queue, b"x")
    container = ListenerContainer(broker, print, template=RetryTemplate(), recover=park(mistyped))
    with pytest.raises(NotSupportedError, match=f"recover: '{mistyped}' begins neither"):
        container.run()
    with closing(broker.connect()) as session:
        message = session.receive(PATIENCE)
        assert message.body == b"x"
        session.commit(message)
