"""Bringing the tables to another version, with alembic: what `retrykit db` does, for programs.

Needs alembic (the extra `sql` brings it); nothing else in `retrykit.sql` imports it.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import attrs
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from retrykit.check import wrong_value
from retrykit.errors import ContextCacheError
from retrykit.sql.migrations import migrations_path
from retrykit.sql.schema import LOCK_SECONDS, exclusive, read_schema
from retrykit.sql.tables import SCHEMA_VERSION

DIALECTS: Final = ("sqlite", "postgresql", "mariadb", "mysql")
_REVISIONS: Final = ("base", *(f"rk_{version:04}" for version in range(1, SCHEMA_VERSION + 1)))

# Of PostgreSQL and MariaDB, when the time for which they wait for a lock is over.
_LOCKED_OUT: Final = frozenset({"55P03", 1205})

# Alembic's `op` and `context` are one of each for the whole process.
_turn: Final = threading.Lock()


@attrs.frozen
class Upgrade:
    """The versions of the schema before and after; 0: there were no tables."""

    before: int
    after: int


def upgrade_tables(bind: Engine | Connection) -> Upgrade:
    """Bring the tables to the version that this retrykit works with, or make them; every row is kept.

    Any number of processes may do so at once: one does it, the others find it done. It is one transaction on SQLite and
    PostgreSQL. MariaDB commits each step; after an interruption the next upgrade goes on from there. On a Connection
    the commit is the caller's. `ContextCacheError` if the tables are newer than this retrykit, or if others have been
    using or changing them for a minute.
    """
    with _turn, _in_words(), exclusive(bind) as connection:
        before = read_schema(connection).get("version", 0)
        if before > SCHEMA_VERSION:
            msg = f"the tables have schema version {before}; this retrykit knows {SCHEMA_VERSION}: upgrade retrykit"
            raise ContextCacheError(msg, found=before, expected=SCHEMA_VERSION)
        config = _config(connection=connection)
        # What `rk_schema` says holds, whatever alembic's table says: it is not there if `create_tables` made these.
        command.stamp(config, _REVISIONS[before], purge=True)
        command.upgrade(config, _REVISIONS[SCHEMA_VERSION])
    return Upgrade(before, SCHEMA_VERSION)


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if not _LOCKED_OUT & {getattr(error.orig, "sqlstate", None), *getattr(error.orig, "args", ())[:1]}:
            raise
        msg = f"others have been using the tables in their transactions for {LOCK_SECONDS} seconds: try again"
        raise ContextCacheError(msg) from error


def upgrade_sql(dialect: str, *, start: int = 0, end: int = SCHEMA_VERSION) -> str:
    """The SQL of an upgrade (or, with `end` below `start`, a downgrade), for somebody else to run.

    `dialect`: "sqlite", "postgresql" or "mariadb". `start`, `end`: versions of the schema; 0: no tables.
    """
    if dialect not in DIALECTS:
        raise wrong_value("dialect", f"one of {DIALECTS}", dialect)
    for name, version in (("start", start), ("end", end)):
        if not 0 <= version <= SCHEMA_VERSION:
            raise wrong_value(name, f"a schema version from 0 to {SCHEMA_VERSION}", version)
    written = io.StringIO()
    config = _config(output_buffer=written, dialect=dialect, before=_stamped(start))
    move = command.upgrade if end >= start else command.downgrade
    with _turn:
        move(config, f"{_REVISIONS[start]}:{_REVISIONS[end]}", sql=True)
    return written.getvalue()


def _config(*, output_buffer: io.StringIO | None = None, **asked: Any) -> Config:
    config = Config(output_buffer=output_buffer, attributes=asked)
    # ConfigParser takes a percent sign for the beginning of something.
    config.set_main_option("script_location", str(migrations_path().parent).replace("%", "%%"))
    return config


def _stamped(version: int) -> list[str]:
    """What alembic's own statements find there: tables that `create_tables` made have no such table beside them."""
    if version == 0:
        return []
    columns = "version_num VARCHAR(32) NOT NULL, CONSTRAINT rk_alembic_version_pkc PRIMARY KEY (version_num)"
    return [
        f"CREATE TABLE IF NOT EXISTS rk_alembic_version ({columns})",
        "DELETE FROM rk_alembic_version",
        f"INSERT INTO rk_alembic_version (version_num) VALUES ('{_REVISIONS[version]}')",  # noqa: S608 - one of ours
    ]
