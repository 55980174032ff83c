"""The work of `stomp.py`: a queue full of messages is consumed one by one, and how that is timed.

Every consumer stays connected, and has a queue of its own. The handler of the first message of a batch waits at a gate
until the queue is full; from then to the moment when the last message reaches the handler, every message but that last
one is handled and settled, and that is what is timed. So nobody is timed connecting, and nobody needs to be asked when
it has done.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import attrs
from sqlalchemy import Engine, event
from stomp_brokers import Running

PATIENCE = 120.0
SIZE = 256
FEW = 4


class UnequalWorkError(Exception):
    """Somebody did not do what the others do, so its time would mean nothing."""


@attrs.define(eq=False)
class Course:
    """What the handlers of one consumer take part in: all of them get the body of each message, as it was sent."""

    messages: int = 0
    seen: list[bytes] = attrs.Factory(list)
    begun: tuple[float, float] = (0.0, 0.0)
    ended: tuple[float, float] = (0.0, 0.0)
    watch: Callable[[str], None] = attrs.field(default=lambda _: None)
    """Told by the thread that handles of the "begin" and of the "end" of what is timed."""
    _arrived: threading.Event = attrs.field(factory=threading.Event, init=False)
    _go: threading.Event = attrs.field(factory=threading.Event, init=False)
    _over: threading.Event = attrs.field(factory=threading.Event, init=False)

    def handle(self, body: bytes) -> None:
        if not self.seen:
            self._wait()
        self._note(body)

    async def async_handle(self, body: bytes) -> None:
        if not self.seen:
            await asyncio.to_thread(self._wait)
        self._note(body)

    def _wait(self) -> None:
        self._arrived.set()
        self._go.wait(PATIENCE)

    def _note(self, body: bytes) -> None:
        self.seen.append(body)
        if len(self.seen) == 1:
            self.watch("begin")
            self.begun = (time.perf_counter(), time.process_time())
        elif len(self.seen) == self.messages:
            self.ended = (time.perf_counter(), time.process_time())
            self.watch("end")
            self._over.set()

    # -- called by who times it

    def prepare(self, messages: int) -> None:
        self.messages, self.seen = messages, []
        for one in (self._arrived, self._go, self._over):
            one.clear()

    def run(self, name: str) -> tuple[float, float]:
        """Open the gate; seconds per message, by the clock and of this process's processors."""
        if not self._arrived.wait(PATIENCE):
            raise UnequalWorkError(f"{name}: no message has arrived")
        self._go.set()
        if not self._over.wait(PATIENCE):
            raise UnequalWorkError(f"{name}: {len(self.seen)} of {self.messages} messages were handled")
        timed = self.messages - 1
        return (self.ended[0] - self.begun[0]) / timed, (self.ended[1] - self.begun[1]) / timed


@attrs.frozen
class Seat:
    """Where one consumer works."""

    server: Running
    destination: str
    prefetch: int


@attrs.frozen
class Contender:
    """A consumer by name. `consuming` lets the handlers of a course have what comes, until it is left."""

    name: str
    package: str | None
    consuming: Callable[[Seat, Course], AbstractContextManager[Any]]
    slow: bool = False
    """It gets few messages."""
    like: str | None = None
    """Whose statements and commits it has to make."""


@attrs.define
class Timings:
    """Seconds per message of each batch, by the clock, and of the processors that this process had."""

    seconds: list[float] = attrs.Factory(list)
    processor: list[float] = attrs.Factory(list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@attrs.frozen
class Batches:
    """How much is timed."""

    rounds: int
    messages: int
    slow_messages: int

    def of(self, contender: Contender, prefetch: int) -> int:
        # More than are on their way at once, or the broker has nothing to deliver while they are handled.
        return 1 + (self.slow_messages if contender.slow else max(self.messages, 2 * prefetch))


@attrs.define
class _Team:
    """A contender at its place."""

    contender: Contender
    seat: Seat
    course: Course = attrs.Factory(Course)
    timings: Timings = attrs.Factory(Timings)
    batches: int = 0

    def batch(self, messages: int) -> tuple[float, float]:
        """Fill the queue, have it consumed; what that took."""
        self.batches += 1
        name, course = self.contender.name, self.course
        bodies = [f"{name} {self.batches}.{number} ".encode().ljust(SIZE, b"x") for number in range(messages)]
        course.prepare(messages)
        self.seat.server.fill(self.seat.destination, bodies)
        taken = course.run(name)
        if course.seen != bodies:
            raise UnequalWorkError(f"{name}: other messages were handled than were sent, or in another order")
        return taken


def measure(
    contenders: Sequence[Contender],
    server: Running,
    prefetch: int,
    batches: Batches,
    *,
    say: Callable[[str], None],
) -> tuple[dict[str, Timings], list[float]]:
    """Each contender in turn, A B C A B C …, and then the disk; the times of it come second."""
    teams = [
        _Team(each, Seat(server, f"/queue/bench.{prefetch}.{number}", prefetch))
        for number, each in enumerate(contenders)
    ]
    fsyncs = []
    with ExitStack() as stack:
        for team in teams:
            stack.enter_context(team.contender.consuming(team.seat, team.course))
        say(f"prefetch {prefetch}: warming up")
        _warm_up(teams, batches)
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        for number in range(batches.rounds):
            if number % 5 == 0:
                say(f"prefetch {prefetch}: round {number + 1} of {batches.rounds}")
            for team in teams:
                seconds, processor = team.batch(batches.of(team.contender, prefetch))
                team.timings.seconds.append(seconds)
                team.timings.processor.append(processor)
            fsyncs.append(server.fsync())
    for team in teams:
        server.check_empty(team.seat.destination)
    return {team.contender.name: team.timings for team in teams}, fsyncs


def _warm_up(teams: Sequence[_Team], batches: Batches) -> None:
    """Two batches for each; those that say so have to send a database the same as somebody else."""
    sent: dict[str, Counter[str]] = {}
    with _statements() as words:
        for team in teams:
            # At first some things are found out.
            team.batch(FEW)
            team.course.watch = partial(_count, words, sent.setdefault(team.contender.name, Counter()))
            team.batch(batches.of(team.contender, team.seat.prefetch))
            team.course.watch = lambda _: None
    for team in teams:
        name, like = team.contender.name, team.contender.like
        if like is not None and sent[name] != sent[like]:
            raise UnequalWorkError(f"{name}: sends {dict(sent[name])}, not {dict(sent[like])} as {like!r} does")


def _count(words: Mapping[int, Counter[str]], sent: Counter[str], moment: str) -> None:
    # Only of the thread that handles: the one before still settles its last message.
    mine = words[get_ident()]
    if moment == "begin":
        mine.clear()
    else:
        sent.update(mine)


@contextmanager
def _statements() -> Iterator[defaultdict[int, Counter[str]]]:
    """What each thread has sent to whatever engine: the first words of the statements, and the commits."""
    words: defaultdict[int, Counter[str]] = defaultdict(Counter)

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        words[get_ident()][statement.split(maxsplit=1)[0]] += 1

    def note_commit(_connection: Any) -> None:
        words[get_ident()]["COMMIT"] += 1

    event.listen(Engine, "before_cursor_execute", note)
    event.listen(Engine, "commit", note_commit)
    try:
        yield words
    finally:
        event.remove(Engine, "before_cursor_execute", note)
        event.remove(Engine, "commit", note_commit)
