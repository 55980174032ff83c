"""What brokers and stomp.py do to those who trust them, and the tests that say it does not happen here.

| pitfall | tests (here, if no other file is named) |
|---|---|
| ABORT redelivers nothing | `test_stomp_server*.py` (abort), `BrokerContract` (rolled_back) |
| NACK makes a dead letter on ActiveMQ, a hot loop on RabbitMQ | `…makes_no_dead_letter`, `…is_no_hot_loop` |
| RabbitMQ's `message-id` is no key | `test_container_on_brokers.py` (stable_id, known_again) |
| `redelivered` is forgotten | `…forgets_the_flag_forgets_no_attempt` |
| `redelivered` is invented | `…flag_of_the_producers…`, `…prefetched_by_somebody_else…` |
| nobody counts deliveries | `test_container_on_brokers.py` (quorum_queue), `BrokerContract` (counted) |
| another consumer gets what comes again | `tests/fault/test_under_fire.py` (however_many_processes) |
| SEND and ACK are not one on RabbitMQ | `…refused_late_acknowledges_nothing`, `tests/fault/test_under_fire.py` |
| classic queues forget ACKs in a crash | `test_container_on_brokers.py` (forgets_acknowledgements) |
| an old ACK acknowledges another message | `BrokerContract` (an_earlier_one_was_given) |
| Nagle, and delayed acknowledgements | `…go_out_at_once`, `…does_not_wait_for_a_delayed_acknowledgement` |
| a listener that raises ends the connection | `…nobody_expects_disturb_nothing`, `…that_raises_keeps_its_connection` |
| a slow handler ends the connection | `test_container_on_brokers.py` (slower_than_the_heart_beat) |
| heart-beats end with a reconnection | `…go_on_after_a_reconnection` |
| leaving, connecting, sending waits for ever | `…though_nobody_answers`, `test_stomp_broker.py`, `…nobody_reads_ends` |
| binary bodies are mangled | `BrokerContract` (body_arrives_unchanged) |
| messages are not persistent | `…are_persistent`, `…outlives_its_connection…` |
| text becomes bytes for JMS | `…text_is_text…` |
"""

from __future__ import annotations

import gc
import socket
import statistics
import threading
import time
import uuid
from contextlib import closing, contextmanager
from functools import partial

import pytest

from retrykit import ExponentialBackOffPolicy, FixedBackOffPolicy, RetryTemplate, SimpleRetryPolicy
from retrykit.errors import CommitInDoubtError
from retrykit.messaging import BrokerRefusedError, ConnectionLostError, ListenerContainer, park
from retrykit.messaging.stomp import StompBroker
from tests import waiting
from tests.servers import Wire
from tests.servers.proxy import TcpProxy

PATIENCE = 60.0
QUICK = ExponentialBackOffPolicy(initial=0.01, max_interval=0.2, jitter="full")


@pytest.fixture(params=["embedded", "activemq"])
def active(request):
    return request.getfixturevalue(request.param)


until = partial(waiting.until, seconds=PATIENCE)


def send(server, queue, *bodies, **headers):
    with closing(StompBroker(server.url).connect(consume=False)) as session:
        for body in bodies:
            session.send(queue, body, headers)
        session.commit()


def raw(server):
    return Wire(server.host, server.port, virtual_host=None)


class Handler:
    """Fails `failures` times, and remembers the numbers of its attempts and the flags of the deliveries."""

    def __init__(self, failures=0):
        self.failures = failures
        self.attempts = []
        self.flags = []

    def __call__(self, message, context):
        self.attempts.append(context.attempt)
        self.flags.append(message.redelivered)
        if len(self.attempts) <= self.failures:
            raise ConnectionError


def consumer(server, queue, handler, *, back_off=None, **options):
    policy = {} if back_off is None else {"back_off_policy": back_off}
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=4), **policy)
    broker = StompBroker(server.url, destination=queue, **options)
    return ListenerContainer(broker, handler, template=template, recover=park(f"{queue}.parked"), reconnect=QUICK)


# -- NACK


def test_a_failed_attempt_makes_no_dead_letter(active, queue):
    body = uuid.uuid4().hex.encode()
    send(active, queue, body)
    with consumer(active, queue, Handler(failures=3)) as container:
        until(lambda: container.counters.acknowledged == 1)
    with raw(active) as wire:
        wire.subscribe("/queue/ActiveMQ.DLQ", prefetch=1000)
        assert body not in {frame.body for frame in wire.messages()}


def test_a_pause_is_no_hot_loop(server, queue):
    send(server, queue, b"x")
    with consumer(server, queue, Handler(failures=2), back_off=FixedBackOffPolicy(0.3)) as container:
        until(lambda: container.counters.acknowledged == 1)
    assert (container.counters.received, container.counters.rolled_back) == (3, 2)


# -- the flag


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_a_restart_that_forgets_the_flag_forgets_no_attempt(request, queue, kind):
    server = request.getfixturevalue(kind)
    handler = Handler(failures=2)
    send(server, queue, b"x")
    container = consumer(server, queue, handler, back_off=FixedBackOffPolicy(1.5))
    with container:
        until(lambda: container.counters.rolled_back == 1)
        if kind == "embedded":
            server.kill()
            server.start()
        else:
            server.restart()
        until(lambda: container.counters.acknowledged == 1)
    assert handler.attempts == [1, 2, 3]
    assert False in handler.flags[1:], "it was not forgotten"


def test_a_flag_of_the_producers_is_no_failed_attempt(server, queue):
    handler = Handler()
    with raw(server) as wire:
        wire.publish(queue, b"x", redelivered="true", retrykit_id="m-1", amqp_message_id="m-1")
    with consumer(server, queue, handler) as container:
        until(lambda: container.counters.acknowledged == 1)
    assert handler.attempts == [1]


def test_what_was_prefetched_by_somebody_else_is_no_failed_attempt(server, queue):
    send(server, queue, *(b"%d" % number for number in range(5)))
    other = StompBroker(server.url, destination=queue, prefetch=10).connect()
    assert other.receive(PATIENCE).body == b"0"
    other.close(wait=False)
    handler = Handler()
    with consumer(server, queue, handler) as container:
        until(lambda: container.counters.acknowledged == 5)
    assert any(handler.flags)
    assert handler.attempts == [1] * 5


# -- sends


def test_a_send_that_is_refused_late_acknowledges_nothing(rabbit, queue):
    send(rabbit, queue, b"x")
    other = f"{queue}.quorum"
    with closing(StompBroker(rabbit.url, destination=other, declare={"x-queue-type": "quorum"}).connect()):
        pass
    broker = StompBroker(rabbit.url, destination=queue)
    with closing(broker.connect()) as session:
        message = session.receive(PATIENCE)
        session.send(other, b"y", {})
        with pytest.raises(BrokerRefusedError, match="inequivalent arg"):
            session.commit(message)
    with closing(broker.connect()) as session:
        assert session.receive(PATIENCE).body == b"x"


def test_messages_are_persistent(server, queue):
    send(server, queue, b"kept")
    with raw(server) as wire:
        wire.subscribe(queue)
        assert wire.message().headers.get("persistent") == "true"


def test_a_message_that_is_not_to_be_persistent_outlives_its_connection_all_the_same(server, queue):
    # Twice: for a queue that is there, and for one that is not. RabbitMQ would make one that goes with the connection.
    send(server, queue, b"1", persistent="false")
    send(server, queue, b"2", persistent="false")
    with raw(server) as wire:
        wire.subscribe(queue, prefetch=2)
        for body in (b"1", b"2"):
            frame = wire.message()
            assert (frame.body, frame.headers.get("persistent")) in ((body, None), (body, "false"))


def test_text_is_text_for_peers_that_tell_it_from_bytes(activemq, queue):
    send(activemq, queue, "Grüße".encode(), **{"content-type": "text/plain"})
    send(activemq, queue, b"\xff\x00", **{"content-type": "application/octet-stream"})
    with raw(activemq) as wire:
        wire.subscribe(queue, prefetch=10)
        text, binary = wire.message(), wire.message()
    # Of JMS's kinds of messages only those of bytes have a length.
    assert "content-length" not in text.headers
    assert text.body == "Grüße".encode()
    assert (binary["content-length"], binary.body) == ("2", b"\xff\x00")


# -- sockets


def sockets_to(port):
    """Every socket of this process that is connected to a port."""
    found = []
    for each in [one for one in gc.get_objects() if isinstance(one, socket.socket)]:
        try:
            peer = each.getpeername()
        except OSError:
            continue
        found += [each] if peer[1:2] == (port,) else []
    return found


def test_small_frames_go_out_at_once(embedded_rabbit, queue):
    with closing(StompBroker(embedded_rabbit.url, destination=queue).connect()):
        (mine,) = [
            each
            for each in sockets_to(embedded_rabbit.port)
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) != bytes(16)
        ]
        assert mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_confirmation_does_not_wait_for_a_delayed_acknowledgement(server, queue):
    send(server, queue, *[b"x"] * 31)
    taken = []
    with closing(StompBroker(server.url, destination=queue).connect()) as session:
        for _ in range(31):
            message = session.receive(PATIENCE)
            began = time.monotonic()
            session.commit(message)
            taken.append(time.monotonic() - began)
    # A kernel that holds an acknowledgement back does so for 40 ms, and for every one of them: no busy machine does.
    assert statistics.quantiles(taken, n=10)[0] < 0.04, taken


class Peer:
    """A server that says and hears what a test wants."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        # Small, so that whoever sends is soon out of room.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.url = f"stomp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.connection = None
        self.ready = threading.Event()
        self.heard = b""
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self):
        self.connection, _ = self.listener.accept()
        self.read(b"\0")
        self.connection.sendall(b"CONNECTED\nversion:1.2\nserver:ActiveMQ/5\nheart-beat:0,0\n\n\0")
        self.ready.set()

    def read(self, until):
        """Hear, up to this."""
        while until not in self.heard:
            self.heard += self.connection.recv(65536)
        heard, _, self.heard = self.heard.partition(until)
        return heard

    def close(self):
        self.thread.join(PATIENCE)
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


@contextmanager
def peer():
    with closing(Peer()) as found:
        yield found


def test_a_send_that_nobody_reads_ends(queue):
    with peer() as nobody:
        session = StompBroker(nobody.url, send_timeout=0.5, receipt_timeout=0.5).connect(consume=False)
        with closing(session), pytest.raises((ConnectionLostError, CommitInDoubtError)):
            send_much(session, queue)


def send_much(session, queue):
    for _ in range(200):
        session.send(queue, bytes(1 << 20), {})
    session.commit()


def test_leaving_takes_a_bounded_time_though_nobody_answers(queue):
    with peer() as nobody:
        session = StompBroker(nobody.url).connect(consume=False)
        left = threading.Event()
        leaving = threading.Thread(target=lambda: (session.close(), left.set()), daemon=True)
        leaving.start()
        assert left.wait(PATIENCE / 3)


ODD = (
    b"RECEIPT\nreceipt-id:nobody-asked\n\n\0",
    b"MESSAGE\n\n\xff\xfe\0",
    b"MESSAGE\nsubscription:of-an-earlier-life\nmessage-id:1\nack:1\n\nold\0",
    b"MESSAGE\nsubscription:s-1\nmessage-id:2\nack:2\ncontent-length:3\n\n\xff\x00\xfe\0",
    b"\n\n\n",
)


def test_frames_that_nobody_expects_disturb_nothing():
    with peer() as odd:
        connected = []
        broker = StompBroker(odd.url, destination="/queue/a")
        connecting = threading.Thread(target=lambda: connected.append(broker.connect()))
        connecting.start()
        assert odd.ready.wait(PATIENCE)
        subscribe = odd.read(b"\0")
        receipt = next(line for line in subscribe.splitlines() if line.startswith(b"receipt:"))[8:]
        odd.connection.sendall(b"".join(ODD[:1]) + b"RECEIPT\nreceipt-id:" + receipt + b"\n\n\0" + b"".join(ODD[1:]))
        connecting.join(PATIENCE)
        (session,) = connected
        message = session.receive(PATIENCE)
        assert (message.id, message.body) == ("2", b"\xff\x00\xfe")
        assert session.stale_frames == 2
        session.close(wait=False)


def test_a_handler_that_raises_keeps_its_connection(server, queue):
    send(server, queue, b"1", b"2", b"3")
    with consumer(server, queue, Handler(failures=5)) as container:
        until(lambda: container.counters.acknowledged + container.counters.parked == 3)
    assert container.counters.generations == 1


def test_heart_beats_go_on_after_a_reconnection(server, queue):
    with TcpProxy(server.port) as proxy:
        container = consumer(Proxied(server, proxy), queue, Handler(), heart_beat=0.4)
        with container:
            until(lambda: container.connected == 1)
            proxy.cut()
            until(lambda: container.counters.generations == 2 and container.connected == 1)
            # Several heart-beats without a message: whoever is silent is thought dead, on either side.
            threading.Event().wait(2.5)
            send(server, queue, b"x")
            until(lambda: container.counters.acknowledged == 1)
        assert container.counters.generations == 2


class Proxied:
    """A server as it is seen through a proxy."""

    def __init__(self, server, proxy):
        self.url = proxy.via(server.url)
