"""Batch jobs on a SQLite database to which somebody else is writing: what is known is said at once."""

from __future__ import annotations

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from retrykit.batch import ChunkStep, run_partitions, stop
from retrykit.clock import SystemClock
from retrykit.errors import JobBusyError, JobFinishedError, JobLostError, JobRunningError
from retrykit.sql import SqlJobStore, create_tables, restart_job, sqlite_engine, stored_jobs
from tests.waiting import until


@pytest.fixture
def locked(tmp_path):
    """A SQLite database to which somebody writes, without an end; who else would write gives up at once."""
    engine = sqlite_engine(f"sqlite:///{tmp_path}/busy.db", busy_timeout=0)
    create_tables(engine)
    with engine.connect() as writer:

        def lock():
            writer.begin()

        yield engine, lock, writer.rollback
    engine.dispose()


def test_who_runs_a_job_is_told_at_once_although_he_is_writing(locked):
    engine, lock, _ = locked
    jobs = SqlJobStore(engine)
    claim = jobs.claim("load", {})
    done = jobs.claim("done", {})
    jobs.release(done, status="finished", counts={})
    lock()
    with pytest.raises(JobRunningError, match="is run by"):
        SqlJobStore(engine).claim("load", {})
    with pytest.raises(JobRunningError, match="is run by"):
        restart_job(engine, claim.id)
    with pytest.raises(JobFinishedError):
        SqlJobStore(engine).claim("done", {})
    jobs.abandon(claim)


def test_what_is_waited_for_is_said_and_that_it_was_in_vain(locked, caplog, monkeypatch):
    engine, lock, unlock = locked
    monkeypatch.setattr("retrykit.sql.waiting.PATIENCE", 0.0)
    jobs, waits = SqlJobStore(engine), "job load is not begun yet: it waits for the database"
    lock()

    def execute(*_):
        until(lambda: any(waits in one for one in caplog.messages), 30)

    event.listen(engine, "handle_error", execute)
    with pytest.raises(JobBusyError, match="job load is not begun yet: the database is busy"):
        jobs.claim("load", {})
    unlock()
    jobs.release(jobs.claim("load", {}), status="finished", counts={})
    lock()
    with pytest.raises(JobBusyError, match="job 1 does not begin anew yet: the database is busy"):
        restart_job(engine, 1)


def test_the_end_of_a_run_is_told_again_until_others_let_it_be_written(locked):
    engine, lock, unlock = locked
    jobs, refused = SqlJobStore(engine), []

    def hear(report):
        # The last transaction has committed; what is left is to say so.
        lock()

    def let_go(_):
        refused.append(True)
        if len(refused) == 2:
            unlock()

    event.listen(engine, "handle_error", let_go)
    step = ChunkStep(name="load", reader=[1, 2], writer=lambda *_: None, jobs=jobs, on_progress=hear)
    assert step.run().status == "finished"
    assert len(refused) == 2
    assert jobs.state("load", {}).status == "finished"


def test_the_whole_job_is_stopped_though_others_write_when_that_is_said(locked):
    engine, lock, unlock = locked
    jobs, refused = SqlJobStore(engine), []

    def veto(_item):
        lock()
        stop("the file is the wrong one", job=True)

    def let_go(_):
        refused.append(True)
        if len(refused) == 2:
            unlock()

    event.listen(engine, "handle_error", let_go)

    def make(*_):
        return ChunkStep(name="load", reader=[1, 2], processor=veto, writer=lambda *_: None, jobs=jobs)

    reason = "the file is the wrong one"
    assert run_partitions(make, 2).failures == dict.fromkeys((1, 2), f"stopped: {reason}")
    assert len(refused) == 2
    assert {job.status for job in stored_jobs(engine)} == {"stopped"}


def test_whether_a_commit_has_happened_is_asked_again_while_the_database_is_busy(tmp_path):
    engine = sqlite_engine(f"sqlite:///{tmp_path}/jobs.db")
    jobs, lost = SqlJobStore(engine), []
    claim = jobs.claim("load", {})

    def lose(_connection, _cursor, statement, parameters, *_):
        if "SELECT rk_job.fence" in statement and not lost:
            lost.append(True)
            busy = OSError("busy")
            busy.sqlite_errorname = "SQLITE_BUSY_RECOVERY"
            raise OperationalError(statement, parameters, busy)

    event.listen(engine, "before_cursor_execute", lose)
    assert jobs.moved(claim) is False
    assert lost
    jobs.abandon(claim)
    engine.dispose()


def test_a_position_that_is_stored_after_the_commit_is_stored_again_but_not_twice(tmp_path):
    engine = sqlite_engine(f"sqlite:///{tmp_path}/jobs.db")
    jobs, commits = SqlJobStore(engine), []
    claim = jobs.claim("load", {})

    @event.listens_for(engine, "commit")
    def be_busy(connection):
        commits.append(True)
        if len(commits) == 2:
            # Done, but who has asked for it does not hear so.
            connection.connection.commit()
        if len(commits) < 3:
            busy = OSError("busy")
            busy.sqlite_errorname = "SQLITE_BUSY"
            raise OperationalError("COMMIT", (), busy)

    before = claim.revision
    assert jobs.book(claim, 5, {"read": 5}) == before + 1
    assert jobs.state("load", {}).position == 5
    # It is known what was lost: nothing to another one.
    with pytest.raises(JobLostError, match="is further than this runner knows, by a commit that was not confirmed"):
        jobs.book(claim, 6, {"read": 6})
    jobs.abandon(claim)
    engine.dispose()


def test_a_partition_waits_until_others_let_it_write(locked):
    engine, lock, unlock = locked
    jobs, slept = SqlJobStore(engine), []

    class Clock(SystemClock):
        def sleep(self, seconds):
            slept.append(seconds)
            unlock()

    def make(*_):
        return ChunkStep(name="load", reader=[1], writer=lambda *_: None, jobs=jobs)

    assert jobs.state("load", {}) is None
    lock()
    assert run_partitions(make, 1, clock=Clock(), poll=7).finished
    assert slept == [7]
