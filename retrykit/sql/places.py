"""Where a cache is, and whether somebody else's connection is there too.

Connections of the cache's own engine are. Of others one of each pool is asked: SQLite for its file; servers for
themselves, their database, and the random number that its tables got when they were made. A copy of the database has
the same number, and is on another server or has another name.

They are asked inside a savepoint: on PostgreSQL a statement that fails would abort the work's transaction otherwise,
and the COMMIT of an aborted transaction is a ROLLBACK without a word.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import Pool

from retrykit.sql.dialects import Database
from retrykit.sql.sqlite import file_of, in_transaction, undo_what_a_failed_commit_left
from retrykit.sql.tables import rk_schema
from retrykit.sql.urls import shown_url

logger = logging.getLogger("retrykit.sql")

_IDENTITY: Final = select(rk_schema.c.value).where(rk_schema.c.name == "identity")


_UNSEEN: Final = (
    "the work of engine %s is not joined, so its effects happen at least once: the tables of the context cache cannot "
    "be read there (%s). If they are in the same database, grant its user SELECT, INSERT, UPDATE and DELETE on "
    "rk_context and SELECT on rk_schema, and put their schema on its search path"
)


class Place(ABC):
    """The database of a cache."""

    @abstractmethod
    def has(self, connection: Connection) -> bool:
        """Whether the connection, of another engine, is on this database."""

    @abstractmethod
    def commits_by_itself(self, connection: Connection) -> bool:
        """AUTOCOMMIT: every statement is a transaction of its own, there is nothing to join."""

    @abstractmethod
    def watch(self, engine: Engine) -> None:
        """Somebody's transaction on this engine is joined."""


class File(Place):
    """Of SQLite."""

    def __init__(self, connection: Connection) -> None:
        self._file = file_of(connection)

    def has(self, connection: Connection) -> bool:
        """The same file."""
        return self._file != "" and file_of(connection) == self._file

    def commits_by_itself(self, connection: Connection) -> bool:
        """No BEGIN of the driver's, nor one of anybody else's."""
        driver = connection.connection.dbapi_connection
        no_begin = getattr(driver, "isolation_level", "") is None or getattr(driver, "autocommit", None) is True
        return no_begin and not in_transaction(driver)

    def watch(self, engine: Engine) -> None:
        """See there."""
        undo_what_a_failed_commit_left(engine)


class Server(Place):
    """PostgreSQL or MariaDB. `ask`: asks the cache's own connection again, since a server may have been restarted."""

    def __init__(self, connection: Connection, database: Database, ask: Callable[[], Any]) -> None:
        self._database = database
        self._where = where(connection, database)
        self._ask = ask
        self._found: WeakKeyDictionary[Pool, bool] = WeakKeyDictionary()

    def has(self, connection: Connection) -> bool:
        """The same server, database and tables."""
        pool = connection.engine.pool
        found = self._found.get(pool)
        if found is None:
            found = self._found[pool] = self._is(connection, self._asked(connection))
        return found

    def _asked(self, connection: Connection) -> tuple[Any, ...] | None:
        """Where they are; None if they may not look."""
        try:
            with connection.begin_nested():
                return where(connection, self._database)
        except DBAPIError as error:
            if not self._database.hides(error):
                raise
            logger.warning(_UNSEEN, shown_url(connection.engine.url), str(error.orig).partition("\n")[0])
            return None

    def _is(self, connection: Connection, theirs: tuple[Any, ...] | None) -> bool:
        if theirs is None:
            return False
        if theirs != self._where:
            self._where = self._ask()
        if theirs[0] == self._where[0] and theirs[1] is None:
            logger.warning(_UNSEEN, shown_url(connection.engine.url), "there seem to be none")
        return theirs == self._where

    def commits_by_itself(self, connection: Connection) -> bool:
        """As its driver says; nothing is asked."""
        driver: Any = connection.connection.dbapi_connection
        return connection.dialect.detect_autocommit_setting(driver)

    def watch(self, engine: Engine) -> None:
        """Nothing to see: a failed COMMIT is a ROLLBACK."""


def where(connection: Connection, database: Database) -> tuple[Any, ...]:
    """The server with its database, and the number of the tables there; None for that if there are none to be seen."""
    assert database.place is not None  # noqa: S101 - servers have one
    place, has_tables = connection.execute(database.place).one()
    return place, connection.scalar(_IDENTITY) if has_tables else None
