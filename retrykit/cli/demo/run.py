"""One run of the demo, from the empty queue to the report."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import attrs

from retrykit.cli.demo.display import Display
from retrykit.cli.demo.events import EventReader
from retrykit.cli.demo.job import FATE, RUN, Job
from retrykit.cli.demo.ledger import Ledger
from retrykit.cli.demo.plan import PlannedMessage
from retrykit.cli.demo.progress import Progress
from retrykit.cli.demo.report import Facts, Report, report
from retrykit.cli.demo.supervisor import Supervisor
from retrykit.cli.interrupts import held_back
from retrykit.messaging import BrokerUnavailableError
from retrykit.messaging.recoverers import ID
from retrykit.messaging.stomp import StompBroker
from retrykit.testing.stomp_server import StompServer

QUEUE: Final = "/queue/retrykit.demo"
_TICK: Final = 0.05
_QUIET: Final = 0.5
_BATCH: Final = 50


class UnusableError(Exception):
    """The broker or the database that the user gave will not do: the text says why. Nothing was started."""


@attrs.frozen(kw_only=True)
class Settings:
    """What to run: `broker` and `database` are URLs of the user's own, None for those that the demo brings.

    `patience`: seconds without any event after which the rest is given up for lost.
    """

    plan: Sequence[PlannedMessage]
    workers: int
    broker: str | None = attrs.field(default=None, repr=False)
    database: str | None = attrs.field(default=None, repr=False)
    patience: float = 30.0


@attrs.frozen
class Queue:
    """Where the messages go.

    `left` counts those that are still there while consumers are at work, where that can be asked; `left_at_the_end`
    (by default the same) when there are none any more.
    """

    url: str = attrs.field(repr=False)
    left: Callable[[], int]
    left_at_the_end: Callable[[], int] = attrs.field(default=attrs.Factory(lambda queue: queue.left, takes_self=True))


def run_demo(settings: Settings, display: Display) -> Report:
    """Do it all; every process, file and connection is gone at the end. `UnusableError` before anything has started."""
    # What stomp.py has to say is in the errors already.
    logging.getLogger("stomp.py").addHandler(logging.NullHandler())
    if settings.broker is not None:
        _check_empty(settings.broker)
    with (
        TemporaryDirectory(prefix="retrykit-demo-") as folder,
        _ledger(settings.database, folder) as ledger,
        _queue(settings.broker) as queue,
    ):
        job = Job(
            broker=queue.url,
            database=ledger.engine.url.render_as_string(hide_password=False),
            events=f"{folder}/events.jsonl",
            run=secrets.token_hex(6),
        )
        watch = Watch(job, settings, ledger, queue, display)
        return carry_out(watch, Supervisor(job, settings.workers, Path(folder)))


def carry_out(watch: Watch, supervisor: Supervisor) -> Report:
    """Publish, consume until it is done, and count."""
    started = time.monotonic()
    with supervisor:
        publish(watch.job, watch.settings.plan)
        watch.until_done(supervisor)
    watch.news()
    watch.display.update(watch.progress)
    facts = watch.facts(left_in_queue=watch.queue.left_at_the_end())
    return report(facts, process_deaths=watch.progress.deaths, seconds=time.monotonic() - started)


def publish(job: Job, plan: Sequence[PlannedMessage]) -> None:
    """Send the messages, persistent, each in a transaction with some others; they are safe on return."""
    broker = StompBroker(job.broker)
    with closing(broker.connect(consume=False)) as session:
        for first in range(0, len(plan), _BATCH):
            for message in plan[first : first + _BATCH]:
                headers = {ID: message.id, RUN: job.run, FATE: str(message.fate), "content-type": "application/json"}
                session.send(broker.destination, message.body, headers)
            session.flush()
            session.commit()


@attrs.define(eq=False)
class Watch:
    """Follows a run. A test that disturbs it does so in `meddle`, called every tick, and counts its `kills`."""

    job: Job
    settings: Settings
    ledger: Ledger
    queue: Queue
    display: Display
    meddle: Callable[[Watch, Supervisor], None] = lambda _watch, _supervisor: None
    kills: int = 0
    progress: Progress = attrs.field(init=False)
    _reader: EventReader = attrs.field(init=False)
    _heard: float = attrs.field(init=False, factory=time.monotonic)
    _asked: float = attrs.field(init=False, factory=time.monotonic)

    def __attrs_post_init__(self) -> None:
        self.progress = Progress(len(self.settings.plan))
        self._reader = EventReader(Path(self.job.events))

    def until_done(self, supervisor: Supervisor) -> None:
        """Return when every message has come to its end, or when it is clear that one never will."""
        while not (self._done() or self._hopeless()):
            self.news()
            for death in supervisor.replace_dead():
                self.display.line(self.progress.bury(death))
            self.meddle(self, supervisor)
            self.display.update(self.progress)
            time.sleep(_TICK)

    def news(self) -> None:
        """Take in what the workers have reported."""
        for event in self._reader.new():
            self._heard = time.monotonic()
            line = self.progress.take(event)
            if line is not None:
                self.display.line(line)

    def facts(self, *, left_in_queue: int = 0) -> Facts:
        """What the database says at this moment."""
        return Facts(
            plan=self.settings.plan,
            effects=self.ledger.effects(self.job.run),
            parked=self.ledger.parked(self.job.name),
            attempts=self.progress.attempts,
            in_doubt=self.progress.in_doubt,
            max_attempts=self.job.max_attempts,
            kills=self.kills,
            left_in_queue=left_in_queue,
        )

    def _done(self) -> bool:
        # Who was killed between commit and report has told nobody: in a silence the database is asked, now and then.
        now = time.monotonic()
        if len(self.progress.finished) < self.progress.total and now - max(self._heard, self._asked) < _QUIET:
            return False
        self._asked = now
        return not self.facts().missing and self.queue.left() == 0

    def _hopeless(self) -> bool:
        return time.monotonic() - self._heard > self.settings.patience or self.progress.runaway is not None


def _check_empty(url: str) -> None:
    """The demo would consume whatever else is in the queue."""
    try:
        if _seen_in(url):
            raise UnusableError(f"{StompBroker(url).destination} is not empty: give the demo a queue of its own")
    except BrokerUnavailableError as error:
        raise UnusableError(str(error)) from error


def _seen_in(url: str) -> int:
    """How many messages a look into the queue shows, which takes none away: 0, or 1 for one or more."""
    with closing(StompBroker(url).connect()) as session:
        return int(session.receive(timeout=1.0) is not None)


@contextmanager
def _queue(url: str | None) -> Iterator[Queue]:
    if url is not None:
        yield Queue(url, left=lambda: 0, left_at_the_end=lambda: _seen_in(url))
        return
    server = StompServer.process(profile="activemq")
    try:
        with held_back():
            server.start()
        yield Queue(server.url + QUEUE, left=lambda: server.depth(QUEUE))
    finally:
        server.stop()


@contextmanager
def _ledger(url: str | None, folder: str) -> Iterator[Ledger]:
    try:
        ledger = Ledger.at(url or f"sqlite:///{folder}/demo.db")
    except ValueError as error:
        raise UnusableError(str(error)) from error
    with closing(ledger):
        if fault := ledger.create():
            raise UnusableError(fault)
        yield ledger
