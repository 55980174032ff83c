"""A run of consumer processes on a broker and a database, and the faults that may befall it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from retrykit.messaging.stomp import StompBroker
from retrykit.sql import create_tables
from tests.fault.broker_consumer import effects, is_poison, metadata
from tests.fault.ledger import PATIENCE, Ledger
from tests.fault.message_ledger import Copy, MessageLedger
from tests.fault.store_consumer import engine_for
from tests.fault.stores import Nursery, Worker
from tests.servers import ActiveMq, RabbitMq, Wire
from tests.servers.proxy import TcpProxy

# Heart-beats that are this far apart are missed after two and a half of them.
HEART_BEAT = 1.0
SILENCE = 3.0
IMPATIENT = {"heart_beat": HEART_BEAT, "connect_timeout": 5.0, "receipt_timeout": 5.0, "send_timeout": 5.0}


class Run:
    """Consumers behind a proxy, a queue of numbered messages, and what is known of their progress."""

    def __init__(
        self,
        broker: ActiveMq | RabbitMq,
        database: str,
        nursery: Nursery,
        folder: Path,
        *,
        messages: int = 0,
        numbers: Sequence[int] = (),
        seed: int,
        journal: str = "redelivered",
        declare: dict[str, str] | None = None,
        patience: dict[str, float] = IMPATIENT,
        **consumer: Any,
    ) -> None:
        self.broker = broker
        self.database = database
        self.chance = random.Random(seed)
        self.numbers = numbers or range(messages)
        self.queue = f"/queue/fire.{seed}.{folder.name}"
        self.declare = declare or {}
        self.ledger = Ledger(folder / "ledger")
        self.proxy = TcpProxy(broker.port)
        self.workers: list[Worker] = []
        self.kills = 0
        self._nursery = nursery
        self._started = 0
        self._order = {
            "ledger": str(self.ledger.path),
            "database": database,
            "journal": journal,
            "takes": 1.5 * HEART_BEAT,
            "broker": {"url": self.proxy.via(broker.url), "destination": self.queue, "declare": self.declare}
            | patience,
            **consumer,
        }
        self._engine = engine_for(database, poolclass=sa.NullPool)
        metadata.create_all(self._engine)
        create_tables(self._engine)

    # -- the consumers

    def start(self, *, dies_after: int | None = None) -> Worker:
        """Start a consumer process."""
        self._started += 1
        order = {**self._order, "worker": self._started, "dies_after": dies_after}
        worker = Worker(self._nursery, order)
        self.workers.append(worker)
        return worker

    def start_mortal(self) -> Worker:
        """Start one that is going to die, between some two steps of its work."""
        return self.start(dies_after=self.chance.randrange(1, 400))

    def start_and_await_its_death(self, after: int) -> None:
        """Have a consumer kill itself after so many steps."""
        worker = self.start(dies_after=after)
        assert worker.wait() == -signal.SIGKILL, f"worker {worker.number} ended with {worker.status}"
        self.workers.remove(worker)
        self.kills += 1

    def replace(self, worker: Worker) -> None:
        """Put another in the place of one that has ended."""
        self.workers.remove(worker)
        self.start()

    def tend(self) -> None:
        """Replace whoever has killed itself."""
        for worker in [worker for worker in self.workers if worker.ended]:
            assert worker.wait() == -signal.SIGKILL, f"worker {worker.number} ended with {worker.status}"
            self.kills += 1
            self.replace(worker)

    def drain(self, worker: Worker) -> None:
        """Tell it to leave, and see that it does, in good order."""
        worker.signal(signal.SIGTERM)
        self.await_end(worker)

    def await_end(self, worker: Worker) -> None:
        """It was told to leave: it does so, unless it kills itself before, or was not even there yet."""
        status = worker.wait()
        self.ledger.count("connected")
        was_there = any(event["w"] == worker.number and event["e"] == "connected" for event in self.ledger.events)
        expected = (0, -signal.SIGKILL) if was_there else (0, -signal.SIGKILL, -signal.SIGTERM)
        assert status in expected, f"worker {worker.number} ended with {status}"

    # -- the messages

    def publish(self) -> None:
        """Make the queues, so that they survive a crash, and put the messages in."""
        for queue in (self.queue, f"{self.queue}.out", f"{self.queue}.parked"):
            StompBroker(self.broker.url, destination=queue, declare=self.declare).connect().close()
        if isinstance(self.broker, RabbitMq):
            self.broker.keep_queues()
        with closing(StompBroker(self.broker.url, declare=self.declare).connect(consume=False)) as session:
            for first in range(0, len(self.numbers), 100):
                for number in self.numbers[first : first + 100]:
                    session.send(self.queue, b"%d" % number, {"content-type": "text/plain"})
                session.commit()

    def reach(self, share: float) -> None:
        """Wait until this share of the messages has come to its end, or as many acknowledgements."""
        self.await_that(lambda: self.ledger.count("acked") >= share * len(self.numbers))

    def reach_the_end(self) -> None:
        """Wait until every message has come to its end and nothing moves any more."""
        self.await_that(lambda: (self._quiet(1.0) and self._done()) or self._quiet(8.0))

    def _done(self) -> bool:
        finished = {event["k"] for event in self.ledger.events if event["e"] in ("acked", "recovered")}
        finished |= set(self.effects())
        if len(finished) < len(self.numbers) and self._quiet(2.0):
            # Who parked a message and died did not live to tell.
            parked = self._all_in(f"{self.queue}.parked", set(), take=False)
            finished |= {int(frame.body) for frame in parked}
        return len(finished) == len(self.numbers)

    def _quiet(self, seconds: float) -> bool:
        self.ledger.count("end")
        return bool(self.ledger.events) and time.monotonic() - self.ledger.events[-1]["at"] > seconds

    def await_that(self, condition: Callable[[], bool]) -> None:
        """Wait for something, and replace whoever dies meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.tend()
            assert time.monotonic() < deadline, f"no end: {Counter(event['e'] for event in self.ledger.events)}"
            threading.Event().wait(0.02)

    def effects(self) -> Counter[int]:
        """How many rows each number has."""
        with self._engine.connect() as connection:
            return Counter(connection.execute(sa.select(effects.c.number)).scalars())

    # -- the end

    def finish(self, *, forgets: int = 0) -> MessageLedger:
        """Let the consumers end in good order: what they have left behind."""
        self._drain_all()
        deadline = time.monotonic() + PATIENCE
        # What a slow reconnection has left: nobody had the time to take it.
        while (left := self._all_in(self.queue, set(), take=False)) and time.monotonic() < deadline:
            connected = self.ledger.count("connected")
            self.start()
            self.ledger.wait("connected", connected + 1)
            self.reach_the_end()
            self._drain_all()
        self.ledger.close()
        done = self.effects()
        poison = {number for number in self.numbers if is_poison(number)}
        return MessageLedger(
            numbers=self.numbers,
            ledger=self.ledger,
            effects=done,
            sent=[copy_of(frame) for frame in self._all_in(f"{self.queue}.out", set(done))],
            parked=[copy_of(frame) for frame in self._all_in(f"{self.queue}.parked", poison)],
            left=len(left),
            atomic=not isinstance(self.broker, RabbitMq),
            forgets=forgets,
            journaled=self._order["journal"] == "always",
        )

    def _drain_all(self) -> None:
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        for worker in self.workers:
            self.await_end(worker)
        self.workers.clear()

    def _all_in(self, queue: str, expected: set[int], *, take: bool = True) -> list[Any]:
        """Everything that lies in a queue; what must be there is waited for."""
        found = []
        with Wire(self.broker.host, self.broker.port, virtual_host=None) as wire:
            kind = {name.replace("-", "_"): value for name, value in self.declare.items()}
            wire.subscribe(queue, prefetch=100, **kind)
            while (frame := wire.next(PATIENCE / 4 if expected else 0.5)) is not None:
                assert frame.command == "MESSAGE", frame
                if take:
                    wire.send("ACK", id=frame["ack"])
                expected.discard(int(frame.body))
                found.append(frame)
            wire.ask("UNSUBSCRIBE", id="1")
        return found

    def close(self) -> None:
        """Leave nothing behind."""
        for worker in self.workers:
            worker.close()
        self.proxy.close()
        self._engine.dispose()


def copy_of(frame: Any) -> Copy:
    """What a message that a consumer sent says of itself."""
    return Copy(int(frame.body), frame["retrykit-id"], int(frame.headers.get("retrykit-attempts", "0")))


@contextmanager
def run_of(*arguments: Any, **options: Any) -> Iterator[Run]:
    """A run that leaves nothing behind."""
    run = Run(*arguments, **options)
    with contextlib.closing(run):
        yield run


# -- what may befall it


def kill_a_consumer(run: Run) -> None:
    """SIGKILL, wherever it is."""
    worker = run.chance.choice(run.workers)
    worker.kill()
    run.kills += 1
    run.replace(worker)


def let_a_consumer_die_between_two_steps(run: Run) -> None:
    """One that is going to kill itself takes the place of another, which is told to leave."""
    worker = run.chance.choice(run.workers)
    run.drain(worker)
    run.workers.remove(worker)
    run.start_mortal()


def drain_a_consumer(run: Run) -> None:
    """SIGTERM: it finishes what it has in hand and leaves."""
    worker = run.chance.choice(run.workers)
    run.drain(worker)
    run.replace(worker)


def hang_a_consumer(run: Run) -> None:
    """SIGSTOP, until its heart-beats are missed."""
    worker = run.chance.choice(run.workers)
    worker.signal(signal.SIGSTOP)
    _let_pass(SILENCE)
    worker.signal(signal.SIGCONT)


def kill_the_broker(run: Run) -> None:
    """SIGKILL, and a new start."""
    run.broker.kill()
    run.broker.start()


def restart_the_broker(run: Run) -> None:
    """A clean end, and a new start."""
    run.broker.restart()


def hang_the_broker(run: Run) -> None:
    """SIGSTOP, until its heart-beats are missed."""
    os.kill(run.broker.pid, signal.SIGSTOP)
    _let_pass(SILENCE)
    os.kill(run.broker.pid, signal.SIGCONT)


def cut_all_connections(run: Run) -> None:
    """RST on both sides."""
    run.proxy.cut()


def half_close_all_connections(run: Run) -> None:
    """The broker has nothing more to say; what consumers say still arrives."""
    run.proxy.half_close()


def let_all_connections_stall(run: Run) -> None:
    """Half-open: nothing arrives on either side, and nobody is told."""
    run.proxy.stall()
    _let_pass(SILENCE)
    run.proxy.heal()


def lose_the_answers_to_commits(run: Run) -> None:
    """They have happened, and nobody knows."""
    _lose(run, run.proxy.lose_answers)


def lose_commits(run: Run) -> None:
    """They have not happened, and nobody knows."""
    _lose(run, run.proxy.lose_requests)


def _lose(run: Run, lose: Callable[..., None]) -> None:
    command = b"COMMIT\n" if run.chance.random() < 0.5 or not isinstance(run.broker, RabbitMq) else b"ACK\n"
    lost = run.proxy.lost
    lose(command, after=run.chance.randrange(5), times=2)
    with contextlib.suppress(AssertionError):
        run.proxy.await_lost(lost + 2, timeout=5.0)
    run.proxy.heal()


def refuse_connections(run: Run) -> None:
    """Nobody listens for a while, and what was connected is cut."""
    run.proxy.refuse()
    run.proxy.cut()
    _let_pass(0.5)
    run.proxy.accept()


def raise_the_memory_alarm(run: Run) -> None:
    """RabbitMQ reads no more from whoever publishes, until the alarm is over."""
    assert isinstance(run.broker, RabbitMq)
    run.broker.control("set_vm_memory_high_watermark", "0")
    _let_pass(SILENCE)
    run.broker.control("set_vm_memory_high_watermark", "0.4")


def _let_pass(seconds: float) -> None:
    # As long as the fault lasts: whether anything goes on meanwhile depends on the fault.
    threading.Event().wait(seconds)


ANYWHERE = (
    *[kill_a_consumer] * 6,
    *[let_a_consumer_die_between_two_steps] * 6,
    *[drain_a_consumer] * 2,
    *[kill_the_broker] * 2,
    restart_the_broker,
    hang_a_consumer,
    hang_the_broker,
    cut_all_connections,
    half_close_all_connections,
    let_all_connections_stall,
    lose_the_answers_to_commits,
    lose_commits,
    refuse_connections,
)
BY_BROKER = {"activemq": ANYWHERE, "rabbitmq": (*ANYWHERE, raise_the_memory_alarm)}
