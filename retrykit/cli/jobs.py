"""`retrykit jobs …`: batch jobs in a database, for operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import click

from retrykit.cli.options import database_option, id_of, json_option, pages, use, yes_option
from retrykit.cli.screen import Cell, Screen, confirm, say_json
from retrykit.cli.words import safe

if TYPE_CHECKING:
    from retrykit.sql import Job

FORMAT: Final = 1
NUMBER: Final = click.IntRange(1, (1 << 63) - 1)
_BRIEF: Final = 120
STATUSES: Final = ("new", "running", "finished", "failed", "stopped")
_TITLES: Final = ("id", "name", "status", "runs", "read", "written", "skipped", "changed", "parameters", "reason")


@click.group()
def jobs() -> None:
    """Look at batch jobs; stop one, or let it begin anew.

    A job is a step's name with parameters. One that failed, was stopped or has died goes on where it was when it is
    started again; one that is finished is refused, until `restart` lets it begin anew.
    """


@jobs.command("list")
@database_option
@click.option("--name", metavar="NAME", help="Of the step with this name.")
@click.option("--status", type=click.Choice(STATUSES), help="In this state.")
@pages("ID")
@json_option
def list_(*, url: str, name: str | None, status: str | None, limit: int, after: str | None, as_json: bool) -> None:
    """Show jobs, in the order of their numbers.

    "running" is also what died without a word: `show` says who runs it, and until when he is believed. With --json:
    {"jobs": […], "next": ID or null}, each job as `show --json` has it.
    """
    from retrykit.sql import stored_jobs

    behind = 0 if after is None else id_of(after, "--after", "number of a job", least=0)
    with use(url) as store:
        found = list(
            islice(stored_jobs(store.engine, name=name, status=status, after=behind, limit=limit + 1), limit + 1)
        )
        screen = Screen.here(store.histories.now())
    page, following = found[:limit], found[limit - 1].id if len(found) > limit else None
    if as_json:
        say_json({"jobs": [to_json(job) for job in page], "next": following})
        return
    if page or screen.console is None:
        screen.table(_TITLES, map(_row, page))
    else:
        screen.line("no such job")
    if following is not None:
        click.echo(f"there are more: --after {following}", err=True)


def _row(job: Job) -> tuple[Cell, ...]:
    counts = job.counts
    return (
        job.id,
        job.name,
        job.status,
        job.runs,
        counts.get("read", 0),
        counts.get("written", 0),
        _skipped(counts),
        job.updated_at,
        _shown(job.parameters),
        brief(job.reason),
    )


def brief(reason: str | None) -> str | None:
    """The first line of a reason: the others of a database's have its statement, and rows."""
    return None if reason is None else reason.partition("\n")[0][:_BRIEF]


def _skipped(counts: Mapping[str, Any]) -> int:
    return sum(counts.get("skipped", {}).values())


def _shown(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items())


def to_json(job: Job) -> dict[str, Any]:
    """The JSON form of a job."""
    instants = ("lease_until", "started_at", "updated_at", "finished_at")
    facts = {"format": FORMAT} | {
        name: getattr(job, name) for name in ("id", "name", "status", "reason", "runs", "position", "owner")
    }
    facts |= {"parameters": dict(job.parameters), "counts": dict(job.counts)}
    return facts | {name: (at := getattr(job, name)) and at.isoformat() for name in instants}


@jobs.command()
@database_option
@click.argument("number", type=NUMBER, metavar="ID")
@json_option
def show(*, url: str, number: int, as_json: bool) -> None:
    """Show one job: counts, position, who runs it."""
    from retrykit.sql import stored_job

    with use(url) as store:
        job = stored_job(store.engine, number)
        screen = Screen.here(store.histories.now())
    if job is None:
        raise _nothing(number)
    if as_json:
        say_json(to_json(job))
    else:
        screen.facts(_facts(job))


def _facts(job: Job) -> Iterator[tuple[str, Cell]]:
    counts = job.counts
    yield "job", job.id
    yield "name", job.name
    yield "parameters", _shown(job.parameters)
    yield "status", job.status
    yield "reason", job.reason
    yield "runs", job.runs
    yield "run by", job.owner
    yield ("goes on" if job.status == "stopped" else "believed until"), job.lease_until
    yield "position", None if job.position is None else str(job.position)
    for name in ("read", "written", "filtered"):
        yield name, counts.get(name, 0)
    yield "skipped", _skipped(counts)
    for kind, skipped in sorted(counts.get("skipped", {}).items()):
        yield kind.rpartition(".")[2], skipped
    for name in ("retries", "rollbacks", "commits"):
        yield name, counts.get(name, 0)
    yield "begun", job.started_at
    yield "changed", job.updated_at
    yield "finished", job.finished_at


def _nothing(number: int) -> click.ClickException:
    return click.ClickException(f"there is no job {number}")


@jobs.command()
@database_option
@click.argument("number", type=NUMBER, metavar="ID")
@yes_option
def restart(*, url: str, number: int, yes: bool) -> None:
    """Let a job begin anew when it is started next.

    Position and counts are forgotten; what it has written stays, and what it has parked. One that failed or was stopped
    needs no restart to go on where it was. A job that somebody runs is left alone.
    """
    from retrykit.sql import restart_job, stored_job

    with use(url) as store:
        job = stored_job(store.engine, number)
        if job is None:
            raise _nothing(number)
        read = job.counts.get("read", 0)
        confirm(f"Let job {number}, {safe(job.name)} ({job.status}, {read} items read), begin anew?", yes=yes)
        if restart_job(store.engine, number) is None:
            raise _nothing(number)
    click.echo(f"job {number} begins anew when it is started next")


@jobs.command()
@database_option
@click.argument("number", type=NUMBER, metavar="ID")
@click.option("--reason", required=True, metavar="TEXT", help="Why; told to whoever runs it.")
@click.option("--partitions", is_flag=True, help="All partitions of its step too, also those that were not begun.")
def stop(*, url: str, number: int, reason: str, partitions: bool) -> None:
    """Stop a job that somebody runs, on whatever machine.

    Its runner hears of it when he commits the next time: that transaction is rolled back, and what was committed before
    stays. The job goes on from there when it is started again. Exit status: 1 if there was nothing to stop.
    """
    from retrykit.sql import stop_job, stored_job

    if not reason.strip():
        raise click.BadParameter("say why", param_hint="--reason")
    with use(url) as store:
        stopped = stop_job(store.engine, number, reason, partitions=partitions)
        job = stored_job(store.engine, number)
    if stopped is None or job is None:
        raise _nothing(number)
    for one in stopped:
        name = " ".join(filter(None, (one.name, _shown(one.parameters))))
        click.echo(f"job {one.id}, {safe(name)}, is stopped")
    if not stopped:
        raise click.ClickException(f"there is nothing to stop: job {number} is {job.status}")
