"""`AsyncSqlJobStore`: `SqlJobStore` on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy.util import greenlet_spawn

from retrykit.check import Seconds, wrong_type
from retrykit.sql.again import Begun
from retrykit.sql.engines import engine_of, is_async_engine
from retrykit.sql.job_rows import Claim
from retrykit.sql.jobs import JoinedJobs, SqlJobStore
from retrykit.sql.stored_jobs import Job

T = TypeVar("T")


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
        self, name: str, parameters: Mapping[str, Any], *, again: bool = False, since: float | None = None
    ) -> Claim:
        """As `SqlJobStore.claim`."""
        claim = await self._run(self._claim, name, parameters, again=again, since=since)
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

    async def begin_again(  # type: ignore[override]
        self, name: str, parameters: Mapping[str, Any], parts: int, *, before: datetime | None = None
    ) -> Begun:
        """As `SqlJobStore.begin_again`."""
        return await self._run(super().begin_again, name, parameters, parts, before=before)

    async def now(self) -> float:  # type: ignore[override]
        """As `SqlJobStore.now`."""
        return await self._run(super().now)

    async def stop_others(self, claim: Claim, reason: str) -> int:  # type: ignore[override]
        """As `SqlJobStore.stop_others`."""
        return await self._run(super().stop_others, claim, reason)

    async def release(  # type: ignore[override]
        self,
        claim: Claim,
        *,
        status: str,
        reason: str = "",
        counts: Mapping[str, Any],
        pause: float | None = None,
    ) -> None:
        """As `SqlJobStore.release`."""
        await self._run(super().release, claim, status=status, reason=reason, counts=counts, pause=pause)


class AsyncJoinedJobs:
    """`JoinedJobs`, awaited."""

    def __init__(self, joined: JoinedJobs) -> None:
        self._joined = joined
        self.snapshot = joined.snapshot
        self.is_open = joined.is_open

    async def book(
        self, claim: Claim, position: Any, counts: Mapping[str, Any], parked: Sequence[Mapping[str, Any]] = ()
    ) -> int | None:
        """As `JoinedJobs.book`."""
        return await greenlet_spawn(self._joined.book, claim, position, counts, parked)

    async def moved(self, claim: Claim) -> bool:
        """As `JoinedJobs.moved`."""
        return await greenlet_spawn(self._joined.moved, claim)
