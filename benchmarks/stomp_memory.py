"""Does the memory of a consumer grow with the messages that it has consumed? Each is asked in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).resolve().parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4_096
STEPS = 40
AHEAD, BATCH = 500, 50
FAILS_EACH = 100
"""One message in so many fails at its first delivery, so that histories come and go."""

Publish = Callable[[range], None]
"""Sends the messages with these numbers."""


@attrs.frozen
class Grown:
    """Bytes that the process had resident: after every fortieth part of the messages."""

    where: str
    messages: int
    bytes: list[int]

    @property
    def growth(self) -> float:
        """The most that was seen, as a multiple of what there was after a tenth of the messages."""
        warm = STEPS // 10
        return max(self.bytes[warm:]) / self.bytes[warm - 1]


def missing() -> str | None:
    return None if Path("/proc/self/statm").exists() else "there is no /proc/self/statm to read it from"


def measured(where: str, arguments: Sequence[Any], messages: int) -> Grown:
    """Run `consume` in a new interpreter; this one's modules and garbage are not what is asked about."""
    paths = [str(ROOT), str(ROOT / "benchmarks")]
    call = f"stomp_memory.consume({[*arguments]!r}, {messages})"
    code = f"import sys; sys.path.extend({paths!r}); import stomp_memory; {call}"
    # Safe path: in the folder of the benchmarks there is one that is called as stomp.py is.
    run = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Grown(where, messages, json.loads(run.stdout))


# ---- in the process that is measured


def consume(where: Sequence[Any], messages: int) -> None:
    """Consume so many messages and print what was resident after each step.

    `where`: "memory", or the profile, host, port and URL of a broker.
    """
    import logging

    logging.getLogger().addHandler(logging.NullHandler())
    broker, publisher = _memory() if where[0] == "memory" else _stomp(*where)
    with publisher as publish:
        print(json.dumps(_consumed(broker, publish, messages)))


def _consumed(broker: Any, publish: Publish, messages: int) -> list[int]:
    from retrykit import RetryTemplate
    from retrykit.messaging import ListenerContainer

    handled = threading.Semaphore(AHEAD)
    numbers = iter(range(messages * 2))

    def handle(message: Any) -> None:
        if next(numbers) % FAILS_EACH == 0 and not message.redelivered:
            raise ConnectionError("the first delivery of this one fails")
        handled.release()

    resident = []
    with ListenerContainer(broker, handle, template=RetryTemplate(name="orders")):
        for step in range(STEPS):
            last = messages * (step + 1) // STEPS
            for first in range(messages * step // STEPS, last, BATCH):
                batch = range(first, min(first + BATCH, last))
                _await(handled, len(batch))
                publish(batch)
            resident.append(_resident())
        _await(handled, AHEAD)
    return resident


def _await(handled: threading.Semaphore, messages: int) -> None:
    for _ in range(messages):
        assert handled.acquire(timeout=60), "no message was handled for a minute"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def _memory() -> tuple[Any, Any]:
    from retrykit.messaging.memory import MemoryBroker

    broker = MemoryBroker("/queue/memory")

    @contextmanager
    def publisher() -> Iterator[Publish]:
        def publish(numbers: range) -> None:
            for number in numbers:
                broker.publish(f"order {number}".ljust(256), id=f"m-{number}")

        yield publish

    return broker, publisher()


def _stomp(kind: str, host: str, port: int, url: str) -> tuple[Any, Any]:
    from retrykit.messaging.stomp import StompBroker
    from tests.servers import Wire

    destination = "/queue/memory"

    @contextmanager
    def publisher() -> Iterator[Publish]:
        # It has no credentials: the brokers of tests let everybody in.
        with Wire(host, port, virtual_host=None if kind == "rabbitmq" else "localhost") as wire:

            def publish(numbers: range) -> None:
                wire.send("BEGIN", transaction="t")
                for number in numbers:
                    headers = {"destination": destination, "persistent": "true", "amqp-message-id": f"m-{number}"}
                    wire.frame("SEND", headers | {"transaction": "t"}, f"order {number}".ljust(256).encode())
                wire.ask("COMMIT", transaction="t")

            yield publish

    return StompBroker(url, destination=destination, profile=kind), publisher()
