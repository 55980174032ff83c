"""What the embedded server has beyond the real broker: faults, a look inside, a life as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from retrykit.testing import StompServer, StompServerProcess
from retrykit.testing.stomp_server import journal, session
from tests.servers import StompErrorFrame, Wire

QUEUE = "/queue/a"


@pytest.fixture(params=["thread", "process"])
def server(request, tmp_path):
    kind = StompServer if request.param == "thread" else StompServerProcess
    with kind(data=tmp_path / "journal") as server:
        yield server


@pytest.fixture
def open_wire(server):
    wires = []

    def connect(**options):
        wires.append(Wire(server.host, server.port, **options))
        return wires[-1]

    yield connect
    for wire in wires:
        wire.close()


@pytest.fixture
def wire(open_wire):
    return open_wire()


def until(condition, seconds=20):
    """Wait for something that another thread or process brings about."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        pause.wait(0.005)


def begin_work(wire):
    """Receive a message and leave a transaction open that settles it and sends another."""
    wire.subscribe(QUEUE)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.publish("/queue/out", b"out", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    return message


# -- a look inside


def test_depths_count_what_is_ready_or_in_flight(server, wire):
    for _ in range(3):
        wire.publish(QUEUE)
    wire.subscribe(QUEUE, prefetch=2)
    wire.message()
    assert server.depths() == {QUEUE: 3}
    assert server.depth(QUEUE) == 3
    assert server.depth("/queue/unknown") == 0


def test_messages_show_what_lies_in_a_queue_and_why(server, wire):
    sent = server.publish(QUEUE, b"\0first", {"trace": "t"})
    server.publish(QUEUE, b"second")
    server.publish(QUEUE, b"third", {"AMQ_SCHEDULED_DELAY": "60000", "persistent": "false"})
    wire.subscribe(QUEUE)
    wire.message()
    first, second, third = server.messages(QUEUE)
    assert (first.message_id, first.body, first.headers["trace"]) == (sent, b"\0first", "t")
    assert [found.state for found in (first, second, third)] == ["in_flight", "ready", "scheduled"]
    assert [found.deliveries for found in (first, second, third)] == [1, 0, 0]
    assert [found.persistent for found in (first, second, third)] == [True, True, False]
    assert server.depth(QUEUE) == 2
    wire.ask("UNSUBSCRIBE", id="1")
    assert server.messages(QUEUE)[0].redelivered
    assert server.messages("/queue/unknown") == []


def test_dead_letters_are_listed(server, wire):
    wire.publish(QUEUE, b"poison")
    wire.subscribe(QUEUE)
    message = wire.message()
    wire.ask("NACK", id=message["ack"])
    (dead,) = server.dead_letters()
    assert (dead.message_id, dead.body) == (message["message-id"], b"poison")
    assert dead.headers["original-destination"] == QUEUE


def test_counters_tell_what_happened(server, wire):
    wire.publish(QUEUE)
    begin_work(wire)
    wire.ask("ABORT", transaction="t")
    wire.ask("UNSUBSCRIBE", id="1")
    begin_work(wire)
    wire.ask("COMMIT", transaction="t")
    with pytest.raises(StompErrorFrame):
        wire.ask("COMMIT", transaction="t")
    counters = server.counters()
    expected = {"connections": 1, "open_connections": 1, "sends": 3, "deliveries": 2, "redeliveries": 1, "acks": 2}
    expected |= {"commits": 1, "aborts": 1, "errors": 1}
    assert {name: counters[name] for name in expected} == expected


# -- faults


def test_a_drop_before_the_commit_undoes_everything(server, open_wire, wire):
    server.publish(QUEUE, b"in")
    message = begin_work(wire)
    server.drop_before_commit()
    wire.send("COMMIT", transaction="t", receipt="r")
    assert wire.closed()
    assert server.depth("/queue/out") == 0
    again = open_wire()
    assert begin_work(again)["message-id"] == message["message-id"]
    again.ask("COMMIT", transaction="t")
    assert server.depths() == {QUEUE: 0, "/queue/out": 1}


def test_a_drop_before_the_receipt_leaves_everything_done(server, wire):
    server.publish(QUEUE, b"in")
    begin_work(wire)
    server.drop_before_receipt()
    wire.send("COMMIT", transaction="t", receipt="r")
    with pytest.raises(ConnectionError):
        wire.await_receipt("r")
    assert server.depths() == {QUEUE: 0, "/queue/out": 1}
    server.restart()
    assert server.depth("/queue/out") == 1


def test_a_drop_after_the_receipt_lets_the_client_know(server, wire):
    server.publish(QUEUE, b"in")
    begin_work(wire)
    server.drop_after_receipt()
    wire.ask("COMMIT", transaction="t")
    assert wire.closed()
    assert server.depths() == {QUEUE: 0, "/queue/out": 1}


def test_faults_strike_as_often_as_ordered(server, open_wire):
    server.drop_before_commit(2)
    outcomes = []
    for _ in range(3):
        wire = open_wire()
        wire.ask("BEGIN", transaction="t")
        wire.send("COMMIT", transaction="t", receipt="r")
        outcomes.append(wire.closed(0.3))
    assert outcomes == [True, True, False]


def test_cleared_faults_do_not_strike(server, wire):
    server.drop_before_commit()
    server.delay_receipts(30)
    server.clear_faults()
    wire.ask("BEGIN", transaction="t")
    wire.ask("COMMIT", transaction="t")


def test_receipts_are_held_back_though_the_work_is_done(server, wire):
    server.delay_receipts(0.4)
    began = time.monotonic()
    wire.send("SEND", b"1", destination=QUEUE, receipt="r1")
    wire.send("SEND", b"2", destination=QUEUE, receipt="r2")
    until(lambda: server.depth(QUEUE) == 2)
    assert time.monotonic() - began < 0.4
    wire.await_receipt("r1")
    wire.await_receipt("r2")
    assert time.monotonic() - began >= 0.35
    wire.ask("DISCONNECT")
    assert wire.closed()


def test_connections_can_be_cut(server, open_wire):
    wires = [open_wire(), open_wire()]
    assert server.drop_connections() == 2
    assert all(wire.closed() for wire in wires)
    assert server.counters()["open_connections"] == 0


def test_flags_can_be_forgotten(server, wire):
    wire.publish(QUEUE)
    wire.subscribe(QUEUE)
    wire.message()
    wire.ask("UNSUBSCRIBE", id="1")
    server.forget_flags()
    wire.subscribe(QUEUE, "2")
    assert "redelivered" not in wire.message().headers


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5])
def test_a_fault_strikes_at_least_once(server, wrong):
    with pytest.raises(ValueError, match=r"times must be a positive number"):
        server.drop_before_commit(wrong)


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan")])
def test_a_delay_is_a_time(server, wrong):
    with pytest.raises(ValueError, match="seconds must be finite"):
        server.delay_receipts(wrong)


# -- life and death


def test_a_killed_server_keeps_what_it_receipted_and_its_port(server, wire):
    for number in range(200):
        wire.send("SEND", b"%d" % number, destination=QUEUE, persistent="true")
    wire.publish(QUEUE, b"last")
    wire.ask("SEND", b"light", destination=QUEUE)
    port = server.port
    server.kill()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((server.host, port), timeout=5).close()
    server.start()
    assert server.port == port
    assert [found.body for found in server.messages(QUEUE)] == [b"%d" % number for number in range(200)] + [b"last"]


def test_a_kill_in_the_middle_loses_nothing_that_was_confirmed(server):
    confirmed, sent = [], 0
    for _ in range(3):
        with Wire(server.host, server.port) as wire:
            killer = threading.Timer(0.1, server.kill)
            killer.start()
            try:
                while True:
                    sent += 1
                    wire.publish(QUEUE, b"%d" % sent)
                    confirmed.append(b"%d" % sent)
            except (ConnectionError, OSError):
                killer.join()
        server.start()
    kept = [found.body for found in server.messages(QUEUE)]
    assert confirmed
    assert set(confirmed) <= set(kept)
    assert len(kept) == len(set(kept))


def test_without_a_data_file_a_restart_in_process_keeps_what_is_persistent():
    with StompServer() as server:
        server.publish(QUEUE, b"kept")
        server.publish(QUEUE, b"light", {"persistent": "false"})
        with Wire(server.host, server.port) as consumer:
            consumer.subscribe(QUEUE, prefetch=10)
            consumer.message()
            with Wire(server.host, server.port) as greedy:
                greedy.subscribe(QUEUE, ack="auto")
                # Nobody inherits what another connection hands back while all of them die.
                server.restart()
        (message,) = server.messages(QUEUE)
        assert (message.body, message.redelivered, message.state) == (b"kept", False, "ready")


def test_flags_survive_a_restart_where_that_is_wanted(tmp_path):
    with StompServer(data=tmp_path / "journal", keep_flags=True) as server:
        server.publish(QUEUE, b"seen")
        server.publish(QUEUE, b"unseen")
        with Wire(server.host, server.port) as wire:
            wire.subscribe(QUEUE)
            wire.message()
            server.restart()
        assert [found.redelivered for found in server.messages(QUEUE)] == [True, False]


def test_a_scheduled_message_that_came_due_while_the_server_was_down_is_delivered(tmp_path):
    with StompServer(data=tmp_path / "journal") as server:
        server.publish(QUEUE, b"later", {"AMQ_SCHEDULED_DELAY": "50"})
        due = time.monotonic() + 0.06
        server.kill()
        until(lambda: time.monotonic() > due)
        server.start()
        assert [found.state for found in server.messages(QUEUE)] == ["ready"]


def test_a_server_that_does_not_run_says_so(tmp_path):
    for server in (StompServer(), StompServerProcess()):
        with pytest.raises(RuntimeError, match="does not run"):
            server.depths()
        server.stop()
        server.kill()


def test_a_server_starts_once(server):
    with pytest.raises(RuntimeError, match="runs already"):
        server.start()


def test_a_port_in_use_is_an_error(server):
    with pytest.raises(OSError, match="in use"):
        StompServer(port=server.port).start()
    with pytest.raises(RuntimeError, match="status 1"):
        StompServerProcess(port=server.port).start()


def test_a_disk_that_fails_stops_the_server_before_it_confirms_anything(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    with StompServer(data=tmp_path / "journal") as server, Wire(server.host, server.port) as wire:
        monkeypatch.setattr(journal.os, "fsync", fail)
        wire.send("SEND", destination=QUEUE, persistent="true", receipt="r")
        with pytest.raises(ConnectionError):
            wire.await_receipt("r")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((server.host, server.port), timeout=5).close()
        monkeypatch.undo()


# -- options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"profile": "artemis"}, "profile must be one of activemq, rabbitmq, not 'artemis'"),
        ({"port": -1}, "port must be a number from 0 to 65535, not -1"),
        ({"port": "61613"}, "port must be a number"),
        ({"user": "u"}, "user and password must be given together"),
        ({"password": "secret"}, "user and password must be given together"),
    ],
)
def test_wrong_options_are_refused_at_once(options, reason):
    with pytest.raises(ValueError, match=reason) as refused:
        StompServer(**options)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("kind", [StompServer, StompServer.process], ids=["thread", "process"])
def test_credentials_are_asked_for_and_never_repeated(kind, caplog, capfd):
    with kind(user="u", password="s3cret") as server:
        Wire(server.host, server.port, login=("u", "s3cret")).close()
        for login in [None, ("u", "wr0ng"), ("wrong", "s3cret"), ("u", "")]:
            with pytest.raises(StompErrorFrame) as refused:
                Wire(server.host, server.port, login=login)
            assert refused.value.frame["message"] == "User name or password is invalid."
    told = caplog.text + "".join(capfd.readouterr())
    assert "s3cret" not in told
    assert "wr0ng" not in told


def test_the_server_listens_on_the_loopback_address():
    with StompServer() as server:
        assert server.url == f"stomp://127.0.0.1:{server.port}"
        (listening,) = server._engine._server.sockets
        assert listening.getsockname()[0] == "127.0.0.1"


# -- stricter than the real broker


def test_fresh_messages_go_to_consumers_strictly_in_turn(server, open_wire):
    consumers = [open_wire(), open_wire()]
    for consumer in consumers:
        consumer.subscribe(QUEUE, prefetch=10)
    for number in range(6):
        server.publish(QUEUE, b"%d" % number)
    shares = [[consumer.message().body for _ in range(3)] for consumer in consumers]
    assert shares == [[b"0", b"2", b"4"], [b"1", b"3", b"5"]]


@pytest.mark.parametrize(
    ("command", "headers", "reason"),
    [
        ("SEND", {"destination": "/exchange/t"}, "only /queue/NAME and /topic/NAME, not /exchange/t"),
        ("SEND", {"destination": "/queue/"}, "only /queue/NAME and /topic/NAME, not /queue/"),
        ("SEND", {"destination": QUEUE, "AMQ_SCHEDULED_CRON": "* * * * *"}, "knows only AMQ_SCHEDULED_DELAY"),
        ("SUBSCRIBE", {"destination": QUEUE, "id": "2", "activemq.prefetchSize": "0"}, "must be a positive number: 0"),
        ("SUBSCRIBE", {"destination": QUEUE, "id": "1"}, "The subscription id is in use already: 1"),
        ("CONNECT", {"accept-version": "1.2", "heart-beat": "soon"}, "Already connected."),
    ],
)
def test_what_the_server_does_not_have_is_refused(wire, command, headers, reason):
    wire.subscribe(QUEUE)
    wire.frame(command, headers)
    assert reason in wire.error()["message"]


def test_heart_beats_that_are_no_numbers_are_refused(open_wire):
    wire = open_wire(connect=False)
    with pytest.raises(StompErrorFrame) as refused:
        wire.connect("soon,0")
    assert refused.value.frame["message"] == "Invalid heart-beat header: soon,0"
    assert wire.closed()


def test_only_so_many_ended_deliveries_are_remembered(monkeypatch):
    monkeypatch.setattr(session, "STALE_IDS", 1)
    with StompServer() as server, Wire(server.host, server.port) as wire:
        server.publish(QUEUE, b"1")
        server.publish(QUEUE, b"2")
        wire.subscribe(QUEUE, prefetch=2)
        forgotten, remembered = wire.message()["ack"], wire.message()["ack"]
        wire.ask("UNSUBSCRIBE", id="1")
        wire.ask("ACK", id=remembered)
        with pytest.raises(StompErrorFrame):
            wire.ask("ACK", id=forgotten)


# -- the process


def start_process(*options, **streams):
    command = [sys.executable, "-m", "retrykit.testing.stomp_server", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **streams)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_says_its_port_and_ends_at_a_signal(number):
    with start_process("--port", "0", "--profile", "activemq", stdin=subprocess.DEVNULL) as child:
        ready = json.loads(child.stdout.readline())
        assert (ready["pid"], ready["profile"]) == (child.pid, "activemq")
        Wire("127.0.0.1", ready["port"]).close()
        child.send_signal(number)
        assert child.wait(20) == 0
        assert child.stderr.read() == ""


def test_the_process_ends_with_its_control_channel():
    with start_process("--control", stdin=subprocess.PIPE) as child:
        child.stdout.readline()
        child.stdin.close()
        assert child.wait(20) == 0


def test_the_process_answers_what_it_does_not_understand_and_goes_on():
    with start_process("--control", stdin=subprocess.PIPE) as child:
        child.stdout.readline()
        for order in ["nonsense", '{"do": "unknown"}', '{"do": "publish"}', '{"do": "depths"}']:
            child.stdin.write(order + "\n")
        child.stdin.close()
        answers = [json.loads(line) for line in child.stdout]
        assert [next(iter(answer)) for answer in answers] == ["error", "error", "error", "result"]
        assert child.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "70000"], "port must be"),
        (["--user", "u"], "together"),
        (["--profile", "x"], "invalid choice"),
        (["--data", "/nowhere/journal"], "cannot run"),
    ],
)
def test_the_process_refuses_wrong_options_with_a_reason(options, reason):
    environment = {name: value for name, value in os.environ.items() if name != "RETRYKIT_STOMP_PASSWORD"}
    with start_process(*options, stdin=subprocess.DEVNULL, env=environment) as child:
        assert child.wait(20) in (1, 2)
        assert reason in child.stderr.read()


def test_a_killed_process_is_reported_and_restarts():
    with StompServerProcess() as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="ended"):
            server.depths()
        server.restart()
        assert server.depths() == {}
