from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, nullcontext
from types import SimpleNamespace

import attrs
import pytest

from retrykit.messaging import Consumers, ListenerContainer, Publisher, by_content, by_header, park, republish
from retrykit.messaging.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConnectionLostError,
    NotSupportedError,
)
from retrykit.messaging.stomp import StompBroker
from retrykit.messaging.stomp.address import Address, parse_address, redacted
from retrykit.messaging.stomp.frames import Frame
from retrykit.messaging.stomp.incoming import Incoming
from retrykit.messaging.stomp.profiles import ACTIVEMQ, GENERIC, RABBITMQ, profile_for
from retrykit.messaging.stomp.session import StompSession
from retrykit.messaging.stomp.sockets import PlainSocket
from retrykit.messaging.stomp.transport import Call
from retrykit.messaging.stomp.wire import Wire
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import RetryTemplate
from retrykit.testing import StompServer
from tests.waiting import until


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("stomp://host", Address("host", 61613)),
        ("stomp://host:7/queue/a", Address("host", 7, path="/queue/a")),
        ("stomp://me:p%40ss%2Fw@host:7", Address("host", 7, "me", "p@ss/w")),
        ("stomp://[::1]:7", Address("::1", 7)),
    ],
)
def test_a_url_names_host_port_credentials_and_destination(url, address):
    assert parse_address(url) == address


@pytest.mark.parametrize(
    "url",
    ["", "host:61613", "http://host", "stomp://", "stomp://host:99999", "stomp://host?x=1", "stomp://a:b%0Ac@host", 7],
)
def test_a_url_that_makes_no_sense_is_refused_by_name(url):
    with pytest.raises((ValueError, TypeError), match="url"):
        StompBroker(url, destination="/queue/a")


@pytest.mark.parametrize(
    ("destination", "name"),
    [("/queue/a", "stomp://host:7/queue/a"), ("a", "stomp://host:7 a"), ("", "stomp://host:7")],
)
def test_a_broker_is_named_by_its_address_and_destination(destination, name):
    assert StompBroker("stomp://me:secret@host:7", destination=destination).name == name


@pytest.mark.parametrize("destination", ["/quene/a", "/a", "/queue"])
def test_a_destination_that_would_silently_be_a_queue_of_its_whole_name_is_refused(destination):
    words = f"destination: '{destination}' begins neither with /queue/ nor with /topic/"
    with pytest.raises(ValueError, match=words):
        StompBroker("stomp://host", destination=destination, profile="activemq")
    with StompServer() as server:
        made = ListenerContainer(StompBroker(server.url, destination=destination), print, template=RetryTemplate())
        with pytest.raises(NotSupportedError, match=words):
            made.run()


@pytest.mark.parametrize("destination", ["/queue/a", "/topic/a", "a", "queue://a", "/temp-queue/a", ""])
def test_a_destination_that_activemq_knows_is_not_refused(destination):
    assert StompBroker("stomp://host", destination=destination, profile="activemq").destination == destination


MISPLACED = {
    "activemq": "'/quene/a' begins neither with /queue/ nor with /topic/, and brokers of the kind 'activemq' would",
    "rabbitmq": "'/quene/a' begins neither with /queue/ nor with /topic/, and brokers of the kind 'rabbitmq' refuse",
}


@pytest.mark.parametrize("recover", [park, republish])
@pytest.mark.parametrize("profile", ["activemq", "rabbitmq"])
def test_a_recovery_to_where_nothing_can_be_is_refused_before_anything_is_consumed(profile, recover):
    wrong, own = recover("/quene/a"), {"template": RetryTemplate()}
    with pytest.raises(ValueError, match=f"recover: {MISPLACED[profile]}"):
        ListenerContainer(
            StompBroker("stomp://host", destination="/queue/a", profile=profile), print, recover=wrong, **own
        )
    with pytest.raises(ValueError, match="recover: '/quene/a'"):
        Consumers(StompBroker("stomp://host", profile=profile), **own).consumer("/queue/a", recover=wrong)(print)
    with StompServer(profile=profile) as server:
        server.publish("/queue/a", b"x", {"amqp-message-id": "m-1"})
        made = ListenerContainer(StompBroker(server.url, destination="/queue/a"), print, recover=wrong, **own)
        with pytest.raises(NotSupportedError, match=f"recover: {MISPLACED[profile]}"):
            made.run()
        assert (made.counters.received, server.depth("/queue/a")) == (0, 1)


@pytest.mark.parametrize("profile", ["activemq", "rabbitmq"])
def test_nothing_is_sent_to_where_nothing_can_be_and_the_next_message_is(profile):
    with StompServer(profile=profile) as server, Publisher(StompBroker(server.url)) as publisher:
        with pytest.raises(ValueError, match=f"destination: {MISPLACED[profile]}"):
            publisher.send("/quene/a", b"x")
        with pytest.raises(ValueError, match="destination: '/queue/' has no name behind the last slash"):
            publisher.send("/queue/", b"x")
        publisher.send("/queue/a", b"x")
        assert server.depth("/queue/a") == 1


@pytest.mark.parametrize("profile", [ACTIVEMQ, attrs.evolve(RABBITMQ, longest_header=50_000)])
def test_a_header_that_is_too_long_is_named_before_anything_is_sent_and_the_next_message_goes_out(profile):
    longest = profile.longest_header
    line = f"{longest} bytes"
    with (
        StompServer(profile=profile.name) as server,
        Publisher(StompBroker(server.url, profile=profile)) as publisher,
    ):
        with pytest.raises(ValueError, match=f"headers: 'note' is too long to be sent: {longest + 1} bytes.*{line}"):
            publisher.send("/queue/a", b"x", {"note": ":" + "y" * (longest - 6)})
        with pytest.raises(ValueError, match="destination is too long to be sent"):
            publisher.send("/queue/" + "a" * longest, b"x")
        publisher.send("/queue/a", b"x", {"note": ":" + "y" * (longest - 7)})
        assert server.depth("/queue/a") == 1


def test_a_handler_that_sends_a_header_that_is_too_long_fails_and_its_message_is_parked_on_the_same_connection():
    def handler(message):
        message.send("/queue/b", b"x", {"note": "y" * 11_000})

    template = RetryTemplate(retry_policy=SimpleRetryPolicy(max_attempts=2))
    with StompServer() as server:
        server.publish("/queue/a", b"x")
        broker = StompBroker(server.url, destination="/queue/a")
        with ListenerContainer(broker, handler, template=template, recover=park("/queue/p")) as container:
            until(lambda: container.counters.parked == 1, 30)
        assert (container.counters.generations, container.counters.in_doubt) == (1, 0)
        (parked,) = server.messages("/queue/p")
        assert parked.headers["retrykit-error-type"] == "builtins.ValueError"
        assert "'note' is too long to be sent" in parked.headers["retrykit-error"]
        assert server.depth("/queue/b") == 0


def test_of_brokers_of_no_known_kind_no_header_is_too_long():
    with StompServer(profile="rabbitmq") as server:
        with Publisher(StompBroker(server.url, profile=attrs.evolve(GENERIC, longest_header=10))) as publisher:
            publisher.send("/queue/a", b"x", {"note": "y" * 11_000})
        assert server.depth("/queue/a") == 1


def test_a_profile_can_know_other_places_and_one_that_knows_none_refuses_nothing():
    own = attrs.evolve(ACTIVEMQ, places=(*ACTIVEMQ.places, "/dsub/"))
    assert StompBroker("stomp://host", destination="/dsub/a", profile=own).misplaced("/dsub/b") == ""
    assert StompBroker("stomp://host", profile=own).misplaced("/dsub/") == "'/dsub/' has no name behind the last slash"
    assert StompBroker("stomp://host", destination="/quene/a", profile="generic").misplaced("/quene/") == ""
    assert StompBroker("stomp://host").misplaced("/quene/a") == ""


@pytest.mark.parametrize(
    "start", ["/queue/", "/topic/", "/exchange/e/", "/amq/queue/", "/temp-queue/", "/reply-queue/", ""]
)
def test_a_destination_that_rabbitmq_knows_is_not_refused(start):
    assert StompBroker("stomp://host", profile="rabbitmq").misplaced(f"{start}a") == ""


def test_a_password_is_never_shown():
    broker = StompBroker("stomp://me:secret@host", destination="/queue/a")
    assert "secret" not in f"{broker!r} {broker.name} {broker.servers!r}"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@host",
        "stomp://me:secret@host:99999",
        "stomp://me:sec%00ret@host",
        "stomp://me:secret/x@host",
        "stomp://me:12/secret@host:61613/queue/a",
        "stomp://me:12?secret@host",
        "stomp://me:12#secret@host",
        "http://me:a//secret@host",
        "stomp://me:[secret]@host",
        "stomp://me:[secret@host",
        "stomp://me:secret\u2100@host",
    ],
)
def test_a_url_is_refused_without_its_password(url):
    assert "sec" not in redacted(url)
    with pytest.raises(ValueError, match="url") as refused:
        StompBroker(url, destination="/queue/a")
    assert "sec" not in f"{refused.value} {refused.value.__cause__}"
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None or refused.value.__suppress_context__


@pytest.mark.parametrize(
    "url", ["stomp://secret@host", "me:secret@host", "a//b//me:secret@host", "x://me:sec//ret@host"]
)
def test_what_may_be_a_password_is_masked_in_whatever_was_given(url):
    assert "sec" not in redacted(url)
    assert "ret" not in redacted(url)
    assert redacted(url).endswith("***@host")


def test_the_destination_is_given_or_the_path_of_the_url():
    assert StompBroker("stomp://host/queue/a").destination == "/queue/a"
    assert StompBroker("stomp://host", destination="/queue/a").name == "stomp://host:61613/queue/a"
    with pytest.raises(ValueError, match=r"destination.*'/queue/b'"):
        StompBroker("stomp://host/queue/a", destination="/queue/b")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prefetch", 0),
        ("prefetch", "1"),
        ("heart_beat", 0),
        ("connect_timeout", -1),
        ("receipt_timeout", float("nan")),
        ("send_timeout", None),
        ("send_timeout", "5"),
        ("profile", "artemis"),
        ("profile", 7),
        ("identify", "order-id"),
        ("identify", by_content),
        ("identify", by_header),
        ("identify", lambda headers: headers["order-id"]),
        ("declare", {"x-message-ttl": 1000}),
        ("declare", "x-queue-type"),
        ("destination", 7),
        ("host", 7),
        ("host", ""),
        ("host", "x\nlogin:shop\npasscode:pw"),
        ("host", "x\0"),
        ("destination", "/queue/a\0SEND"),
        ("destination", "/queue/\ud800"),
        ("declare", {"x": "a\0b"}),
        ("declare", {"": "x"}),
        ("subscribe", {"x\0": "a"}),
        ("subscribe", {"x": "\ud800"}),
    ],
)
def test_a_wrong_option_is_refused(option, value):
    with pytest.raises((ValueError, TypeError), match=option.removeprefix("receipt_").removeprefix("send_")):
        StompBroker("stomp://host", **{option: value})


def test_the_profile_is_what_the_server_calls_itself():
    assert profile_for("ActiveMQ/5.17.2") is ACTIVEMQ
    assert profile_for("RabbitMQ/4.1.0") is RABBITMQ
    assert profile_for("RabbitMQ") is RABBITMQ
    assert profile_for("RabbitMQ/3.10.8") == attrs.evolve(RABBITMQ, longest_header=None)
    assert profile_for("ActiveMQ-Artemis/2.38.0 ActiveMQ Artemis Messaging Engine") is GENERIC
    assert profile_for("Something/1.0") is GENERIC
    assert profile_for("") is GENERIC


def test_consuming_from_nowhere_is_refused_before_anything_is_connected():
    with pytest.raises(ValueError, match="destination"):
        StompBroker("stomp://127.0.0.1:1").connect()


def test_a_broker_that_is_not_there_is_unavailable(unused_port):
    with pytest.raises(BrokerUnavailableError, match=f":{unused_port}"):
        StompBroker(f"stomp://127.0.0.1:{unused_port}", destination="/queue/a").connect()


def test_a_server_that_never_answers_is_unavailable_in_time(silent_port):
    broker = StompBroker(f"stomp://127.0.0.1:{silent_port}", destination="/queue/a", connect_timeout=0.1)
    with pytest.raises(BrokerUnavailableError, match="did not answer"):
        broker.connect()


@pytest.fixture
def silent_port():
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.fixture
def unused_port():
    import socket

    # Bound but not listening: nobody else can take it, and nobody answers.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_broker_that_refused_a_frame_and_hung_up_is_heard_before_the_next_is_given_up(monkeypatch):
    wire = Wire(StompBroker("stomp://127.0.0.1:1", destination="/queue/a"), Call(Address("127.0.0.1", 1)))
    transport = wire._connection.transport
    ours, theirs = socket.socketpair()

    def write(data):
        if data.startswith(b"COMMIT"):
            theirs.sendall(b"ERROR\nmessage:no such exchange\n\n\0")
            theirs.close()
            raise BrokenPipeError

    with ours, theirs:
        transport.socket = PlainSocket(ours)
        monkeypatch.setattr(transport, "send", write)
        wire.put_confirmed("SEND", {}, b"x", "a message")
        wire.put("COMMIT", {})
        with pytest.raises(BrokerRefusedError, match="no such exchange"):
            raise wire.failure()


@contextmanager
def answering(*frames):
    """The port of a server that answers whatever it is told first with these."""

    def serve():
        live, _ = listening.accept()
        with live:
            live.recv(65_536)
            live.sendall(b"".join(frames))
            while live.recv(65_536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(10)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([b"CONNECTED\nheart-beat:often\n\n\0"], "makes no sense: ValueError"),
        ([b"CONNECTED\ncontent-length:1\n\nabc\0"], "makes no sense: .*content-length 1"),
    ],
)
def test_what_makes_no_sense_ends_the_connection_and_is_its_reason(frames, words, caplog):
    with answering(*frames) as port, pytest.raises(BrokerUnavailableError, match=words):
        StompBroker(f"stomp://127.0.0.1:{port}", destination="/queue/a").connect()
    assert "makes no sense" in caplog.text


def test_a_refusal_that_the_broker_repeats_is_told_once(monkeypatch):
    wire = Wire(StompBroker("stomp://127.0.0.1:1", destination="/queue/a"), Call(Address("127.0.0.1", 1)))
    monkeypatch.setattr(wire, "_connection", SimpleNamespace(transport=SimpleNamespace(send=lambda _: None)))
    wire.put_confirmed("SEND", {"destination": "/queue/b"}, what="a message")
    wire.on_error({"message": "no such header"}, b"")
    assert isinstance(wire.failure(), BrokerRefusedError)
    # ActiveMQ may say it again, of the rest of a frame that it has not understood.
    wire.on_error({"message": "no such header"}, b"")
    assert isinstance(wire.failure(), ConnectionLostError)


def test_the_reason_is_known_when_a_connection_that_was_lost_ends_a_wait():
    wire = Wire(StompBroker("stomp://127.0.0.1:1", destination="/queue/a"), Call(Address("127.0.0.1", 1)))
    transport = wire._connection.transport
    # As if another thread had begun to close it, and got no further.
    transport.notified_on_disconnect = True
    transport.disconnect_socket()
    assert wire.lost is not None
    assert not wire.pause(10)


def test_a_session_may_be_closed_by_another_thread_while_its_worker_looks():
    with StompServer(profile="rabbitmq") as server:
        for _ in range(20):
            session = StompBroker(server.url, destination="/queue/a").connect()
            faults = []

            def work(session=session, faults=faults):
                try:
                    while True:
                        session.flush()
                except BrokerError:
                    return
                except RuntimeError as fault:
                    faults.append(fault)

            worker = threading.Thread(target=work)
            worker.start()
            session.close()
            worker.join(10)
            assert not worker.is_alive()
            assert not faults


def test_a_server_that_hangs_once_it_has_let_us_in_is_given_no_more_time_than_later():
    with answering(b"CONNECTED\nheart-beat:60000,60000\n\n\0") as port:
        session = StompBroker(f"stomp://127.0.0.1:{port}", heart_beat=60).connect(consume=False)
        connection = session._wire._connection
        assert connection.receive_sleep == 150
        assert connection.received_heartbeat <= time.monotonic()
        session.close(wait=False)


def test_the_shortest_heart_beat_is_one():
    broker = StompBroker("stomp://127.0.0.1:1", destination="/queue/a", heart_beat=0.0001)
    assert Wire(broker, Call(Address("127.0.0.1", 1)))._connection.heartbeats == (1, 1)


def test_frames_that_belong_together_go_out_in_one_piece(monkeypatch):
    wire = Wire(StompBroker("stomp://127.0.0.1:1", destination="/queue/a"), Call(Address("127.0.0.1", 1)))
    sent = []
    monkeypatch.setattr(wire, "_connection", SimpleNamespace(transport=SimpleNamespace(send=sent.append)))
    wire.put("BEGIN", {"transaction": "t-1"}, more=True)
    wire.put("ACK", {"id": "a:1", "transaction": "t-1"}, more=True)
    assert not sent
    wire.put_confirmed("COMMIT", {"transaction": "t-1"})
    wire.put("SEND", {"destination": "/queue/b"}, b"body")
    assert sent == [
        b"BEGIN\ntransaction:t-1\n\n\0ACK\nid:a\\c1\ntransaction:t-1\n\n\0COMMIT\ntransaction:t-1\nreceipt:r-1\n\n\0",
        b"SEND\ndestination:/queue/b\n\nbody\0",
    ]


def test_an_acknowledgement_in_a_transaction_is_one_write(monkeypatch):
    with StompServer(profile="activemq") as server:
        server.publish("/queue/a", b"x")
        with closing(StompBroker(server.url, destination="/queue/a").connect()) as session:
            message = session.receive(10)
            transport = session._wire._connection.transport
            sent, send = [], transport.send
            monkeypatch.setattr(transport, "send", lambda data: sent.append(data) or send(data))
            session.commit(message)
            assert [data.count(b"\0") for data in sent] == [3]
        assert server.depth("/queue/a") == 0


@pytest.mark.parametrize("profile", ["activemq", "rabbitmq"])
def test_a_copy_is_confirmed_before_what_it_replaces_is_acknowledged(monkeypatch, profile):
    with StompServer(profile=profile) as server:
        server.publish("/queue/a", b"x", {"amqp-message-id": "m"})
        with closing(StompBroker(server.url, destination="/queue/a").connect()) as session:
            message = session.receive(10)
            wire, due = session._wire, []
            send = wire._connection.transport.send

            def write(data):
                due.append((data.partition(b"\n")[0], set(wire._awaited.values())))
                send(data)

            monkeypatch.setattr(wire._connection.transport, "send", write)
            session.put_off(message, 60.0)
    copied, acknowledged = due[0], due[1:]
    assert copied[0] == b"SEND"
    assert acknowledged
    assert all(copied[1].isdisjoint(receipts) for _, receipts in acknowledged)


def test_without_stomp_py_the_error_says_what_to_install():
    code = "import sys; sys.modules['stomp'] = None\nimport retrykit.messaging.stomp"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert 'pip install "retrykit[stomp]"' in ran.stderr


def test_the_rest_of_messaging_does_not_need_stomp_py():
    code = "import sys; import retrykit.messaging, retrykit.messaging.memory; assert 'stomp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_ids_that_the_broker_gives_need_no_look_up_of_first_deliveries():
    assert ACTIVEMQ.capabilities.flags_while_connected
    for identify in (None, by_header("order"), by_content()):
        broker = StompBroker("stomp://127.0.0.1:1", profile="activemq", identify=identify)
        can = StompSession(broker, None).capabilities
        assert can.flags_while_connected is (identify is None)
        assert can.stable_ids is (identify is None or isinstance(identify, by_content))


def test_the_flag_of_a_topics_message_is_not_believed():
    for destination in "/topic/a", "/queue/a":
        broker = StompBroker("stomp://127.0.0.1:1", destination=destination, profile="activemq")
        assert StompSession(broker, None).capabilities.flags_while_connected is (destination == "/queue/a")


async def later():
    return "me", "secret"


@pytest.mark.parametrize(
    ("url", "options", "names"),
    [
        ("stomp://host", {"credentials": ("me", "secret")}, "credentials"),
        ("stomp://host", {"credentials": later}, "credentials.*plain function"),
        ("stomp://me:secret@host", {"credentials": lambda: ("me", "secret")}, "credentials: are given twice"),
        ("failover:(stomp://a,stomp://me@b)", {"credentials": lambda: ("me", "secret")}, "credentials.*twice"),
        ("stomp+ssl://host", {"ssl_context": True}, "ssl_context"),
        ("stomp://host", {"ssl_context": ssl.create_default_context()}, r"ssl_context.*stomp\+ssl"),
        ("stomp://host/queue/a", {"durable": "audit", "client_id": "me"}, "durable.*queue"),
        ("stomp://host/topic/a", {"durable": "audit"}, "client_id"),
        ("stomp://host/topic/a", {"durable": "audit", "profile": "activemq"}, "client_id"),
        ("stomp://host/topic/a", {"durable": "", "client_id": "me"}, "durable"),
        ("stomp://host/topic/a", {"durable": "audit", "client_id": "a\nb"}, "client_id"),
        ("stomp://host/topic/a", {"durable": "audit", "client_id": "me", "profile": "generic"}, "durable.*subscribe="),
        ("stomp://host/queue/a", {"selector": "colour = 'red'", "profile": "rabbitmq"}, "selector.*rabbitmq"),
        ("stomp://host/queue/a", {"selector": 7}, "selector"),
        ("stomp://host/queue/a", {"selector": " "}, "selector"),
        ("stomp://host/queue/a", {"subscribe": {"id": "1"}}, "subscribe: 'id' is reserved"),
        ("stomp://host/queue/a", {"subscribe": {"ack": "auto"}}, "subscribe: 'ack' is reserved"),
        ("stomp://host/queue/a", {"subscribe": {"prefetch-count": "1"}}, "subscribe: .*prefetch="),
        ("stomp://host/queue/a", {"subscribe": {"activemq.prefetchSize": "1"}}, "subscribe: .*prefetch="),
        ("stomp://host/queue/a", {"subscribe": {"destination": "/queue/b"}}, "subscribe: .*destination="),
        ("stomp://host/queue/a", {"subscribe": {"receipt": "1"}}, "subscribe: 'receipt' is reserved"),
        ("stomp://host/queue/a", {"subscribe": {"browser": True}}, "subscribe"),
    ],
)
def test_options_that_contradict_each_other_or_the_broker_are_refused(url, options, names):
    with pytest.raises((ValueError, TypeError), match=names) as refused:
        StompBroker(url, **options)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "options", "at_most"),
    [
        ("stomp://host/queue/a", {}, None),
        ("stomp://host/topic/a", {}, 1),
        ("stomp://host/topic/a", {"durable": "audit", "client_id": "me"}, 1),
        ("stomp://host/topic/a", {"durable": "audit", "profile": "rabbitmq"}, None),
        ("stomp://host/exchange/a", {"profile": "rabbitmq"}, 1),
    ],
)
def test_several_workers_are_refused_where_each_would_get_every_message(url, options, at_most):
    broker = StompBroker(url, **options)
    assert broker.sessions_at_most == at_most
    with nullcontext() if at_most is None else pytest.raises(ValueError, match=r"concurrency.*at most 1.*/a"):
        ListenerContainer(broker, print, template=RetryTemplate(name="orders"), concurrency=2)


@pytest.mark.parametrize(("told", "count"), [("3", 4), ("9" * 5_000, 1), ("some", 1)])
def test_a_count_that_a_producer_made_up_ends_no_connection(told, count):
    broker = StompBroker("stomp://host", destination="/queue/a", declare={"x-queue-type": "quorum"}, profile="rabbitmq")
    headers = {"amqp-message-id": "m", "subscription": "s-1", "ack": "a", "x-delivery-count": told}
    message = Incoming(broker, profile_for("RabbitMQ")).message(Frame("MESSAGE", headers, b"x"), None)
    assert message.delivery_count == count


def test_a_login_that_is_answered_after_the_end_leaves_no_heart_beats_behind():
    with StompServer() as server:
        broker = StompBroker(server.url, heart_beat=60)
        wire = Wire(broker, Call(broker.servers.addresses[0]))
        transport = wire._connection.transport
        transport.start()
        wire.hang_up()
        transport._tell(Frame("CONNECTED", {"version": "1.2", "heart-beat": "60000,60000"}, b""))
        beats = [thread for thread in threading.enumerate() if thread is wire._connection.heartbeat_thread]
        for thread in beats:
            thread.join(5)
        assert not any(thread.is_alive() for thread in beats)
        assert not transport.is_connected()
