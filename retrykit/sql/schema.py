"""Whether the tables are there, and of the version that this retrykit works with.

The row `version` of `rk_schema` is the truth. It is set by whoever makes or changes the tables: `create_tables` here,
the migrations in `retrykit.sql.migrations`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from sqlalchemy import URL, Connection, Engine, func, select

from retrykit.errors import ContextCacheError
from retrykit.sql.sqlite import reading, start_writing
from retrykit.sql.tables import SCHEMA_VERSION, metadata, rk_schema

# Any number that others are unlikely to choose.
ADVISORY_LOCK: Final = 8_278_104_729_305_617
LOCK_SECONDS: Final = 300


def open_tables(bind: Engine | Connection) -> Mapping[str, int]:
    """What a cache does at its start: make the tables on SQLite, ask for them elsewhere. The rows of `rk_schema`.

    `ContextCacheError` says what to run if they are absent or of another version.
    """
    return create_tables(bind) if bind.dialect.name == "sqlite" else check_version(bind)


def create_tables(bind: Engine | Connection) -> Mapping[str, int]:
    """Create what is missing, in one transaction: any number of processes may do so at once. The rows of `rk_schema`.

    On a Connection: in its transaction, which is the caller's to commit. `ContextCacheError` if the tables there have
    another version: `retrykit db upgrade` changes them.
    """
    if not read_schema(bind):
        with _writing(bind) as connection:
            lock(connection)
            # The checks for existence come after the lock: who waited for it finds everything there.
            metadata.create_all(connection)
            unlock(connection)
    return check_version(bind)


def check_version(bind: Engine | Connection) -> Mapping[str, int]:
    """Refuse tables of another version of the schema, before anything is read half or written wrong.

    Returns the rows of `rk_schema`: `version`, `identity` and, on SQLite, how many `contexts` there are.
    """
    rows = read_schema(bind)
    found = rows.get("version")
    if found == SCHEMA_VERSION:
        return rows
    newer = found is not None and found > SCHEMA_VERSION
    advice = "upgrade retrykit" if newer else f"run: retrykit db upgrade --store {shown_url(bind.engine.url)}"
    what = "the tables are not there" if found is None else f"the tables have schema version {found}"
    msg = f"{what}; this retrykit works with version {SCHEMA_VERSION}: {advice}"
    raise ContextCacheError(msg, found=found, expected=SCHEMA_VERSION)


def read_schema(bind: Engine | Connection) -> dict[str, int]:
    """The rows of `rk_schema`; none if it is not there."""
    if isinstance(bind, Engine):
        with reading(bind).connect() as connection:
            return read_schema(connection)
    if not bind.dialect.has_table(bind, rk_schema.name):
        return {}
    rows = bind.execute(select(rk_schema.c.name, rk_schema.c.value))
    return {row.name: row.value for row in rows}


def shown_url(url: URL) -> str:
    """The URL without its password, nor the options, some of which are secrets too."""
    return url.set(query={}).render_as_string(hide_password=True)


def lock(connection: Connection) -> None:
    """Let nobody else change the tables of this database until `unlock`, or the transaction's end (not on MariaDB).

    DDL commits on MariaDB, so there the lock is one of the connection.
    """
    match connection.dialect.name:
        case "sqlite":
            start_writing(connection)
        case "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        case _:
            if connection.scalar(select(func.get_lock(_lock_name(connection), LOCK_SECONDS))) != 1:
                raise ContextCacheError(f"somebody else has been changing the tables for {LOCK_SECONDS} seconds")


def unlock(connection: Connection) -> None:
    """End the lock where the transaction's end does not."""
    if connection.dialect.name not in ("sqlite", "postgresql"):
        connection.execute(select(func.release_lock(_lock_name(connection))))


def _lock_name(connection: Connection) -> str:
    # Locks of MariaDB are the server's: named after the database, within the 64 characters that a name may have.
    return f"retrykit:{connection.scalar(select(func.md5(func.database())))}"


@contextmanager
def _writing(bind: Engine | Connection) -> Iterator[Connection]:
    if isinstance(bind, Connection):
        yield bind
        return
    with bind.begin() as connection:
        yield connection
