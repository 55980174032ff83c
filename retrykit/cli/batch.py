"""`retrykit batch …`: a batch job as a command: progress, report, partitions over processes, signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal

import attrs
import click

from retrykit.batch import AsyncChunkStep, ChunkStep, Division, Report, run_partitions
from retrykit.cli.jobs import brief
from retrykit.cli.logs import log_options, set_up
from retrykit.cli.plot import Point, Series, svg
from retrykit.cli.screen import say_json
from retrykit.cli.steps import made_by, step_of
from retrykit.cli.target import LoadingError, TargetError
from retrykit.cli.words import safe
from retrykit.errors import JobError

_log = logging.getLogger("retrykit.batch")

EVERY: Final = 10.0
MAX_WORKERS: Final = 256
INTERRUPTED: Final = 128 + signal.SIGINT


@attrs.frozen(kw_only=True)
class Options:
    """What was asked for."""

    target: str
    parameters: Mapping[str, str]
    again: bool
    partitions: int | None
    workers: int
    since: float | None
    plot: Path | None
    as_json: bool
    log_level: str
    log_format: Literal["text", "json"]

    def command(self, since: float) -> Sequence[str]:
        """The arguments of an interpreter for another worker."""
        named = [part for name, value in self.parameters.items() for part in ("--param", f"{name}={value}")]
        logs = ("--log-level", self.log_level, "--log-format", self.log_format)
        divided = ("--partitions", str(self.partitions), "--since", repr(since))
        return (sys.executable, "-m", "retrykit.cli", "batch", "run", self.target, *named, *divided, *logs, "--json")


def _as_parameters(_context: Any, _option: Any, given: Sequence[str]) -> dict[str, str]:
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{one!r} is not NAME=VALUE")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice")
        found[name] = value
    return found


@click.group()
def batch() -> None:
    """Run batch jobs."""


@batch.command()
@click.argument("target", metavar="MODULE:NAME")
@click.option(
    "--param",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_as_parameters,
    help="A parameter of the job, a text; may be said several times.",
)
@click.option("--again", is_flag=True, help="Run a finished job again, from the beginning.")
@click.option(
    "--partitions", type=click.IntRange(1), metavar="N", help="Divide the step: MODULE:NAME is called as (part, parts)."
)
@click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    default=1,
    show_default=True,
    metavar="N",
    help="With --partitions: run in N processes.",
)
@click.option("--since", type=float, hidden=True)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.svg",
    help="Draw items a second and failures over time; not with --partitions.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
@log_options
def run(**options: Any) -> None:
    """Run a batch job to its end.

    MODULE:NAME is a ChunkStep or AsyncChunkStep, or a function that makes one; with --partitions a function that makes
    the one for a partition. A function is given those parameters of the job that it has arguments for. The current
    directory is importable. A job that was interrupted goes on where it was.

    On a terminal progress is shown; elsewhere it is logged every ten seconds. SIGTERM or SIGINT (Ctrl-C) stop the job:
    the open transaction is rolled back, and what was committed stays.

    With --partitions every process that runs the same command, on whatever machine, takes partitions that are free.
    Another number of partitions is refused once a job was begun, unless it is to begin --again. Say --again
    to the first process only.

    Exit status: 0 when the job is finished, 1 when it failed, was stopped, or cannot be run, 2 when the command cannot
    be understood, 130 after a signal.
    """
    asked = Options(**options)
    if asked.workers > 1 and asked.partitions is None:
        raise click.UsageError("--workers needs --partitions.")
    if asked.plot is not None and asked.partitions is not None:
        raise click.UsageError("--plot is of one process: leave out --partitions.")
    if asked.plot is not None and not asked.plot.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {safe(str(asked.plot.parent))!r}", param_hint="--plot")
    set_up(asked.log_level.lower(), asked.log_format)
    with _told(), _ended_by_sigterm():
        finished = _run_one(asked) if asked.partitions is None else _run_divided(asked, asked.partitions)
    sys.exit(0 if finished else 1)


@contextmanager
def _told() -> Iterator[None]:
    """What ends a job, in a line for people; of the user's own errors the log has the traceback."""
    try:
        yield
    except (TargetError, LoadingError) as error:
        if error.__cause__ is not None:
            _log.critical("%s", error, exc_info=error.__cause__)
            sys.exit(1)
        raise click.BadParameter(str(error), param_hint="MODULE:NAME") from error
    except JobError as error:
        raise click.ClickException(safe(str(error))) from error
    except click.ClickException:
        raise
    except KeyboardInterrupt:
        _log.warning("interrupted: what was committed stays, and the next run goes on behind it")
        sys.exit(INTERRUPTED)
    except Exception:  # noqa: BLE001 - whatever it is, the job has ended with it, and the log says so
        _log.critical("the job has failed", exc_info=True)
        sys.exit(1)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- one job


def _run_one(asked: Options) -> bool:
    step = step_of(asked.target, asked.parameters)
    series = Series()
    with progress(step) as show:
        told = step.on_progress

        def heard(report: Report) -> Any:
            show(report)
            series.add(Point(report.seconds, report.counts.read, report.counts.rollbacks))
            return None if told is None else told(report)

        shown = attrs.evolve(step, on_progress=heard)
        try:
            report = _done(shown, asked)
        except Exception:
            _draw(asked, f"{step.name}: failed", series)
            raise
    _draw(asked, f"{report.name}: {report.status}", series)
    if asked.as_json:
        say_json(report.to_json())
    else:
        click.echo(safe(report.table(), lines=True))
    return report.status == "finished"


def _done(step: ChunkStep | AsyncChunkStep, asked: Options) -> Report:
    if isinstance(step, AsyncChunkStep):
        return asyncio.run(step.run(asked.parameters, again=asked.again))
    return step.run(asked.parameters, again=asked.again)


def _draw(asked: Options, title: str, series: Series) -> None:
    """The picture; what becomes of it changes nothing about the job."""
    if asked.plot is None:
        return
    try:
        asked.plot.write_text(svg(title, series.points), encoding="utf-8")
    except OSError as error:
        _log.error("the picture cannot be written: %s", error)


@contextmanager
def progress(step: ChunkStep | AsyncChunkStep) -> Iterator[Callable[[Report], None]]:
    """Something to tell how far it is: a bar on a terminal, lines in the log elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Logged()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        total = len(step.reader) if isinstance(step.reader, Sized) else None
        task = bar.add_task(safe(step.name), total=total)

        def show(report: Report) -> None:
            skipped = f", {report.counts.all_skipped:,} skipped" if report.counts.all_skipped else ""
            bar.update(task, completed=report.counts.read, description=f"{safe(step.name)}{skipped}")

        yield show


class _Logged:
    """Progress in the log, every ten seconds."""

    def __init__(self) -> None:
        self._due = time.monotonic() + EVERY

    def __call__(self, report: Report) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY
        counts = report.counts
        facts = (report.name, counts.read, counts.written, counts.all_skipped, counts.rollbacks)
        _log.info("%s: %d read, %d written, %d skipped, %d rolled back", *facts)


# -- partitions


def _run_divided(asked: Options, parts: int) -> bool:
    make = made_by(asked.target, asked.parameters)
    first = make(1, parts)
    if first.jobs is None:
        raise JobError(f"{first.name}: partitions are claimed in a job store: give the step `jobs`")
    since = first.jobs.now() if asked.since is None else asked.since
    if asked.again:
        _begin_anew(first, asked.parameters, parts)
    with _others(asked, since):
        division = run_partitions(make, parts, asked.parameters, since=since)
    _say(asked, first, parts, division)
    return division.finished


def _begin_anew(step: ChunkStep, parameters: Mapping[str, str], parts: int) -> None:
    from retrykit.sql import restart_job
    from retrykit.sql.stored_jobs import is_believed

    # Where others run the same command they have begun anew already: once is enough.
    jobs = [step.jobs.state(step.name, step.jobs.partition(parameters, part, parts)) for part in range(1, parts + 1)]
    for job in filter(None, jobs):
        if job.status == "running" and is_believed(job, step.jobs.now()):
            raise JobError(f"job {job.id} of {step.name} is run by {job.owner}: leave out --again to take part")
    for number, _ in step.jobs.divided_otherwise(step.name, step.jobs.partition(parameters, 1, parts)):
        restart_job(step.jobs.engine, number)
    for job in filter(None, jobs):
        if job.status == "finished":
            restart_job(step.jobs.engine, job.id)


@contextmanager
def _others(asked: Options, since: float) -> Iterator[None]:
    """The other workers; ended when this one is."""
    command = asked.command(since)
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(asked.workers - 1)]  # noqa: S603 - this very command
    try:
        yield
        for worker in started:
            worker.wait()
    finally:
        for worker in started:
            if worker.poll() is None:
                worker.terminate()
                worker.wait()


def _say(asked: Options, step: ChunkStep, parts: int, division: Division) -> None:
    """What has become of each partition, here and elsewhere."""
    rows = [_row(asked, step, (part, parts), division.failures.get(part)) for part in range(1, parts + 1)]
    if asked.as_json:
        say_json({"name": step.name, "parameters": dict(asked.parameters), "partitions": rows})
        return
    for row in rows:
        counts: dict[str, Any] = row["counts"]
        skipped = sum(counts.get("skipped", {}).values())
        why = f"  {safe(brief(row['reason']) or '')}" if row["reason"] else ""
        told = f"{counts.get('read', 0):>10,} read  {counts.get('written', 0):>10,} written  {skipped:>6,} skipped"
        click.echo(f"{row['partition']:>8}  {row['status']:<8}  {told}{why}")


def _row(asked: Options, step: ChunkStep, place: tuple[int, int], reason: str | None) -> dict[str, Any]:
    parameters = step.jobs.partition(asked.parameters, *place)
    job = step.jobs.state(step.name, parameters)
    status, counts = ("new", {}) if job is None else (job.status, dict(job.counts))
    return {"partition": parameters["partition"], "status": status, "reason": reason, "counts": counts}
