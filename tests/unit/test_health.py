"""Health: what a container says of itself, and the pages that tell it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from functools import partial

import pytest

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.messaging import ConsumerHealth, Consumers, Counters, Health, ListenerContainer, NoStableIdError
from retrykit.messaging.health import HealthServer
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import RetryTemplate
from retrykit.testing import StompServer
from tests import waiting

ORDERS = "/queue/orders"
PATIENCE = 20.0
QUICK = ExponentialBackOffPolicy(initial=0.001, max_interval=0.01)


@pytest.fixture
def broker():
    return MemoryBroker(ORDERS)


def container(broker, handler=lambda _message: None, **options):
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=2))
    return ListenerContainer(broker, handler, template=template, reconnect=QUICK, **options)


wait_for = partial(waiting.until, seconds=PATIENCE, look=0.002)


def ask(server, page, method="GET"):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
    try:
        connection.request(method, page)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    return answer.status, json.loads(body) if body else None


# -- what a container says


def test_a_container_is_ready_while_every_worker_is_connected(broker):
    made = container(broker, concurrency=2)
    assert made.health().reasons == ("orders has not been started",)
    with made:
        wait_for(lambda: made.health().ready)
        assert made.health().reasons == ()
        broker.refuse_connections()
        broker.drop_connections()
        wait_for(lambda: made.health().reasons == ("orders has 0 of 2 workers connected (BrokerUnavailableError)",))
        broker.refuse_connections(False)
        wait_for(lambda: made.health().ready)
    assert made.health().reasons == ("orders has ended",)


def test_why_nobody_is_connected_is_told_by_a_class_of_errors():
    with StompServer(user="shop", password="right") as server:
        refused = container(StompBroker(server.url.replace("right", "wrong"), destination=ORDERS))
        with refused:
            wait_for(lambda: refused.health().consumers[0].failure == "LoginRefusedError")
        url = server.url
    gone = container(StompBroker(url, destination=ORDERS))
    with gone:
        wait_for(lambda: gone.health().reasons == ("orders has 0 of 1 workers connected (ConnectionRefusedError)",))


def test_a_container_that_is_stopping_is_not_ready(broker):
    broker.publish("x")
    running, go_on = threading.Event(), threading.Event()

    def handler(message):
        running.set()
        assert go_on.wait(PATIENCE)

    made = container(broker, handler)
    with made:
        assert running.wait(PATIENCE)
        assert made.health().ready
        made.stop()
        assert made.health().reasons == ("orders is stopping",)
        go_on.set()


def test_a_container_that_gave_up_says_so_for_good(broker):
    def refuse(timeout=None):
        raise NoStableIdError(destination=ORDERS, broker="it", remedy="none")

    class Refusing(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            session.receive = refuse
            return session

    made = container(Refusing(ORDERS))
    with pytest.raises(NoStableIdError):
        made.run()
    assert made.health().reasons == ("orders has given up: NoStableIdError",)


def test_a_group_says_what_each_of_its_containers_says(broker):
    consumers = Consumers(broker, template=RetryTemplate(name="shop"))
    consumers.add("/queue/a", lambda _message: None)
    consumers.add("/queue/b", lambda _message: None)
    health = consumers.group().health()
    assert health.reasons == ("shop.a has not been started", "shop.b has not been started")
    assert [one.destination for one in health.consumers] == ["/queue/a", "/queue/b"]


def test_nobody_is_not_ready():
    assert not Health(()).ready
    assert not Health((), ("process 1 does not answer",)).ready


def test_health_travels_as_json():
    one = ConsumerHealth(
        name="orders",
        destination=ORDERS,
        state="running",
        workers=2,
        connected=1,
        counters=Counters(received=3, parked=1),
        failure="TimeoutError",
        process=4,
    )
    assert ConsumerHealth.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert one.reason == "process 4: orders has 1 of 2 workers connected (TimeoutError)"
    both = Health.of([Health((one,)), Health((one,), ("fault",))])
    assert (both.total.received, both.total.parked, both.faults) == (6, 2, ("fault",))


# -- counters


def test_counters_tell_what_observers_ask(broker):
    def handler(message):
        if message.text == "bad":
            raise ValueError("no")

    made = container(broker, handler, recover=lambda _message, _context: None)
    broker.publish("bad")
    broker.publish("good")
    with made:
        assert broker.wait_until_empty(PATIENCE)
        broker.drop_connections()
        wait_for(lambda: made.counters.generations == 2)
        broker.doubt_next_commit("undone")
        broker.publish("x")
        assert broker.wait_until_empty(PATIENCE)
    # What was in doubt is delivered a second time.
    assert made.counters == Counters(
        generations=3, received=5, redelivered=2, recovered=1, acknowledged=3, rolled_back=1, in_doubt=1
    )


# -- the pages


def test_the_pages_tell_a_container_as_it_is(broker):
    broker.publish("x")
    made = container(broker)
    with HealthServer(made) as server:
        assert ask(server, "/health/live") == (200, {"live": True})
        assert ask(server, "/health/ready") == (503, {"ready": False, "reasons": ["orders has not been started"]})
        with made:
            assert broker.wait_until_empty(PATIENCE)
            assert ask(server, "/health/ready?verbose") == (200, {"ready": True, "reasons": []})
            status, told = ask(server, "/health/counters")
        assert ask(server, "/health/ready")[0] == 503
    assert status == 200
    assert told["total"]["acknowledged"] == 1
    (consumer,) = told["consumers"]
    assert consumer.pop("counters") == told["total"]
    assert consumer == {
        "name": "orders",
        "destination": ORDERS,
        "state": "running",
        "workers": 1,
        "connected": 1,
        "error": "",
        "failure": "",
        "process": None,
    }


def test_a_page_that_is_not_there_names_those_that_are(broker):
    with HealthServer(container(broker)) as server:
        assert ask(server, "/metrics") == (404, {"pages": ["/health/live", "/health/ready", "/health/counters"]})
        assert ask(server, "/health/ready", method="HEAD") == (503, None)


def test_other_methods_are_refused(broker):
    with HealthServer(container(broker)) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
        connection.request("POST", "/health/ready", body=b"{}")
        assert connection.getresponse().status == 501
        connection.close()


def test_clients_that_say_nothing_keep_nobody_out(broker):
    with HealthServer(container(broker)) as server:
        idle = [socket.create_connection((server.host, server.port)) for _ in range(30)]
        assert ask(server, "/health/live")[0] == 200
        # The oldest had to go.
        idle[0].settimeout(PATIENCE)
        assert idle[0].recv(1) == b""
        for one in idle:
            one.close()


def test_nonsense_is_answered_or_hung_up_on(broker):
    with HealthServer(container(broker)) as server:
        for nonsense in (b"\0\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"):
            with socket.create_connection((server.host, server.port), timeout=PATIENCE) as client:
                client.sendall(nonsense)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65_536):
                    pass
        assert ask(server, "/health/live")[0] == 200


def test_a_fault_in_what_is_observed_is_logged_and_ends_one_request_only(caplog):
    class Broken:
        def health(self):
            raise RuntimeError("no health")

    with HealthServer(Broken()) as server:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server, "/health/ready")
        assert ask(server, "/health/live")[0] == 200
    assert "no health" in caplog.text


def test_a_port_that_is_taken_is_an_error_and_can_be_had_afterwards(broker):
    made = container(broker)
    with HealthServer(made) as first:
        second = HealthServer(made, port=first.port)
        with pytest.raises(OSError, match="in use"):
            second.start()
        with pytest.raises(RuntimeError, match="runs already"):
            first.start()
    with second:
        assert ask(second, "/health/live")[0] == 200
    second.close()


def test_it_listens_on_the_loopback_address_only_and_says_where(broker):
    with HealthServer(container(broker)) as server:
        assert server.host == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.port}/health"
    assert HealthServer(container(broker), host="::1", port=8080).url == "http://[::1]:8080/health"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"observed": 7}, "observed.*7"),
        ({"observed": ListenerContainer}, "observed"),
        ({"port": "80"}, "port.*80"),
        ({"port": True}, "port.*True"),
        ({"port": 70_000}, "port.*70000"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(broker, change, names):
    given = {"observed": container(broker)} | change
    with pytest.raises((TypeError, ValueError), match=names):
        HealthServer(given.pop("observed"), **given)
