"""Savepoints in somebody's transaction, plain or asynchronous."""

from __future__ import annotations

from typing import Any

from sqlalchemy.util import greenlet_spawn

from retrykit.sql.sqlite import start_writing
from retrykit.sql.transaction import connection_in, unwrapped


class Savepoint:
    """What was done since may be undone, and the transaction goes on."""

    def __init__(self, transaction: Any) -> None:
        handle = unwrapped(transaction)
        if handle is None:
            msg = f"a savepoint needs a transaction of SQLAlchemy, not {type(transaction).__name__}"
            raise TypeError(msg)
        # Python's driver leaves SQLite without a BEGIN until something is changed: then the savepoint would be the
        # transaction, and releasing it the commit.
        start_writing(connection_in(handle))
        self._nested = handle.begin_nested()

    def release(self) -> None:
        """It stays, as far as the transaction does."""
        self._nested.commit()

    def roll_back(self) -> None:
        """It is undone."""
        self._nested.rollback()


class AsyncSavepoint:
    """`Savepoint` in the transaction of an AsyncSession or AsyncConnection: awaited."""

    def __init__(self, savepoint: Savepoint) -> None:
        self._savepoint = savepoint

    @classmethod
    async def begin(cls, transaction: Any) -> AsyncSavepoint:
        """Set one."""
        return cls(await greenlet_spawn(Savepoint, transaction))

    async def release(self) -> None:
        """As `Savepoint.release`."""
        await greenlet_spawn(self._savepoint.release)

    async def roll_back(self) -> None:
        """As `Savepoint.roll_back`."""
        await greenlet_spawn(self._savepoint.roll_back)
