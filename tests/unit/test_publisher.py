from __future__ import annotations

import os
import signal
import threading
import time
import warnings

import pytest

from retrykit.backoff import NoBackOffPolicy
from retrykit.errors import CommitInDoubtError
from retrykit.messaging import (
    BrokerUnavailableError,
    ListenerContainer,
    OutgoingMessage,
    Publisher,
    SendInDoubtError,
)
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.policy import NeverRetryPolicy, SimpleRetryPolicy
from retrykit.template import AsyncRetryTemplate, RetryTemplate
from retrykit.testing import StompServer

ONCE = RetryTemplate(name="publisher", retry_policy=NeverRetryPolicy())
TWICE = RetryTemplate(
    name="publisher", retry_policy=SimpleRetryPolicy(max_attempts=2), back_off_policy=NoBackOffPolicy()
)


@pytest.fixture
def broker():
    return MemoryBroker("/queue/a")


def test_a_message_is_there_when_send_returns(broker):
    with Publisher(broker) as publisher:
        id_ = publisher.send("/queue/a", b"\x00\xff", {"type": "order"})
        (message,) = broker.messages()
    assert (message.body, message.id) == (b"\x00\xff", id_)
    assert message.headers == {"type": "order", "retrykit-id": id_, "persistent": "true"}


def test_the_id_may_be_given(broker):
    with Publisher(broker) as publisher:
        assert publisher.send("/queue/a", b"", id="o-1") == "o-1"
        assert publisher.send("/queue/a", b"", {"retrykit-id": "o-2"}) == "o-2"
        assert [message.id for message in broker.messages()] == ["o-1", "o-2"]


def test_text_is_encoded_once_and_has_its_time_when_it_is_sent(broker, monkeypatch):
    class Long(str):
        encoded = 0
        __slots__ = ()

        def encode(self, *given):
            Long.encoded += 1
            return super().encode(*given)

    now = time.time()
    message = OutgoingMessage("/queue/a", Long("grün"), expires_in=60)
    monkeypatch.setattr(time, "time", lambda: now + 1_000)
    with Publisher(broker) as publisher:
        publisher.send_many([message, message])
        sent = broker.messages()
    assert [one.text for one in sent] == ["grün", "grün"]
    assert Long.encoded == 1
    assert int(sent[0].headers["retrykit-expires-at"]) == int((now + 1_060) * 1_000)


def test_text_is_sent_as_such(broker):
    with Publisher(broker) as publisher:
        publisher.send("/queue/a", "grün")
        publisher.send("/queue/a", "{}", {"content-type": "application/json"})
    plain, json = broker.messages()
    assert (plain.text, plain.content_type) == ("grün", "text/plain")
    assert json.content_type == "application/json"


def test_priority_expiry_and_transience_are_headers(broker):
    before = time.time()
    with Publisher(broker) as publisher:
        publisher.send("/queue/a", b"", priority=9, expires_in=60, persistent=False)
    (message,) = broker.messages()
    assert (message.headers["priority"], message.headers["persistent"]) == ("9", "false")
    assert before + 59 < int(message.headers["retrykit-expires-at"]) / 1000 <= time.time() + 60


def test_the_end_of_a_message_whose_headers_are_sent_on_is_not_that_of_the_new_one(broker):
    old = {"retrykit-expires-at": "1", "type": "order"}
    with Publisher(broker) as publisher:
        publisher.send("/queue/a", b"1", old)
        publisher.send("/queue/a", b"2", old, expires_in=60)
    without, with_end = broker.messages()
    assert "retrykit-expires-at" not in without.headers
    assert without.headers["type"] == "order"
    assert int(with_end.headers["retrykit-expires-at"]) / 1000 > time.time()


def test_a_message_that_has_expired_is_delivered_to_nobody(broker):
    with Publisher(broker) as publisher:
        publisher.send("/queue/a", b"old", expires_in=0.001)
        publisher.send("/queue/a", b"new")
    deadline = time.time() + 0.001
    while time.time() <= deadline:
        pass
    session = broker.connect()
    assert session.receive(1).body == b"new"
    assert session.receive(0) is None
    session.close()


@pytest.mark.parametrize("fate", ["done", "undone"])
def test_what_was_not_confirmed_is_sent_again_under_the_same_id(broker, fate):
    broker.doubt_next_commit(fate)
    with Publisher(broker, template=TWICE) as publisher:
        id_ = publisher.send("/queue/a", b"x", expires_in=60)
    messages = broker.messages()
    assert [message.id for message in messages] == [id_] * (2 if fate == "done" else 1)
    assert len({message.headers["retrykit-expires-at"] for message in messages}) == 1


def test_a_consumer_with_marks_sees_what_was_sent_twice_once(broker):
    broker.doubt_next_commit("done")
    with Publisher(broker, template=TWICE) as publisher:
        publisher.send("/queue/a", b"x")
    handled = []
    template = RetryTemplate(name="orders", remember_completed=60)
    with ListenerContainer(broker, handled.append, template=template) as container:
        assert broker.wait_until_empty()
    assert len(handled) == 1
    assert container.counters.duplicates == 1


def test_if_no_confirmation_comes_at_all_the_error_says_that_nobody_knows(broker):
    broker.doubt_next_commit("done")
    with Publisher(broker, template=ONCE) as publisher, pytest.raises(SendInDoubtError, match="o-1") as doubt:
        publisher.send("/queue/a", b"x", id="o-1")
    assert doubt.value.ids == ("o-1",)
    assert isinstance(doubt.value.__cause__, CommitInDoubtError)
    assert len(broker.messages()) == 1


def test_a_doubt_is_not_hidden_by_what_a_later_try_came_to(broker):
    broker.doubt_next_commit("done")

    class Refusing:
        def delay(self, context):
            broker.refuse_connections()
            return 0.0

    template = RetryTemplate(
        name="publisher", retry_policy=SimpleRetryPolicy(max_attempts=2), back_off_policy=Refusing()
    )
    with Publisher(broker, template=template) as publisher, pytest.raises(SendInDoubtError) as doubt:
        publisher.send("/queue/a", b"x")
    assert isinstance(doubt.value.__cause__, BrokerUnavailableError)


def test_a_broker_that_is_not_there_is_told_as_such_and_nothing_was_sent(broker):
    broker.refuse_connections()
    with Publisher(broker, template=TWICE) as publisher:
        with pytest.raises(BrokerUnavailableError):
            publisher.send("/queue/a", b"x")
        broker.refuse_connections(False)
        publisher.send("/queue/a", b"y")
    assert [message.body for message in broker.messages()] == [b"y"]


def test_a_connection_that_was_lost_meanwhile_costs_no_attempt(broker):
    with Publisher(broker, template=ONCE) as publisher:
        publisher.send("/queue/a", b"1")
        broker.drop_connections()
        publisher.send("/queue/a", b"2")
    assert [message.body for message in broker.messages()] == [b"1", b"2"]


@pytest.mark.parametrize("profile", ["activemq", "rabbitmq"])
def test_a_server_that_hung_up_a_moment_ago_leaves_nobody_in_doubt(profile):
    with StompServer(profile=profile) as server, Publisher(StompBroker(server.url), template=ONCE) as publisher:
        publisher.send("/queue/a", b"1")
        server.restart()
        # The thread that stands by need not have had its turn.
        publisher.send("/queue/a", b"2")
        assert len(server.messages("/queue/a")) == 2


def test_several_messages_are_one_transaction(broker):
    broker.doubt_next_commit("undone")
    orders = [OutgoingMessage("/queue/a", str(number), id=f"o-{number}") for number in range(3)]
    with Publisher(broker, template=ONCE) as publisher:
        with pytest.raises(SendInDoubtError) as doubt:
            publisher.send_many(orders)
        assert doubt.value.ids == ("o-0", "o-1", "o-2")
        assert broker.messages() == ()
        assert publisher.send_many(iter(orders)) == ["o-0", "o-1", "o-2"]
        assert publisher.send_many([]) == []
    assert [message.text for message in broker.messages()] == ["0", "1", "2"]


def test_threads_may_share_it(broker):
    def send(number):
        for place in range(20):
            publisher.send("/queue/a", f"{number}.{place}")

    with Publisher(broker) as publisher:
        threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    texts = [message.text for message in broker.messages()]
    assert len(texts) == 80
    assert all(
        [text for text in texts if text[0] == number]
        == sorted((text for text in texts if text[0] == number), key=lambda text: int(text[2:]))
        for number in "0123"
    )


def test_it_starts_no_thread(broker):
    before = threading.active_count()
    with Publisher(broker) as publisher:
        publisher.send("/queue/a", b"x")
        assert threading.active_count() == before


def test_a_closed_publisher_sends_no_more(broker):
    with Publisher(broker) as publisher:
        pass
    publisher.close()
    with pytest.raises(RuntimeError, match="closed"):
        publisher.send("/queue/a", b"x")


@pytest.mark.parametrize(
    ("arguments", "options", "names"),
    [
        (("", b""), {}, "destination"),
        ((7, b""), {}, "destination"),
        (("/queue/a", {"id": 7}), {}, "body"),
        (("/queue/a", None), {}, "body"),
        (("/queue/a", b"", {"a": 1}), {}, "headers"),
        (("/queue/a", b"", {"receipt": "r"}), {}, "headers: 'receipt'"),
        (("/queue/a", b"", {"persistent": "false"}), {}, "headers: 'persistent'"),
        (("/queue/a", b"", {"message-id": "m"}), {}, "headers: 'message-id'"),
        (("/queue/a", b""), {"id": ""}, "id"),
        (("/queue/a", b""), {"id": 7}, "id"),
        (("/queue/a", b""), {"priority": 10}, "priority"),
        (("/queue/a", b""), {"priority": -1}, "priority"),
        (("/queue/a", b""), {"priority": True}, "priority"),
        (("/queue/a", b""), {"priority": "9"}, "priority"),
        (("/queue/a", b""), {"expires_in": 0}, "expires_in"),
        (("/queue/a", b""), {"expires_in": "soon"}, "expires_in"),
        (("/queue/a", b""), {"expires_in": float("inf")}, "expires_in"),
        (("/queue/a", b""), {"persistent": "no"}, "persistent"),
    ],
)
def test_a_wrong_argument_is_refused_by_name_before_anything_is_connected(broker, arguments, options, names):
    broker.refuse_connections()
    with Publisher(broker) as publisher, pytest.raises((ValueError, TypeError), match=names):
        publisher.send(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda _: Publisher(MemoryBroker), "broker: must be a broker.*type"),
        (lambda _: Publisher("stomp://localhost"), "broker"),
        (lambda broker: Publisher(broker, template=AsyncRetryTemplate()), "template"),
        (lambda broker: Publisher(broker).send_many([b"x"]), "messages"),
    ],
)
def test_what_is_no_broker_template_or_message_is_refused(broker, make, names):
    with pytest.raises(TypeError, match=names):
        make(broker)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_connection_of_its_own():
    with StompServer() as server, Publisher(StompBroker(server.url, receipt_timeout=5), template=ONCE) as publisher:
        publisher.send("/queue/a", "before")
        session = publisher._session
        with publisher._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child does nothing but this
            child = os.fork()
            if not child:
                signal.alarm(20)
                try:
                    publisher.send("/queue/a", "child")
                    publisher.close()
                    os._exit(0)
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
        assert status == 0
        publisher.send("/queue/a", "after")
        assert publisher._session is session
        assert [message.body for message in server.messages("/queue/a")] == [b"before", b"child", b"after"]
