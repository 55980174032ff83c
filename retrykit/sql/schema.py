"""Whether the tables are there, and of the version that this retrykit works with.

The row `version` of `rk_schema` is the truth. It is set by whoever makes or changes the tables: `create_tables` here,
the migrations in `retrykit.sql.migrations`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Connection, Engine, create_engine, func, select, text

from retrykit.errors import ContextCacheError
from retrykit.sql.engines import engine_of, sync_engine_of
from retrykit.sql.faults import wording
from retrykit.sql.sqlite import reading, start_writing
from retrykit.sql.tables import SCHEMA_VERSION, metadata, rk_schema
from retrykit.sql.urls import shown_url

# Any number that others are unlikely to choose.
ADVISORY_LOCK: Final = 8_278_104_729_305_617
# For others who change the tables, and for those who use them.
LOCK_SECONDS: Final = 60


def open_tables(bind: Engine | Connection) -> Mapping[str, int]:
    """What a cache does at its start: make the tables on SQLite, ask for them elsewhere. The rows of `rk_schema`.

    `ContextCacheError` says what to run if they are absent or of another version.
    """
    return create_tables(bind) if bind.dialect.name == "sqlite" else check_version(bind)


def create_tables(bind: Engine | Connection) -> Mapping[str, int]:
    """Create what is missing, in one transaction: any number of processes may do so at once. The rows of `rk_schema`.

    On a Connection: in its transaction, which is the caller's to commit (DDL commits on MariaDB). `ContextCacheError`
    if the tables there have another version: `retrykit db upgrade` changes them.
    """
    if not read_schema(bind):
        with exclusive(bind) as connection:
            # The checks for existence come after the lock: who waited for it finds everything there.
            metadata.create_all(connection)
    return check_version(bind)


def check_version(bind: Engine | Connection) -> Mapping[str, int]:
    """Refuse tables of another version of the schema, before anything is read half or written wrong.

    Returns the rows of `rk_schema`: `version`, `identity` and, on SQLite, how many `contexts` there are.
    """
    rows = read_schema(bind)
    found = rows.get("version")
    if found == SCHEMA_VERSION:
        return rows
    command = _command(bind.engine.url)
    advice = command if found is None or found < SCHEMA_VERSION else "upgrade retrykit"
    what = "the tables are not there" if found is None else f"the tables have schema version {found}"
    msg = f"{what}; this retrykit works with version {SCHEMA_VERSION}: {advice}"
    raise ContextCacheError(msg, found=found, expected=SCHEMA_VERSION)


def _command(url: URL) -> str:
    """What brings the tables to this version; a command without its password would be of no use."""
    command = "run: retrykit db upgrade"
    if url.password is None:
        return f"{command} --store {shown_url(url)}"
    return f"{command}, with the URL of {shown_url(url)} in RETRYKIT_STORE"


def version_at(url: URL) -> int:
    """The version at a URL, as `check_version` wants it; no file is made for that, and none gets another journal."""
    engine = _engine_of_file(url) if url.get_backend_name() == "sqlite" else sync_engine_of(engine_of(url))
    try:
        with wording("db current", "", url):
            return check_version(engine)["version"]
    finally:
        engine.dispose()


def _engine_of_file(url: URL) -> Engine:
    name = (url.database or "").removeprefix("file:").partition("?")[0]
    path = Path(name).absolute()
    if not path.is_file():
        raise ContextCacheError(f"there is no file {path}")
    return create_engine(url)


def read_schema(bind: Engine | Connection) -> dict[str, int]:
    """The rows of `rk_schema`; none if it is not there."""
    if isinstance(bind, Engine):
        with reading(bind).connect() as connection:
            return read_schema(connection)
    if not bind.dialect.has_table(bind, rk_schema.name):
        return {}
    rows = bind.execute(select(rk_schema.c.name, rk_schema.c.value))
    return {row.name: row.value for row in rows}


@contextmanager
def exclusive(bind: Engine | Connection) -> Iterator[Connection]:
    """A connection in a transaction (of a Connection: its own) that alone changes the tables of this database."""
    if isinstance(bind, Connection):
        with _locked(bind):
            yield bind
        return
    # AUTOCOMMIT would end the lock at once, and a snapshot taken while waiting for it would show what was before.
    server = bind.dialect.name != "sqlite"
    engine = bind.execution_options(isolation_level="READ COMMITTED") if server else bind
    with engine.begin() as connection, _locked(connection):
        yield connection


@contextmanager
def _locked(connection: Connection) -> Iterator[None]:
    match connection.dialect.name:
        case "sqlite":
            start_writing(connection)
            yield
        case "postgresql":
            # Both end with the transaction. Who waits for a table keeps all who come later from it: not for long.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
            connection.execute(select(func.pg_advisory_xact_lock(ADVISORY_LOCK)))
            yield
        case _:
            with _named_lock(connection):
                yield


@contextmanager
def _named_lock(connection: Connection) -> Iterator[None]:
    # MariaDB: DDL commits, so the lock is the connection's. Locks are the server's, so this one is named after the
    # database, within the 64 characters that a name may have.
    name = f"retrykit:{connection.scalar(select(func.md5(func.database())))}"
    if connection.scalar(select(func.get_lock(name, LOCK_SECONDS))) != 1:
        raise ContextCacheError(f"somebody else has been changing the tables for {LOCK_SECONDS} seconds: try again")
    patience = connection.scalar(text("SELECT @@lock_wait_timeout"))
    try:
        connection.exec_driver_sql(f"SET lock_wait_timeout = {LOCK_SECONDS}")
        yield
        # Who waits for the lock shall see the rows that came after the last DDL.
        connection.exec_driver_sql("COMMIT")
    finally:
        if not connection.invalidated:
            connection.exec_driver_sql(f"SET lock_wait_timeout = {patience}")
            connection.execute(select(func.release_lock(name)))
