"""`SqlJobStore`: how far batch jobs are, in the table `rk_job`, in the transaction of the work where it is there too.

A job is identified by its name and parameters. Who runs it has *claimed* it: under a fence that grows with each claim,
for a lease that is renewed while it runs. What a claim stores names its fence and the revision before it; so a process
that was overtaken stores nothing, and one whose connection was lost in a commit can ask whether it was done.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import attrs
from sqlalchemy import Connection, Engine, bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.util import greenlet_spawn

from retrykit.check import Seconds, seconds, wrong_type, wrong_value
from retrykit.errors import JobFinishedError, JobLostError, JobRunningError
from retrykit.lease import hold
from retrykit.owner import begin, end, is_running
from retrykit.sql.connections import connections_of
from retrykit.sql.dialects import Database, database_of
from retrykit.sql.engines import engine_of, is_async_engine, sync_engine_of
from retrykit.sql.faults import wording
from retrykit.sql.opening import opened
from retrykit.sql.parked import park_in
from retrykit.sql.places import Place
from retrykit.sql.prepared import Prepared
from retrykit.sql.rows import rows_for
from retrykit.sql.sqlite import reading
from retrykit.sql.tables import rk_job
from retrykit.sql.transaction import joinable

T = TypeVar("T")

_log = logging.getLogger("retrykit.sql")
_c = rk_job.c

_REASON: Final = 2_000
_PAGE: Final = 200

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

    `crashed`: the run before was neither finished nor stopped; its process died, or was believed dead.
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
    until_released: Callable[[], Any] = attrs.field(default=lambda: None, repr=False)


@attrs.frozen(kw_only=True)
class Job:
    """A job as people see it; `position` and `counts` as they were stored last. Instants are UTC."""

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


class _JobRows:
    """The verbs as statements on an open connection: who commits is somebody else's business."""

    def __init__(self, database: Database, lease: float) -> None:
        self.clock = rows_for(database, capacity=None, on_full="reject", time_to_live=None, clock=None)
        self.lease = lease

    def claim(self, connection: Connection, name: str, parameters: Mapping[str, Any], *, again: bool) -> Claim:
        now = self.clock.now()
        instance = instance_of(name, parameters)
        row = connection.execute(select(rk_job).where(_c.instance == instance).with_for_update()).first()
        if row is None:
            row = connection.execute(insert(rk_job).returning(*rk_job.c), _new(instance, name, parameters, now)).one()
        else:
            _check_free(row, now, again=again)
        anew = row.status == "finished"
        claim = Claim(
            id=row.id,
            name=name,
            parameters=parameters,
            position=None if anew else _loaded(row.position),
            counts={} if anew else json.loads(row.counts),
            revision=row.revision + 1,
            fence=row.fence + 1,
            owner=begin(),
            crashed=row.status == "running",
        )
        connection.execute(update(rk_job).where(_c.id == row.id).values(self._claimed(row, claim, now)))
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
            raise JobLostError(name=claim.name, id=claim.id, fence=claim.fence)
        for item in parked:
            headers = {**item["headers"], "retrykit-job": str(claim.id)}
            park_in(connection, **{**item, "headers": headers}, parked_at=now)
        return claim.revision + 1

    def moved(self, connection: Connection, claim: Claim) -> bool:
        row = connection.execute(select(_c.fence, _c.revision).where(_c.id == claim.id)).first()
        if row is None or row.fence != claim.fence:
            raise JobLostError(name=claim.name, id=claim.id, fence=claim.fence)
        return bool(row.revision != claim.revision)

    def renew(self, connection: Connection, claim: Claim) -> bool:
        until = self.clock.now() + self.lease
        ours = update(rk_job).where(_c.id == claim.id, _c.fence == claim.fence)
        return connection.execute(ours.values(lease_until=until)).rowcount == 1

    def release(
        self, connection: Connection, claim: Claim, status: str, *, reason: str, counts: Mapping[str, Any]
    ) -> bool:
        now = self.clock.now()
        values = {
            "status": status,
            "reason": reason[:_REASON] or None,
            "counts": json.dumps(counts),
            "owner": None,
            "lease_until": None,
            "updated_at": now,
            "finished_at": now if status == "finished" else None,
        }
        ours = update(rk_job).where(_c.id == claim.id, _c.fence == claim.fence)
        return connection.execute(ours.values(values)).rowcount == 1

    def stop_others(self, connection: Connection, claim: Claim, reason: str) -> int:
        stopped = [self._stop(connection, claim, one, reason) for one in partitions_of(claim.parameters)]
        return sum(stopped)

    def _stop(self, connection: Connection, claim: Claim, parameters: Mapping[str, Any], reason: str) -> int:
        now, instance = self.clock.now(), instance_of(claim.name, parameters)
        found = connection.execute(select(_c.id, _c.status).where(_c.instance == instance).with_for_update()).first()
        values: dict[str, Any] = {"status": "stopped", "reason": reason[:_REASON], "updated_at": now}
        if found is None:
            connection.execute(insert(rk_job), _new(instance, claim.name, parameters, now) | values)
            return 1
        if found.id == claim.id or found.status == "finished":
            return 0
        # Under another fence its runner cannot commit any more.
        values |= {"fence": _c.fence + 1, "owner": None, "lease_until": None}
        connection.execute(update(rk_job).where(_c.id == found.id).values(values))
        return 1


def partition(parameters: Mapping[str, Any], part: int, parts: int) -> dict[str, Any]:
    """The parameters of one of the jobs that a step is divided into; `part` counts from 1."""
    return {**parameters, "partition": f"{part}/{parts}"}


def partitions_of(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of all jobs of the step that is divided as these say; none if it is not."""
    _, _, parts = str(parameters.get("partition", "")).partition("/")
    return [partition(parameters, part, int(parts)) for part in range(1, int(parts) + 1)] if parts.isdecimal() else []


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


def _check_free(row: Any, now: float, *, again: bool) -> None:
    """Refuse a job that is finished, unless it is to run again, and one that somebody runs."""
    facts = {"name": row.name, "parameters": json.loads(row.parameters), "id": row.id}
    if row.status == "finished" and not again:
        raise JobFinishedError(finished_at=_instant(row.finished_at), **facts)
    if row.status == "running":
        alive = is_running(row.owner or "")
        if alive or (alive is None and row.lease_until is not None and row.lease_until > now):
            raise JobRunningError(owner=row.owner, until=_instant(row.lease_until), **facts)


def _dumped(position: Any) -> str | None:
    try:
        return None if position is None else json.dumps(position, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise wrong_value("position", f"JSON-able ({error})", position) from error


def _loaded(position: str | None) -> Any:
    return None if position is None else json.loads(position)


def _instant(at: float | None) -> datetime | None:
    return None if at is None else datetime.fromtimestamp(at, UTC)


@attrs.frozen(eq=False)
class _Lease:
    """What the keeper of leases renews."""

    store: Any
    claim: Claim

    def renew(self) -> bool:
        return self._told(self.store.renew(self.claim))

    async def async_renew(self) -> bool:
        try:
            return self._told(await self.store.renew(self.claim))
        except Exception:  # noqa: BLE001 - a task ends here: it is tried again while the lease lasts
            _log.exception("job %s: its lease could not be renewed; it is going to be tried again", self.claim.name)
            return True

    def _told(self, renewed: bool) -> bool:  # noqa: FBT001 - the store's answer
        if not renewed:
            _log.warning("job %s: somebody else has claimed it: nothing more is stored here", self.claim.name)
        return renewed


class SqlJobStore:
    """Positions and counts of batch jobs in the table `rk_job`, and what they skip in `rk_parked`.

    `engine`: a SQLAlchemy Engine, used as it is, or a URL. Give the one that the step's transactions are of, or one of
    the same database: then position, counts and skipped items commit with the items, and a restart repeats nothing.
    Anywhere else they are stored after the commit, and a process that dies in between writes a chunk twice. On SQLite
    the tables are made; on servers `retrykit db upgrade` makes them. `lease`: seconds for which a runner that nobody
    can see from here is believed to be running; renewed each third of it.

    Errors of the database are SQLAlchemy's own. Safe to use from any thread.
    """

    _in_loop = False

    def __init__(self, engine: Any, *, lease: Seconds = 60.0) -> None:
        self.lease = seconds("lease", lease)
        if self.lease <= 0:
            raise wrong_value("lease", "more than 0 seconds", lease)
        self._engine = self._checked(engine)
        beneath = sync_engine_of(self._engine)
        self._database: Database = database_of(beneath)  # type: ignore[assignment] # engine_of has asked
        self._rows = _JobRows(self._database, self.lease)
        self._connections = connections_of(beneath, self._database, None, in_loop=self._in_loop)
        self._place: Place | None = None

    def _checked(self, engine: Any) -> Any:
        made = engine_of(engine)
        if is_async_engine(made):
            raise wrong_type("engine", "an Engine (an AsyncEngine needs an AsyncSqlJobStore)", engine)
        return made

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._engine  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        from retrykit.sql.urls import shown_url

        return f"{type(self).__name__}({shown_url(sync_engine_of(self._engine).url)!r}, lease={self.lease:g})"

    def _open(self) -> Place:
        """Look whether the tables are there, and where; once."""
        if self._place is None:
            engine = sync_engine_of(self._engine)
            with wording("open", "", engine.url):
                self._place = opened(engine, self._connections, self._database, self._rows.clock)
        return self._place

    def _do(self, work: Callable[[Connection], T]) -> T:
        self._open()
        with self._connections.several() as connection:
            return work(connection)

    # -- for who runs a job

    def claim(self, name: str, parameters: Mapping[str, Any], *, again: bool = False) -> Claim:
        """Take a job: nobody else runs it until it is released, or this process is dead, or silent for a lease.

        `JobFinishedError` for one that is finished, unless it is to run `again` from the beginning; `JobRunningError`.
        """
        claim = self._claim(name, parameters, again=again)
        claim.until_released = self._hold(claim)
        return claim

    def _claim(self, name: str, parameters: Mapping[str, Any], *, again: bool) -> Claim:
        for _ in range(3):
            try:
                return self._do(lambda connection: self._rows.claim(connection, name, parameters, again=again))
            except IntegrityError:
                # Somebody else has made the same one at the same time.
                continue
        return self._do(lambda connection: self._rows.claim(connection, name, parameters, again=again))

    def _hold(self, claim: Claim) -> Callable[[], Any]:
        return hold(_Lease(self, claim), self, self.lease / 3, asynchronous=self._in_loop)

    def renew(self, claim: Claim) -> bool:
        """Go on being believed. False: somebody else has the job."""
        return self._do(lambda connection: self._rows.renew(connection, claim))

    def joined(self, transaction: object) -> JoinedJobs | None:
        """The store inside the caller's open transaction; None if that is on another database, or AUTOCOMMIT."""
        connection = joinable(transaction, sync_engine_of(self._engine), self._open())
        return None if connection is None else JoinedJobs(self._rows, connection)

    def book(
        self, claim: Claim, position: Any, counts: Mapping[str, Any], parked: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """Store position and counts, and park items (the arguments of `park_in`), in a transaction of its own.

        The revision after it. `JobLostError` if somebody else has the job.
        """
        return self._do(lambda connection: self._rows.book(connection, claim, position, counts=counts, parked=parked))

    def moved(self, claim: Claim) -> bool:
        """Whether something was stored behind the claim's revision: by a commit that was not confirmed."""
        return self._do(lambda connection: self._rows.moved(connection, claim))

    def state(self, name: str, parameters: Mapping[str, Any]) -> Job | None:
        """The job as it stands; None if it was never started."""
        instance = instance_of(name, parameters)
        row = self._do(lambda connection: connection.execute(select(rk_job).where(_c.instance == instance)).first())
        return None if row is None else _job(row)

    def now(self) -> float:
        """Seconds since the epoch, by the clock that jobs go by: the server's, where there is one."""
        self._open()
        return self._rows.clock.now()

    def stop_others(self, claim: Claim, reason: str) -> int:
        """Stop the other partitions of the claim's job, those that run at their next commit; how many."""
        return self._do(lambda connection: self._rows.stop_others(connection, claim, reason))

    def release(self, claim: Claim, *, status: str, reason: str = "", counts: Mapping[str, Any]) -> None:
        """End the run. `JobLostError` if the job is another's by now and this one has finished it."""
        try:
            released = self._do(
                lambda connection: self._rows.release(connection, claim, status, reason=reason, counts=counts)
            )
        finally:
            # Not before: others would take it for the job of a process that has died.
            self.abandon(claim)
        _check_released(claim, status, released=released)

    def abandon(self, claim: Claim) -> None:
        """Let go of the job without a word: as if the process had died, but known to others on this machine."""
        claim.until_released()
        end(claim.owner)


def _check_released(claim: Claim, status: str, *, released: bool) -> None:
    if released:
        return
    lost = JobLostError(name=claim.name, id=claim.id, fence=claim.fence)
    if status == "finished":
        raise lost
    _log.warning("%s", lost)


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
        yield from map(_job, page)
        if len(page) < size:
            return
        after, limit = page[-1].id, None if limit is None else limit - size


def stored_job(bind: Engine, number: int) -> Job | None:
    """One job by its number."""
    with reading(bind).connect() as connection:
        row = connection.execute(select(rk_job).where(_c.id == number)).first()
    return None if row is None else _job(row)


def _job(row: Any) -> Job:
    started, updated = _instant(row.started_at), _instant(row.updated_at)
    assert started is not None  # noqa: S101 - the columns have no NULLs
    assert updated is not None  # noqa: S101 - as above
    return Job(
        id=row.id,
        name=row.name,
        parameters=json.loads(row.parameters),
        status=row.status,
        reason=row.reason,
        runs=row.runs,
        position=_loaded(row.position),
        counts=json.loads(row.counts),
        owner=row.owner,
        lease_until=_instant(row.lease_until),
        started_at=started,
        updated_at=updated,
        finished_at=_instant(row.finished_at),
    )


class JoinedJobs:
    """What a runner stores, inside somebody's open transaction: nothing here begins or commits."""

    def __init__(self, rows: _JobRows, connection: Connection) -> None:
        self._rows = rows
        self._connection = connection

    def book(
        self, claim: Claim, position: Any, counts: Mapping[str, Any], parked: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """As `SqlJobStore.book`: it holds once the transaction has committed."""
        return self._rows.book(self._connection, claim, position, counts=counts, parked=parked)

    def moved(self, claim: Claim) -> bool:
        """As `SqlJobStore.moved`."""
        return self._rows.moved(self._connection, claim)


class AsyncSqlJobStore(SqlJobStore):
    """`SqlJobStore` on an AsyncEngine, or the URL of an asynchronous driver: for an `AsyncChunkStep`, on asyncio."""

    _in_loop = True

    def __init__(self, engine: Any, *, lease: Seconds = 60.0) -> None:
        super().__init__(engine, lease=lease)
        self._opening = asyncio.Lock()

    def _checked(self, engine: Any) -> Any:
        made = engine_of(engine)
        if not is_async_engine(made):
            raise wrong_type("engine", "an AsyncEngine (an Engine needs a SqlJobStore)", engine)
        return made

    async def _run(self, verb: Callable[..., T], *arguments: Any, **options: Any) -> T:
        if self._place is None:
            async with self._opening:
                await greenlet_spawn(self._open)
        return await greenlet_spawn(verb, *arguments, **options)

    async def claim(  # type: ignore[override]
        self, name: str, parameters: Mapping[str, Any], *, again: bool = False
    ) -> Claim:
        """As `SqlJobStore.claim`."""
        claim = await self._run(self._claim, name, parameters, again=again)
        claim.until_released = self._hold(claim)
        return claim

    async def renew(self, claim: Claim) -> bool:  # type: ignore[override]
        """As `SqlJobStore.renew`."""
        return await self._run(super().renew, claim)

    async def joined(self, transaction: object) -> AsyncJoinedJobs | None:  # type: ignore[override]
        """As `SqlJobStore.joined`: an AsyncSession or AsyncConnection."""
        joined = await self._run(super().joined, transaction)
        return None if joined is None else AsyncJoinedJobs(joined)

    async def book(  # type: ignore[override]
        self, claim: Claim, position: Any, counts: Mapping[str, Any], parked: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """As `SqlJobStore.book`."""
        return await self._run(super().book, claim, position, counts, parked)

    async def moved(self, claim: Claim) -> bool:  # type: ignore[override]
        """As `SqlJobStore.moved`."""
        return await self._run(super().moved, claim)

    async def state(  # type: ignore[override]
        self, name: str, parameters: Mapping[str, Any]
    ) -> Job | None:
        """As `SqlJobStore.state`."""
        return await self._run(super().state, name, parameters)

    async def stop_others(self, claim: Claim, reason: str) -> int:  # type: ignore[override]
        """As `SqlJobStore.stop_others`."""
        return await self._run(super().stop_others, claim, reason)

    async def release(  # type: ignore[override]
        self, claim: Claim, *, status: str, reason: str = "", counts: Mapping[str, Any]
    ) -> None:
        """As `SqlJobStore.release`."""
        await self._run(super().release, claim, status=status, reason=reason, counts=counts)


class AsyncJoinedJobs:
    """`JoinedJobs`, awaited."""

    def __init__(self, joined: JoinedJobs) -> None:
        self._joined = joined

    async def book(
        self, claim: Claim, position: Any, counts: Mapping[str, Any], parked: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """As `JoinedJobs.book`."""
        return await greenlet_spawn(self._joined.book, claim, position, counts, parked)

    async def moved(self, claim: Claim) -> bool:
        """As `JoinedJobs.moved`."""
        return await greenlet_spawn(self._joined.moved, claim)


def restart_job(bind: Engine, number: int) -> Job | None:
    """Let a job begin anew when it is started next; None if there is no such job.

    Position and counts are forgotten; what it has written and parked stays. `JobRunningError` while somebody runs it.
    """
    database = database_of(bind)
    if database is None:
        raise wrong_type("bind", "an Engine of SQLite, PostgreSQL or MariaDB", bind)
    clock = rows_for(database, capacity=None, on_full="reject", time_to_live=None, clock=None)
    with connections_of(bind, database, None, in_loop=False).several() as connection:
        row = connection.execute(select(rk_job).where(_c.id == number).with_for_update()).first()
        if row is None:
            return None
        _check_free(row, clock.now(), again=True)
        anew: dict[str, Any] = {
            "status": "new",
            "reason": None,
            "position": None,
            "counts": "{}",
            "finished_at": None,
            "owner": None,
        }
        anew |= {"revision": row.revision + 1, "fence": row.fence + 1, "updated_at": clock.now(), "lease_until": None}
        connection.execute(update(rk_job).where(_c.id == number).values(anew))
        return _job(connection.execute(select(rk_job).where(_c.id == number)).one())
