"""The consumers of `stomp.py` that are written by hand: a raw socket, and stomp.py as it comes and tuned."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import Any

import stomp
from stomp_work import Contender, Course, Seat

SOCKET = "raw socket, the same frames"
UNTUNED = "stomp.py as it comes, BEGIN/ACK/COMMIT + receipt"
PLAIN = "stomp.py tuned, ACK"
RECEIPT = "stomp.py tuned, ACK + receipt"
TRANSACTION = "stomp.py tuned, BEGIN/ACK/COMMIT + receipt"

BEAT = 10_000
SECONDS = 60.0
QUICKACK = getattr(socket, "TCP_QUICKACK", None)
Work = Callable[[Any], None]
"""What is done with a frame before it is acknowledged."""


def tune(live: socket.socket) -> None:
    live.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def acknowledge_at_once(live: socket.socket | None) -> None:
    """The kernel takes this back by itself: to be said after every read."""
    if QUICKACK is not None and live is not None:
        with suppress(OSError):
            live.setsockopt(socket.IPPROTO_TCP, QUICKACK, 1)


# ---- stomp.py


class Consumer(stomp.ConnectionListener):  # type: ignore[misc] # stomp.py has no types
    """stomp.py's thread reads; a worker of ours handles and acknowledges, so that it can wait for receipts."""

    def __init__(self, seat: Seat, work: Work, *, tuned: bool) -> None:
        self.frames: SimpleQueue[Any] = SimpleQueue()
        self.receipts: SimpleQueue[str] = SimpleQueue()
        self.numbers = count(1)
        self.work = work
        place, kind = (seat.server.host, seat.server.port), seat.server.kind
        # Brokers beat only when the last interval was silent: with less patience an idle connection is cut.
        patience = {"heartbeats": (BEAT, BEAT), "heart_beat_receive_scale": 2.5}
        self.connection = stomp.Connection12([place], vhost=kind.virtual_host, auto_decode=False, **patience)
        self.connection.set_listener("", self)
        if tuned:
            self._acknowledge_at_once()
        login, passcode = seat.server.login or (None, None)
        self.connection.connect(login, passcode, wait=True)
        if tuned:
            tune(self.connection.transport.socket)
        prefetch = {kind.prefetch_header: str(seat.prefetch)}
        self.connection.subscribe(seat.destination, id="1", ack="client-individual", headers=prefetch)

    def _acknowledge_at_once(self) -> None:
        transport = self.connection.transport
        receive = transport.receive

        def received() -> bytes:
            data: bytes = receive()
            acknowledge_at_once(transport.socket)
            return data

        transport.receive = received

    def on_message(self, frame: Any) -> None:
        self.frames.put(frame)

    def on_receipt(self, frame: Any) -> None:
        self.receipts.put(frame.headers["receipt-id"])

    def run(self, settle: Callable[[Consumer, str], None]) -> None:
        while (frame := self.frames.get()) is not None:
            self.work(frame)
            settle(self, frame.headers["ack"])

    def confirmed(self, receipt: str) -> None:
        assert self.receipts.get(timeout=SECONDS) == receipt


def ack(consumer: Consumer, identity: str) -> None:
    consumer.connection.ack(identity)


def ack_with_receipt(consumer: Consumer, identity: str) -> None:
    receipt = f"r-{next(consumer.numbers)}"
    consumer.connection.ack(identity, receipt=receipt)
    consumer.confirmed(receipt)


def ack_in_transaction(consumer: Consumer, identity: str) -> None:
    number = next(consumer.numbers)
    transaction, receipt = f"t-{number}", f"r-{number}"
    consumer.connection.begin(transaction=transaction)
    consumer.connection.ack(identity, transaction=transaction)
    consumer.connection.commit(transaction=transaction, receipt=receipt)
    consumer.confirmed(receipt)


Settle = Callable[[Consumer, str], None]


@contextmanager
def consuming(seat: Seat, work: Work, settle: Settle, *, tuned: bool = True) -> Iterator[None]:
    consumer = Consumer(seat, work, tuned=tuned)
    thread = threading.Thread(target=consumer.run, args=(settle,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        consumer.frames.put(None)
        thread.join(SECONDS)
        consumer.connection.disconnect()


def same_as_ours(seat: Seat) -> Settle:
    """The acknowledgement that retrykit makes at this broker."""
    return ack_in_transaction if seat.server.kind.transactional else ack_with_receipt


@contextmanager
def _with_stomp_py(seat: Seat, course: Course, *, settle: Settle, tuned: bool = True) -> Iterator[None]:
    with consuming(seat, lambda frame: course.handle(frame.body), settle, tuned=tuned):
        yield


# ---- no library at all


class Bare:
    """A socket, and as little as can be done with what comes: bodies have no NUL here."""

    def __init__(self, seat: Seat, course: Course) -> None:
        self.seat, self.course = seat, course
        self.numbers = count(1)
        self.settle = self._in_transaction if seat.server.kind.transactional else self._with_receipt
        self.rest = b""
        self.waiting: deque[bytes] = deque()
        self.socket = socket.create_connection((seat.server.host, seat.server.port))
        tune(self.socket)

    def run(self) -> None:
        try:
            self._log_in()
            while True:
                frame = self.waiting.popleft() if self.waiting else self._next()
                head, _, body = frame.partition(b"\n\n")
                self.course.handle(body)
                number = b"%d" % next(self.numbers)
                self.socket.sendall(self.settle(_header(head, b"\nack:"), number))
                self._await(number)
        except (OSError, EOFError):
            return  # left

    def _log_in(self) -> None:
        server, kind = self.seat.server, self.seat.server.kind
        login = "login:{}\npasscode:{}\n".format(*server.login) if server.login else ""
        self.socket.sendall(f"CONNECT\naccept-version:1.2\nhost:{kind.virtual_host}\n{login}\n\0".encode())
        assert self._next().startswith(b"CONNECTED")
        prefetch = f"{kind.prefetch_header}:{self.seat.prefetch}\n"
        where = f"id:1\ndestination:{self.seat.destination}\nack:client-individual\n"
        self.socket.sendall(f"SUBSCRIBE\n{where}{prefetch}\n\0".encode())

    @staticmethod
    def _in_transaction(identity: bytes, number: bytes) -> bytes:
        return (
            b"BEGIN\ntransaction:%b\n\n\0ACK\nid:%b\ntransaction:%b\n\n\0COMMIT\ntransaction:%b\nreceipt:%b\n\n\0"
            % (number, identity, number, number, number)
        )

    @staticmethod
    def _with_receipt(identity: bytes, number: bytes) -> bytes:
        return b"ACK\nid:%b\nreceipt:%b\n\n\0" % (identity, number)

    def _await(self, number: bytes) -> None:
        while not (frame := self._next()).startswith(b"RECEIPT"):
            self.waiting.append(frame)
        assert _header(frame, b"\nreceipt-id:") == number

    def _next(self) -> bytes:
        while b"\0" not in self.rest:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            acknowledge_at_once(self.socket)
            self.rest += data
        frame, _, self.rest = self.rest.partition(b"\0")
        return frame.lstrip(b"\r\n")


def _header(head: bytes, name: bytes) -> bytes:
    return head.partition(name)[2].partition(b"\n")[0].rstrip(b"\r")


@contextmanager
def _with_a_socket(seat: Seat, course: Course) -> Iterator[None]:
    bare = Bare(seat, course)
    thread = threading.Thread(target=bare.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        bare.socket.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)
        bare.socket.close()


CONTENDERS = (
    Contender(SOCKET, None, _with_a_socket),
    Contender(UNTUNED, "stomp.py", partial(_with_stomp_py, settle=ack_in_transaction, tuned=False), slow=True),
    Contender(PLAIN, "stomp.py", partial(_with_stomp_py, settle=ack)),
    Contender(RECEIPT, "stomp.py", partial(_with_stomp_py, settle=ack_with_receipt)),
    Contender(TRANSACTION, "stomp.py", partial(_with_stomp_py, settle=ack_in_transaction)),
)
