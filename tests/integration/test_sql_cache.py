"""The contract of context caches, on every database and driver."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import StaticPool

from retrykit.sql import AsyncSqlRetryContextCache, SqlRetryContextCache
from retrykit.testing import BlockingContextCache, ContextCacheContract, TombstoneContract
from tests.servers.databases import empty_database


class Contract(ContextCacheContract):
    """The contract for a cache on a database of its own."""

    @pytest.fixture(autouse=True)
    def _end(self, request):
        self.request = request
        with ExitStack() as stack:
            self.at_the_end = stack
            yield

    def url(self, name, driver=None):
        return empty_database(self.request, name, driver)

    def cache(self, engine, **options):
        return self.at_the_end.enter_context(SqlRetryContextCache(engine, **options))

    def on_engine(self, url, options, **settings):
        engine = create_engine(url, **settings)
        self.at_the_end.callback(engine.dispose)
        return self.cache(engine, **options)

    def async_cache(self, engine, **options):
        cache = SqlRetryContextCache(engine, **options)
        assert isinstance(cache, AsyncSqlRetryContextCache)
        blocking = self.at_the_end.enter_context(BlockingContextCache(cache))
        self.at_the_end.callback(lambda: blocking.run(cache.engine.dispose()))
        return blocking


class TestSqliteFile(TombstoneContract, Contract):
    def make_cache(self, directory, **options):
        return self.cache(f"sqlite:///{directory}/histories.db", **options)


class TestSqliteMemory(Contract):
    def make_cache(self, directory, **options):
        return self.cache("sqlite://", **options)


class TestSqliteMemoryOfAnEngineWithOneSharedConnection(Contract):
    def make_cache(self, directory, **options):
        settings = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
        return self.on_engine("sqlite://", options, **settings)


class TestSqliteFileOfAnEngineAsUsersMakeThem(Contract):
    def make_cache(self, directory, **options):
        return self.on_engine(f"sqlite:///{directory}/histories.db", options, connect_args={"timeout": 60})


class TestPostgresql(TombstoneContract, Contract):
    def make_cache(self, directory, **options):
        return self.cache(self.url("postgresql"), **options)


class TestMariadb(TombstoneContract, Contract):
    def make_cache(self, directory, **options):
        return self.cache(self.url("mariadb"), **options)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
class TestPostgresqlOfAnEngineOfTheUsers(Contract):
    @pytest.fixture(autouse=True)
    def _isolation(self, isolation):
        self.isolation = isolation

    def make_cache(self, directory, **options):
        return self.on_engine(self.url("postgresql"), options, isolation_level=self.isolation)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
class TestMariadbOfAnEngineOfTheUsersThatCallsItMysql(Contract):
    @pytest.fixture(autouse=True)
    def _isolation(self, isolation):
        self.isolation = isolation

    def make_cache(self, directory, **options):
        url = self.url("mariadb").replace("mariadb+", "mysql+")
        return self.on_engine(url, options, isolation_level=self.isolation)


class TestAiosqlite(Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(f"sqlite+aiosqlite:///{directory}/histories.db", **options)


class TestAiosqliteMemory(TombstoneContract, Contract):
    def make_cache(self, directory, **options):
        return self.async_cache("sqlite+aiosqlite://", **options)


class TestAiosqliteMemoryOfAnEngineWithOneSharedConnection(Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(create_async_engine("sqlite+aiosqlite://"), **options)


class TestAsyncpg(TombstoneContract, Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(self.url("postgresql", "asyncpg"), **options)


class TestPsycopgAsync(Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(self.url("postgresql", "psycopg_async"), **options)


class TestAsyncpgOfAnEngineOfTheUsers(Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(create_async_engine(self.url("postgresql", "asyncpg")), **options)


class TestAiomysql(TombstoneContract, Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(self.url("mariadb", "aiomysql"), **options)


class TestAsyncmy(Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(self.url("mariadb", "asyncmy"), **options)


class TestAiomysqlOfAnEngineOfTheUsers(Contract):
    def make_cache(self, directory, **options):
        return self.async_cache(create_async_engine(self.url("mariadb", "aiomysql")), **options)
