"""Stateful retry in an event loop: work, history and mark commit together, on every asynchronous driver."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sqlite3
from contextlib import closing

import pymysql
import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.pool import StaticPool

from retrykit import AsyncRetryTemplate, RetryState, SimpleRetryPolicy
from retrykit.errors import CacheCapacityError, ContextCacheError
from retrykit.message import Message
from retrykit.sql import (
    AsyncSqlRetryContextCache,
    SqlRetryContextCache,
    async_sqlite_engine,
    create_tables,
    park_in_transaction,
    parked_items,
    sqlite_engine,
)
from tests.servers.databases import ASYNC_DRIVERS, DRIVERS, empty_database, with_driver

WAYS = [(name, driver) for name, drivers in ASYNC_DRIVERS.items() for driver in drivers]
MARK = {"completed_at": 1.0, "expires_at": 4e9, "retry_count": 0}


@pytest.fixture(params=WAYS, ids="-".join)
def url(request):
    return empty_database(request, *request.param)


@pytest.fixture
def beside(url):
    """A blocking engine on the same database, that has a table for the work."""
    name = url.partition("+")[0]
    address = with_driver(url, DRIVERS[name][0])
    engine = sqlite_engine(address) if name == "sqlite" else create_engine(address)
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (id INTEGER PRIMARY KEY)"))
    yield engine
    engine.dispose()


@pytest.fixture
def run(url, beside):
    """Runs a coroutine function with a cache and the engine of the work."""

    def run(function, *, same=True, **options):
        async def main():
            async with SqlRetryContextCache(url, **options) as cache:
                engine = cache.engine if same else create_async_engine(url)
                try:
                    return await asyncio.wait_for(function(cache, engine), 60)
                finally:
                    await engine.dispose()

        return asyncio.run(main())

    return run


def work_done(engine):
    with engine.begin() as connection:
        return connection.scalar(text("SELECT count(*) FROM work"))


def stored(url, beside):
    with SqlRetryContextCache(beside) as cache:
        return {key: dict(found.snapshot) for key, found in cache.items()}


async def do(transaction, number=1):
    await transaction.execute(text("INSERT INTO work (id) VALUES (:id)"), {"id": number})


def template(cache, **options):
    options = {"remember_completed": 3600, "retry_policy": SimpleRetryPolicy(max_attempts=3)} | options
    return AsyncRetryTemplate(name="orders", context_cache=cache, **options)


def state(*, redelivered):
    return RetryState(key="m-1", redelivered=redelivered, recover_on_redelivery=False)


TRANSACTIONS = {
    "AsyncSession": lambda engine: async_sessionmaker(engine).begin,
    "AsyncConnection": lambda engine: engine.begin,
}


@pytest.mark.parametrize("on", [(transaction, same) for transaction in TRANSACTIONS for same in (True, False)])
def test_effect_happens_once_however_often_the_message_comes(run, beside, url, on):
    transaction, same = on

    async def main(cache, engine):
        begin = TRANSACTIONS[transaction](engine)
        calls = []

        async def work(context):
            calls.append(context.attempt)
            await do(context.transaction)

        for redelivered in (False, True, True):
            await template(cache).execute(work, state=state(redelivered=redelivered), transaction=begin)
        assert calls == [1]

    run(main, same=same)
    assert work_done(beside) == 1
    assert [snapshot["completed_at"] > 0 for snapshot in stored(url, beside).values()] == [True]


@pytest.mark.parametrize("transaction", TRANSACTIONS)
def test_work_that_is_rolled_back_takes_the_mark_with_it(run, beside, url, transaction):
    async def main(cache, engine):
        async with TRANSACTIONS[transaction](engine)() as begun:
            await do(begun)
            joined = await cache.joined(begun)
            assert await joined.save("a/1", MARK, None) is not None
            assert (await joined.load("a/1")).snapshot == MARK
            assert [key async for key, _ in joined.items()] == ["a/1"]
            await begun.rollback()

    run(main)
    assert (work_done(beside), stored(url, beside)) == (0, {})


def test_commit_that_fails_counts_and_the_last_one_parks_the_message_with_its_history(run, beside, url):
    if "aiomysql" in url and not callable(getattr(pymysql.converters, "escape_bytes_prefixed", None)):
        pytest.skip("this aiomysql cannot send bytes with this PyMySQL")
    message = Message(destination="/queue/orders", id="m-1", body=b"{}")

    async def main(cache, engine):
        begin = async_sessionmaker(engine).begin

        async def work(context):
            await do(context.transaction)
            raise OSError("no")

        async def recover(context):
            await context.transaction.run_sync(lambda _: park_in_transaction(message, context))

        for redelivered in (False, True):
            with pytest.raises(OSError, match="no"):
                await template(cache).execute(work, state=state(redelivered=redelivered), transaction=begin)
        for _ in range(2):
            await template(cache).execute(work, recover, state=state(redelivered=True), transaction=begin)

    run(main)
    (item,) = parked_items(beside)
    assert (item.attempts, item.message_id, len(item.errors)) == (3, "m-1", 3)
    assert work_done(beside) == 0
    assert [snapshot["completed_at"] > 0 for snapshot in stored(url, beside).values()] == [True]


def test_first_delivery_that_succeeds_costs_one_statement_more_than_the_work(run, beside):
    seen = []

    def see(*arguments):
        seen.append(arguments[2].split()[0])

    async def main(cache, engine):
        version = await cache.save("warm/1", {}, None)
        await cache.remove("warm/1", version)
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        event.listen(Engine, "before_cursor_execute", see)
        try:
            await template(cache).execute(
                lambda context: do(context.transaction), state=state(redelivered=False), transaction=engine.begin
            )
        finally:
            event.remove(Engine, "before_cursor_execute", see)

    run(main)
    assert [word for word in seen if word != "BEGIN"] == ["INSERT", "INSERT"]


def test_work_that_is_cancelled_leaves_neither_its_effect_nor_a_mark_nor_a_count(run, beside, url):
    async def main(cache, engine):
        begun = asyncio.Event()

        async def work(context):
            await do(context.transaction)
            begun.set()
            await asyncio.sleep(60)

        call = template(cache).execute(
            work, state=state(redelivered=True), transaction=async_sessionmaker(engine).begin
        )
        task = asyncio.create_task(call)
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert (work_done(beside), stored(url, beside)) == (0, {})


@pytest.mark.parametrize("after", range(6))
def test_verb_that_is_cancelled_anywhere_is_done_or_not_done_and_the_cache_goes_on(run, beside, url, after):
    async def main(cache, engine):
        version = await cache.save("a/1", {"retry_count": 1}, None)
        task = asyncio.create_task(cache.save("a/1", {"retry_count": 2}, version))
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        now = await cache.load("a/1")
        assert now.snapshot["retry_count"] in (1, 2)
        assert (now.version == version) == (now.snapshot["retry_count"] == 1)
        assert await cache.save("a/1", {"retry_count": 3}, now.version) is not None

    run(main)
    assert stored(url, beside) == {"a/1": {"retry_count": 3}}


@pytest.mark.parametrize("after", range(6))
def test_joined_verb_that_is_cancelled_anywhere_commits_nothing_by_half(run, beside, url, after):
    async def main(cache, engine):
        async def settle():
            async with AsyncSession(engine) as session, session.begin():
                await do(session)
                joined = await cache.joined(session)
                await joined.save("a/1", MARK, None)

        # What drivers leave behind when connecting is cancelled is their own affair.
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        await cache.open()
        task = asyncio.create_task(settle())
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    run(main)
    assert work_done(beside) == len(stored(url, beside))


def test_tasks_that_count_on_one_key_lose_no_count(run, beside, url):
    async def main(cache, engine):
        async def count():
            done = 0
            while done < 5:
                found = await cache.load("a/1")
                number, version = (0, None) if found is None else (found.snapshot["retry_count"], found.version)
                done += await cache.save("a/1", {"retry_count": number + 1}, version) is not None

        # They are all there before anybody has looked for the tables.
        await asyncio.gather(*(count() for _ in range(8)))

    run(main)
    assert stored(url, beside) == {"a/1": {"retry_count": 40}}


def test_tasks_fill_the_cache_to_its_capacity_and_not_beyond(run, beside, url):
    async def main(cache, engine):
        async def fill(task):
            refused = 0
            for number in range(5):
                try:
                    await cache.save(f"a/{task}/{number}", {}, None)
                except CacheCapacityError:
                    refused += 1
            return refused

        return await asyncio.gather(*(fill(task) for task in range(4)))

    assert sum(run(main, capacity=8)) == 12
    assert len(stored(url, beside)) == 8


def test_every_handle_on_a_transaction_can_be_joined(run, beside, url):
    async def main(cache, engine):
        async def save(transaction, key):
            joined = await cache.joined(transaction)
            assert await joined.save(key, MARK, None) is not None

        async with async_sessionmaker(engine).begin() as session:
            await save(session, "a/session")
        async with AsyncSession(engine) as session, session.begin() as transaction:
            await save(transaction, "a/session transaction")
        async with AsyncSession(engine) as session, session.begin():
            await save(session.sync_session, "a/sync session")
        async with engine.begin() as connection:
            await save(connection, "a/connection")
        async with engine.connect() as connection, connection.begin() as transaction:
            await save(transaction, "a/transaction")
        scoped = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
        async with scoped.begin():
            await save(scoped, "a/scoped session")
        await scoped.remove()

    run(main)
    assert len(stored(url, beside)) == 6


def test_transaction_elsewhere_or_none_is_not_joined(run, beside, tmp_path):
    async def main(cache, engine):
        other = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/other.db")
        async with AsyncSession(other) as session, session.begin():
            assert await cache.joined(session) is None
        await other.dispose()
        automatic = create_async_engine(cache.engine.url, isolation_level="AUTOCOMMIT")
        async with AsyncSession(automatic) as session:
            assert await cache.joined(session) is None
        await automatic.dispose()
        for nothing in (None, object(), "session"):
            assert await cache.joined(nothing) is None

    run(main)


def test_joined_verbs_end_with_the_transaction(run, beside):
    async def main(cache, engine):
        async with AsyncSession(engine) as session:
            async with session.begin():
                joined = await cache.joined(session)
                assert repr(joined).startswith("AsyncJoinedContextCache('")
            with pytest.raises(ContextCacheError, match="the transaction that was joined is over"):
                await joined.remove("a/1")

    run(main)


def test_nothing_is_asked_before_the_first_verb_or_open(url, beside):
    seen = []

    def see(*arguments):
        seen.append(arguments[2])

    async def main():
        event.listen(Engine, "before_cursor_execute", see)
        try:
            async with SqlRetryContextCache(url) as cache:
                assert isinstance(cache, AsyncSqlRetryContextCache)
                assert seen == []
                await cache.open()
                if cache.store_clock is not None:
                    assert cache.store_clock.known
                count = len(seen)
                await cache.load("a/1")
                assert len(seen) == count + 1
        finally:
            event.remove(Engine, "before_cursor_execute", see)

    asyncio.run(main())
    assert seen


def test_cache_tells_that_it_is_asynchronous(url, beside):
    async def main():
        async with SqlRetryContextCache(url, capacity=7) as cache:
            assert repr(cache).startswith("AsyncSqlRetryContextCache('")
            with pytest.raises(TypeError, match="is asynchronous: use `async with`"), cache:
                pass
            again = pickle.loads(pickle.dumps(cache))  # noqa: S301 - our own
            assert repr(again) == repr(cache)
            await again.close()

    asyncio.run(main())


def test_database_in_memory_is_one_for_all_tasks():
    async def main(engine):
        cache = SqlRetryContextCache(engine)
        await asyncio.gather(*(cache.save(f"a/{number}", {}, None) for number in range(20)))
        found = [key async for key, _ in cache.items()]
        await cache.engine.dispose()
        return len(found)

    assert asyncio.run(main("sqlite+aiosqlite://")) == 20
    assert asyncio.run(main(create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool))) == 20


SLOW = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000000) SELECT count(*) FROM c"


@pytest.mark.parametrize("whose", ["ours", "given"])
def test_statement_that_is_cancelled_leaves_no_lock_on_the_file(tmp_path, whose):
    file = tmp_path / "work.db"
    url = f"sqlite+aiosqlite:///{file}"

    async def work(engine):
        async with engine.begin() as transaction:
            await do(transaction)
            await transaction.execute(text(SLOW))

    async def main():
        engine = async_sqlite_engine(url) if whose == "ours" else create_async_engine(url)
        async with AsyncSqlRetryContextCache(engine), engine.begin() as transaction:
            await transaction.execute(text("CREATE TABLE work (id INTEGER PRIMARY KEY)"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work(engine), 0.1)
        with closing(sqlite3.connect(file, timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert list(other.execute("SELECT * FROM work")) == []
        await engine.dispose()

    gc.collect()
    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
