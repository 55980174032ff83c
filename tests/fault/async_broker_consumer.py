"""As `tests.fault.broker_consumer`, with coroutines: the work on an event loop, in an asynchronous transaction.

`python -m tests.fault.async_broker_consumer` reads orders (`tests.fault.forks`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from retrykit import AsyncRetryTemplate
from retrykit.sql import async_sqlite_engine
from tests.fault.broker_consumer import TROUBLES, Consumer, effects, failures, is_slow
from tests.fault.forks import serve


def async_engine_for(url: str) -> AsyncEngine:
    """An engine as a user makes it."""
    place = sa.make_url(url)
    if place.get_backend_name() == "sqlite":
        return async_sqlite_engine(place.set(drivername="sqlite+aiosqlite"), durability="process")
    return create_async_engine(place.set(drivername="postgresql+asyncpg"))


class AsyncConsumer(Consumer):
    """One process whose handlers are coroutines."""

    template_class = AsyncRetryTemplate

    def __init__(self, order: dict[str, Any]) -> None:
        super().__init__(order)
        self.engine: Any = async_engine_for(order["database"])
        self.begun: Any = async_sessionmaker(self.engine).begin
        self.options = {"lifespan": self.lifespan}

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        yield
        await self.engine.dispose()

    async def handle(self, message: Any, context: Any) -> None:
        number = int(message.text)
        self.note("attempt", n=context.attempt)
        await context.transaction.execute(sa.insert(effects).values(number=number))
        message.send(f"{message.destination}.out", message.text)
        self.step()
        if is_slow(number):
            await asyncio.sleep(self.order["takes"])
        if context.attempt <= failures(number):
            raise TROUBLES[number % len(TROUBLES)](f"attempt {context.attempt} of {number} failed")

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        async with self.begun() as session:
            yield session
            self.step()
        self.step()


def main() -> None:
    logging.getLogger("retrykit").propagate = False
    logging.getLogger("stomp.py").addHandler(logging.NullHandler())
    # Loaded once, for all children.
    __import__("asyncpg")
    __import__("aiosqlite")
    serve(AsyncConsumer)


if __name__ == "__main__":
    main()
