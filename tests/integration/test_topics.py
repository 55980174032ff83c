"""Topics, durable subscriptions and selectors, on the brokers that have them; their refusal on those that do not."""

from __future__ import annotations

import uuid
from collections import Counter
from contextlib import closing
from functools import partial

import pytest

from retrykit.backoff import NoBackOffPolicy
from retrykit.messaging import (
    BrokerUnavailableError,
    ListenerContainer,
    NotSupportedError,
    OutgoingMessage,
    Publisher,
    SubscriptionRefusedError,
    by_content,
    by_header,
    park,
)
from retrykit.messaging.stomp import StompBroker
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import RetryTemplate
from retrykit.testing import StompServer
from tests import waiting
from tests.servers import ActiveMq

PATIENCE = 60.0
SLOW_TO_FAIL = {"receipt_timeout": 20.0, "connect_timeout": 20.0}


@pytest.fixture(params=["embedded", "activemq"])
def activemq_kind(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["embedded_rabbit", "rabbitmq"])
def rabbitmq_kind(request):
    return request.getfixturevalue(request.param)


def is_activemq(server):
    return isinstance(server, ActiveMq) or getattr(server, "profile", "") == "activemq"


@pytest.fixture
def name():
    return uuid.uuid4().hex[:12]


@pytest.fixture
def topic(name):
    return f"/topic/news.{name}"


@pytest.fixture
def publisher(server):
    with Publisher(StompBroker(server.url, **SLOW_TO_FAIL)) as publisher:
        yield publisher


until = partial(waiting.until, seconds=PATIENCE)


def template(**options):
    return RetryTemplate(
        name="news",
        retry_policy=SimpleRetryPolicy(max_attempts=3),
        back_off_policy=NoBackOffPolicy(),
        **options,
    )


def durable(server, topic, **options):
    """A broker with a durable subscription, said in the way of its kind."""
    own = {"client_id": f"client-{topic}"} if is_activemq(server) else {"profile": "rabbitmq"}
    return StompBroker(server.url, destination=topic, durable="audit", **SLOW_TO_FAIL, **own, **options)


class Reader:
    """Handles messages, and fails with some as often as is wanted."""

    def __init__(self, broker, failures=None, **options):
        self.handled, self.attempts = [], []
        self.failures = dict(failures or {})
        options = {"template": template(), "reconnect": NoBackOffPolicy()} | options
        self.container = ListenerContainer(broker, self.handle, **options)

    def handle(self, message):
        self.attempts.append(message.text)
        if self.failures.get(message.text, 0) > 0:
            self.failures[message.text] -= 1
            raise ConnectionError(message.text)
        self.handled.append(message.text)

    def __enter__(self):
        self.container.start()
        until(lambda: self.container.connected == self.container.concurrency)
        return self

    def __exit__(self, *error):
        self.container.stop()
        assert self.container.wait(PATIENCE)


def test_every_subscriber_gets_a_topics_message_and_tries_again_for_itself(server, publisher, topic):
    broker = StompBroker(server.url, destination=topic, **SLOW_TO_FAIL)
    with Reader(broker, {"2": 2}) as one, Reader(broker) as other:
        for number in range(1, 5):
            publisher.send(topic, str(number))
        until(lambda: len(one.handled) == len(other.handled) == 4)
    assert one.handled == ["1", "2", "3", "4"]
    assert one.attempts == ["1", "2", "2", "2", "3", "4"]
    assert other.attempts == ["1", "2", "3", "4"]
    assert one.container.counters.generations == 1


def test_poison_of_a_topic_is_parked_once_and_the_rest_goes_on(server, publisher, topic, name):
    parked = f"/queue/parked.{name}"
    broker = StompBroker(server.url, destination=topic, prefetch=5, **SLOW_TO_FAIL)
    with Reader(broker, {"1": 99}, recover=park(parked)) as reader:
        publisher.send_many(OutgoingMessage(topic, str(number)) for number in range(1, 5))
        until(lambda: len(reader.handled) == 3)
        until(lambda: reader.container.counters.parked == 1)
    assert Counter(reader.attempts) == {"1": 3, "2": 1, "3": 1, "4": 1}
    with closing(StompBroker(server.url, destination=parked, **SLOW_TO_FAIL).connect()) as session:
        copy = session.receive(PATIENCE)
        assert (copy.text, copy.headers["retrykit-attempts"]) == ("1", "3")
        session.commit(copy)
        assert session.receive(0.2) is None


def test_a_durable_subscription_keeps_what_comes_while_nobody_is_there(server, publisher, topic):
    broker = durable(server, topic)
    with Reader(broker) as first:
        publisher.send(topic, "1")
        until(lambda: first.handled == ["1"])
    publisher.send(topic, "2")
    publisher.send(topic, "3")
    with Reader(broker, {"2": 1}) as second:
        until(lambda: len(second.handled) == 2)
    assert second.attempts == ["2", "2", "3"]
    publisher.send(topic, "4")
    with Reader(broker) as third:
        until(lambda: third.handled == ["4"])


def test_what_a_durable_subscriber_has_in_hand_comes_again_when_its_connection_ends(server, publisher, topic):
    broker = durable(server, topic, prefetch=3)
    with closing(broker.connect()) as session:
        publisher.send_many(OutgoingMessage(topic, str(number)) for number in range(3))
        message = session.receive(PATIENCE)
        session.rollback(message)
        # What is given back comes first on ActiveMQ, on RabbitMQ behind what is on its way.
        assert session.receive(PATIENCE).text == ("0" if is_activemq(server) else "1")
        session.close(wait=False)
    until(lambda: connects(broker))
    if is_activemq(server):
        with closing(broker.connect()) as session:
            assert not session.receive(PATIENCE).redelivered, "the flag would do"
            assert not session.capabilities.flags_while_connected
    with Reader(broker) as reader:
        until(lambda: len(reader.handled) == 3)
    assert reader.handled == ["0", "1", "2"]


def connects(broker):
    """Whether the broker has noticed that the last connection is gone."""
    try:
        broker.connect().close()
    except BrokerUnavailableError:
        return False
    return True


def test_a_message_of_a_topic_that_is_given_back_is_the_next_and_is_flagged(server, publisher, topic):
    with closing(StompBroker(server.url, destination=topic).connect()) as session:
        publisher.send(topic, "1")
        publisher.send(topic, "2")
        first = session.receive(PATIENCE)
        assert not first.redelivered
        session.send("/queue/never", b"x", {})
        session.rollback(first)
        again = session.receive(PATIENCE)
        assert (again.text, again.redelivered, again.key) == ("1", True, first.key)
        session.commit(again)
        second = session.receive(PATIENCE)
        assert second.text == "2"
        session.commit(second)
        assert session.receive(0.2) is None
        assert session.stale_frames == 0


def test_brokers_of_unknown_kinds_are_given_nothing_of_a_topic_back(activemq_kind, topic):
    broker = StompBroker(activemq_kind.url, destination=topic, profile="generic")
    with closing(broker.connect()) as session, Publisher(StompBroker(activemq_kind.url)) as publisher:
        publisher.send(topic, "1")
        session.rollback(session.receive(PATIENCE))
        message = session.receive(PATIENCE)
        assert (message.text, message.redelivered) == ("1", True)
        session.commit(message)
        assert session.receive(0.1) is None


def test_a_durable_subscription_survives_its_broker(server, publisher, topic):
    broker = durable(server, topic)
    with Reader(broker) as reader:
        publisher.send(topic, "1")
        until(lambda: reader.handled == ["1"])
    publisher.send(topic, "2")
    server.restart()
    publisher.send(topic, "3")
    with Reader(broker) as reader:
        until(lambda: len(reader.handled) == 2)
    assert reader.handled == ["2", "3"]


@pytest.mark.parametrize("profile", ["activemq", "rabbitmq"])
def test_a_durable_subscription_is_in_the_data_file(tmp_path, topic, profile):
    server = StompServer(profile=profile, data=tmp_path / "data")
    own = {"profile": "rabbitmq"} if profile == "rabbitmq" else {"client_id": "me"}
    broker = {"destination": topic, "durable": "audit", **own}
    with server:
        StompBroker(server.url, **broker).connect().close()
        server.kill()
        server.start()
        server.publish(topic, b"1")
        server.kill()
        server.start()
        consumer = StompBroker(server.url, **broker, identify=by_content())
        with closing(consumer.connect()) as session:
            assert session.receive(PATIENCE).body == b"1"


def test_a_second_session_of_one_client_is_refused_by_name(activemq_kind, topic):
    broker = durable(activemq_kind, topic)
    with closing(broker.connect()):
        with pytest.raises(BrokerUnavailableError, match=f"client-{topic} already connected"):
            broker.connect()
        # What only sends is no client by that name.
        broker.connect(consume=False).close()


def test_a_durable_subscription_of_rabbitmq_is_shared_by_several_workers(rabbitmq_kind, topic):
    broker = durable(rabbitmq_kind, topic)
    with Reader(broker, concurrency=3) as reader, Publisher(StompBroker(rabbitmq_kind.url)) as publisher:
        publisher.send_many(OutgoingMessage(topic, str(number)) for number in range(30))
        until(lambda: len(reader.handled) == 30)
    assert sorted(map(int, reader.handled)) == list(range(30))


def test_several_workers_share_a_virtual_topic_of_activemq(activemq, name):
    broker = StompBroker(activemq.url, destination=f"/queue/Consumer.audit.VirtualTopic.{name}")
    with Reader(broker, {"7": 2}, concurrency=3) as reader, Publisher(StompBroker(activemq.url)) as publisher:
        publisher.send_many(OutgoingMessage(f"/topic/VirtualTopic.{name}", str(number)) for number in range(20))
        until(lambda: len(reader.handled) == 20)
    assert sorted(map(int, reader.handled)) == list(range(20))
    assert reader.attempts.count("7") == 3


# -- selectors


def test_a_selector_takes_some_messages_and_leaves_the_others(activemq, name):
    queue = f"/queue/selected.{name}"
    red = StompBroker(activemq.url, destination=queue, selector="colour = 'red' AND size > 2", **SLOW_TO_FAIL)
    colours = ["red", "blue", "red", "green"]
    with Publisher(StompBroker(activemq.url)) as publisher:
        for number, colour in enumerate(colours):
            publisher.send(queue, str(number), {"colour": colour, "size": "3"})
        publisher.send(queue, "small", {"colour": "red", "size": "2"})
    # Giving back makes the subscription anew: with its selector.
    with Reader(red, {"0": 2}) as reader:
        until(lambda: len(reader.handled) == 2)
    assert sorted(reader.handled) == ["0", "2"]
    with Reader(StompBroker(activemq.url, destination=queue)) as rest:
        until(lambda: len(rest.handled) == 3)
    assert rest.handled == ["1", "3", "small"]


def test_a_durable_subscription_may_have_a_selector(activemq, topic):
    broker = durable(activemq, topic, selector="colour = 'red'")
    broker.connect().close()
    with Publisher(StompBroker(activemq.url)) as publisher:
        publisher.send(topic, "1", {"colour": "blue"})
        publisher.send(topic, "2", {"colour": "red"})
    with Reader(broker) as reader:
        until(lambda: reader.handled == ["2"])


def test_a_selector_that_cannot_be_read_stops_the_container_with_a_sentence(activemq, name):
    broker = StompBroker(activemq.url, destination=f"/queue/selected.{name}", selector="colour =")
    container = ListenerContainer(broker, print, template=template())
    container.start()
    with pytest.raises(SubscriptionRefusedError, match=r"selector: .*Exception: colour =$") as refused:
        container.wait(PATIENCE)
    assert "\tat org.apache" in refused.value.answer


def test_a_selector_stops_the_container_on_a_broker_that_would_take_no_notice(rabbitmq_kind, name):
    broker = StompBroker(rabbitmq_kind.url, destination=f"/queue/selected.{name}", selector="colour = 'red'")
    container = ListenerContainer(broker, print, template=template())
    container.start()
    with pytest.raises(NotSupportedError, match=r"selector.*'rabbitmq'.*deliver everything"):
        container.wait(PATIENCE)
    # To send needs no selector.
    broker.connect(consume=False).close()


def test_headers_of_the_subscription_may_be_given_as_they_are(activemq, name):
    queue = f"/queue/exclusive.{name}"
    exclusive = StompBroker(activemq.url, destination=queue, subscribe={"activemq.exclusive": "true"})
    with closing(exclusive.connect()) as one, closing(exclusive.connect()) as other:
        with Publisher(StompBroker(activemq.url)) as publisher:
            publisher.send_many(OutgoingMessage(queue, str(number)) for number in range(3))
        for _ in range(3):
            one.commit(one.receive(PATIENCE))
        assert other.receive(0.2) is None


@pytest.mark.parametrize("profile", ["activemq", "rabbitmq"])
@pytest.mark.parametrize("asked", [{"destination": "/topic/news.*"}, {"subscribe": {"activemq.selector": "x"}}])
def test_the_embedded_server_says_that_it_has_neither_wildcards_nor_selectors(profile, asked):
    refused = pytest.raises(BrokerUnavailableError, match="The embedded server has no")
    with StompServer(profile=profile) as server, refused:
        StompBroker(server.url, **{"destination": "/queue/a"} | asked).connect()


def test_what_a_publisher_sends_twice_is_handled_once_where_it_is_known_by_its_own_id():
    handled = []
    with StompServer() as server, Publisher(StompBroker(server.url)) as publisher:
        server.drop_before_receipt()
        publisher.send("/queue/orders", "x")
        assert server.depth("/queue/orders") == 2
        broker = StompBroker(server.url, destination="/queue/orders", identify=by_header("retrykit-id", "message-id"))
        container = ListenerContainer(broker, handled.append, template=template(remember_completed=60))
        with container:
            until(lambda: server.depth("/queue/orders") == 0)
    assert len(handled) == 1
    assert container.counters.duplicates == 1
