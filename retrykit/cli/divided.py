"""A batch job in partitions, in several processes of this command: who is started, and what they tell."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final, Literal

import attrs
import click

from retrykit.batch import Division, Report
from retrykit.batch.partitions import Worker
from retrykit.batch.work import async_drive, drive
from retrykit.cli.calls import Do, Interruption, blocked, calls
from retrykit.cli.interrupts import held_back
from retrykit.cli.jobs import brief
from retrykit.cli.plot import Point, Series, draw, spread
from retrykit.cli.progress import Shown, progress_of_parts
from retrykit.cli.screen import say_json
from retrykit.cli.steps import made_by
from retrykit.cli.words import safe

_log = logging.getLogger("retrykit.batch")

PATIENCE: Final = 2.0
"""Seconds after which it is said that processes which are to end have not ended yet."""
MARK: Final = b"\x1eretrykit "
"""What an increment begins with, and no line that an application prints."""


@attrs.frozen(kw_only=True)
class Options:
    """What was asked for. `since`: of a process that another one has started, which it tells of its work."""

    target: str
    parameters: Mapping[str, str]
    again: bool
    again_since: datetime | None
    partitions: int | None
    workers: int
    since: float | None
    plot: Path | None
    as_json: bool
    log_level: str
    log_format: Literal["text", "json"]

    @property
    def is_for_another(self) -> bool:
        """Whether another process of the command has started this one."""
        return self.since is not None

    def command(self, since: float) -> Sequence[str]:
        """The arguments of an interpreter for another worker."""
        named = [part for name, value in self.parameters.items() for part in ("--param", f"{name}={value}")]
        logs = ("--log-level", self.log_level, "--log-format", self.log_format)
        divided = ("--partitions", str(self.partitions), "--since", repr(since))
        return (sys.executable, "-m", "retrykit.cli", "batch", "run", self.target, *named, *divided, *logs)


def run_divided(asked: Options, parts: int, interruption: Interruption) -> bool:
    """Run the partitions, here and in other processes of this command; whether all are finished."""
    make, gathered = made_by(asked.target, asked.parameters), Gathered()
    watch = Increments(ToTheParent() if asked.is_for_another else gathered.add)
    again = asked.again_since or asked.again
    worker = Worker(
        make,
        parts,
        asked.parameters,
        again=again,
        since=asked.since,
        watch=watch,
        check=interruption.check,
        # One of them is enough.
        says_what_it_waits_for=not asked.is_for_another,
    )
    with calls(asynchronous=bool(worker.asynchronous)) as do:
        running = _Running(asked, worker, do, gathered)
        try:
            division = running.share()
        except KeyboardInterrupt:
            running.tell({})
            raise
        running.tell(division.failures)
    return division.finished


@attrs.frozen
class _Running:
    asked: Options
    worker: Worker
    do: Do
    gathered: Gathered

    def share(self) -> Division:
        """Begin, and run what is free, as the others do."""
        worker = self.worker
        perform: Any = async_drive if worker.asynchronous else drive
        self.do(lambda: perform(worker.begin()))
        assert worker.since is not None  # noqa: S101 - it has begun
        if self.asked.is_for_another:
            return self.do(lambda: perform(worker.share()))  # type: ignore[no-any-return]
        with progress_of_parts(worker.name) as shown, _others(self.asked, worker.since, self.gathered):
            self.gathered.shown = shown
            return self.do(lambda: perform(worker.share()))  # type: ignore[no-any-return]

    def tell(self, failures: Mapping[int, str]) -> None:
        """What has become of each partition, here and elsewhere; one that another process has started says nothing."""
        asked = self.asked
        if asked.is_for_another:
            return
        name = self.worker.name
        rows = [self._row(part, failures.get(part)) for part in range(1, self.worker.parts + 1)]
        finished = sum(row["status"] == "finished" for row in rows)
        draw(asked.plot, f"{name}: {finished} of {len(rows)} partitions are finished", *self.gathered.lines())
        if asked.as_json:
            say_json({"name": name, "parameters": dict(asked.parameters), "partitions": rows})
            return
        for row in rows:
            click.echo(_shown(row))

    def _row(self, part: int, failure: str | None) -> dict[str, Any]:
        job = self.do(lambda: self.worker.state_of(part))
        named = {"partition": f"{part}/{self.worker.parts}", "id": None if job is None else job.id}
        if job is None:
            return named | {"status": "new", "reason": failure, "counts": {}}
        return named | {"status": job.status, "reason": job.reason or failure, "counts": dict(job.counts)}


def _shown(row: Mapping[str, Any]) -> str:
    counts: Mapping[str, Any] = row["counts"]
    skipped = sum(counts.get("skipped", {}).values())
    why = f"  {safe(brief(row['reason']) or '')}" if row["reason"] else ""
    told = f"{counts.get('read', 0):>10,} read  {counts.get('written', 0):>10,} written  {skipped:>6,} skipped"
    return f"{row['partition']:>8}  {row['status']:<8}  {told}{why}"


@contextmanager
def _others(asked: Options, since: float, gathered: Gathered) -> Iterator[None]:
    """The other workers; ended when this one is."""
    started: list[_Other] = []
    try:
        for _ in range(asked.workers - 1):
            with held_back():
                started.append(_Other(asked.command(since), gathered))
        yield
        for other in started:
            other.wait()
    finally:
        _end(started)


def _end(others: Sequence[_Other]) -> None:
    """Have them leave in good order; who interrupts that has them killed."""
    try:
        for other in others:
            other.terminate()
        deadline = time.monotonic() + PATIENCE
        late = [other for other in others if not other.has_ended(deadline)]
        if late:
            _log.warning("waiting for processes that have something in hand (%d): Ctrl-C kills them", len(late))
        for other in others:
            other.end()
    except KeyboardInterrupt:
        # Whoever leans on the key leaves none alive.
        with held_back():
            for other in others:
                other.process.kill()
        raise


class _Other:
    """Another process of this very command. `gathered`: where to put what it tells of its work."""

    def __init__(self, command: Sequence[str], gathered: Gathered) -> None:
        above = subprocess.PIPE if sys.stderr.isatty() else None
        with blocked():
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=above)  # noqa: S603 - our own
        self._told_to_end = False
        self._watching = _begun(self._watch)
        self._listening = [_begun(gathered.listen, self.process.stdout)]
        if self.process.stderr is not None:
            # A terminal shows a bar: what is logged there is to stand above it.
            self._listening.append(_begun(gathered.repeat, self.process.stderr))

    def _watch(self) -> None:
        status = self.process.wait()
        if status < 0 and not self._told_to_end:
            _log.warning("process %d has died of signal %d: others run what it ran", self.process.pid, -status)

    def wait(self) -> None:
        """Until it has ended."""
        self._watching.join()

    def has_ended(self, deadline: float) -> bool:
        """Whether it has, at the latest then (monotonic seconds)."""
        self._watching.join(max(0.0, deadline - time.monotonic()))
        return not self._watching.is_alive()

    def terminate(self) -> None:
        """Have it end, if it has not."""
        if self._watching.is_alive():
            self._told_to_end = True
            self.process.terminate()

    def end(self) -> None:
        """Wait for its end, and for what it has told."""
        self.wait()
        for thread in self._listening:
            # What the application has started may hold the pipe open: nobody waits for that.
            thread.join(1.0)


def _begun(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread


# -- what the processes tell


class Increments:
    """What is told of partitions, as what has come to it each time: items and attempts that failed."""

    def __init__(self, tell: Callable[[int, int, int], None]) -> None:
        self._tell = tell
        self._known: dict[int, tuple[Any, int, int]] = {}

    def __call__(self, part: int, report: Report, earlier: Mapping[str, Any], /) -> None:
        """As `retrykit.batch.partitions.Watch`."""
        items, failures = report.counts.read, report.counts.rollbacks
        run, before, failed = self._known.get(part, (None, 0, 0))
        if run is not earlier:
            before, failed = earlier.get("read", 0), earlier.get("rollbacks", 0)
        self._known[part] = earlier, items, failures
        if (items, failures) != (before, failed):
            self._tell(part, items - before, failures - failed)


class ToTheParent:
    """A line on standard output for each increment, as long as somebody reads them."""

    def __init__(self) -> None:
        self._heard = True

    def __call__(self, part: int, items: int, failures: int) -> None:
        """Write one."""
        if not self._heard:
            return
        try:
            # Past the buffer: nothing is left in it that cannot be written at the end.
            os.write(sys.stdout.fileno(), MARK + json.dumps([part, items, failures]).encode() + b"\n")
        except OSError:
            # The process that draws has died. The work goes on.
            self._heard = False


class Gathered:
    """What all processes of the command have told, over time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._all = _Line(Series([Point(0.0, 0, 0)]))
        self._parts: dict[int, _Line] = {}
        self.shown = Shown(lambda _items, _failures: None, sys.stderr.write)
        """Where the whole is shown, and what others print."""

    def add(self, part: int, items: int, failures: int) -> None:
        """So much has come to a partition."""
        with self._lock:
            seconds = time.monotonic() - self._began
            for line in (self._all, self._parts.setdefault(part, _Line())):
                line.add(seconds, items, failures)
            self.shown.tell(self._all.items, self._all.failures)

    def listen(self, pipe: IO[bytes]) -> None:
        """Add what another process tells, until it has ended. What its application prints goes to standard error."""
        with pipe:
            for line in pipe:
                if not line.startswith(MARK):
                    self._repeat(line)
                    continue
                part, items, failures = json.loads(line.removeprefix(MARK))
                self.add(part, items, failures)

    def repeat(self, pipe: IO[bytes]) -> None:
        """Say on standard error what another process says there."""
        with pipe:
            for line in pipe:
                self._repeat(line)

    def _repeat(self, line: bytes) -> None:
        self.shown.say(line.decode(errors="backslashreplace"))

    def lines(self) -> tuple[Sequence[Point], Mapping[int, Sequence[Point]]]:
        """The points of the whole, and of each partition."""
        with self._lock:
            parts = {part: spread(line.series.points) for part, line in sorted(self._parts.items())}
            return spread(self._all.series.points), parts


@attrs.define
class _Line:
    series: Series = attrs.Factory(Series)
    items: int = 0
    failures: int = 0

    def add(self, seconds: float, items: int, failures: int) -> None:
        self.items += items
        self.failures += failures
        self.series.add(Point(seconds, self.items, self.failures))
