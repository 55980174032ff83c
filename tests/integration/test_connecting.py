"""Connections as production has them: encrypted, to one of several servers, with secrets that change."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from contextlib import closing
from functools import partial

import pytest

from retrykit.backoff import FixedBackOffPolicy
from retrykit.messaging import (
    BrokerUnavailableError,
    ConnectionLostError,
    CredentialsError,
    ListenerContainer,
    Publisher,
)
from retrykit.messaging.stomp import StompBroker
from retrykit.template import RetryTemplate
from retrykit.testing import StompServer
from tests import waiting
from tests.servers import Authority
from tests.servers.proxy import TcpProxy
from tests.servers.rabbitmq import USER

PATIENCE = 60.0


until = partial(waiting.until, seconds=PATIENCE)


# -- encrypted


@pytest.fixture(scope="module")
def embedded_tls():
    authority = Authority()
    with StompServer(ssl_context=authority.server_context()) as server:
        server.authority, server.tls_port = authority, server.port
        yield server


@pytest.fixture(params=["embedded_tls", "activemq", "rabbitmq"])
def encrypted(request):
    return request.getfixturevalue(request.param)


def over_tls(server, host="127.0.0.1"):
    credentials = server.url.partition("://")[2].rpartition("@")[0]
    return f"stomp+ssl://{credentials}{'@' if credentials else ''}{host}:{server.tls_port}"


def trusting(server):
    return server.authority.client_context()


def test_messages_of_all_sizes_come_over_tls(encrypted, queue):
    bodies = [b"", b"x", bytes(range(256)) * 4, bytes(2_000_000)]
    broker = StompBroker(over_tls(encrypted), destination=queue, ssl_context=trusting(encrypted), prefetch=4)
    with closing(broker.connect()) as session:
        for body in bodies:
            session.send(queue, body, {})
        session.commit()
        for body in bodies:
            message = session.receive(PATIENCE)
            assert message.body == body
            session.commit(message)


def test_an_authority_that_is_not_trusted_is_refused(encrypted, queue):
    for context in (Authority().client_context(), None):
        broker = StompBroker(over_tls(encrypted), destination=queue, ssl_context=context)
        with pytest.raises(
            BrokerUnavailableError, match=r"certificate was not accepted: .*(issuer|self-signed).*ssl_context"
        ) as refused:
            broker.connect()
        assert isinstance(refused.value.__cause__, ssl.SSLCertVerificationError)


def test_a_certificate_for_another_host_is_refused(encrypted, queue):
    broker = StompBroker(over_tls(encrypted, "localhost"), destination=queue, ssl_context=trusting(encrypted))
    with pytest.raises(BrokerUnavailableError, match=r"certificate was not accepted: .*localhost"):
        broker.connect()


def test_what_a_context_does_not_check_is_logged(embedded_tls, queue, caplog):
    context = trusting(embedded_tls)
    context.check_hostname = False
    with closing(StompBroker(over_tls(embedded_tls, "localhost"), destination=queue, ssl_context=context).connect()):
        assert "does not have the name in the certificate of the server checked" in caplog.text
    context.verify_mode = ssl.CERT_NONE
    with closing(StompBroker(over_tls(embedded_tls), destination=queue, ssl_context=context).connect()):
        assert "does not have the certificate of the server checked" in caplog.text


def test_a_server_that_asks_for_a_certificate_says_so(queue):
    authority = Authority()
    asking = authority.server_context()
    asking.verify_mode = ssl.CERT_REQUIRED

    def answer():
        client, _ = listening.accept()
        with client, pytest.raises(ssl.SSLError):
            asking.wrap_socket(client, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=answer)
        server.start()
        url = f"stomp+ssl://127.0.0.1:{listening.getsockname()[1]}"
        broker = StompBroker(url, destination=queue, ssl_context=authority.client_context())
        with pytest.raises(BrokerUnavailableError, match=r"CERTIFICATE_REQUIRED"):
            broker.connect()
        server.join()


def test_a_server_without_tls_is_told_as_such(queue):
    with StompServer() as plain, pytest.raises(BrokerUnavailableError, match=r"TLS was not agreed on in time"):
        StompBroker(plain.url.replace("stomp:", "stomps:"), destination=queue, connect_timeout=0.3).connect()


def test_a_server_with_tls_only_is_not_spoken_to_without(embedded_tls, queue):
    url = f"stomp://127.0.0.1:{embedded_tls.port}"
    with pytest.raises(BrokerUnavailableError, match=r"was closed.* \(does it speak TLS\? .*stomp\+ssl://\)"):
        StompBroker(url, destination=queue, connect_timeout=5).connect()


def test_a_handshake_that_never_ends_is_given_up_in_time(queue):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"stomp+ssl://127.0.0.1:{listening.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match="in time"):
            StompBroker(url, destination=queue, connect_timeout=0.2).connect()
        assert time.monotonic() - began < 5


def test_a_tls_connection_that_the_server_closes_is_lost_at_once(embedded_tls, queue):
    broker = StompBroker(over_tls(embedded_tls), destination=queue, ssl_context=trusting(embedded_tls))
    with closing(broker.connect()) as session:
        began = time.monotonic()
        threading.Timer(0.1, embedded_tls.drop_connections).start()
        with pytest.raises(ConnectionLostError, match="closed"):
            session.receive(PATIENCE)
        # Well before any heart-beat is missed.
        assert time.monotonic() - began < 5


def through(proxy, server):
    return f"stomp+ssl://127.0.0.1:{proxy.port}", trusting(server)


def test_a_tls_connection_that_hangs_is_given_up_when_no_heart_beat_comes(embedded_tls, queue):
    with TcpProxy(embedded_tls.port) as proxy:
        url, context = through(proxy, embedded_tls)
        with closing(StompBroker(url, destination=queue, ssl_context=context, heart_beat=0.2).connect()) as session:
            proxy.stall()
            with pytest.raises(ConnectionLostError, match="no heart-beat came in time"):
                session.receive(PATIENCE)


def test_a_message_may_take_longer_to_arrive_than_a_heart_beat_may_be_late(queue):
    body = bytes(40)

    def serve():
        client, _ = listening.accept()
        with client:
            client.recv(1_000)
            client.sendall(b"CONNECTED\nversion:1.2\nserver:ActiveMQ/5\nheart-beat:100,100\n\n\0")
            subscribed = client.recv(1_000)
            receipt = subscribed.partition(b"receipt:")[2].partition(b"\n")[0]
            head = b"MESSAGE\nmessage-id:1\nack:1\nsubscription:s-1\ncontent-length:%d\n\n" % len(body)
            client.sendall(b"RECEIPT\nreceipt-id:%b\n\n\0%b" % (receipt, head))
            # In all 2 s; 2.5 * 0.2 s of silence would be too much.
            for place in range(0, len(body), 2):
                done.wait(0.1)
                client.sendall(body[place : place + 2])
            client.sendall(b"\0")
            done.wait(PATIENCE)

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=serve)
        server.start()
        broker = StompBroker(f"stomp://127.0.0.1:{listening.getsockname()[1]}", destination=queue, heart_beat=0.2)
        try:
            with closing(broker.connect()) as session:
                assert session.receive(PATIENCE).body == body
                done.set()
        finally:
            done.set()
            server.join()


@pytest.fixture
def deaf(embedded_tls):
    """Servers that answer CONNECT and read no more: their URL, over TLS or not."""
    done = threading.Event()
    threads = []

    def serve(listening, context):
        client, _ = listening.accept()
        with client if context is None else context.wrap_socket(client, server_side=True) as peer:
            peer.recv(1_000)
            peer.sendall(b"CONNECTED\nversion:1.2\nserver:ActiveMQ/5\n\n\0")
            done.wait(PATIENCE)

    def start(*, tls):
        listening = socket.create_server(("127.0.0.1", 0))
        context = embedded_tls.authority.server_context() if tls else None
        threads.append(threading.Thread(target=serve, args=(listening, context)))
        threads[-1].start()
        cleanup.append(listening)
        return f"{'stomp+ssl' if tls else 'stomp'}://127.0.0.1:{listening.getsockname()[1]}"

    cleanup = []
    yield start
    done.set()
    for thread in threads:
        thread.join()
    for listening in cleanup:
        listening.close()


@pytest.mark.parametrize("tls", [True, False])
def test_a_send_that_nobody_takes_ends_in_time(embedded_tls, deaf, queue, tls):
    context = trusting(embedded_tls) if tls else None
    broker = StompBroker(deaf(tls=tls), ssl_context=context, send_timeout=0.3)
    with closing(broker.connect(consume=False)) as session:
        began = time.monotonic()
        # More than all buffers on the way can hold.
        session.send(queue, bytes(30_000_000), {})
        with pytest.raises(ConnectionLostError, match="SEND could not be sent"):
            session.flush()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("tls", [True, False])
def test_where_no_heart_beats_come_the_system_looks_after_the_connection(embedded_tls, deaf, tls, caplog):
    context = trusting(embedded_tls) if tls else None
    with closing(StompBroker(deaf(tls=tls), ssl_context=context).connect(consume=False)) as session:
        assert "the server sends no heart-beats" in caplog.text
        live = session._wire._connection.transport.socket
        live = getattr(live, "_socket", live)
        assert live.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert live.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


def test_heart_beats_that_come_are_worth_no_word(queue, caplog):
    with StompServer() as server:
        StompBroker(server.url, destination=queue).connect().close()
    assert not caplog.text


def test_a_tls_connection_that_is_cut_loses_and_repeats_nothing(embedded_tls, queue):
    handled = []
    with TcpProxy(embedded_tls.port) as proxy:
        url, context = through(proxy, embedded_tls)

        def handler(message):
            handled.append(message.body)
            if len(handled) % 5 == 0:
                proxy.cut()

        container = ListenerContainer(
            StompBroker(url, destination=queue, ssl_context=context),
            handler,
            template=RetryTemplate(name="orders", remember_completed=60),
            reconnect=FixedBackOffPolicy(0.02),
        )
        for number in range(30):
            embedded_tls.publish(queue, str(number).encode())
        with container:
            until(lambda: embedded_tls.depth(queue) == 0)
    assert set(handled) == {str(number).encode() for number in range(30)}
    assert container.counters.generations > 1


def test_an_idle_tls_connection_costs_no_time(embedded_tls, queue):
    broker = StompBroker(over_tls(embedded_tls), destination=queue, ssl_context=trusting(embedded_tls))
    with closing(broker.connect()) as session:
        before = time.process_time()
        session.receive(0.5)
        assert time.process_time() - before < 0.25


def test_a_reader_that_waits_keeps_no_writer_out(embedded_tls, queue):
    broker = StompBroker(over_tls(embedded_tls), destination=queue, ssl_context=trusting(embedded_tls), heart_beat=0.2)
    with closing(broker.connect()) as session:
        # Heart-beats go out and come in from threads of their own while large bodies do both.
        for number in range(20):
            session.send(queue, bytes([number]) * 300_000, {})
            session.commit()
            message = session.receive(PATIENCE)
            assert message.body == bytes([number]) * 300_000
            session.commit(message)


def test_a_container_consumes_over_tls(embedded_tls, queue):
    embedded_tls.publish(queue, b"1")
    broker = StompBroker(over_tls(embedded_tls), destination=queue, ssl_context=trusting(embedded_tls))
    handled = []
    with ListenerContainer(broker, handled.append, template=RetryTemplate(name="orders")) as container:
        until(lambda: container.counters.acknowledged == 1)
        embedded_tls.drop_connections()
        embedded_tls.publish(queue, b"2")
        until(lambda: container.counters.acknowledged == 2)
    assert [message.body for message in handled] == [b"1", b"2"]


# -- several servers


@pytest.fixture
def pair():
    with StompServer(user="me", password="one") as one, StompServer(user="me", password="two") as other:
        yield one, other


def failover(pair, options="?randomize=false"):
    one, other = pair
    addresses = f"stomp://me:one@127.0.0.1:{one.port},stomp://me:two@127.0.0.1:{other.port}"
    return f"failover:({addresses}){options}"


def open_connections(pair):
    return tuple(server.counters()["open_connections"] for server in pair)


def test_consumers_go_on_with_the_next_server_when_theirs_is_killed(pair, queue):
    one, other = pair
    handled = []
    container = ListenerContainer(
        StompBroker(failover(pair), destination=queue),
        lambda message: handled.append(message.body),
        template=RetryTemplate(name="orders"),
        concurrency=2,
        reconnect=FixedBackOffPolicy(0.02),
    )
    one.publish(queue, b"1")
    other.publish(queue, b"2")
    with container:
        until(lambda: handled == [b"1"])
        until(lambda: open_connections(pair) == (2, 0))
        one.kill()
        until(lambda: handled == [b"1", b"2"])
        until(lambda: other.counters()["open_connections"] == 2)
        # Nobody goes back by himself; when the second one is lost, the first is there again.
        one.start()
        one.publish(queue, b"3")
        other.kill()
        until(lambda: handled == [b"1", b"2", b"3"])


def test_a_server_that_was_lost_is_not_asked_first(pair, queue):
    broker = StompBroker(failover(pair), destination=queue)
    with closing(broker.connect()) as session:
        assert open_connections(pair) == (1, 0)
        pair[0].drop_connections()
        with pytest.raises(ConnectionLostError, match=rf"stomp://127\.0\.0\.1:{pair[0].port}/queue"):
            session.receive(PATIENCE)
    with closing(broker.connect()):
        assert open_connections(pair) == (0, 1)


def test_a_session_that_is_closed_here_is_not_lost(pair, queue):
    broker = StompBroker(failover(pair), destination=queue)
    for _ in range(3):
        with closing(broker.connect()):
            assert open_connections(pair) == (1, 0)
        until(lambda: open_connections(pair) == (0, 0))


def test_if_no_server_is_there_the_error_names_each_with_its_reason(pair, queue):
    one, other = pair
    url = failover(pair).replace("me:two", "me:wrong")
    one.stop()
    with pytest.raises(BrokerUnavailableError) as nobody:
        StompBroker(url, destination=queue).connect()
    text = str(nobody.value)
    assert f"stomp://127.0.0.1:{one.port}: [Errno" in text
    assert f"stomp://127.0.0.1:{other.port}: the broker sent ERROR: User name or password is invalid." in text
    assert "wrong" not in text
    assert "me:" not in text


def test_a_server_that_does_not_answer_is_passed_over_in_time(pair, queue):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = failover(pair).replace(f":{pair[0].port}", f":{silent.getsockname()[1]}")
        with closing(StompBroker(url, destination=queue, connect_timeout=0.3).connect()):
            assert open_connections(pair) == (0, 1)


def test_in_any_order_all_servers_are_used(pair, queue):
    broker = StompBroker(failover(pair, ""), destination=queue)
    sessions = [broker.connect() for _ in range(30)]
    one, other = open_connections(pair)
    for session in sessions:
        session.close()
    assert one + other == 30
    assert one
    assert other


def test_a_publisher_goes_on_with_the_next_server(pair, queue):
    with Publisher(StompBroker(failover(pair))) as publisher:
        publisher.send(queue, b"1")
        pair[0].kill()
        publisher.send(queue, b"2")
    assert [message.body for message in pair[1].messages(queue)] == [b"2"]


# -- secrets that change


def test_credentials_are_asked_for_at_each_connection(queue):
    secrets = iter([("me", "old"), ("me", "new")])
    with StompServer(user="me", password="new") as server:
        broker = StompBroker(server.url, destination=queue, credentials=lambda: next(secrets))
        with pytest.raises(BrokerUnavailableError, match="password is invalid"):
            broker.connect()
        with closing(broker.connect()) as session:
            assert session.receive(0.01) is None


def test_rabbitmq_is_shown_the_credentials_of_the_moment(rabbitmq, queue):
    secrets = iter([(USER, "yesterday's"), (USER, rabbitmq.password)])
    url = f"stomp://{rabbitmq.host}:{rabbitmq.port}"
    broker = StompBroker(url, destination=queue, profile="rabbitmq", credentials=lambda: next(secrets))
    with pytest.raises(BrokerUnavailableError, match=f"Access refused for user '{USER}'"):
        broker.connect()
    broker.connect().close()


def test_a_container_connects_with_the_secret_of_the_hour(queue):
    secret = ["new"]
    with StompServer(user="me", password="new") as server:
        broker = StompBroker(server.url, destination=queue, credentials=lambda: ("me", secret[0]))
        handled = []
        container = ListenerContainer(
            broker, handled.append, template=RetryTemplate(name="orders"), reconnect=FixedBackOffPolicy(0.02)
        )
        with container:
            until(lambda: server.counters()["open_connections"] == 1)
            secret[0] = "old"
            server.drop_connections()
            until(lambda: server.counters().get("errors", 0) >= 2)
            secret[0] = "new"
            server.publish(queue, b"x")
            until(lambda: len(handled) == 1)


def vault_is_sealed():
    raise PermissionError("sealed")


def test_credentials_that_cannot_be_had_are_told_with_what_was_raised(queue):
    broker = StompBroker("stomp://127.0.0.1:1", destination=queue, credentials=vault_is_sealed)
    words = r"credentials\(\) raised builtins.PermissionError"
    with pytest.raises(BrokerUnavailableError, match=words) as unavailable:
        broker.connect()
    assert isinstance(unavailable.value.__cause__, PermissionError)


class Asynchronous:
    async def __call__(self):
        return "me", "sesame"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("sesame", "a str, and not two texts"),
        (["me", 7, "sesame"], "a list, and not two texts"),
        (("me", None), r"a tuple of \(str, NoneType\), and not of two texts"),
        (("me", b"sesame"), r"a tuple of \(str, bytes\)"),
        (("me", "sesame", "open"), r"a tuple of \(str, str, str\)"),
        (("me", "sesame\n"), "there is a line break or NUL in it"),
        (Asynchronous(), "a coroutine, and credentials= must be a plain function"),
    ],
)
def test_credentials_of_a_wrong_shape_end_the_container_with_a_sentence_that_does_not_show_them(
    given, reason, queue, caplog
):
    caplog.set_level(logging.DEBUG)
    asked = given if callable(given) else lambda: given
    broker = StompBroker("failover:(stomp://127.0.0.1:1,stomp://127.0.0.1:2)", destination=queue, credentials=asked)
    container = ListenerContainer(broker, print, template=RetryTemplate(name="orders"), concurrency=2)
    container.start()
    with pytest.raises(CredentialsError, match=f"is no login: {reason}") as wrong:
        container.wait(60)
    (line,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert line.exc_info is None
    with pytest.raises(CredentialsError, match=reason), Publisher(broker) as publisher:
        publisher.send(queue, b"x")
    assert "sesame" not in f"{wrong.value}{vars(wrong.value)}{broker!r}{caplog.text}"


def test_the_log_says_why_a_container_is_not_connected(queue, caplog):
    broker = StompBroker("stomp://127.0.0.1:1", destination=queue, credentials=vault_is_sealed)
    template = RetryTemplate(name="orders")
    with ListenerContainer(broker, print, template=template, reconnect=FixedBackOffPolicy(0.01)):
        until(lambda: len(caplog.records) > 0)
    assert "orders: No connection to the broker stomp://127.0.0.1:1" in caplog.text
    assert "credentials() raised builtins.PermissionError" in caplog.text
    assert "(try 1); the next one is in 0.01 s" in caplog.text


def test_nothing_that_was_asked_for_is_logged(queue, caplog):
    caplog.set_level(logging.DEBUG)
    with StompServer(user="me", password="open sesame") as server:
        broker = StompBroker(server.url, destination=queue, credentials=lambda: ("me", "open sesame"))
        with closing(broker.connect()) as session:
            session.receive(0.01)
    assert "sesame" not in caplog.text + repr(broker)
