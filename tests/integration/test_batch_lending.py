"""The transaction of a chunk is the step's to end: who else does so stops the step before anything is counted."""

from __future__ import annotations

import asyncio
import re

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from retrykit.batch import AsyncChunkStep, ChunkStep, SkipPolicy, TransactionEndedError
from retrykit.sql import SqlJobStore, create_tables, sqlite_engine, stored_job
from tests.servers.databases import empty_database

metadata = MetaData()
work = Table("work", metadata, Column("id", Integer, primary_key=True, autoincrement=False))
ENDINGS = ["commit", "rollback", "close"]


@pytest.fixture
def engine(tmp_path):
    engine = sqlite_engine(f"sqlite:///{tmp_path}/a.db")
    create_tables(engine)
    metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture(params=["none", "joined", "elsewhere"])
def jobs(request, engine, tmp_path):
    if request.param == "none":
        return None
    return SqlJobStore(engine if request.param == "joined" else f"sqlite:///{tmp_path}/b.db")


def begin_of(engine, kind):
    return sessionmaker(engine).begin if kind == "session" else engine.begin


def put(transaction, items):
    transaction.execute(insert(work), [{"id": item} for item in items])


def written(engine):
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(work))


@pytest.mark.parametrize("kind", ["session", "connection"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_writer_that_ends_its_transaction_stops_the_step_at_once(engine, ending, kind, jobs):
    calls, heard = [], []

    class Reader:
        def read_from(self, position):
            return ((item, item) for item in range(1, 31))

        def settled(self, items):
            heard.extend(items)

    def write(transaction, items):
        calls.append(items)
        put(transaction, items)
        if 11 in items:
            getattr(transaction, ending)()

    message = r"^step load: the writer has ended the transaction .* items 11 to 20 may .* begin_nested\(\)\.\n"
    step = ChunkStep(
        name="load", reader=Reader(), writer=write, transaction=begin_of(engine, kind), chunk_size=10, jobs=jobs
    )
    with pytest.raises(TransactionEndedError, match=message):
        step.run()
    assert [items[0] for items in calls] == [1, 11]
    assert heard == list(range(1, 11))
    assert written(engine) == (20 if ending == "commit" else 10)
    if jobs is not None:
        job = stored_job(jobs.engine, 1)
        assert (job.status, job.position, job.counts["written"], job.counts["rollbacks"]) == ("failed", 10, 10, 1)


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_a_roll_back_that_is_meant_for_one_item_is_told_as_what_it_is(engine, kind):
    calls = []

    def write(transaction, items):
        for item in items:
            calls.append(item)
            try:
                put(transaction, [item])
            except IntegrityError:
                transaction.rollback()

    step = ChunkStep(
        name="load",
        reader=[1, 2, 2, 3],
        writer=write,
        transaction=begin_of(engine, kind),
        skip=SkipPolicy(skip_for=Exception),
    )
    with pytest.raises(TransactionEndedError, match=r"^step load: the writer has ended") as caught:
        step.run()
    assert (written(engine), calls) == (0, [1, 2, 2, 3])
    assert caught.value.__cause__ is not None


def test_a_processor_and_on_skip_are_told_apart(engine):
    def process(item):
        open_now.execute(select(1))
        open_now.rollback()

    class Begin:
        def __enter__(self):
            nonlocal open_now
            open_now = self.session = sessionmaker(engine)()
            self.session.begin()
            return self.session

        def __exit__(self, *error):
            self.session.close()

    open_now = None
    with pytest.raises(TransactionEndedError, match="the processor has ended the transaction"):
        ChunkStep(name="load", reader=[1], processor=process, writer=put, transaction=Begin).run()

    def refuse(item):
        raise ValueError(item)

    def recover(transaction, skipped):
        transaction.commit()

    for reader in ([1], [1, 2]):
        with pytest.raises(TransactionEndedError, match="on_skip has ended the transaction"):
            ChunkStep(
                name="load",
                reader=reader,
                processor=refuse,
                writer=put,
                transaction=engine.begin,
                skip=SkipPolicy(skip_for=ValueError),
                on_skip=recover,
            ).run()


@pytest.mark.parametrize("in_place", [(), ValueError])
def test_a_savepoint_is_no_end(engine, in_place):
    def write(session, items):
        for item in items:
            try:
                with session.begin_nested():
                    put(session, [item])
            except IntegrityError:
                continue

    report = ChunkStep(
        name="load",
        reader=[1, 2, 2, 3],
        writer=write,
        transaction=sessionmaker(engine).begin,
        skip=SkipPolicy(skip_for=ValueError),
        no_rollback_for=in_place,
    ).run()
    assert (report.counts.written, written(engine)) == (4, 3)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_asynchronous_step_notices_it_too(engine, tmp_path, ending):
    async def run():
        later = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db")

        async def write(session, items):
            await session.execute(insert(work), [{"id": item} for item in items])
            await getattr(session, ending)()

        try:
            await AsyncChunkStep(
                name="load", reader=range(3), writer=write, transaction=async_sessionmaker(later).begin
            ).run()
        finally:
            await later.dispose()

    with pytest.raises(TransactionEndedError, match="the writer has ended the transaction"):
        asyncio.run(run())
    assert written(engine) == (3 if ending == "commit" else 0)


@pytest.mark.parametrize("kind", ["session", "connection"])
def test_an_error_that_was_swallowed_is_no_commit_where_that_would_be_a_roll_back(request, kind):
    engine = create_engine(empty_database(request, "postgresql"))
    metadata.create_all(engine)

    def write(transaction, items):
        put(transaction, items)
        connection = transaction.connection() if kind == "session" else transaction
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("nonsense")

    with pytest.raises(
        TransactionEndedError, match=re.escape("has swallowed an error of the database, which has aborted")
    ):
        ChunkStep(name="load", reader=[1], writer=write, transaction=begin_of(engine, kind)).run()
    engine.dispose()
