"""What is sent arrives as it was, with bodies of all kinds and sizes and headers with anything in them, or expires."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing

import attrs
import pytest

from retrykit.backoff import FixedBackOffPolicy
from retrykit.messaging import (
    BrokerRefusedError,
    ListenerContainer,
    OutgoingMessage,
    Publisher,
    SendInDoubtError,
    park,
)
from retrykit.messaging.stomp import StompBroker
from retrykit.messaging.stomp.profiles import ACTIVEMQ
from retrykit.policy import NeverRetryPolicy, SimpleRetryPolicy
from retrykit.template import RetryTemplate
from tests.servers import RabbitMq, Wire, is_rabbit

PATIENCE = 60.0
LARGE = 10_000_000
LARGE_SECONDS = 30.0
ODD = "a:b\\c\nd\re \t ü 日本 😀"
ALL_BYTES = bytes(range(256)) * 3


@pytest.fixture
def publisher(server):
    # What the profile knows of headers would be told before the broker can.
    profile = None if is_rabbit(server) else attrs.evolve(ACTIVEMQ, longest_header=None)
    with Publisher(StompBroker(server.url, receipt_timeout=LARGE_SECONDS, profile=profile)) as publisher:
        yield publisher


@pytest.fixture
def take(server, queue):
    """Take the next message out of the queue."""
    with closing(StompBroker(server.url, destination=queue, prefetch=10).connect()) as session:

        def take(patience=PATIENCE):
            message = session.receive(patience)
            if message is not None:
                session.commit(message)
            return message

        yield take


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", None),
        (b"\x00", None),
        (ALL_BYTES, None),
        (ALL_BYTES, "application/octet-stream"),
        (b"\n\n\x00\n\nMESSAGE\n\n\x00", None),
        ("grün 😀", "text/plain; charset=utf-8"),
        ("", "text/plain; charset=utf-8"),
        ("with a NUL: \x00, and more behind it 😀", "text/plain; charset=utf-8"),
        ('{"a": "\\u00e9"}', "application/json"),
        ("grün".encode("latin-1"), "text/plain; charset=iso-8859-1"),
        ("grün".encode("utf-16"), "text/plain; charset=utf-16"),
        (b"\xff\xfe not what it says", "text/plain"),
    ],
)
def test_a_body_arrives_as_it_was_sent(publisher, take, queue, body, content_type):  # noqa: PLR0917 - two are examples
    headers = {} if content_type is None else {"content-type": content_type}
    publisher.send(queue, body, headers)
    publisher.send(queue, b"the next one")
    message = take()
    assert message.body == (body.encode() if isinstance(body, str) else body)
    assert message.headers.get("content-type") == content_type
    assert take().body == b"the next one"


@pytest.mark.parametrize("kind", ["bytes", "text"])
def test_ten_megabytes_go_both_ways(publisher, take, queue, kind):
    body = os.urandom(LARGE) if kind == "bytes" else "0123456789ü" * (LARGE // 12)
    began = time.monotonic()
    publisher.send(queue, body)
    message = take()
    assert time.monotonic() - began < LARGE_SECONDS
    assert (message.body if kind == "bytes" else message.text) == body


def test_a_handler_sends_ten_megabytes_on(server, publisher, queue):
    body = os.urandom(LARGE)
    publisher.send(queue, body)
    copies = StompBroker(server.url, destination=f"{queue}.copies", receipt_timeout=LARGE_SECONDS)
    broker = StompBroker(server.url, destination=queue, receipt_timeout=LARGE_SECONDS)

    def handler(message):
        message.send(copies.destination, message.body)

    with (
        ListenerContainer(broker, handler, template=RetryTemplate(name="copies")),
        closing(copies.connect()) as session,
    ):
        message = session.receive(PATIENCE)
        assert message.body == body
        session.commit(message)


def test_text_is_text_and_bytes_are_bytes_to_peers_that_tell_them_apart(activemq, queue):
    # ActiveMQ gives a JMS BytesMessage with its length, a TextMessage without.
    with Publisher(StompBroker(activemq.url)) as publisher, Wire(activemq.host, activemq.port) as wire:
        publisher.send(queue, "text")
        publisher.send(queue, b"bytes")
        publisher.send(queue, b"{}", {"content-type": "application/json"})
        publisher.send(queue, "gr\xfcn".encode("latin-1"), {"content-type": "text/plain; charset=latin-1"})
        wire.subscribe(queue, prefetch=10)
        frames = [wire.message() for _ in range(4)]
    assert ["content-length" in frame.headers for frame in frames] == [False, True, False, True]


WRITTEN_BY_JAVA = b"caf\xc3\xa9 \xed\xa0\xbd\xed\xb8\x80 \xc0\x80 end"
READ_AS = "caf\xe9 \N{GRINNING FACE} \0 end"


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_text_is_what_java_writes_and_reads(request, queue, kind):
    server = request.getfixturevalue(kind)
    broker = StompBroker(server.url, destination=queue)
    with Publisher(broker) as publisher, Wire(server.host, server.port) as wire:
        # The broker keeps the body of a TextMessage as it is, whoever sends it.
        wire.frame("SEND", {"destination": queue, "amq-msg-type": "text"}, WRITTEN_BY_JAVA)
        with closing(broker.connect()) as session:
            message = session.receive(PATIENCE)
            assert (message.text, message.body) == (READ_AS, READ_AS.encode())
            session.commit(message)
        publisher.send(queue, READ_AS)
        wire.subscribe(queue)
        frame = wire.message()
    assert frame.body == WRITTEN_BY_JAVA
    assert "content-length" not in frame.headers


def test_what_a_handler_sends_as_text_is_called_text(server, publisher, queue):
    publisher.send(queue, b"x", {"reply-to": f"{queue}.answers"})
    answers = StompBroker(server.url, destination=f"{queue}.answers")

    def handler(message):
        message.reply("grün", priority=7, expires_in=600)

    broker = StompBroker(server.url, destination=queue)
    with ListenerContainer(broker, handler, template=RetryTemplate(name="x")), closing(answers.connect()) as session:
        answer = session.receive(PATIENCE)
        assert (answer.text, answer.content_type) == ("grün", "text/plain")
        assert answer.headers["priority"] == "7"
        end = int(answer.headers["retrykit-expires-at"])
        assert 0 < end / 1000 - time.time() <= 600
        # In the broker's own words: an instant for ActiveMQ, a time for RabbitMQ.
        assert answer.headers.get("expires") == str(end) or 0 < int(answer.headers["expiration"]) <= 600_000
        session.commit(answer)


def test_names_and_values_of_headers_arrive_as_they_were(publisher, take, queue):
    odd = {"plain": ODD, "na:me\\": "x", "empty": "", "spaces": "  x  ", "ünï 日本": "y", "colons": ":::", "cr": "\r"}
    publisher.send(queue, b"x", odd)
    headers = take().headers
    assert {name: headers.get(name) for name in odd} == odd


def test_a_nul_in_a_header_of_a_producer_is_replaced_and_the_message_can_be_parked(server, take, queue):
    def handler(_message):
        raise ConnectionError

    template = RetryTemplate(name="nul", retry_policy=NeverRetryPolicy())
    with Wire(server.host, server.port, virtual_host=None) as peer:
        peer.publish(f"{queue}.all", b"x", **{"amqp-message-id": "m", "odd": "x\0RECEIPT", "receipt-id": "r-1"})
    broker = StompBroker(server.url, destination=f"{queue}.all")
    recover = park(queue, headers=("odd",))
    with ListenerContainer(broker, handler, template=template, recover=recover) as container:
        message = take()
        assert (message.body, message.headers["odd"]) == (b"x", "x\ufffdRECEIPT")
        assert container.counters.generations == 1


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_headers_of_peers_with_another_version_arrive_too(server, publisher, queue, version):
    value = ODD if version == "1.2" else ODD.replace("\r", "")
    with Wire(server.host, server.port, version=version, virtual_host=None) as peer:
        publisher.send(queue, b"to the peer", {"odd": value})
        peer.subscribe(queue)
        frame = peer.message()
        assert (frame.headers["odd"], frame.body) == (value, b"to the peer")
        settles = {"id": frame.headers["ack"]} if version == "1.2" else {"message-id": frame.headers["message-id"]}
        peer.ask("ACK", **{"subscription": "1", **settles})
        peer.ask("UNSUBSCRIBE", id="1")
        peer.publish(queue, b"from the peer", odd=value, amqp_message_id="m-1")
    with closing(StompBroker(server.url, destination=queue).connect()) as session:
        message = session.receive(PATIENCE)
        assert (message.headers["odd"], message.body) == (value, b"from the peer")
        session.commit(message)


@pytest.mark.parametrize("headers", [{"a": "x\0y"}, {"a\0b": "x"}, {"": "x"}, {"a": "\ud83d"}])
def test_what_no_header_can_carry_is_refused_and_nothing_is_sent(double, queue, headers):
    with Publisher(StompBroker(double.url)) as publisher:
        with pytest.raises(ValueError, match="headers"):
            publisher.send_many([OutgoingMessage(queue, b"1"), OutgoingMessage(queue, b"2", headers)])
        publisher.send(queue, b"3")
    assert [message.body for message in double.messages(queue)] == [b"3"]


# -- the publisher on brokers


def test_a_message_that_was_confirmed_is_there_with_its_id(publisher, take, queue):
    id_ = publisher.send(queue, b"x", id="order-7")
    message = take()
    assert (id_, message.headers["retrykit-id"]) == ("order-7", "order-7")
    assert message.headers.get("persistent") == "true"


def test_many_messages_arrive_in_their_order(publisher, take, queue):
    ids = publisher.send_many(OutgoingMessage(queue, str(number)) for number in range(50))
    messages = [take() for _ in range(50)]
    assert [message.text for message in messages] == [str(number) for number in range(50)]
    assert [message.headers["retrykit-id"] for message in messages] == ids


def unwanted(server, queue):
    """What this broker refuses: ActiveMQ a header that is too long, RabbitMQ a destination with a slash too many."""
    if is_rabbit(server):
        return OutgoingMessage(f"{queue}/such", b"2")
    return OutgoingMessage(queue, b"2", {"long": "x" * 11_000})


def test_what_the_broker_refuses_is_told_and_nothing_of_it_was_sent(server, publisher, take, queue):
    with pytest.raises(BrokerRefusedError):
        publisher.send_many([OutgoingMessage(queue, b"1"), unwanted(server, queue)])
    publisher.send(queue, b"3")
    assert take().body == b"3"


@pytest.mark.parametrize("moment", ["drop_before_commit", "drop_before_receipt", "drop_after_receipt"])
def test_a_connection_that_is_cut_costs_no_message(double, queue, moment):
    with Publisher(StompBroker(double.url)) as publisher:
        getattr(double, moment)()
        id_ = publisher.send(queue, b"x")
        publisher.send(queue, b"y")
    found = [message for message in double.messages(queue) if message.body == b"x"]
    assert {message.headers["retrykit-id"] for message in found} == {id_}
    assert len(found) == (2 if moment == "drop_before_receipt" else 1)
    assert len(double.messages(queue)) == len(found) + 1


def test_a_receipt_that_does_not_come_leaves_the_message_in_doubt(double, queue):
    once = RetryTemplate(name="publisher", retry_policy=NeverRetryPolicy())
    broker = StompBroker(double.url, receipt_timeout=0.2)
    with Publisher(broker, template=once) as publisher:
        double.drop_before_receipt()
        with pytest.raises(SendInDoubtError, match=r"order-7.*closed"):
            publisher.send(queue, b"x", id="order-7")
    assert [message.headers["retrykit-id"] for message in double.messages(queue)] == ["order-7"]


def test_a_publisher_outlives_its_broker(tmp_path, activemq, queue):
    template = RetryTemplate(name="publisher")
    with Publisher(StompBroker(activemq.url), template=template) as publisher:
        publisher.send(queue, b"1")
        activemq.restart()
        publisher.send(queue, b"2")
    with closing(StompBroker(activemq.url, destination=queue, prefetch=2).connect()) as session:
        for body in b"1", b"2":
            message = session.receive(PATIENCE)
            assert message.body == body
            session.commit(message)


@pytest.mark.parametrize("kind", ["activemq", "rabbitmq"])
def test_whatever_was_confirmed_is_there_though_the_broker_was_killed(request, queue, kind):
    real = request.getfixturevalue(kind)
    reading = StompBroker(real.url, destination=queue, prefetch=100, connect_timeout=20.0, receipt_timeout=20.0)
    reading.connect().close()
    if isinstance(real, RabbitMq):
        real.keep_queues()
    patient = RetryTemplate(
        name="publisher",
        retry_policy=SimpleRetryPolicy(max_attempts=None, no_retry_for=(BrokerRefusedError,)),
        back_off_policy=FixedBackOffPolicy(0.1),
    )
    confirmed = {}

    def send(number):
        for place in range(40):
            body = f"{number}.{place}"
            confirmed[publisher.send(queue, body)] = body

    with Publisher(StompBroker(real.url, connect_timeout=20.0), template=patient) as publisher:
        threads = [threading.Thread(target=send, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        while len(confirmed) < 30 and all(thread.is_alive() for thread in threads):
            threads[0].join(0.001)
        real.kill()
        real.start()
        for thread in threads:
            thread.join()
    found = {}
    with closing(reading.connect()) as session:
        while (message := session.receive(PATIENCE if len(found) < len(confirmed) else 0.5)) is not None:
            found.setdefault(message.headers["retrykit-id"], message.text)
            session.commit(message)
    assert len(confirmed) == 120
    assert found == confirmed


# -- an end in time, and an order of importance


def test_a_message_that_has_expired_is_delivered_to_nobody(server, publisher, queue):
    publisher.send(queue, b"old", expires_in=0.2)
    publisher.send(queue, b"new", expires_in=600)
    threading.Event().wait(0.5)
    with closing(StompBroker(server.url, destination=queue).connect()) as session:
        message = session.receive(PATIENCE)
        assert message.body == b"new"
        session.commit(message)
        assert session.receive(0.3) is None


def test_a_broker_of_a_kind_that_is_not_known_is_not_asked_to_drop_messages(embedded, queue):
    with (
        Publisher(StompBroker(embedded.url, profile="generic")) as publisher,
        pytest.raises(ValueError, match="expires_in"),
    ):
        publisher.send(queue, b"x", expires_in=60)
    assert embedded.messages(queue) == []


def test_a_queue_with_priorities_gives_the_important_first(rabbitmq, queue):
    declare = {"x-max-priority": "9"}
    broker = StompBroker(rabbitmq.url, destination=queue, declare=declare)
    with Publisher(broker) as publisher:
        for priority in (1, 9, 4):
            publisher.send(queue, str(priority), priority=priority)
    with closing(broker.connect()) as session:
        for expected in "941":
            message = session.receive(PATIENCE)
            assert (message.text, message.headers["priority"]) == (expected, expected)
            session.commit(message)


def test_activemq_is_told_the_priority(activemq, queue):
    with Publisher(StompBroker(activemq.url)) as publisher:
        publisher.send(queue, b"x", priority=8)
    with closing(StompBroker(activemq.url, destination=queue).connect()) as session:
        message = session.receive(PATIENCE)
        assert message.headers["priority"] == "8"
        session.commit(message)


def test_what_is_not_persistent_does_not_survive_the_broker(double, queue):
    with Publisher(StompBroker(double.url)) as publisher:
        publisher.send(queue, b"gone", persistent=False)
        publisher.send(queue, b"kept")
    double.restart()
    assert [message.body for message in double.messages(queue)] == [b"kept"]
