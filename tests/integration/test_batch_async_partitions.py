"""Partitions whose steps are asynchronous: in an event loop for each process, or in the caller's."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import Column, Integer, MetaData, NullPool, Table, create_engine, insert, select
from sqlalchemy.ext.asyncio import create_async_engine

from retrykit import AsyncRetryTemplate, RetryTemplate, SimpleRetryPolicy
from retrykit.batch import AsyncChunkStep, ChunkStep, async_run_partitions, run_partitions, stop
from retrykit.errors import AttemptsInFlightError, JobError
from retrykit.sql import AsyncSqlJobStore, SqlJobStore, async_sqlite_engine, create_tables, stored_jobs
from tests.servers.databases import ASYNC_DRIVERS, with_driver

metadata = MetaData()
# Nothing is unique: what is written twice shows.
work = Table("work", metadata, Column("item", Integer, nullable=False))
ITEMS = range(40)


@pytest.fixture
def database(url):
    """A plain engine, and the URL for asynchronous ones."""
    engine = create_engine(url)
    create_tables(engine)
    metadata.create_all(engine)
    yield engine, with_driver(url, ASYNC_DRIVERS[engine.dialect.name][0])
    engine.dispose()


def steps(url, process=lambda item: item):
    # Its connections live no longer than their event loop.
    made = async_sqlite_engine if url.startswith("sqlite") else create_async_engine
    engine = made(url, poolclass=NullPool)

    def make(part, parts):
        async def items():
            for item in range(part - 1, len(ITEMS), parts):
                await asyncio.sleep(0)
                yield item

        class Items:
            def __aiter__(self):
                return items()

        async def write(connection, found):
            await connection.execute(insert(work), [{"item": item} for item in found])

        return AsyncChunkStep(
            name="load",
            reader=Items(),
            processor=process,
            writer=write,
            transaction=engine.begin,
            chunk_size=4,
            template=AsyncRetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
            jobs=AsyncSqlJobStore(engine),
        )

    return make


def written(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(select(work.c.item)))


def test_asynchronous_partitions_run_in_a_loop_of_their_own_and_again_when_all_are_finished(database):
    engine, url = database
    division = run_partitions(steps(url), 3, {"day": 1})
    assert (division.finished, sorted(division.reports)) == (True, [1, 2, 3])
    assert run_partitions(steps(url), 3, {"day": 1}).reports == {}
    assert written(engine) == list(ITEMS)
    assert run_partitions(steps(url), 3, {"day": 1}, again=True).finished
    assert written(engine) == sorted([*ITEMS, *ITEMS])
    with pytest.raises(JobError, match="was begun in 3 partitions"):
        run_partitions(steps(url), 2, {"day": 1})


def test_several_share_them_in_one_loop_and_each_runs_once(database):
    engine, url = database

    async def run():
        return await asyncio.gather(*(async_run_partitions(steps(url), 5, poll=0.01) for _ in range(3)))

    found = asyncio.run(run())
    assert written(engine) == list(ITEMS)
    assert sorted(part for division in found for part in division.reports) == [1, 2, 3, 4, 5]


def test_asynchronous_partitions_fail_and_are_stopped_as_others_are(database):
    engine, url = database

    async def process(item):
        if item == 5:
            raise OSError("no line")
        if item == 6:
            stop("wrong file", job=True)
        return item

    division = run_partitions(steps(url, process), 4)
    assert division.failures.pop(2).endswith("OSError: no line")
    assert division.failures == {3: "stopped: wrong file", 4: "stopped: wrong file"}
    assert [job.status for job in stored_jobs(engine)] == ["finished", "failed", "stopped", "stopped"]
    assert run_partitions(steps(url), 4).finished
    assert written(engine) == list(ITEMS)


def test_an_asynchronous_partition_waits_for_attempts_that_others_make_of_its_items(database):
    engine, url = database
    errors = [AttemptsInFlightError(name="load", key=5, running=1)]

    async def process(item):
        if item == 5 and errors:
            raise errors.pop()
        return item

    division = run_partitions(steps(url, process), 4, poll=0.01)
    assert (division.finished, sorted(division.reports)) == (True, [1, 2, 3, 4])
    assert [(job.status, job.runs) for job in stored_jobs(engine)] == [("finished", runs) for runs in (1, 2, 1, 1)]
    assert written(engine) == list(ITEMS)


def test_what_does_not_fit_together_is_refused(tmp_path):
    url = f"sqlite+aiosqlite:///{tmp_path}/jobs.db"
    plain = ChunkStep(
        name="load",
        reader=[],
        writer=print,
        template=RetryTemplate(name="load"),
        jobs=SqlJobStore(f"sqlite:///{tmp_path}/jobs.db"),
    )
    make = steps(url)

    async def inside():
        run_partitions(make, 2)

    with pytest.raises(RuntimeError, match=r"await async_run_partitions\(\)"):
        asyncio.run(inside())
    with pytest.raises(TypeError, match=r"^make: .*an AsyncChunkStep"):
        asyncio.run(async_run_partitions(lambda *_: plain, 2))
    with pytest.raises(TypeError, match=r"^make: .*steps of one class"):
        run_partitions(lambda part, parts: plain if part == 2 else make(part, parts), 2)
