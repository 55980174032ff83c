"""Whether a transaction that was lent to somebody is still the one that was begun, and can be committed."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from retrykit.sql.dialects import ABORTING, database_of
from retrykit.sql.transaction import connections_in, unwrapped


class Begun:
    """The transaction that a Session or Connection was in when it was lent. Nothing is asked of the database."""

    __slots__ = ("_handle", "_root")

    def __init__(self, handle: Session | Connection, root: Any) -> None:
        self._handle = handle
        self._root = root

    @classmethod
    def of(cls, transaction: object) -> Begun | None:
        """None for what is not SQLAlchemy's, or has begun nothing."""
        handle = transaction if isinstance(transaction, Connection) else unwrapped(transaction)
        root = None if handle is None else handle.get_transaction()
        return None if handle is None or root is None else cls(handle, root)

    @property
    def is_over(self) -> bool:
        """Whether somebody has committed it, rolled it back or closed it."""
        return self._handle.get_transaction() is not self._root

    def fault(self) -> Literal["over", "aborted"] | None:
        """What would come of a commit: nothing, because it is over, or a roll-back, because an error was swallowed."""
        handle = self._handle
        if handle.get_transaction() is not self._root:
            return "over"
        if isinstance(handle, Connection):
            return "aborted" if handle.dialect.name in ABORTING and _is_aborted(handle) else None
        return "aborted" if any(map(_is_aborted, connections_in(self._root))) else None


def _is_aborted(connection: Connection) -> bool:
    database = database_of(connection)
    if database is None or database.is_aborted is None:
        return False
    return not connection.invalidated and database.is_aborted(connection)
