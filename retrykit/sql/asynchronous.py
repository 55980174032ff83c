"""`AsyncSqlRetryContextCache`: the verbs of `SqlRetryContextCache` for an event loop.

Nothing of a verb is written twice: the blocking one runs in a greenlet, as SQLAlchemy's own asynchronous engine runs
its blocking one, and gives way to other tasks wherever it waits for the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

from sqlalchemy import URL
from sqlalchemy.util import greenlet_spawn

from retrykit.cache import StoredContext
from retrykit.sql.cache import JoinedContextCache, SqlRetryContextCache
from retrykit.sql.engines import is_async_engine
from retrykit.sql.rows import PAGE

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


class AsyncSqlRetryContextCache(SqlRetryContextCache):
    """Histories in a SQL database, on an AsyncEngine, or the URL of an asynchronous driver.

    Drivers: `postgresql+asyncpg`, `postgresql+psycopg_async`, `mariadb+asyncmy`, `mariadb+aiomysql`,
    `sqlite+aiosqlite`. Options and promises are those of `SqlRetryContextCache`. Making one does no I/O: the first verb
    looks whether the tables are there. It belongs to the event loop that its engine belongs to. A verb that is
    cancelled is done or not done, never by half; its connection is closed.
    """

    _in_loop = True

    def _start(self) -> None:
        """Later, in the loop."""
        self._opening = asyncio.Lock()

    async def _run(self, verb: Callable[..., T], *arguments: Any) -> T:
        if self._place is None:
            async with self._opening:
                await greenlet_spawn(self._open)
        return await greenlet_spawn(verb, *arguments)

    async def open(self) -> None:
        """Look whether the tables are there, and what o'clock it is there: what the first verb does, done before it.

        A program that guards writes of its own with `context.fence` calls this at its start: what counts before the
        store was asked for anything goes by the machine's own clock.
        """
        await self._run(self._open)

    @property
    def engine(self) -> AsyncEngine:  # type: ignore[override]
        """The engine; the work's AsyncSessions may use it too."""
        return self._engine  # type: ignore[return-value]

    async def load(self, key: str) -> StoredContext | None:  # type: ignore[override]
        """The snapshot of a key and its version; None if there is none."""
        return await self._run(super().load, key)

    async def save(  # type: ignore[override]
        self, key: str, snapshot: Mapping[str, Any], expected: int | None
    ) -> int | None:
        """Compare and set, as `SqlRetryContextCache.save`."""
        return await self._run(super().save, key, snapshot, expected)

    async def remove(self, key: str, expected: int | None = None) -> bool:  # type: ignore[override]
        """Forget a key (if its version still is `expected`). False: it was not there, or had another version."""
        return await self._run(super().remove, key, expected)

    async def items(  # type: ignore[override]
        self, prefix: str = "", after: str | None = None
    ) -> AsyncIterator[tuple[str, StoredContext]]:
        """Every key with its snapshot, ordered by key, as `SqlRetryContextCache.items`."""
        async for item in self._read("items", prefix, after):
            yield item

    async def evicted(  # type: ignore[override]
        self, prefix: str = "", after: str | None = None
    ) -> AsyncIterator[tuple[str, StoredContext]]:
        """The tombstones, ordered by key, as `SqlRetryContextCache.evicted`."""
        async for item in self._read("evicted", prefix, after):
            yield item

    async def _read(self, verb: str, prefix: str, after: str | None) -> AsyncIterator[tuple[str, StoredContext]]:
        while True:
            page = await self._run(self._page, verb, prefix, after)
            for item in page:
                yield item
            if len(page) < PAGE:
                return
            after = page[-1][0]

    async def expire(self, now: float | None = None, limit: int | None = None) -> int:  # type: ignore[override]
        """Drop what is past its time, as `SqlRetryContextCache.expire`; how many."""
        return await self._run(super().expire, now, limit)

    async def open_keys(self, prefix: str, limit: int) -> list[str] | None:  # type: ignore[override]
        """The keys of histories and tombstones that begin with the prefix, as `SqlRetryContextCache.open_keys`."""
        return await self._run(super().open_keys, prefix, limit)

    async def vetoed(self, keys: Collection[str]) -> dict[str, StoredContext]:  # type: ignore[override]
        """Those of the keys that have a veto, as `SqlRetryContextCache.vetoed`."""
        return await self._run(super().vetoed, keys)

    async def joined(self, transaction: object) -> AsyncJoinedContextCache | None:  # type: ignore[override]
        """The same verbs inside the caller's open transaction; None if that is on another database, or AUTOCOMMIT.

        `transaction`: an AsyncSession (also scoped) or AsyncConnection, or what is beneath one. It is begun if it was
        not.
        """
        joined = await self._run(super().joined, transaction)
        return None if joined is None else AsyncJoinedContextCache(joined)

    async def close(self) -> None:  # type: ignore[override]
        """Close the idle connections, if the engine was made from a URL."""
        if isinstance(self._given, URL | str):
            for engine in (self._engine, self._own):
                if is_async_engine(engine):
                    await engine.dispose()

    def __enter__(self) -> Self:
        raise TypeError(f"{self!r} is asynchronous: use `async with`")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncJoinedContextCache:
    """The verbs of an `AsyncSqlRetryContextCache` inside somebody's open transaction, which nothing here ends."""

    def __init__(self, joined: JoinedContextCache) -> None:
        self._joined = joined

    def __repr__(self) -> str:
        return f"Async{self._joined!r}"

    async def load(self, key: str) -> StoredContext | None:
        """The snapshot of a key and its version; None if there is none."""
        return await greenlet_spawn(self._joined.load, key)

    async def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """Compare and set, as `SqlRetryContextCache.save`."""
        return await greenlet_spawn(self._joined.save, key, snapshot, expected)

    async def remove(self, key: str, expected: int | None = None) -> bool:
        """Forget a key (if its version still is `expected`). False: it was not there, or had another version."""
        return await greenlet_spawn(self._joined.remove, key, expected)

    async def items(self, prefix: str = "", after: str | None = None) -> AsyncIterator[tuple[str, StoredContext]]:
        """Every key with its snapshot, ordered by key."""
        items = self._joined.items(prefix, after)
        while (item := await greenlet_spawn(next, items, None)) is not None:
            yield item

    async def expire(self, now: float | None = None, limit: int | None = None) -> int:
        """Drop what is past its time; how many."""
        return await greenlet_spawn(self._joined.expire, now, limit)
