"""What a broker's ERROR frame comes to: one sentence, the whole text for those who look, and a verdict."""

from __future__ import annotations

from contextlib import closing

import pytest

from retrykit.messaging import BrokerUnavailableError, ListenerContainer, LoginRefusedError, SubscriptionRefusedError
from retrykit.messaging.stomp import StompBroker
from retrykit.messaging.stomp.refusals import sentence, unanswered, whole_text
from retrykit.template import RetryTemplate
from retrykit.testing import StompServer

JAVA = (
    b"javax.jms.InvalidSelectorException: region = = 'EU'\n"
    b"\tat org.apache.activemq.selector.SelectorParser.parse(SelectorParser.java:89)\n"
    b"\tat java.base/java.lang.Thread.run(Thread.java:840)\n"
    b"Caused by: org.apache.activemq.selector.ParseException: Encountered ...\n\t... 3 more\n"
)


@pytest.mark.parametrize(
    ("message", "body", "told"),
    [
        ("region = = 'EU'", JAVA, "javax.jms.InvalidSelectorException: region = = 'EU'"),
        ("Bad CONNECT", b"Access refused for user 'x'\n", "Bad CONNECT: Access refused for user 'x'"),
        ("not_found", b"NOT_FOUND - no queue 'q' in vhost '/'", "NOT_FOUND - no queue 'q' in vhost '/'"),
        ("", b"", ""),
        ("no such\nqueue", b"", "no such queue"),
        ("x", b"\xff\xfe", "x: \ufffd\ufffd"),
        ("x", b"a" * 20_000, "x: " + "a" * 497),
    ],
)
def test_an_error_is_one_sentence_that_says_nothing_twice(message, body, told):
    assert sentence(message, body) == told


def test_the_stack_is_in_the_whole_text():
    assert whole_text("region = = 'EU'", JAVA).count("\tat ") == 2
    assert len(whole_text("x", b"a" * 20_000)) == 10_002


@pytest.mark.parametrize(
    ("reason", "encrypted", "hinted"),
    [
        ("the connection was closed", False, True),
        ("the connection was closed: [Errno 104] Connection reset by peer", False, True),
        ("the connection was closed", True, False),
        ("it did not answer in 10 s", False, False),
    ],
)
def test_a_server_that_hangs_up_without_a_word_may_want_tls(reason, encrypted, hinted):
    assert ("stomp+ssl://" in unanswered(reason, encrypted=encrypted)) is hinted


def test_a_login_that_is_refused_has_a_class_of_its_own_and_says_all_that_the_broker_said():
    with StompServer(user="shop", password="right") as server:
        broker = StompBroker(server.url.replace("right", "wrong"), destination="/queue/orders")
        with pytest.raises(LoginRefusedError, match="did not let us in") as refused:
            broker.connect()
    assert isinstance(refused.value, BrokerUnavailableError)
    assert refused.value.answer


def test_what_all_servers_have_in_common_is_the_class_of_the_error():
    with StompServer(user="shop", password="right") as first, StompServer(user="shop", password="right") as second:
        ports = first.port, second.port
        url = "failover:({})".format(",".join(f"stomp://shop:wrong@127.0.0.1:{port}" for port in ports))
        with pytest.raises(LoginRefusedError, match=rf"{ports[0]}: the broker sent ERROR.*"):
            StompBroker(f"{url}?randomize=false", destination="/queue/orders").connect()
        second.stop()
        with pytest.raises(BrokerUnavailableError) as mixed:
            StompBroker(f"{url}?randomize=false", destination="/queue/orders").connect()
    assert type(mixed.value) is BrokerUnavailableError
    assert isinstance(mixed.value.__cause__, ConnectionRefusedError)


def test_a_subscription_that_contradicts_its_queue_is_not_tried_for_ever():
    with StompServer(profile="rabbitmq") as server:
        with closing(StompBroker(server.url, destination="/queue/orders").connect()):
            pass
        broker = StompBroker(server.url, destination="/queue/orders", declare={"x-queue-type": "quorum"})
        container = ListenerContainer(broker, lambda _message: None, template=RetryTemplate(name="orders"))
        with pytest.raises(SubscriptionRefusedError, match=r"declare.*inequivalent arg") as refused, container:
            assert container.wait(20)
    assert container.counters.generations == 0
    assert "precondition_failed" in refused.value.answer


def test_a_queue_that_is_not_there_yet_is_waited_for():
    with StompServer(profile="rabbitmq") as server, pytest.raises(BrokerUnavailableError, match="NOT_FOUND"):
        StompBroker(server.url, destination="/amq/queue/missing").connect()
