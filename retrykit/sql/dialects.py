"""The databases, and all in which they differ: everything else in this package speaks to a `Database`.

- What inserts a row or nothing. ON CONFLICT DO NOTHING on PostgreSQL and SQLite, which return no row to who lost.
  MariaDB has ON DUPLICATE KEY UPDATE, here of nothing, which returns the row of whoever won: the token in it tells.
  (INSERT IGNORE would hide more than the conflict: values that are cut off, for instance.)
- What deletes the rows that a query chooses, with its limit. PostgreSQL may run a subquery in IN more than once, and
  each time it skips what it has locked before: as an array it runs once. MariaDB runs one for each row, and where it
  joins it may begin with the wrong table and lock all of it: it is told where to begin, in its own words.
- What o'clock it is there. SQLite has no clock but this machine's.
- What passes: which faults are worth another try.
- Where a connection is: so that a transaction somewhere else is not taken for one here.
- What AUTOCOMMIT costs. psycopg and asyncpg switch to it and back without a word to the server; MariaDB's drivers tell
  it each time, so the switch would cost more than the COMMIT that it saves.

MySQL is not among them: it has no RETURNING, and not the collation under which keys differ by every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Double,
    Engine,
    Executable,
    Insert,
    Select,
    func,
    literal_column,
    text,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError

from retrykit.sql.tables import rk_context
from retrykit.tombstone import CLOSING, CUT, SEAM

_c = rk_context.c

AN_OBJECT: Final = '{%"%}'
"""What the text of a snapshot is like in which there is something: it can be shortened, or be added to."""


@attrs.frozen(kw_only=True, eq=False)
class Database:
    """One kind of database. `MARIADB` is one whether the URL calls it mariadb or mysql."""

    title: str
    is_server: bool
    insert_or_nothing: Callable[[Mapping[str, Any]], Insert]
    clock: Any = None
    place: Executable | None = None
    # Whether a row is one of those that a query chooses; None where it is said in `texts`.
    is_chosen: Callable[[Select[Any]], ColumnElement[bool]] | None = None
    # The function that tells where a text is in another.
    finds: str = "instr"
    texts: Mapping[str, Executable] = attrs.field(factory=dict)
    # The rows of `rk_context` with the keys in a JSON array, each looked up by the index, whatever the planner knows.
    among: str
    # Reads of a transaction may show what was there at its beginning, while its writes meet what is there now. So a
    # read that explains why a write lost takes a lock: then it sees the same. (PostgreSQL refuses such a write.)
    reads_the_past: bool = False
    switches_for_nothing: bool = False
    # A condition that holds where a statement in somebody's transaction can neither fail nor wait because of others.
    undisturbed: Any = None
    passes: Callable[[BaseException], bool]
    hint: Callable[[BaseException, URL], str]
    # Whether a fault says that there is no such table, or that one may not read it.
    hides: Callable[[DBAPIError], bool] = attrs.field(default=lambda _error: False)
    # Whether the transaction can only be rolled back, as far as the driver knows without asking. None: it never is.
    is_aborted: Callable[[Connection], bool] | None = None
    oldest: tuple[int, ...] = (0,)


# -- SQLite


def _sqlite_hint(error: BaseException, url: URL) -> str:
    words = str(error)
    if "locked" in words:
        return " (the work's own transaction may hold the lock: only one on the same file can be joined)"
    if isinstance(error, OperationalError) and "unable to open" in words and url.database:
        folder = Path(url.database).absolute().parent
        return f" (in {folder})" if folder.is_dir() else f" (no directory {folder})"
    return ""


def _nothing_passes(_error: BaseException) -> bool:
    # SQLite waits by itself, as long as the connection's busy timeout says.
    return False


def _on_conflict(dialect: Any) -> Callable[[Mapping[str, Any]], Insert]:
    def insert(values: Mapping[str, Any]) -> Insert:
        return dialect.insert(rk_context).values(values).on_conflict_do_nothing(index_elements=[_c.context_key])  # type: ignore[no-any-return]

    return insert


def _is_in(chosen: Select[Any]) -> ColumnElement[bool]:
    return _c.id.in_(chosen)


SQLITE: Final = Database(
    title="SQLite",
    among="json_each(:the_keys) AS given CROSS JOIN rk_context ON rk_context.context_key = given.value",
    is_chosen=_is_in,
    is_server=False,
    insert_or_nothing=_on_conflict(sqlite),
    passes=_nothing_passes,
    hint=_sqlite_hint,
)

# -- PostgreSQL

_INERROR: Final = 3

# Connections, serialization, deadlock, too many connections, shutdown, crash, starting up.
_PASSING_STATES: Final = ("08", "40001", "40P01", "53300", "57P01", "57P02", "57P03")
# What a refused connection says when it will be refused for ever (libpq tells no SQLSTATE of these).
_REFUSALS: Final = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password supplied")


def _postgresql_passes(error: BaseException) -> bool:
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_PASSING_STATES)
    refused = isinstance(error, OperationalError) and not any(words in str(error.orig) for words in _REFUSALS)
    return refused or error.connection_invalidated


def _server_hint(error: BaseException, _url: URL) -> str:
    words = str(error)
    if "rk_" in words and ("does not exist" in words or "doesn't exist" in words):
        return " (are the tables there, and on the search path? retrykit db upgrade makes them)"
    return ""


# Not allowed; no such schema, no such table.
_HIDING_STATES: Final = frozenset({"42501", "3F000", "42P01"})


def _postgresql_hides(error: DBAPIError) -> bool:
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    return state in _HIDING_STATES


def _postgresql_is_aborted(connection: Connection) -> bool:
    # psycopg, psycopg2 and libpq call it INERROR; other drivers do not tell.
    info = getattr(connection.connection.driver_connection, "info", None)
    return getattr(info, "transaction_status", None) == _INERROR


def _is_in_array(chosen: Select[Any]) -> ColumnElement[bool]:
    return _c.id == func.any(func.array(chosen.scalar_subquery()))


POSTGRESQL: Final = Database(
    title="PostgreSQL",
    among="json_array_elements_text(CAST(CAST(:the_keys AS text) AS json)) AS given (member) "
    "JOIN rk_context ON rk_context.context_key = given.member",
    is_chosen=_is_in_array,
    finds="strpos",
    is_server=True,
    insert_or_nothing=_on_conflict(postgresql),
    clock=literal_column("extract(epoch FROM clock_timestamp())::float8", Double),
    place=text(
        "SELECT concat_ws('/', extract(epoch FROM pg_postmaster_start_time()), current_database()), "
        "to_regclass('rk_schema') IS NOT NULL"
    ),
    switches_for_nothing=True,
    undisturbed=literal_column("current_setting('transaction_isolation')") == literal_column("'read committed'"),
    passes=_postgresql_passes,
    hint=_server_hint,
    hides=_postgresql_hides,
    is_aborted=_postgresql_is_aborted,
    oldest=(15,),
)

# -- MariaDB

_PASSING_CODES: Final = frozenset({
    1020,  # the record has changed since it was read (snapshot isolation)
    1040,  # too many connections
    1053,  # the server is shutting down
    *(1158, 1159, 1160, 1161),  # packets that did not come through
    1203,  # too many connections of this user
    1205,  # waited too long for a lock
    1213,  # deadlock
    1927,  # the connection was killed
    *(2002, 2003, 2006, 2013, 2014, 2045, 2055, 4031),  # no connection, or no longer
})  # fmt: skip


# Not allowed: the database, the table, the column; no such table.
_HIDING_CODES: Final = frozenset({1044, 1142, 1143, 1146})


def _mariadb_hides(error: DBAPIError) -> bool:
    arguments = getattr(error.orig, "args", ())
    return bool(arguments and arguments[0] in _HIDING_CODES)


def _mariadb_passes(error: BaseException) -> bool:
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    arguments = getattr(error.orig, "args", ())
    return error.connection_invalidated or bool(arguments and arguments[0] in _PASSING_CODES)


def _on_duplicate_key(values: Mapping[str, Any]) -> Insert:
    return mysql.insert(rk_context).values(values).on_duplicate_key_update(id=literal_column("id"))


_PAST: Final = (
    "(SELECT id FROM rk_context WHERE expires_at <= :now {} ORDER BY expires_at LIMIT :chunk FOR UPDATE SKIP LOCKED) "
    "AS past STRAIGHT_JOIN rk_context ON rk_context.id = past.id"
)
_EXPIRE: Final = f"DELETE rk_context FROM {_PAST}"
_BURIED: Final = (
    " SET snapshot = CASE WHEN snapshot = '{{}}' THEN CONCAT('{{', SUBSTR(:epitaph, 2)) "
    "WHEN snapshot NOT LIKE :an_object THEN snapshot WHEN INSTR(snapshot, :cut) > 0 THEN "
    "CONCAT(SUBSTR(snapshot, 1, INSTR(snapshot, :cut) - 1), :closing, :epitaph) "
    "WHEN INSTR(snapshot, :seam) > 0 THEN CONCAT(SUBSTR(snapshot, 1, INSTR(snapshot, :seam) - 1), :epitaph) "
    "ELSE CONCAT(SUBSTR(snapshot, 1, CHAR_LENGTH(snapshot) - 1), :epitaph) END, revision = revision | 3, "
    "completed_at = :buried_at, evicted_at = :buried_at, expires_at = :buried_until"
)
_BURY_EXPIRED: Final = f"UPDATE {_PAST}{_BURIED} WHERE completed_at IS NULL"
_SWEEP: Final = f"{_EXPIRE} WHERE completed_at IS NOT NULL"
# What returns keys cannot pass over what is locked, so the keys are asked for before. Between the two somebody may have
# locked or changed a row: it stays.
_OLDEST: Final = (
    "SELECT id, revision, context_key FROM rk_context WHERE completed_at IS NULL AND {} ORDER BY updated_minute, id "
    "LIMIT :surplus FOR UPDATE SKIP LOCKED"
)
_ALL_VETOED: Final = (
    "NOT EXISTS (SELECT 1 FROM rk_context AS other WHERE other.completed_at IS NULL AND other.veto IS NULL)"
)
_ONE: Final = (
    "(SELECT id FROM rk_context WHERE id = :the_id AND revision = :the_revision FOR UPDATE SKIP LOCKED) AS oldest "
    "STRAIGHT_JOIN rk_context ON rk_context.id = oldest.id"
)
_TRIM: Final = (
    "DELETE rk_context FROM (SELECT id FROM rk_context WHERE evicted_at IS NOT NULL AND completed_at = evicted_at "
    "ORDER BY evicted_at, completed_at, id LIMIT :surplus FOR UPDATE SKIP LOCKED) AS oldest "
    "STRAIGHT_JOIN rk_context ON rk_context.id = oldest.id"
)
_UNDISTURBED: Final = "AND @@tx_isolation = 'READ-COMMITTED'"


def _burying(statement: str, condition: str = "") -> Executable:
    marks = {"cut": CUT, "closing": CLOSING[:-1], "seam": SEAM}
    return text(statement.format(condition)).bindparams(**marks, an_object=AN_OBJECT)


_MEMBER: Final = "member VARCHAR(600) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin PATH '$'"

MARIADB: Final = Database(
    title="MariaDB",
    among=f"JSON_TABLE(:the_keys, '$[*]' COLUMNS ({_MEMBER})) AS given "
    "STRAIGHT_JOIN rk_context ON rk_context.context_key = given.member",
    is_server=True,
    insert_or_nothing=_on_duplicate_key,
    # Of a time in a time zone there may be two in a year; of UTC there is one.
    clock=literal_column(
        "(TIMESTAMPDIFF(MICROSECOND, TIMESTAMP'1970-01-01 00:00:00', UTC_TIMESTAMP(6)) / 1e6)", Double
    ),
    place=text(
        "SELECT concat_ws('/', @@hostname, @@port, @@datadir, database()), EXISTS (SELECT 1 FROM "
        "information_schema.tables WHERE table_schema = database() AND table_name = 'rk_schema')"
    ),
    texts={
        "expire": text(_EXPIRE.format("")),
        "expire_joined": text(_EXPIRE.format(_UNDISTURBED)),
        "oldest": text(_OLDEST.format("veto IS NULL")),
        "oldest_vetoed": text(_OLDEST.format(_ALL_VETOED)),
        "evict": text(f"DELETE rk_context FROM {_ONE}"),
        "sweep": text(_SWEEP.format("")),
        "sweep_joined": text(_SWEEP.format(_UNDISTURBED)),
        "bury_expired": _burying(_BURY_EXPIRED),
        "bury_expired_joined": _burying(_BURY_EXPIRED, _UNDISTURBED),
        "bury": _burying(f"UPDATE {_ONE}{_BURIED}"),
        "trim": text(_TRIM),
    },
    reads_the_past=True,
    passes=_mariadb_passes,
    hint=_server_hint,
    hides=_mariadb_hides,
    oldest=(10, 11),
)

_DATABASES: Final = {"sqlite": SQLITE, "postgresql": POSTGRESQL, "mariadb": MARIADB, "mysql": MARIADB}
ABORTING: Final = frozenset(name for name, database in _DATABASES.items() if database.is_aborted is not None)
"""The names of the dialects whose transactions may be aborted."""


def database_of(bind: Engine | Connection | URL) -> Database | None:
    """The kind of database behind an engine, connection or URL; None for one that is not supported."""
    name = bind.get_backend_name() if isinstance(bind, URL) else bind.dialect.name
    return _DATABASES.get(name)
