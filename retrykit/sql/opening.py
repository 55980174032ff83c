"""What a cache does once, before its first verb: look whether the tables are there, and where it is."""

from __future__ import annotations

import time

from sqlalchemy import Connection, Engine, select

from retrykit.errors import ContextCacheError
from retrykit.sql.connections import Connections
from retrykit.sql.dialects import Database
from retrykit.sql.places import File, Place, Server, where
from retrykit.sql.rows import ContextRows
from retrykit.sql.schema import open_tables
from retrykit.sql.sqlite import check_shareable


def opened(engine: Engine, connections: Connections, database: Database, rows: ContextRows) -> Place:
    """The place of the cache. `ContextCacheError` if its tables are absent or of another version."""
    if not database.is_server:
        check_shareable(engine)
        open_tables(engine)
        with connections.reading() as connection:
            return File(connection)
    with connections.reading() as connection:
        _check_server(connection, database)
        open_tables(connection)
        _ask_for_the_time(connection, database, rows)
        return Server(connection, database, lambda: _asked_again(connections, database))


def _asked_again(connections: Connections, database: Database) -> object:
    with connections.reading() as connection:
        return where(connection, database)


def _check_server(connection: Connection, database: Database) -> None:
    found = connection.dialect.server_version_info or (0,)
    wanted = f"{database.title} {'.'.join(map(str, database.oldest))} or newer"
    if database.title == "MariaDB" and not getattr(connection.dialect, "is_mariadb", False):
        lacks = "it has no INSERT … RETURNING, and no collation that tells keys apart by every byte"
        raise ContextCacheError(f"the server is MySQL, which is not supported ({lacks}): {wanted} is needed")
    if tuple(found[: len(database.oldest)]) < database.oldest:
        raise ContextCacheError(f"the server has version {'.'.join(map(str, found))}: {wanted} is needed")


def _ask_for_the_time(connection: Connection, database: Database, rows: ContextRows) -> None:
    if rows.store_clock is not None:
        sent = time.monotonic()
        rows.store_clock.observe(sent, connection.execute(select(database.clock)).scalar_one(), time.monotonic())
