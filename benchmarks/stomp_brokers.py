"""The brokers of `stomp.py`, started as the tests start theirs; filling their queues, and looking what is left."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from tests.servers import ActiveMq, RabbitMq, Wire, activemq_missing, rabbitmq_missing
from tests.servers.rabbitmq import USER

CHUNK = 500
FSYNC_BYTES = 1_024
FSYNCS = 20


@attrs.frozen
class Kind:
    """What distinguishes a broker here."""

    title: str
    profile: str
    missing: Callable[[], str | None]
    start: Callable[[], Any]
    prefetch_header: str
    virtual_host: str
    transactional: bool
    """retrykit acknowledges in a transaction there: BEGIN, ACK, COMMIT with a receipt; else ACK with a receipt."""
    looks_up: bool
    """retrykit looks the history of every message up there, and stores that an attempt is running."""


@attrs.define
class Running:
    """A broker that runs, with a connection to fill its queues."""

    kind: Kind
    server: Any
    folder: Path
    version: str
    _wire: Wire

    @property
    def host(self) -> str:
        return str(self.server.host)

    @property
    def port(self) -> int:
        return int(self.server.port)

    @property
    def login(self) -> tuple[str, str] | None:
        return (USER, self.server.password) if self.kind.profile == "rabbitmq" else None

    @property
    def url(self) -> str:
        return str(self.server.url)

    def fill(self, destination: str, bodies: Sequence[bytes]) -> None:
        """Send persistent messages, in transactions of some hundred."""
        for start in range(0, len(bodies), CHUNK):
            self._wire.send("BEGIN", transaction="t")
            for body in bodies[start : start + CHUNK]:
                self._send(destination, body)
            self._wire.ask("COMMIT", transaction="t")

    def _send(self, destination: str, body: bytes) -> None:
        name = body.split(b" x", 1)[0].decode().replace(" ", "-")
        headers = {"destination": destination, "persistent": "true", "transaction": "t", "amqp-message-id": name}
        self._wire.frame("SEND", headers | {"content-length": str(len(body))}, body)

    def check_empty(self, destination: str) -> None:
        """Everything was acknowledged: what is sent now comes first."""
        last = b"nothing was left before this"
        self.fill(destination, [last])
        with self._connected() as wire:
            wire.subscribe(destination)
            found = wire.message()
            wire.ask("ACK", id=found["ack"])
        assert found.body == last, f"left in {destination}: {found.body!r}"

    def _connected(self) -> Wire:
        return connected(self.server, self.kind)

    def fsync(self) -> float:
        """Seconds that the disk takes to have a small record for sure, where this broker has its data."""
        path = self.folder / "fsync"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            # The file has its size beforehand, as a broker's journal has.
            os.pwrite(descriptor, bytes(FSYNC_BYTES * FSYNCS), 0)
            os.fsync(descriptor)
            started = time.perf_counter()
            for number in range(FSYNCS):
                os.pwrite(descriptor, b"x" * FSYNC_BYTES, number * FSYNC_BYTES)
                os.fdatasync(descriptor)
            return (time.perf_counter() - started) / FSYNCS
        finally:
            os.close(descriptor)
            path.unlink()


def connected(server: Any, kind: Kind) -> Wire:
    login = (USER, server.password) if kind.profile == "rabbitmq" else None
    return Wire(server.host, server.port, virtual_host=kind.virtual_host, login=login)


@contextmanager
def running(kind: Kind) -> Iterator[Running]:
    """A broker of its own, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="retrykit-bench-", ignore_cleanup_errors=True) as folder:
        server = kind.start() if kind.profile == "rabbitmq" else kind.start(Path(folder) / "broker")
        with server, connected(server, kind) as wire:
            assert wire.connected is not None
            version = wire.connected["server"].replace("/", " ")
            yield Running(kind, server, Path(folder), version, wire)


KINDS = (
    Kind(
        title="ActiveMQ",
        profile="activemq",
        missing=activemq_missing,
        start=ActiveMq,
        prefetch_header="activemq.prefetchSize",
        virtual_host="localhost",
        transactional=True,
        looks_up=False,
    ),
    Kind(
        title="RabbitMQ",
        profile="rabbitmq",
        missing=rabbitmq_missing,
        start=RabbitMq,
        prefetch_header="prefetch-count",
        virtual_host="/",
        transactional=False,
        looks_up=True,
    ),
)
