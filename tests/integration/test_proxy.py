"""The proxy that the fault tests put before a server fails in the ways it says, and in no other."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from tests.servers.proxy import TcpProxy


class Upper:
    """A server that answers each line in capitals, and remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=[client], daemon=True).start()

    def serve(self, client):
        with client, client.makefile("rb") as lines:
            try:
                for line in lines:
                    self.asked.append(line.strip())
                    client.sendall(line.upper())
            except OSError:
                return

    def close(self):
        if self.listener.fileno() >= 0:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()


class Client:
    def __init__(self, proxy):
        self.socket = socket.create_connection((proxy.host, proxy.port), timeout=10)

    def ask(self, line):
        self.socket.sendall(line + b"\n")
        return self.answer()

    def answer(self):
        answer = b""
        while not answer.endswith(b"\n"):
            data = self.socket.recv(100)
            if not data:
                return None
            answer += data
        return answer.strip()

    def close(self):
        self.socket.close()


@pytest.fixture
def server():
    server = Upper()
    yield server
    server.close()


@pytest.fixture
def proxy(server):
    with TcpProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def connect(proxy):
    clients = []

    def connect():
        clients.append(Client(proxy))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def test_what_nobody_disturbs_passes(proxy, connect):
    one, other = connect(), connect()
    assert (one.ask(b"one"), other.ask(b"two"), one.ask(b"three")) == (b"ONE", b"TWO", b"THREE")
    one.socket.shutdown(socket.SHUT_WR)
    assert one.answer() is None
    assert other.ask(b"four") == b"FOUR"
    assert proxy.accepted == 2
    assert proxy.via(f"x://user:word@127.0.0.1:{proxy.target[1]}/y") == f"x://user:word@127.0.0.1:{proxy.port}/y"


def test_a_cut_resets_every_connection_and_no_later_one(proxy, connect):
    clients = [connect(), connect()]
    for client in clients:
        client.ask(b"hello")
    assert proxy.cut() == 2
    for client in clients:
        with pytest.raises(ConnectionResetError):
            client.answer()
    assert connect().ask(b"again") == b"AGAIN"


def test_refused_connections_fail_at_once_and_open_ones_go_on(proxy, connect):
    client = connect()
    client.ask(b"one")
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect()
    assert client.ask(b"two") == b"TWO"
    proxy.accept()
    assert connect().ask(b"three") == b"THREE"


def test_a_server_that_is_gone_resets_who_asks_for_it(server, proxy, connect):
    server.close()
    with pytest.raises(ConnectionError):
        connect().ask(b"anybody")


def test_each_way_takes_as_long_as_was_said(proxy, connect):
    client = connect()
    client.ask(b"quick")
    proxy.delay(0.1)
    begin = time.monotonic()
    assert client.ask(b"slow") == b"SLOW"
    assert time.monotonic() - begin >= 0.2
    proxy.delay(0)
    assert client.ask(b"quick") == b"QUICK"


def test_what_is_held_back_arrives_later(server, proxy, connect):
    client = connect()
    client.ask(b"one")
    proxy.stall()
    client.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        client.ask(b"two")
    assert server.asked == [b"one"]
    client.socket.settimeout(10)
    proxy.resume()
    assert client.answer() == b"TWO"


def test_a_half_closed_connection_still_carries_requests(server, proxy, connect):
    client = connect()
    client.ask(b"one")
    assert proxy.half_close() == 1
    assert client.ask(b"two") is None
    deadline = time.monotonic() + 10
    while server.asked != [b"one", b"two"]:
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_an_answer_is_lost_though_the_request_arrived(server, proxy, connect):
    client, other = connect(), connect()
    proxy.lose_answers(b"COMMIT")
    assert client.ask(b"INSERT") == b"INSERT"
    assert other.ask(b"SELECT") == b"SELECT"
    with pytest.raises(ConnectionResetError):
        client.ask(b"COMMIT")
    assert server.asked == [b"INSERT", b"SELECT", b"COMMIT"]
    assert other.ask(b"COMMIT") == b"COMMIT", "one was to be lost"
    proxy.await_lost(1)


def test_a_request_is_lost_before_it_arrives(server, proxy, connect):
    client = connect()
    proxy.lose_requests(b"COMMIT")
    assert client.ask(b"INSERT") == b"INSERT"
    with pytest.raises(ConnectionResetError):
        client.ask(b"COMMIT")
    assert server.asked == [b"INSERT"]


def test_an_answer_is_lost_after_others_were_not(server, proxy, connect):
    client = connect()
    proxy.lose_answers(b"COMMIT", after=1, times=2)
    assert [client.ask(line) for line in (b"COMMIT", b"SELECT")] == [b"COMMIT", b"SELECT"]
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            client.ask(b"COMMIT")
        client = connect()
    assert client.ask(b"COMMIT") == b"COMMIT"
    assert proxy.lost == 2


def test_the_connection_breaks_within_an_answer(proxy, connect):
    client = connect()
    assert client.ask(b"12345") == b"12345"
    proxy.drop_after(8)
    assert client.ask(b"1234") == b"1234"
    with pytest.raises(ConnectionResetError):
        client.ask(b"5678")
    assert connect().ask(b"whole") == b"WHOLE"


def test_healed_it_does_nothing_any_more(proxy, connect):
    proxy.delay(10)
    proxy.lose_answers()
    proxy.drop_after(0)
    proxy.stall()
    proxy.refuse()
    proxy.heal()
    assert connect().ask(b"one") == b"ONE"
