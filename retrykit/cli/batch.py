"""`retrykit batch …`: a batch job as a command: progress, report, partitions over processes, signals."""

from __future__ import annotations

import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import attrs
import click

from retrykit.batch import AsyncChunkStep, ChunkStep, Report
from retrykit.batch.report import Status
from retrykit.batch.work import async_drive, drive
from retrykit.cli.calls import Do, Interruption, calls, interruptible, let_through
from retrykit.cli.divided import Options, run_divided
from retrykit.cli.jobs import brief
from retrykit.cli.logs import log_options, set_up
from retrykit.cli.plot import Point, Series, draw
from retrykit.cli.progress import progress
from retrykit.cli.screen import say_json
from retrykit.cli.steps import step_of
from retrykit.cli.target import LoadingError, TargetError
from retrykit.cli.words import as_instant, safe
from retrykit.errors import ContextCacheError, JobError, JobFinishedError, JobLostError
from retrykit.failure import message_of

_log = logging.getLogger("retrykit.batch")

_PART: Final = re.compile(r"\d+/\d+")
MAX_WORKERS: Final = 256
INTERRUPTED: Final = 128 + signal.SIGINT
LEAVING: Final = 10.0
"""Seconds that a process which another one has started has for leaving in good order."""


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
@click.option(
    "--again",
    is_flag=True,
    help="Run a finished job again, from the beginning; with --partitions, when each of them is finished.",
)
@click.option(
    "--again-since",
    metavar="TIME",
    callback=as_instant,
    help="With --partitions: run them again, unless they were begun at this time or later.",
)
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
    help="Draw items a second and failures over time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
@log_options
def run(**options: Any) -> None:
    """Run a batch job to its end.

    MODULE:NAME is a ChunkStep or AsyncChunkStep, or a function that makes one; with --partitions a function that makes
    the one for a partition. A function is given those parameters of the job that it has arguments for. The current
    directory is importable. A job that was interrupted goes on where it was.

    On a terminal progress is shown; elsewhere it is logged every ten seconds. SIGTERM or SIGINT (Ctrl-C) stop the job:
    the open transaction is rolled back, and what was committed stays. Another one kills processes that do not leave.

    With --partitions every process that runs the same command, on whatever machine, takes partitions that are free.
    Another number of partitions is refused once a job was begun, unless that is finished and it is to begin --again.
    Of several processes that say --again the first begins, and those that come while it runs take part. One that comes
    when all is finished begins once more: say --again-since where that can happen, with any time since the last run.

    What a job has come to is told, and drawn, also when it has failed or was stopped.

    Exit status: 0 when the job is finished, 1 when it failed, was stopped, or cannot be run, 2 when the command cannot
    be understood, 130 after a signal.
    """
    asked = Options(**options)
    if asked.workers > 1 and asked.partitions is None:
        raise click.UsageError("--workers needs --partitions.")
    if asked.again_since is not None and (asked.partitions is None or asked.again):
        raise click.UsageError("--again-since needs --partitions, and stands in place of --again.")
    _check(asked)
    set_up(asked.log_level.lower(), asked.log_format)
    with _told(asked), interruptible(LEAVING if asked.is_for_another else 0.0) as interruption:
        if asked.is_for_another:
            let_through()
        parts = asked.partitions
        finished = _run_one(asked, interruption) if parts is None else run_divided(asked, parts, interruption)
    sys.exit(0 if finished else 1)


def _check(asked: Options) -> None:
    """What is wrong with one option, however the others are."""
    if asked.again_since is not None and asked.again_since > datetime.now(UTC):
        words = f"{asked.again_since:%Y-%m-%dT%H:%M:%SZ} is in the future"
        raise click.BadParameter(words, param_hint="--again-since")
    if asked.plot is not None and not asked.plot.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {safe(str(asked.plot.parent))!r}", param_hint="--plot")
    if asked.plot is not None and asked.plot.suffix.lower() not in {"", ".svg"}:
        words = f"{safe(asked.plot.name)!r} is to be drawn as SVG: FILE.svg"
        raise click.BadParameter(words, param_hint="--plot")
    part = asked.parameters.get("partition")
    if part is not None and (asked.partitions is not None or _PART.fullmatch(part)):
        words = "'partition' says of each job of a step in --partitions which one it is: choose another name"
        raise click.BadParameter(words, param_hint="--param")


@contextmanager
def _told(asked: Options) -> Iterator[None]:
    """What ends a job, in a line for people; of the user's own errors the log has the traceback."""
    try:
        yield
    except (TargetError, LoadingError) as error:
        if error.__cause__ is not None:
            _log.critical("%s", error, exc_info=error.__cause__)
            sys.exit(1)
        raise click.BadParameter(str(error), param_hint="MODULE:NAME") from error
    except JobFinishedError as error:
        raise click.ClickException(safe(_finished(**vars(error)))) from error
    except (JobError, ContextCacheError) as error:
        _log.debug("the job has failed", exc_info=True)
        raise click.ClickException(safe(str(error))) from error
    except click.ClickException:
        raise
    except KeyboardInterrupt:
        # Said once: by the process that has started the others, which hear the signal too.
        level = logging.DEBUG if asked.is_for_another else logging.WARNING
        _log.log(level, "interrupted: what was committed stays, and the next run goes on behind it")
        sys.exit(INTERRUPTED)
    except Exception:  # noqa: BLE001 - whatever it is, the job has ended with it, and the log says so
        _log.critical("the job has failed", exc_info=True)
        sys.exit(1)


def _finished(*, name: str, parameters: Any, id: int, finished_at: datetime, **_: Any) -> str:  # noqa: A002 - a fact
    job = f"the job {name} {parameters} (number {id})"
    return f"{job} was finished at {finished_at}: say --again to run it from the beginning"


def _run_one(asked: Options, interruption: Interruption) -> bool:
    step = step_of(asked.target, asked.parameters)
    series = Series()
    with calls(asynchronous=step.asynchronous) as do, progress(step) as show:

        def hear(report: Report) -> None:
            interruption.check()
            show(report)
            series.add(_point(report))

        report, error, earlier = _end_of(step, asked, do, hear)
    if report is not None:
        series.begin(Point(0.0, earlier.get("read", 0), earlier.get("rollbacks", 0)))
        series.end(_point(report))
        draw(asked.plot, _title(report), series.points)
        _say(asked, report)
    if error is not None:
        raise error
    return report is not None and report.status == "finished"


def _end_of(
    step: ChunkStep | AsyncChunkStep, asked: Options, do: Do, heard: Callable[[Report], None]
) -> tuple[Report | None, BaseException | None, Mapping[str, Any]]:
    """What the job has come to, whatever ended it (None if it was not begun), and its counts before."""
    told = step.on_progress
    perform: Any = async_drive if step.asynchronous else drive

    def hear(report: Report) -> Any:
        heard(report)
        return None if told is None else told(report)

    course = attrs.evolve(step, on_progress=hear).course(asked.parameters, perform)
    report, error = None, None
    try:
        report = do(lambda: perform(course.run(again=asked.again)))
    except BaseException as ended:  # noqa: BLE001 - raised when the report is out
        error = ended
        if step.jobs is None or course.claim is not None:
            report = course.report(*_status_of(ended))
    return report, error, {} if course.claim is None else course.claim.counts


def _status_of(error: BaseException) -> tuple[Status, str]:
    by_somebody = isinstance(error, JobLostError) and vars(error).get("status") == "stopped"
    status: Status = "stopped" if by_somebody or not isinstance(error, Exception) else "failed"
    return status, f"{type(error).__name__}: {message_of(error)}"


def _point(report: Report) -> Point:
    return Point(report.seconds, report.counts.read, report.counts.rollbacks)


def _title(report: Report) -> str:
    return f"{report.name}: {report.status}" + (f" ({brief(report.reason)})" if report.reason else "")


def _say(asked: Options, report: Report) -> None:
    if asked.as_json:
        say_json(report.to_json())
    else:
        click.echo(safe(report.table(), lines=True))
