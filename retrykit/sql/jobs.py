"""`SqlJobStore`: how far batch jobs are, in the table `rk_job`, in the transaction of the work where it is there too.

A job is identified by its name and parameters. Who runs it has *claimed* it: under a fence that grows with each claim,
for a lease that is renewed while it runs. What a claim stores names its fence and the revision before it; so a process
that was overtaken stores nothing, and one whose connection was lost in a commit can ask whether it was done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

import attrs
from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import IntegrityError

from retrykit.check import Seconds, seconds, wrong_type, wrong_value
from retrykit.errors import JobError, JobLostError
from retrykit.lease import hold
from retrykit.owner import end
from retrykit.sql.again import Again, Begun
from retrykit.sql.connections import connections_of
from retrykit.sql.dialects import Database, database_of
from retrykit.sql.divisions import partition
from retrykit.sql.engines import engine_of, is_async_engine, sync_engine_of
from retrykit.sql.faults import wording
from retrykit.sql.job_rows import Claim, JobRows, check_free, has_ended, instance_of, is_taken
from retrykit.sql.opening import opened
from retrykit.sql.places import Place
from retrykit.sql.resilience import Resilience, resilience
from retrykit.sql.stored_jobs import Job, job_of
from retrykit.sql.tables import rk_job
from retrykit.sql.transaction import commits_at_once, joinable, keeps_a_snapshot
from retrykit.sql.waiting import is_busy, telling

T = TypeVar("T")

_log = logging.getLogger("retrykit.sql")
_c = rk_job.c

_PATIENCE: Final = 5.0
"""Seconds; who stops a run waits for its end."""
_AHEAD: Final = 1.0
"""Seconds; the server's clock is known by estimate."""


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
    Anywhere else, and with a Session that writes to several databases, they are stored after the commit, and a process
    that dies in between writes a chunk twice. On SQLite the tables are made; on servers `retrykit db upgrade` makes
    them. `lease`: seconds for which a runner that nobody can see from here is believed to be running; renewed each
    third of it.

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
        self._rows = JobRows(self._database, self.lease)
        self._connections = connections_of(beneath, self._database, None, in_loop=self._in_loop)
        self._trying = {patience: self._tried_for(patience) for patience in (self.lease, _PATIENCE)}
        self._place: Place | None = None
        self._snapshots: MutableMapping[Any, dict[Any, bool]] = WeakKeyDictionary()

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

    def _tried_for(self, patience: float) -> Resilience:
        passes = self._database.passes
        database = attrs.evolve(self._database, passes=lambda error: passes(error) or is_busy(error))
        return resilience(database, patience, evicts=False, in_loop=self._in_loop)

    def _surely(self, patience: float, work: Callable[[Connection], T]) -> T:
        """What may be done twice is tried again when what stopped it passes."""
        return self._trying[patience].run(lambda _: self._do(work))

    def _look(self, work: Callable[[Connection], T]) -> T:
        self._open()
        with self._connections.reading() as connection:
            return work(connection)

    # -- for who runs a job

    def claim(
        self, name: str, parameters: Mapping[str, Any], *, again: bool = False, since: float | None = None
    ) -> Claim:
        """Take a job: nobody else runs it until it is released, or this process is dead, or silent for a lease.

        `JobFinishedError` for one that is finished, unless it is to run `again` from the beginning; `JobRunningError`;
        `JobError` for one that was begun in another number of partitions; `again`, if it is not finished.
        `JobLostError` for one that has failed, or was stopped, at `since` (epoch seconds, see `now`) or later.
        """
        claim = self._claim(name, parameters, again=again, since=since)
        claim.until_released = self._hold(claim)
        return claim

    def _claim(self, name: str, parameters: Mapping[str, Any], *, again: bool, since: float | None) -> Claim:
        if not self._database.is_server:
            self._check_free(name, parameters, again=again)
        with telling(f"job {name} is not begun yet", name=name, parameters=parameters):
            return self._claim_at_last(name, parameters, again=again, since=since)

    def _check_free(self, name: str, parameters: Mapping[str, Any], *, again: bool) -> None:
        """What a claim refuses is refused at once where it would have to wait for the writer first."""
        row = self._row(name, parameters)
        if row is not None:
            check_free(row, self._rows.clock.now(), again=again)

    def _claim_at_last(self, name: str, parameters: Mapping[str, Any], **how: Any) -> Claim:
        for _ in range(3):
            try:
                return self._claim_once(name, parameters, **how)
            except IntegrityError:
                # Somebody else has made the same one at the same time.
                continue
        return self._claim_once(name, parameters, **how)

    def _claim_once(self, name: str, parameters: Mapping[str, Any], **how: Any) -> Claim:
        made: list[Claim] = []
        try:
            self._do(lambda connection: made.append(self._rows.claim(connection, name, parameters, **how)))
        except BaseException:
            # Its commit may have happened: nobody runs the job all the same.
            for claim in made:
                end(claim.owner)
            raise
        return made[0]

    def _hold(self, claim: Claim) -> Callable[[], Any]:
        return hold(_Lease(self, claim), self, self.lease / 3, asynchronous=self._in_loop)

    def renew(self, claim: Claim) -> bool:
        """Go on being believed. False: somebody else has the job.

        While a transaction is open that keeps a snapshot nothing is done: it is to change the row itself.
        """
        waits = claim.within is not None and claim.within.is_open()
        return waits or self._do(lambda connection: self._rows.renew(connection, claim))

    def joined(self, transaction: object) -> JoinedJobs | None:
        """The store inside the caller's open transaction; None if that is on another database, or AUTOCOMMIT."""
        connection = joinable(transaction, sync_engine_of(self._engine), self._open())
        if connection is None:
            return None
        return JoinedJobs(self._rows, connection, transaction, snapshot=self._keeps_a_snapshot(connection))

    def _keeps_a_snapshot(self, connection: Connection) -> bool:
        """Asked once for each pool and isolation level."""
        known = self._snapshots.setdefault(connection.engine.pool, {})
        level = connection.get_execution_options().get("isolation_level")
        if level not in known:
            known[level] = keeps_a_snapshot(connection)
        return known[level]

    def book(
        self, claim: Claim, position: Any, counts: Mapping[str, Any], parked: Sequence[Mapping[str, Any]] = ()
    ) -> int:
        """Store position and counts, and park items (the arguments of `park_in`), in a transaction of its own.

        The revision after it. `JobLostError` if somebody else has the job. While the database is busy or away it is
        tried again for a lease, and is not done twice.
        """

        def store(again: bool) -> int:  # noqa: FBT001 - as Resilience calls it
            if again and self._do(lambda connection: self._rows.moved(connection, claim)):
                return claim.revision + 1
            return self._do(
                lambda connection: self._rows.book(connection, claim, position, counts=counts, parked=parked)
            )

        return self._trying[self.lease].run(store)

    def moved(self, claim: Claim) -> bool:
        """Whether something was stored behind the claim's revision: by a commit that was not confirmed."""
        return self._surely(self.lease, lambda connection: self._rows.moved(connection, claim))

    @staticmethod
    def partition(parameters: Mapping[str, Any], part: int, parts: int) -> dict[str, Any]:
        """The parameters of the job of one partition; `part` counts from 1."""
        return partition(parameters, part, parts)

    def state(self, name: str, parameters: Mapping[str, Any]) -> Job | None:
        """The job as it stands; None if it was never started."""
        row = self._row(name, parameters)
        return None if row is None else job_of(row)

    def _row(self, name: str, parameters: Mapping[str, Any]) -> Any:
        instance = instance_of(name, parameters)
        return self._look(lambda connection: connection.execute(select(rk_job).where(_c.instance == instance)).first())

    def begin_again(
        self, name: str, parameters: Mapping[str, Any], parts: int, *, before: datetime | None = None
    ) -> Begun:
        """Let all partitions of a job begin anew when they are started next, provided that each of them is finished.

        "begun"; "joined": some are not finished, and nothing is changed; "done": they were begun at `before` or later.
        Jobs of the same input in another number of partitions begin anew too, which is to say that they count no more;
        `JobRunningError` if somebody runs one of them, `JobError` if they are not all finished. `JobError` if a run
        that was begun before `before` is not finished, and for a `before` in the future, by the clock of the store.
        """
        instant = None if before is None else before.timestamp()
        self._open()
        if instant is not None and instant > self._rows.clock.now() + _AHEAD:
            raise JobError(f"before: {before} is in the future: whoever comes until then would begin {name} anew")
        again = Again(name=name, parameters=parameters, parts=parts, before=instant)
        # Who takes part in a run need not wait for those who write.
        answer = self._look(again.look)
        if answer is not None:
            return answer
        with telling(f"job {name} does not begin anew yet", name=name, parameters=parameters):
            return self._do(lambda connection: again.begin(connection, self._rows.clock.now()))

    def now(self) -> float:
        """Seconds since the epoch, by the clock that jobs go by: the server's, where there is one."""
        self._open()
        return self._rows.clock.now()

    def stop_others(self, claim: Claim, reason: str) -> int:
        """Stop the other partitions of the claim's job, those that run at their next commit; how many.

        While the database is busy or away it is tried again for a lease.
        """
        return self._surely(self.lease, lambda connection: self._rows.stop_others(connection, claim, reason))

    @staticmethod
    def has_ended(job: Job, since: float) -> bool:
        """Whether a job has failed, or was stopped, at `since` (epoch seconds, see `now`) or later; not for a while."""
        until = None if job.lease_until is None else job.lease_until.timestamp()
        return has_ended(job.status, until, job.updated_at.timestamp(), since)

    def is_taken(self, job: Job) -> bool:
        """Whether a job is to be left alone for now: somebody is believed to run it, or it pauses."""
        until = None if job.lease_until is None else job.lease_until.timestamp()
        return is_taken(job.status, job.owner, until, self._rows.clock.now())

    def release(
        self,
        claim: Claim,
        *,
        status: str,
        reason: str = "",
        counts: Mapping[str, Any],
        pause: float | None = None,
    ) -> None:
        """End the run. `JobLostError` if the job is another's by now and this one has finished it.

        `pause`: of a job that is "stopped", and to go on after so many seconds: those who share its partitions wait for
        that. While the database is busy or away it is tried again for a lease; for five seconds if the run was stopped.
        """
        try:
            self._surely(
                _PATIENCE if status == "stopped" else self.lease,
                lambda connection: self._rows.release(
                    connection, claim, status, reason=reason, counts=counts, pause=pause
                ),
            )
        except JobLostError as lost:
            if status == "finished":
                raise
            on_purpose = vars(lost).get("status") == "stopped"
            _log.log(logging.INFO if on_purpose else logging.WARNING, "%s", lost)
        finally:
            # Not before: others would take it for the job of a process that has died.
            self.abandon(claim)

    def abandon(self, claim: Claim) -> None:
        """Let go of the job without a word: as if the process had died, but known to others on this machine."""
        claim.until_released()
        end(claim.owner)


class JoinedJobs:
    """What a runner stores, inside somebody's open transaction: nothing here begins or commits.

    `snapshot`: the transaction cannot change what is changed elsewhere since it began.
    """

    def __init__(self, rows: JobRows, connection: Connection, transaction: object, *, snapshot: bool) -> None:
        self.snapshot = snapshot
        self._rows = rows
        self._connection = connection
        self._transaction = transaction

    def book(
        self, claim: Claim, position: Any, counts: Mapping[str, Any], parked: Sequence[Mapping[str, Any]] = ()
    ) -> int | None:
        """As `SqlJobStore.book`: it holds once the transaction has committed.

        None, and nothing is stored, if that is a Session that commits on several connections: the work may be lost
        where this is kept.
        """
        if not commits_at_once(self._transaction):
            return None
        return self._rows.book(self._connection, claim, position, counts=counts, parked=parked)

    def is_open(self) -> bool:
        """Whether the transaction has not ended yet. Asked from any thread."""
        return self._connection.get_transaction() is not None

    def moved(self, claim: Claim) -> bool:
        """As `SqlJobStore.moved`."""
        return self._rows.moved(self._connection, claim)
