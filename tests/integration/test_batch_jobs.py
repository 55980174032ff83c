"""Batch jobs on databases: position, counts and skipped items commit with the items, and a job has one runner."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from decimal import Decimal
from uuid import UUID

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, registry, sessionmaker

from retrykit import AsyncRetryTemplate, FixedBackOffPolicy, RetryTemplate, SimpleRetryPolicy, current_context
from retrykit.batch import AsyncChunkStep, ChunkStep, SkipPolicy, SqlWriter
from retrykit.errors import JobFinishedError, JobLostError, JobRunningError
from retrykit.failure import StoredError
from retrykit.sql import (
    AsyncSqlJobStore,
    SqlJobStore,
    SqlRetryContextCache,
    create_tables,
    parked_items,
    rk_job,
    sqlite_engine,
    stop_job,
    stored_job,
    stored_jobs,
)
from tests.doubles import ManualClock
from tests.servers.databases import ASYNC_DRIVERS, empty_database, with_driver

metadata = MetaData()
work = Table("work", metadata, Column("id", Integer, primary_key=True, autoincrement=False))


@pytest.fixture
def engine(url):
    with opened(url) as engine:
        create_tables(engine)
        metadata.create_all(engine)
        yield engine


@contextmanager
def opened(url):
    engine = create_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


@pytest.fixture
def jobs(engine):
    return SqlJobStore(engine)


def write(transaction, items):
    transaction.execute(insert(work), [{"id": item} for item in items])


def step(jobs, engine, reader=range(10), **options):
    options = {
        "name": "load",
        "writer": write,
        "transaction": sessionmaker(engine).begin,
        "chunk_size": 3,
        "template": RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
        "jobs": jobs,
    } | options
    return ChunkStep(reader=reader, **options)


def rows(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(select(work.c.id)))


def only(engine):
    (job,) = stored_jobs(engine)
    return job


class Interrupted(BaseException):
    """Nobody expected that."""


def until(last, error):
    def read():
        for item in range(10):
            if item == last:
                raise error
            yield item

    return read()


def test_a_job_that_failed_goes_on_behind_what_it_committed(engine, jobs):
    with pytest.raises(OSError, match="no line"):
        step(jobs, engine, until(7, OSError("no line"))).run({"file": "a"})
    job = only(engine)
    assert (job.status, job.reason, job.position, job.runs) == ("failed", "OSError: no line", 6, 1)
    assert rows(engine) == list(range(6))
    report = step(jobs, engine).run({"file": "a"})
    assert rows(engine) == list(range(10))
    assert (report.counts.read, report.counts.written, report.counts.commits) == (10, 10, 4)
    job = only(engine)
    assert (job.status, job.reason, job.position, job.runs, job.owner) == ("finished", None, 10, 2, None)
    assert job.counts["written"] == 10


def test_an_interrupted_job_is_stopped_and_goes_on(engine, jobs):
    with pytest.raises(Interrupted):
        step(jobs, engine, until(7, Interrupted())).run()
    assert (only(engine).status, only(engine).position) == ("stopped", 6)
    step(jobs, engine).run()
    assert rows(engine) == list(range(10))


@pytest.mark.parametrize("place", ["there", "elsewhere"])
def test_an_interruption_that_comes_with_the_commit_leaves_counts_and_position_in_step(engine, jobs, tmp_path, place):
    store = jobs if place == "there" else SqlJobStore(f"sqlite:///{tmp_path}/jobs.db")
    begun = []

    @contextmanager
    def interrupted():
        with engine.begin() as connection:
            begun.append(connection)
            yield connection
        if len(begun) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(store, engine, transaction=interrupted).run()
    job = only(store.engine)
    if place == "there":
        assert (job.status, job.position, job.counts["read"], job.counts["written"]) == ("stopped", 6, 6, 6)
        report = step(store, engine).run()
        assert (report.status, report.counts.written) == ("finished", 10)
        assert rows(engine) == list(range(10))
    else:
        # At least once: what was committed last is not known.
        assert (job.status, job.position, job.counts["read"], job.counts["written"]) == ("stopped", 3, 3, 3)
    store.engine.dispose()


def test_an_interruption_in_a_statement_leaves_no_lock_that_the_release_would_wait_for(tmp_path):
    engine = sqlite_engine(f"sqlite:///{tmp_path}/work.db", busy_timeout=0.2)
    metadata.create_all(engine)
    jobs = SqlJobStore(engine)

    def interrupt(*given):
        if given[2].startswith("INSERT INTO work"):
            raise Interrupted

    event.listen(engine, "after_cursor_execute", interrupt)
    with pytest.raises(Interrupted):
        step(jobs, engine, transaction=engine.begin).run()
    assert (only(engine).status, rows(engine)) == ("stopped", [])
    event.remove(engine, "after_cursor_execute", interrupt)
    step(jobs, engine, transaction=engine.begin).run()
    assert rows(engine) == [*range(10)]
    engine.dispose()


def test_counts_go_no_further_than_the_position_when_that_cannot_be_stored(engine, tmp_path):
    class Full(SqlJobStore):
        booked = 0

        def book(self, *arguments):
            self.booked += 1
            if self.booked == 2:
                raise OSError("no space left")
            return super().book(*arguments)

    store = Full(f"sqlite:///{tmp_path}/jobs.db")
    with pytest.raises(OSError, match="no space"):
        step(store, engine).run()
    job = only(store.engine)
    assert (job.status, job.position, job.counts["read"]) == ("failed", 3, 3)
    store.engine.dispose()


@pytest.mark.parametrize("text", ["\ud800 alone", "a NUL \0"])
def test_a_reason_that_no_database_can_store_ends_the_run_all_the_same(engine, jobs, text):
    def fail(item):
        raise RuntimeError(text)

    with pytest.raises(RuntimeError):
        step(jobs, engine, processor=fail).run()
    job = only(engine)
    assert job.status == "failed"
    assert job.reason == f"item 1 (process): RuntimeError: {text}".replace("\ud800", "?").replace("\0", "?")


def test_a_text_that_utf_8_cannot_say_is_parked_escaped(engine, jobs):
    def fail(item):
        raise ValueError("no")

    step(jobs, engine, reader=["\ud800!"], processor=fail, skip=SkipPolicy(skip_for=ValueError)).run()
    (parked,) = parked_items(engine)
    assert parked.payload == rb"\ud800!"


def test_a_finished_job_is_not_run_again_unless_it_is_asked_for(engine, jobs):
    step(jobs, engine).run({"file": "a"})
    with pytest.raises(JobFinishedError, match=r"load \{'file': 'a'\}") as caught:
        step(jobs, engine, until(0, AssertionError("it is read"))).run({"file": "a"})
    assert caught.value.finished_at == only(engine).finished_at
    with engine.begin() as connection:
        connection.execute(work.delete())
    report = step(jobs, engine).run({"file": "a"}, again=True)
    assert rows(engine) == list(range(10))
    assert (report.counts.read, only(engine).runs, only(engine).counts["read"]) == (10, 2, 10)


def test_name_and_parameters_in_whatever_order_identify_the_job(engine, jobs):
    step(jobs, engine, []).run({"a": 1, "b": 2})
    with pytest.raises(JobFinishedError):
        step(jobs, engine, []).run({"b": 2, "a": 1})
    step(jobs, engine, []).run({"a": 1, "b": 3})
    step(jobs, engine, [], name="other").run({"a": 1, "b": 2})
    found = list(stored_jobs(engine))
    assert [(job.name, job.parameters) for job in found] == [
        ("load", {"a": 1, "b": 2}),
        ("load", {"a": 1, "b": 3}),
        ("other", {"a": 1, "b": 2}),
    ]
    assert list(stored_jobs(engine, name="other")) == found[2:]
    assert list(stored_jobs(engine, after=found[0].id, limit=1)) == found[1:2]
    assert list(stored_jobs(engine, status="failed")) == []
    assert stored_job(engine, found[1].id) == found[1]
    assert stored_job(engine, 10**6) is None


@pytest.mark.parametrize("position", [UUID(int=7), Decimal(1), float("nan")])
def test_positions_that_cannot_be_stored_are_refused_before_anything_is_tried(tmp_path, position):
    class Reader:
        def read_from(self, begin):
            yield 1, position

    tried, engine = [], sqlite_engine(f"sqlite:///{tmp_path}/a.db")
    options = {"processor": tried.append, "writer": write}
    with pytest.raises(ValueError, match=r"^reader: must be one whose positions are JSON-able \(.*\), not ") as refused:
        step(SqlJobStore(engine), engine, Reader(), **options).run()
    assert repr(position) in str(refused.value)
    assert (tried, only(engine).status) == ([], "failed")
    assert step(None, engine, Reader(), **options).run().counts.filtered == 1, "where none is stored any will do"


def test_a_second_start_is_refused_while_the_first_runs(engine, jobs):
    refused = []

    def read():
        yield 0
        with pytest.raises(JobRunningError, match="load"):
            step(SqlJobStore(engine), engine, []).run()
        refused.append(True)

    step(jobs, engine, read()).run()
    assert refused == [True]
    assert only(engine).status == "finished"


def test_a_job_whose_process_died_is_taken_over_at_once(engine, jobs):
    claim = jobs.claim("load", {})
    jobs.abandon(claim)
    assert only(engine).status == "running"
    step(jobs, engine).run()
    assert (only(engine).status, only(engine).runs) == ("finished", 2)


def test_a_claim_whose_commit_was_not_confirmed_is_nobodys(engine):
    class Torn(SqlJobStore):
        def _do(self, work):
            super()._do(work)
            raise OSError("the line is cut")

    with pytest.raises(OSError, match="cut"):
        step(Torn(engine), engine).run()
    assert only(engine).status == "running"
    assert step(SqlJobStore(engine), engine).run().status == "finished"


def test_a_runner_on_another_machine_is_believed_for_its_lease(engine, jobs):
    claim = jobs.claim("load", {})
    jobs.abandon(claim)
    elsewhere = {"owner": "elsewhere/boot/pid:[1]/7/7/1"}
    with engine.begin() as connection:
        connection.execute(update(rk_job).values(elsewhere))
    with pytest.raises(JobRunningError, match="elsewhere/boot"):
        step(jobs, engine).run()
    with engine.begin() as connection:
        connection.execute(update(rk_job).values(lease_until=1.0))
    step(jobs, engine).run()
    assert rows(engine) == list(range(10))


def test_a_runner_that_was_overtaken_commits_nothing_more(engine, jobs):
    def read():
        yield from range(3)
        with engine.begin() as connection:
            connection.execute(update(rk_job).values(fence=rk_job.c.fence + 1))
        yield from range(3, 10)

    with pytest.raises(JobLostError, match="claimed by somebody else"):
        step(jobs, engine, read(), skip=SkipPolicy(skip_for=Exception)).run()
    assert rows(engine) == [0, 1, 2]
    assert only(engine).position == 3
    assert list(parked_items(engine)) == []


@pytest.mark.parametrize("transaction", range(1, 7))
def test_a_job_that_is_stopped_is_lost_whatever_the_step_is_about(engine, jobs, transaction):
    sessions, begun = sessionmaker(engine), []

    def begin():
        begun.append(True)
        if len(begun) == transaction:
            stop_job(engine, only(engine).id, "enough")
        return sessions.begin()

    def write(session, items):
        if 7 in items:
            raise ValueError("bad")

    load = ChunkStep(
        name="load",
        reader=range(10),
        writer=write,
        transaction=begin,
        chunk_size=10,
        skip=SkipPolicy(skip_for=ValueError),
        template=RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(2, no_retry_for=ValueError)),
        jobs=jobs,
    )
    # Also where the bad item stands alone, and is being recorded.
    with pytest.raises(JobLostError, match="was stopped: enough"):
        load.run()
    assert len(begun) >= transaction
    assert only(engine).reason == "enough"
    assert load.run().counts.skipped == {"builtins.ValueError": 1}


def test_of_two_starts_at_once_one_runs(url, engine):
    start, outcomes = threading.Barrier(2), []

    def run():
        with opened(url) as own:
            jobs = SqlJobStore(own)
            start.wait(30)
            try:
                step(jobs, own).run()
                outcomes.append("ran")
            except (JobRunningError, JobFinishedError) as error:
                outcomes.append(type(error).__name__)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes.count("ran") == 1
    assert len(outcomes) == 2
    assert rows(engine) == list(range(10))


def test_the_lease_is_renewed_while_a_chunk_takes_long(engine):
    # SQLite lets one write at a time: there the renewal waits until the chunk is written.
    renewed = threading.Event()

    class Watched(SqlJobStore):
        def renew(self, claim):
            done = super().renew(claim)
            renewed.set()
            return done

    def read():
        assert renewed.wait(30)
        yield 1

    step(Watched(engine, lease=0.3), engine, read()).run()
    assert rows(engine) == [1]


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_the_renewal_of_the_lease_disturbs_no_transaction_that_keeps_a_snapshot(url, engine, level):
    if engine.dialect.name == "sqlite":
        pytest.skip("it lets one write at a time, and knows no levels")
    renewals, due = [], threading.Semaphore(0)

    class Watched(SqlJobStore):
        def renew(self, claim):
            before = only(engine).lease_until
            done = super().renew(claim)
            renewals.append(only(engine).lease_until > before)
            due.release()
            return done

    def write_slowly(transaction, items):
        write(transaction, items)
        while due.acquire(blocking=False):
            pass
        renewals.clear()
        assert due.acquire(timeout=30)

    strict = create_engine(url, isolation_level=level)
    step(Watched(strict, lease=0.3), strict, range(5), writer=write_slowly).run()
    strict.dispose()
    assert rows(engine) == list(range(5))
    if level == "READ COMMITTED":
        assert any(renewals)


@pytest.mark.parametrize("level", ["READ COMMITTED", "SERIALIZABLE"])
def test_the_lease_is_renewed_in_the_pause_after_a_commit_that_failed(url, engine, level):
    if engine.dialect.name == "sqlite":
        pytest.skip("it lets one write at a time, and knows no levels")
    strict = create_engine(url, isolation_level=level)
    failing, renewed = [1, 2], []

    @contextmanager
    def begin():
        with strict.begin() as connection:
            yield connection
            if failing and failing.pop():
                raise OSError("no commit")

    class Watched(SqlJobStore):
        def claim(self, *arguments, **options):
            self.claimed = super().claim(*arguments, **options)
            return self.claimed

    class Clock(ManualClock):
        def sleep(self, seconds):
            before = only(engine).lease_until
            assert store.renew(store.claimed)
            renewed.append(only(engine).lease_until > before)

    template = RetryTemplate(
        name="load", back_off_policy=FixedBackOffPolicy(1), clock=Clock(), retry_policy=SimpleRetryPolicy(3)
    )
    store = Watched(strict)
    step(store, strict, transaction=begin, template=template).run()
    strict.dispose()
    assert renewed == [True, True]
    assert rows(engine) == list(range(10))


@contextmanager
def asked():
    """The statements about histories, on whatever engine."""
    seen = []

    def note(*given):
        if "rk_context" in given[2]:
            seen.append(given[2].split()[0])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def test_a_veto_of_another_process_stops_an_item_at_the_price_of_one_statement_a_chunk(url, engine, jobs):
    with SqlRetryContextCache(url) as ours, SqlRetryContextCache(url) as theirs:
        load = RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1), context_cache=ours)
        RetryTemplate(name="load", context_cache=theirs).veto(4, "the customer is closed")
        with asked() as seen:
            report = step(jobs, engine, template=load, key=lambda item: item, chunk_size=5).run()
        assert rows(engine) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert seen == ["SELECT", "SELECT"]
        assert report.counts.commits == 2
        (parked,) = parked_items(engine)
        assert (parked.reason, parked.attempts) == ("The item 4 of load is vetoed: the customer is closed", 0)
        assert (parked.key, parked.payload) == (load.key_of(4), b"4")
        # Nothing settles a veto but its withdrawal.
        assert load.history(4).veto_reason == "the customer is closed"


def test_the_asynchronous_step_heeds_the_veto_of_another_process(request):
    url = empty_database(request, "sqlite")
    with opened(url) as plain, SqlRetryContextCache(url) as theirs:
        create_tables(plain)
        metadata.create_all(plain)
        RetryTemplate(name="load", context_cache=theirs).veto(4, "closed")

        async def run():
            engine = create_async_engine(with_driver(url, "aiosqlite"))
            ours = SqlRetryContextCache(engine)
            load = AsyncRetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1), context_cache=ours)

            async def later(session, items):
                await session.execute(insert(work), [{"id": item} for item in items])

            await ours.open()
            with asked() as seen:
                report = await AsyncChunkStep(
                    name="load",
                    reader=range(6),
                    writer=later,
                    transaction=async_sessionmaker(engine).begin,
                    template=load,
                    key=lambda item: item,
                ).run()
            await engine.dispose()
            return report, seen

        report, seen = asyncio.run(run())
        assert (seen, [skipped.item for skipped in report.skipped]) == (["SELECT"], [4])
        assert rows(plain) == [0, 1, 2, 3, 5]


def test_skipped_items_are_parked_with_their_job_and_their_errors(engine, jobs):
    with engine.begin() as connection:
        connection.execute(insert(work), {"id": 4})
    skip = SkipPolicy(skip_for=IntegrityError)
    report = step(jobs, engine, skip=skip, template=RetryTemplate(name="load")).run()
    assert rows(engine) == list(range(10))
    (item,) = parked_items(engine)
    assert (item.name, item.payload, item.content_type, item.attempts) == ("load", b"4", "application/json", 3)
    assert item.headers == {
        "retrykit-item": "5",
        "retrykit-phase": "write",
        "retrykit-job": str(only(engine).id),
    }
    assert [error["type"] for error in item.errors] == ["sqlalchemy.exc.IntegrityError"] * 3
    assert item.reason.startswith("skipped in write: sqlalchemy.exc.IntegrityError; ")
    assert report.counts.skipped == {"sqlalchemy.exc.IntegrityError": 1}


def test_counts_of_skipped_items_limit_all_runs_of_a_job(engine, jobs):
    def process(item):
        if item in (1, 8):
            raise ValueError(item)
        return item

    skip = SkipPolicy(skip_for=ValueError, limit=1)
    with pytest.raises(OSError, match="gone"):
        step(jobs, engine, until(6, OSError("gone")), processor=process, skip=skip).run()
    with pytest.raises(ValueError, match="limit=1 items are skipped already"):
        raise_cause(step(jobs, engine, processor=process, skip=skip).run)


def raise_cause(run):
    """`SkipLimitError` as what it says."""
    from retrykit.batch import SkipLimitError

    try:
        run()
    except SkipLimitError as error:
        raise ValueError(str(error)) from error


def test_position_and_counts_cost_one_statement_in_the_transaction(engine, jobs):
    step(jobs, engine, [100]).run({"warm": True})
    seen = []
    event.listen(engine, "before_cursor_execute", lambda *call: seen.append(call[2].split()[0]))
    event.listen(engine, "begin", lambda _: seen.append("BEGIN"))
    event.listen(engine, "commit", lambda _: seen.append("COMMIT"))
    step(jobs, engine, range(6)).run()
    # Begin, insert, update, commit: for each of the two chunks.
    assert "".join(word[0] for word in seen).count("BIUC") == 2


def test_a_store_elsewhere_has_the_position_after_the_commit(engine, tmp_path):
    other = sqlite_engine(f"sqlite:///{tmp_path}/jobs.db")
    try:
        jobs = SqlJobStore(other)
        with pytest.raises(OSError, match="no line"):
            step(jobs, engine, until(7, OSError("no line"))).run()
        step(jobs, engine).run()
        assert rows(engine) == list(range(10))
        assert next(iter(stored_jobs(other))).counts["written"] == 10
        assert list(stored_jobs(engine)) == []
    finally:
        other.dispose()


@pytest.mark.filterwarnings("ignore:transaction already deassociated:sqlalchemy.exc.SAWarning")
def test_a_session_that_commits_on_two_databases_has_the_position_stored_after_both(tmp_path):
    # Their order is that of a set: each is tried several times.
    items, ours = sqlite_engine(f"sqlite:///{tmp_path}/items.db"), sqlite_engine(f"sqlite:///{tmp_path}/jobs.db")
    with items.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE station (name TEXT PRIMARY KEY)")
        connection.exec_driver_sql(
            "CREATE TABLE reading (id INTEGER, station TEXT REFERENCES station DEFERRABLE INITIALLY DEFERRED)"
        )
        connection.exec_driver_sql("INSERT INTO station VALUES ('A')")
    reading = Table("reading", MetaData(), Column("id", Integer), Column("station", String))
    for number in range(6):
        report = step(
            SqlJobStore(ours),
            None,
            reader=[{"id": number, "station": "Z" if one == 4 else "A"} for one in range(8)],
            writer=SqlWriter(reading),
            transaction=sessionmaker(ours, binds={reading: items}).begin,
            skip=SkipPolicy(skip_for=IntegrityError),
        ).run({"number": number})
        assert (report.counts.written, report.counts.all_skipped) == (7, 1)
        with items.connect() as connection:
            assert connection.scalar(select(func.count()).where(reading.c.id == number)) == 7
    items.dispose()
    ours.dispose()


def test_the_history_of_an_item_with_a_key_ends_in_the_transaction_that_records_it(engine, jobs):
    cache = SqlRetryContextCache(engine)
    template = RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(2), context_cache=cache)
    skip = SkipPolicy(skip_for=ValueError)

    def fail(transaction, items):
        write(transaction, items)
        if 4 in items:
            raise ValueError(4)

    step(jobs, engine, writer=fail, key=lambda item: item, template=template, skip=skip).run()
    assert [(item.key, item.attempts) for item in parked_items(engine)] == [("load#4", 2)]
    assert list(cache.items()) == []


KILLED = """
import os, signal, sys
from sqlalchemy.orm import sessionmaker
from sqlalchemy import create_engine
from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, SkipPolicy
from retrykit.sql import SqlJobStore, SqlRetryContextCache
from tests.integration.test_batch_jobs import write

engine = create_engine(sys.argv[1])

def poison(transaction, items):
    write(transaction, items)
    if items == [4]:
        os.kill(os.getpid(), signal.SIGKILL)
    if 4 in items:
        raise ValueError(4)

ChunkStep(
    name="load", reader=range(10), writer=poison, transaction=sessionmaker(engine).begin, chunk_size=5, key=str,
    template=RetryTemplate(
        name="load", context_cache=SqlRetryContextCache(engine),
        retry_policy=SimpleRetryPolicy(2, no_retry_for=ValueError),
    ),
    skip=SkipPolicy(skip_for=ValueError, skip_crashes="skip" in sys.argv), jobs=SqlJobStore(engine),
).run()
"""


def test_an_item_that_kills_its_process_uses_up_its_attempts(url, engine):
    if engine.dialect.name == "mariadb":
        pytest.skip("the databases differ in nothing here: two of them are enough")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*arguments):
        command = [sys.executable, "-c", KILLED, url, *arguments]
        return subprocess.run(command, env=environment, check=False, timeout=60).returncode

    assert [run(), run()] == [-9, -9]
    assert rows(engine) == [0, 1, 2, 3]
    assert (only(engine).status, only(engine).position) == ("running", 4)
    assert run("skip") == 0
    assert rows(engine) == [item for item in range(10) if item != 4]
    assert [(item.attempts, item.errors[0]["type"]) for item in parked_items(engine)] == [(2, "retrykit.Crash")]
    assert only(engine).counts["skipped"] == {"retrykit.Crash": 1}


KILLER = """
import os, signal, sys
from sqlalchemy.orm import sessionmaker
from sqlalchemy import create_engine
from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, SkipPolicy
from retrykit.sql import SqlJobStore, SqlRetryContextCache
from tests.integration.test_batch_jobs import write

def run(url):
    engine = create_engine(url)

    def kill(transaction, items):
        write(transaction, items)
        if 13 in items:
            os.kill(os.getpid(), signal.SIGKILL)

    ChunkStep(
        name="load", reader=range(40), writer=kill, transaction=sessionmaker(engine).begin, chunk_size=20,
        template=RetryTemplate(
            name="load", retry_policy=SimpleRetryPolicy(2), context_cache=SqlRetryContextCache(engine)
        ),
        skip=SkipPolicy(skip_crashes=True), jobs=SqlJobStore(engine),
    ).run()

deaths = 0
while (child := os.fork()) and os.waitpid(child, 0)[1]:
    deaths += 1
if child == 0:
    run(sys.argv[1])
    os._exit(0)
print(deaths)
"""


def test_an_item_without_a_name_that_kills_whoever_writes_it_is_found_over_restarts(url, engine):
    if engine.dialect.name == "mariadb":
        pytest.skip("the databases differ in nothing here: two of them are enough")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLER, url]
    done = subprocess.run(command, env=environment, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The chunk; groups that come nearer; twice the item alone.
    assert 3 <= int(done.stdout) <= 7
    assert rows(engine) == [item for item in range(40) if item != 13]
    assert [(item.payload, item.attempts) for item in parked_items(engine)] == [(b"13", 2)]
    assert only(engine).counts["skipped"] == {"retrykit.Crash": 1}
    assert list(SqlRetryContextCache(engine).items()) == []


DEAD_HERE, DEAD_ELSEWHERE = None, "elsewhere/boot/pid:[1]/7/7/1"


@pytest.mark.parametrize("owner", [DEAD_HERE, DEAD_ELSEWHERE])
@pytest.mark.parametrize("skip_crashes", [False, True])
def test_a_job_that_died_in_an_items_last_attempt_goes_on(engine, jobs, owner, skip_crashes):
    cache = SqlRetryContextCache(engine)
    options = {
        "chunk_size": 1,
        "key": lambda item: item,
        "template": RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1), context_cache=cache),
        "skip": SkipPolicy(skip_crashes=skip_crashes),
    }
    running = []

    def note(transaction, items):
        if items == [4]:
            running.append(cache.load("load#4").snapshot)
            raise Interrupted
        write(transaction, items)

    with pytest.raises(Interrupted):
        step(jobs, engine, writer=note, **options).run()
    # As if the process had died where it was interrupted.
    (left,) = running
    left["in_flight"][0]["owner"] = owner or left["in_flight"][0]["owner"]
    assert cache.save("load#4", left, None)
    jobs.abandon(jobs.claim("load", {}))
    report = step(jobs, engine, **options).run()
    assert report.status == "finished"
    assert rows(engine) == [item for item in range(10) if item != 4 or not skip_crashes]
    assert report.counts.skipped == ({"retrykit.Crash": 1} if skip_crashes else {})
    assert list(cache.items()) == []


def test_a_crash_is_not_skipped_unless_it_is_asked_for():
    crash = StoredError.of_crash(1, "somebody")
    assert not SkipPolicy(skip_for=Exception).may_skip(crash)
    assert SkipPolicy(skip_crashes=True).may_skip(crash)


# -- asynchronous


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("driver", ["aiosqlite", "asyncpg"])
def test_the_asynchronous_step_commits_position_and_skipped_items_with_the_items(request, driver, in_place):
    name = next(name for name, drivers in ASYNC_DRIVERS.items() if driver in drivers)
    place = empty_database(request, name, driver)
    plain = with_driver(place, {"sqlite": "pysqlite", "postgresql": "psycopg"}[name])
    with opened(plain) as engine:
        create_tables(engine)
        metadata.create_all(engine)
        asyncio.run(load(place, in_place))
        assert rows(engine) == [item for item in range(20) if item != 7]
        assert [item.payload for item in parked_items(engine)] == [b"7"]
        job = only(engine)
        assert (job.status, job.position, job.counts["written"], job.runs) == ("finished", 20, 19, 2)


async def load(place, in_place):
    async def write_later(session, items):
        await session.execute(insert(work), [{"id": item} for item in items])
        if 7 in items:
            raise ValueError(7)

    async def numbers(last):
        for item in range(20):
            if item == last:
                raise OSError("no line")
            yield item

    engine = create_async_engine(place)
    try:
        for last in (13, 99):
            one = AsyncChunkStep(
                name="load",
                reader=numbers(last),
                writer=write_later,
                transaction=async_sessionmaker(engine).begin,
                template=AsyncRetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
                skip=SkipPolicy(skip_for=ValueError),
                no_rollback_for=ValueError if in_place else (),
                chunk_size=5,
                jobs=AsyncSqlJobStore(engine),
            )
            if last == 13:
                with pytest.raises(OSError, match="no line"):
                    await one.run()
            else:
                report = await one.run()
                assert report.counts.read == 20
    finally:
        await engine.dispose()


@pytest.mark.parametrize("kind", [SqlJobStore, AsyncSqlJobStore])
def test_each_store_wants_its_kind_of_engine(tmp_path, kind):
    driver = "sqlite+aiosqlite" if kind is SqlJobStore else "sqlite"
    with pytest.raises(TypeError, match=r"^engine: "):
        kind(f"{driver}:///{tmp_path}/a.db")


@pytest.mark.parametrize("lease", [0, -1, "1", float("inf")])
def test_a_bad_lease_is_refused(tmp_path, lease):
    with pytest.raises((TypeError, ValueError), match=r"^lease: "):
        SqlJobStore(f"sqlite:///{tmp_path}/a.db", lease=lease)


# -- without a roll-back


def refuse(*culprits):
    def fail(transaction, items):
        write(transaction, items)
        for item in items:
            if item in culprits:
                raise ValueError(item)

    return fail


def test_culprits_are_found_between_savepoints_of_one_transaction(engine, jobs):
    with engine.begin() as connection:
        connection.execute(insert(work), {"id": 4})
    seen = []
    event.listen(engine, "commit", lambda _: seen.append("commit"))
    event.listen(engine, "rollback", lambda _: seen.append("rollback"))
    both = (ValueError, IntegrityError)
    report = step(
        jobs,
        engine,
        range(20),
        chunk_size=20,
        writer=refuse(11, 12),
        skip=SkipPolicy(skip_for=both),
        no_rollback_for=both,
        transaction=engine.begin,
        processor=lambda item: int("x") if item == 7 else item,
    ).run()
    assert rows(engine) == [item for item in range(20) if item not in (7, 11, 12)]
    # Claimed; written; released.
    assert seen.count("commit") == 3
    assert [(item.number, item.phase, item.attempts) for item in report.skipped] == [
        (5, "write", 1),
        (8, "process", 1),
        (12, "write", 1),
        (13, "write", 1),
    ]
    assert (report.counts.written, report.counts.commits, report.counts.rollbacks) == (16, 1, 0)
    assert len(list(parked_items(engine))) == 4


def test_what_a_processor_left_to_be_written_is_searched_between_transactions(engine, jobs):
    class Row:
        def __init__(self, number):
            self.id = number

    registry().map_imperatively(Row, work)
    with engine.begin() as connection:
        connection.execute(insert(work), {"id": 4})
    report = step(
        jobs,
        engine,
        processor=lambda item: current_context().transaction.add(Row(item)) or item,
        writer=lambda *_: None,
        skip=SkipPolicy(skip_for=IntegrityError),
        no_rollback_for=IntegrityError,
    ).run()
    assert [skipped.number for skipped in report.skipped] == [5]
    assert (report.counts.written, rows(engine)) == (9, list(range(10)))


@pytest.mark.parametrize("begin", ["session", "connection"])
def test_nothing_is_committed_by_a_savepoint(engine, jobs, begin):
    # Of Python's SQLite driver the savepoint would be the transaction, unless one was begun before.
    transaction = sessionmaker(engine).begin if begin == "session" else engine.begin

    def fail(transaction, items):
        write(transaction, items)
        if 3 in items and len(items) > 1:
            raise ValueError(items)
        if 3 in items:
            raise OSError("and now something else")

    with pytest.raises(OSError, match="something else"):
        step(
            jobs,
            engine,
            range(5),
            chunk_size=5,
            writer=fail,
            transaction=transaction,
            skip=SkipPolicy(skip_for=ValueError),
            no_rollback_for=ValueError,
        ).run()
    assert rows(engine) == []


def test_limits_hold_without_a_roll_back_too(engine, jobs):
    one = step(
        jobs,
        engine,
        chunk_size=10,
        writer=refuse(2, 5, 8),
        skip=SkipPolicy(skip_for=ValueError, limit=2),
        no_rollback_for=ValueError,
    )
    with pytest.raises(ValueError, match=r"item 9, .* limit=2 items are skipped already"):
        raise_cause(one.run)
    assert rows(engine) == [0, 1, 3, 4, 6, 7]
    assert len(list(parked_items(engine))) == 2


def test_what_the_database_refused_to_a_processor_is_rolled_back_in_any_case(engine, jobs):
    def process(item):
        if item == 3:
            current_context().transaction.execute(insert(work), [{"id": 77}, {"id": 77}])
        return item

    report = step(
        jobs,
        engine,
        processor=process,
        chunk_size=10,
        skip=SkipPolicy(skip_for=IntegrityError),
        no_rollback_for=IntegrityError,
    ).run()
    assert rows(engine) == [item for item in range(10) if item != 3]
    assert report.counts.rollbacks == 1


@pytest.mark.parametrize("transaction", [sessionmaker, lambda engine: engine.connect])
def test_a_transaction_that_nobody_commits_is_refused_before_anything_is_written(engine, transaction):
    made = transaction(engine)
    with pytest.raises(TypeError, match=r"^transaction: .*engine\.begin"):
        step(None, engine, transaction=made).run()
    assert rows(engine) == []


def test_a_session_of_ones_own_that_commits_when_it_is_left_will_do(engine, jobs):
    class Committing(Session):
        def __exit__(self, kind, error, trace):
            if kind is None:
                self.commit()
            super().__exit__(kind, error, trace)

    step(jobs, engine, transaction=lambda: Committing(engine)).run()
    assert rows(engine) == list(range(10))


def test_savepoints_need_a_transaction_of_sqlalchemy(engine):
    @contextmanager
    def begin():
        yield "no session"

    skip = SkipPolicy(skip_for=ValueError)
    with pytest.raises(TypeError, match="a savepoint needs a transaction of SQLAlchemy, not str"):
        ChunkStep(name="load", reader=[1], writer=write, transaction=begin, skip=skip, no_rollback_for=ValueError).run()
