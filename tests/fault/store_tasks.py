"""A consumer whose threads are tasks of one event loop, with asynchronous drivers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from retrykit import AsyncRetryTemplate
from retrykit.sql import SqlRetryContextCache, async_sqlite_engine
from tests.fault.store_consumer import Consumer, _present

DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "mariadb": "mariadb+aiomysql"}


def engine_for(url: str, **options: Any) -> AsyncEngine:
    """An engine as a user makes it."""
    place = sa.make_url(url)
    place = place.set(drivername=DRIVERS[place.get_backend_name()])
    if place.get_backend_name() == "sqlite":
        return async_sqlite_engine(place, durability="process", **options)
    return create_async_engine(place, **options)


class Within(NamedTuple):
    """A context as the blocking work sees it, inside the session's own `run_sync`."""

    key: Any
    attempt: int
    fence: int
    transaction: Any


class Tasks(Consumer):
    """As the one with threads; the work itself is the same."""

    template_class = AsyncRetryTemplate

    def connect(self) -> None:
        self.work = None if self.order.get("work") is None else engine_for(self.order["work"], **self.engine_options)
        self.sessions = None if self.work is None else async_sessionmaker(self.work)

    def cache(self) -> Any:
        url, options = self.order["history"], self.order.get("options", {})
        if url.startswith("redis"):
            import redis.asyncio

            from retrykit.redis import RedisRetryContextCache

            return RedisRetryContextCache(redis.asyncio.Redis.from_url(url, socket_timeout=5), **options)
        return SqlRetryContextCache(self.work if url == self.order.get("work") else engine_for(url), **options)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        worked = False
        try:
            async with self.sessions.begin() as session:
                yield session
                worked = True
                self.note("commit")
        except BaseException as error:
            if worked:
                _present.get().edge = error
                self.note("not committed", error=type(error).__name__)
            raise
        self.note("committed")

    async def attempt_later(self, context: Any) -> str:
        self.note("attempt", n=context.attempt, fence=context.fence)
        await asyncio.sleep(self.order.get("takes", 0))
        return await self.within(self.do, context)

    async def recover_later(self, context: Any) -> str:
        return await self.within(self.recover, context)

    async def within(self, work: Any, context: Any) -> str:
        """The work, on the blocking session beneath the asynchronous one."""
        session = context.transaction
        if session is None:
            return work(context)
        return await session.run_sync(
            lambda blocking: work(Within(context.key, context.attempt, context.fence, blocking))
        )

    async def deliver(self, key: int, redelivered: bool | None) -> str:
        state = self.begin(key, redelivered)
        error: Exception | None = None
        try:
            outcome = await self.template.execute(
                self.attempt_later,
                self.recover_later if self.order.get("recovers", True) else None,
                state=state,
                transaction=None if self.sessions is None else self.transaction,
            )
        except Exception as raised:
            error, outcome = raised, type(raised).__name__
        return self.end(outcome, error)

    async def consume(self, number: int, keys: list[int]) -> None:
        source = self.source(number, keys)
        outcome: Any = None
        while True:
            try:
                key, redelivered, pause = source.send(outcome)
            except StopIteration:
                return
            await asyncio.sleep(pause)
            outcome = await self.deliver(key, redelivered)

    def run(self) -> None:
        async def main() -> None:
            open_store = getattr(self.template.context_cache, "open", None)
            if open_store is not None:
                await open_store()
            self.pen("began")
            async with asyncio.TaskGroup() as tasks:
                for number, keys in enumerate(self.order["threads"]):
                    tasks.create_task(self.consume(number, keys))

        asyncio.run(main())
        self.pen("done")
