"""Batch jobs for people to look at, and to let begin anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import attrs
from sqlalchemy import Engine, select, update
from sqlalchemy.exc import DBAPIError

from retrykit.check import wrong_type, wrong_value
from retrykit.errors import JobError
from retrykit.sql.connections import connections_of
from retrykit.sql.dialects import database_of
from retrykit.sql.divisions import partitions_of
from retrykit.sql.job_rows import begun_anew, check_free, instance_of, instant_of, loaded, stop_rows
from retrykit.sql.rows import rows_for
from retrykit.sql.sqlite import reading
from retrykit.sql.tables import rk_job
from retrykit.sql.waiting import telling

_c = rk_job.c
_PAGE: Final = 200


@attrs.frozen(kw_only=True)
class Job:
    """A job as people see it; `position` and `counts` as they were stored last.

    `started_at`: when it was begun, from its beginning. `lease_until`: until when it is believed to be run; of a job
    that is "stopped", when it is to go on. Instants are UTC.
    """

    id: int
    name: str
    parameters: Mapping[str, Any]
    status: str
    reason: str | None
    runs: int
    position: Any
    counts: Mapping[str, Any]
    owner: str | None
    lease_until: datetime | None
    started_at: datetime
    updated_at: datetime
    finished_at: datetime | None


def stored_jobs(
    bind: Engine, *, name: str | None = None, status: str | None = None, after: int = 0, limit: int | None = None
) -> Iterator[Job]:
    """The jobs in the order of their numbers, behind `after`, at most `limit`; read in pages.

    `status`: "running" (also of a process that has died), "finished", "failed" or "stopped".
    """
    query = select(rk_job)
    if name is not None:
        query = query.where(_c.name == name)
    if status is not None:
        query = query.where(_c.status == status)
    while limit is None or limit > 0:
        size = _PAGE if limit is None else min(_PAGE, limit)
        with reading(bind).connect() as connection:
            page = connection.execute(query.where(_c.id > after).order_by(_c.id).limit(size)).all()
        yield from map(job_of, page)
        if len(page) < size:
            return
        after, limit = page[-1].id, None if limit is None else limit - size


def stored_job(bind: Engine, number: int) -> Job | None:
    """One job by its number."""
    with reading(bind).connect() as connection:
        row = connection.execute(select(rk_job).where(_c.id == number)).first()
    return None if row is None else job_of(row)


def restart_job(bind: Engine, number: int) -> Job | None:
    """Let a job begin anew when it is started next; None if there is no such job.

    Position and counts are forgotten; what it has written and parked stays. `JobRunningError` while somebody runs it,
    `JobError` where the database lets nothing be changed.
    """
    try:
        return _restarted(bind, number)
    except DBAPIError as error:
        raise JobError(f"job {number} is not changed: {error.orig}") from error


def _database_of(bind: Engine) -> Any:
    database = database_of(bind)
    if database is None:
        raise wrong_type("bind", "an Engine of SQLite, PostgreSQL or MariaDB", bind)
    return database


def _clock_of(bind: Engine) -> Any:
    return rows_for(_database_of(bind), capacity=None, on_full="reject", time_to_live=None, clock=None)


def _connections_of(bind: Engine) -> Any:
    return connections_of(bind, _database_of(bind), None, in_loop=False)


def _restarted(bind: Engine, number: int) -> Job | None:
    clock, connections = _clock_of(bind), _connections_of(bind)
    with connections.reading() as connection:
        # Before the lock, which on SQLite a runner has nearly always.
        row = connection.execute(select(rk_job).where(_c.id == number)).first()
        if row is not None:
            check_free(row, clock.now(), again=True)
    with telling(f"job {number} does not begin anew yet", id=number), connections.several() as connection:
        row = connection.execute(select(rk_job).where(_c.id == number).with_for_update()).first()
        if row is None:
            return None
        check_free(row, clock.now(), again=True)
        connection.execute(update(rk_job).where(_c.id == number).values(begun_anew(row, clock.now())))
        return job_of(connection.execute(select(rk_job).where(_c.id == number)).one())


def stop_job(bind: Engine, number: int, reason: str, *, partitions: bool = False) -> Sequence[Job] | None:
    """Stop a job that somebody runs, for a reason: the jobs that were stopped; None if there is no such job.

    Its runner commits nothing more, and hears of it at his next commit. It goes on from there when it is started again.
    `partitions`: those of the same step too, also what was not begun, so that nobody who runs the others begins it. A
    job that has ended stays as it is. `ValueError` for an empty reason, `JobError` where the database lets nothing be
    changed.
    """
    if not isinstance(reason, str):
        raise wrong_type("reason", "a str", reason)
    if not reason:
        raise wrong_value("reason", "a text that says why", reason)
    try:
        return _stopped(bind, number, reason, partitions=partitions)
    except DBAPIError as error:
        raise JobError(f"job {number} is not changed: {error.orig}") from error


def _stopped(bind: Engine, number: int, reason: str, *, partitions: bool) -> Sequence[Job] | None:
    now = _clock_of(bind).now
    with telling(f"job {number} is not stopped yet", id=number), _connections_of(bind).several() as connection:
        row = connection.execute(select(rk_job).where(_c.id == number)).first()
        if row is None:
            return None
        parameters = json.loads(row.parameters)
        all_of_them = partitions_of(parameters) if partitions else []
        stopped = stop_rows(connection, row.name, all_of_them or [parameters], reason, now=now)
        instances = [instance_of(row.name, one) for one in stopped]
        found = connection.execute(select(rk_job).where(_c.instance.in_(instances)).order_by(_c.id))
        return [job_of(one) for one in found]


def job_of(row: Any) -> Job:
    """What a row says."""
    started, updated = instant_of(row.started_at), instant_of(row.updated_at)
    assert started is not None  # noqa: S101 - the columns have no NULLs
    assert updated is not None  # noqa: S101 - as above
    return Job(
        id=row.id,
        name=row.name,
        parameters=json.loads(row.parameters),
        status=row.status,
        reason=row.reason,
        runs=row.runs,
        position=loaded(row.position),
        counts=json.loads(row.counts),
        owner=row.owner,
        lease_until=instant_of(row.lease_until),
        started_at=started,
        updated_at=updated,
        finished_at=instant_of(row.finished_at),
    )
