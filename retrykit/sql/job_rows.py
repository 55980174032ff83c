"""Batch jobs as rows: the statements on an open connection, and who may run what. Who commits is others' business."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import attrs
from sqlalchemy import Connection, bindparam, case, insert, literal, select, update

from retrykit.check import wrong_value
from retrykit.errors import JobFinishedError, JobLostError, JobRunningError
from retrykit.owner import begin, end, is_running
from retrykit.sql.dialects import Database
from retrykit.sql.divisions import begun_otherwise, check_division, check_finished, let_one_begin, partitions_of
from retrykit.sql.parked import park_in
from retrykit.sql.prepared import Prepared
from retrykit.sql.rows import rows_for, storable
from retrykit.sql.tables import rk_job

_c = rk_job.c

_REASON: Final = 2_000

_BOOK: Final = Prepared(
    update(rk_job)
    .where(
        _c.id == bindparam("the_id", type_=_c.id.type),
        _c.fence == bindparam("the_fence", type_=_c.fence.type),
        _c.revision == bindparam("the_revision", type_=_c.revision.type),
    )
    .values(
        {
            name: bindparam(name, type_=_c[name].type)
            for name in ("position", "counts", "revision", "updated_at", "lease_until")
        }
    )
)


@attrs.define(kw_only=True, eq=False)
class Claim:
    """A job as its runner has it. `position` and `counts` are as they were stored last.

    `crashed`: the run before was neither finished nor stopped; its process died, or was believed dead. `within`:
    the store as joined to a transaction that could not store its position any more if the lease were renewed beside it.
    """

    id: int
    name: str
    parameters: Mapping[str, Any]
    position: Any
    counts: Mapping[str, Any]
    revision: int
    fence: int
    owner: str
    crashed: bool
    within: Any = attrs.field(default=None, repr=False)
    until_released: Callable[[], Any] = attrs.field(default=lambda: None, repr=False)


class JobRows:
    """The verbs as statements on an open connection: who commits is somebody else's business."""

    def __init__(self, database: Database, lease: float) -> None:
        self.clock = rows_for(database, capacity=None, on_full="reject", time_to_live=None, clock=None)
        self.lease = lease

    def claim(
        self,
        connection: Connection,
        name: str,
        parameters: Mapping[str, Any],
        *,
        again: bool,
        since: float | None = None,
    ) -> Claim:
        """Take the job, made if it is not there: `JobFinishedError`, `JobRunningError` if it is not free, `JobError` if
        it was begun in another number of partitions; `again`, if it is not finished in that. `JobLostError` if it has
        failed, or was stopped, at `since` or later.
        """
        now = self.clock.now()
        instance = instance_of(name, parameters)
        row = _locked(connection, instance)
        if _is_new(row) and again:
            supersede(connection, begun_otherwise(connection, name, parameters, locked=True), now)
        elif _is_new(row):
            check_division(connection, name, parameters)
        if row is None:
            row = connection.execute(insert(rk_job).returning(*rk_job.c), _new(instance, name, parameters, now)).one()
        else:
            check_free(row, now, again=again)
            _check_not_ended(row, since)
        anew = row.status == "finished"
        started = now if anew or row.status == "new" else row.started_at
        claim = Claim(
            id=row.id,
            name=name,
            parameters=parameters,
            position=None if anew else loaded(row.position),
            counts={} if anew else json.loads(row.counts),
            revision=row.revision + 1,
            fence=row.fence + 1,
            owner=begin(),
            crashed=row.status == "running",
        )
        try:
            values = self._claimed(row, claim, now) | {"started_at": started}
            connection.execute(update(rk_job).where(_c.id == row.id).values(values))
        except BaseException:
            end(claim.owner)
            raise
        return claim

    def _claimed(self, row: Any, claim: Claim, now: float) -> dict[str, Any]:
        return {
            "status": "running",
            "reason": None,
            "runs": row.runs + 1,
            "position": _dumped(claim.position),
            "counts": json.dumps(claim.counts),
            "revision": claim.revision,
            "fence": claim.fence,
            "owner": claim.owner,
            "lease_until": now + self.lease,
            "updated_at": now,
            "finished_at": None,
        }

    def book(
        self,
        connection: Connection,
        claim: Claim,
        position: Any,
        *,
        counts: Mapping[str, Any],
        parked: Iterable[Mapping[str, Any]],
    ) -> int:
        """Store how far the claim is, and park items; the revision after that. `JobLostError`."""
        now = self.clock.now()
        booked = _BOOK.on(
            connection,
            {
                "the_id": claim.id,
                "the_fence": claim.fence,
                "the_revision": claim.revision,
                "position": _dumped(position),
                "counts": json.dumps(counts),
                "revision": claim.revision + 1,
                "updated_at": now,
                "lease_until": now + self.lease,
            },
        )
        if booked.rowcount != 1:
            raise _lost(connection, claim)
        for item in parked:
            headers = {**item["headers"], "retrykit-job": str(claim.id)}
            park_in(connection, **{**item, "headers": headers}, parked_at=now)
        return claim.revision + 1

    def moved(self, connection: Connection, claim: Claim) -> bool:
        """Whether the row is behind the claim's revision. `JobLostError`."""
        row = connection.execute(select(_c.fence, _c.revision).where(_c.id == claim.id)).first()
        if row is None or row.fence != claim.fence:
            raise _lost(connection, claim)
        return bool(row.revision != claim.revision)

    def renew(self, connection: Connection, claim: Claim) -> bool:
        """Believe in the runner for another lease. False: it is another's job."""
        until = self.clock.now() + self.lease
        ours = update(rk_job).where(_c.id == claim.id, _c.fence == claim.fence)
        return connection.execute(ours.values(lease_until=until)).rowcount == 1

    def release(
        self,
        connection: Connection,
        claim: Claim,
        status: str,
        *,
        reason: str,
        counts: Mapping[str, Any],
        pause: float | None,
    ) -> None:
        """The run is over, or goes on after a pause. `JobLostError`."""
        now = self.clock.now()
        # A runner that was interrupted in its last commit does not know what that has stored: it stays.
        known = _c.revision == claim.revision
        values = {
            "status": status,
            "reason": storable(reason)[:_REASON] or None,
            "counts": case((known, literal(json.dumps(counts), _c.counts.type)), else_=_c.counts),
            "owner": None,
            "lease_until": None if pause is None else now + pause,
            "updated_at": now,
            "finished_at": now if status == "finished" else None,
        }
        ours = update(rk_job).where(_c.id == claim.id, _c.fence == claim.fence)
        if connection.execute(ours.values(values)).rowcount != 1:
            raise _lost(connection, claim)

    def stop_others(self, connection: Connection, claim: Claim, reason: str) -> int:
        """Stop the other partitions, those that were never begun too; how many."""
        others = partitions_of(claim.parameters)
        return len(stop_rows(connection, claim.name, others, reason, now=self.clock.now, but=claim.id))


def stop_rows(
    connection: Connection,
    name: str,
    jobs: Iterable[Mapping[str, Any]],
    reason: str,
    *,
    now: Callable[[], float],
    but: int | None = None,
) -> list[Mapping[str, Any]]:
    """Stop the jobs with these parameters, but not the one of that number; the parameters of those that were."""
    # Nobody begins one of them meanwhile.
    let_one_begin(connection)
    return [one for one in jobs if _stop_row(connection, name, one, reason, now=now(), but=but)]


def _stop_row(
    connection: Connection, name: str, parameters: Mapping[str, Any], reason: str, *, now: float, but: int | None
) -> bool:
    """Stop a job that has not ended, also one that was never begun, unless its number is `but`. Whether it was so."""
    instance = instance_of(name, parameters)
    query = select(_c.id, _c.status, _c.lease_until).where(_c.instance == instance)
    found = connection.execute(query.with_for_update()).first()
    values: dict[str, Any] = {"status": "stopped", "reason": storable(reason)[:_REASON], "updated_at": now}
    if found is None:
        connection.execute(insert(rk_job), _new(instance, name, parameters, now) | values)
        return True
    if found.id == but or found.status == "finished":
        return False
    if found.status in {"failed", "stopped"} and found.lease_until is None:
        # Its own reason stays. That it is not started again by those who run the others follows from the time.
        connection.execute(update(rk_job).where(_c.id == found.id).values(updated_at=now))
        return False
    # Under another fence its runner cannot commit any more.
    values |= {"fence": _c.fence + 1, "owner": None, "lease_until": None}
    connection.execute(update(rk_job).where(_c.id == found.id).values(values))
    return True


def _lost(connection: Connection, claim: Claim) -> JobLostError:
    """What has become of a job that was claimed."""
    row = connection.execute(select(_c.status, _c.reason, _c.fence).where(_c.id == claim.id)).first()
    status = None if row is None else row.status
    told = {None: "is not there any more", "new": "begins anew"}
    reason = told.get(status, "was claimed by somebody else")
    if row is not None and status == "stopped":
        reason = f"was stopped: {row.reason}"
    elif row is not None and row.fence == claim.fence:
        reason = "is further than this runner knows, by a commit that was not confirmed"
    return JobLostError(name=claim.name, id=claim.id, fence=claim.fence, reason=reason, status=status)


def _is_new(row: Any) -> bool:
    return row is None or row.status == "new"


def _locked(connection: Connection, instance: str) -> Any:
    """The row of a job under its lock, if there is one. Who finds that it is to begin is the only one at that."""
    query = select(rk_job).where(_c.instance == instance)
    begun = not _is_new(connection.execute(query).first())
    row = connection.execute(query.with_for_update()).first() if begun else None
    if begun and not _is_new(row):
        return row
    # Not before it is known to be needed: the row of one that runs may be locked for long, and all would wait for it.
    let_one_begin(connection)
    return connection.execute(query.with_for_update()).first()


def supersede(connection: Connection, rows: Sequence[Any], now: float) -> None:
    """Let jobs of another number of partitions begin anew, so that they count no more. `JobRunningError` while somebody
    runs one, `JobError` if not all of their partitions are finished.
    """
    for row in rows:
        check_free(row, now, again=True)
    check_finished(rows)
    for row in rows:
        connection.execute(update(rk_job).where(_c.id == row.id).values(begun_anew(row, now)))


def instance_of(name: str, parameters: Mapping[str, Any]) -> str:
    """What identifies a job: a digest of its name and parameters, in whatever order these are."""
    text = json.dumps([name, parameters], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _new(instance: str, name: str, parameters: Mapping[str, Any], now: float) -> dict[str, Any]:
    return {
        "instance": instance,
        "name": name,
        "parameters": json.dumps(parameters, sort_keys=True),
        "status": "new",
        "runs": 0,
        "position": None,
        "counts": "{}",
        "revision": 0,
        "fence": 0,
        "started_at": now,
        "updated_at": now,
    }


def begun_anew(row: Any, now: float) -> dict[str, Any]:
    """What a row is set to so that the job begins anew when it is started next."""
    return {
        "status": "new",
        "reason": None,
        "position": None,
        "counts": "{}",
        "finished_at": None,
        "owner": None,
        "lease_until": None,
        "revision": row.revision + 1,
        "fence": row.fence + 1,
        "started_at": now,
        "updated_at": now,
    }


def check_free(row: Any, now: float, *, again: bool) -> None:
    """Refuse a job that is finished, unless it is to run again, and one that somebody runs."""
    facts = {"name": row.name, "parameters": json.loads(row.parameters), "id": row.id}
    if row.status == "finished" and not again:
        raise JobFinishedError(finished_at=instant_of(row.finished_at), **facts)
    if row.status == "running" and believed(row.owner, row.lease_until, now):
        raise JobRunningError(owner=row.owner, until=instant_of(row.lease_until), **facts)


def is_taken(status: str, owner: str | None, lease_until: float | None, now: float) -> bool:
    """Whether a job is to be left alone for now: somebody runs it, or it pauses."""
    if status == "running":
        return believed(owner, lease_until, now)
    return status == "stopped" and lease_until is not None and lease_until > now


def has_ended(status: str, lease_until: float | None, updated_at: float, since: float) -> bool:
    """Whether a job has failed, or was stopped, then or later; one that pauses has not."""
    return status in {"failed", "stopped"} and lease_until is None and updated_at >= since


def _check_not_ended(row: Any, since: float | None) -> None:
    if since is not None and has_ended(row.status, row.lease_until, row.updated_at, since):
        reason = f"has {row.status}" if row.status == "failed" else f"was stopped: {row.reason}"
        raise JobLostError(name=row.name, id=row.id, fence=row.fence, reason=reason, status=row.status)


def believed(owner: str | None, lease_until: float | None, now: float) -> bool:
    """Whether somebody is believed to be running what says that it is run by him."""
    alive = is_running(owner or "")
    return bool(alive or (alive is None and lease_until is not None and lease_until > now))


def _dumped(position: Any) -> str | None:
    try:
        return None if position is None else json.dumps(position, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise wrong_value("position", f"JSON-able ({error})", position) from error


def loaded(position: str | None) -> Any:
    """A position as it was given."""
    return None if position is None else json.loads(position)


def instant_of(at: float | None) -> datetime | None:
    """Seconds since the epoch as an instant."""
    return None if at is None else datetime.fromtimestamp(at, UTC)
