"""The tables: `rk_context` (histories and completion marks), `rk_parked` (items put aside), `rk_job` (batch jobs),
`rk_schema` (its version).

The types say what SQLite, PostgreSQL and MariaDB must agree on. Keys are compared byte by byte everywhere (collation
C, utf8mb4_nopad_bin): a store that found `Order-1` under `order-1` would merge two histories. Ids are never given out
twice, not even after a delete (AUTOINCREMENT, IDENTITY, AUTO_INCREMENT of InnoDB): versions of histories are made of
them.

`metadata` may be merged into an application's own migrations, and then `retrykit.sql.migrations` belongs there too. The
counter of histories is kept by triggers on SQLite only: its writers come one after the other anyway. On servers with
concurrent writers one counter row would make them do so; they count over an index.

That index is on the minute of the last save, not on its very time: PostgreSQL updates a row without touching any index
(HOT) only while no indexed column changes. Measured on 1,000 histories, each failing again and again: half the WAL, a
quarter of the table's and a 60th of the index's size. For the same reason pages there are filled to 70 %: a new version
of a row finds room beside the old one.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    DDL,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
    insert,
    literal_column,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.types import TypeEngine

SCHEMA_VERSION: Final = 4
MAX_KEY: Final = 600

metadata = MetaData()


def _id() -> TypeEngine[int]:
    # SQLite gives ids by itself to INTEGER PRIMARY KEY only.
    return BigInteger().with_variant(Integer(), "sqlite")


def _exact(length: int) -> TypeEngine[str]:
    servers = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_nopad_bin")
    return (
        String(length)
        .with_variant(String(length, collation="C"), "postgresql")
        .with_variant(servers, "mysql", "mariadb")
    )


def _long_text() -> TypeEngine[str]:
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), "mysql", "mariadb")


def _bytes() -> TypeEngine[bytes]:
    return LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


# Databases of MariaDB 10.11 are latin1 unless somebody said otherwise.
_on_mariadb: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in {"engine": "InnoDB", "charset": "utf8mb4"}.items()
}

rk_schema = Table(
    "rk_schema",
    metadata,
    Column(
        "name",
        String(50),
        primary_key=True,
        comment="version; identity: a random number; contexts: how many histories there are (SQLite)",
    ),
    Column("value", BigInteger, nullable=False),
    **_on_mariadb,
)

rk_context = Table(
    "rk_context",
    metadata,
    Column("id", _id(), primary_key=True, comment="never given out twice"),
    Column(
        "context_key", _exact(MAX_KEY), nullable=False, unique=True, comment="canonical text of template name and key"
    ),
    Column("revision", Integer, nullable=False, comment="grows with every save"),
    Column("name", String(255), comment="of the template"),
    Column("retry_count", Integer),
    Column("last_failed_at", Double, comment="seconds since the epoch, as all times here"),
    Column("not_before", Double),
    Column("veto", Text),
    Column("exhausted", Boolean),
    Column("completed_at", Double, comment="not null: a completion mark, no history"),
    Column("expires_at", Double, comment="may be dropped from then on"),
    Column("updated_at", Double, nullable=False),
    Column("snapshot", _long_text(), nullable=False, comment="JSON; the columns above repeat parts of it for people"),
    # Of version 2: last, where the migration puts them.
    Column(
        "token",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="random, of the last save: tells its writer, whose connection was lost, that it was done",
    ),
    Column(
        "updated_minute",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="updated_at in whole minutes: seldom changes with it, so it can be indexed",
    ),
    # Of version 4.
    Column("evicted_at", Double, comment="not null: a tombstone, what is left of a history"),
    **_on_mariadb,
    sqlite_autoincrement=True,
    postgresql_with={"fillfactor": 70},
)

# What may be dropped, the longest over first.
Index(
    "ix_rk_context_expires_at",
    rk_context.c.expires_at,
    sqlite_where=rk_context.c.expires_at.is_not(None),
    postgresql_where=rk_context.c.expires_at.is_not(None),
)
# How many histories there are, and which was stored longest ago, however many completion marks lie around: these are
# out of the index where it can be partial, and beyond its NULLs on MariaDB. To be asked with `completed_at IS NULL` and
# ORDER BY completed_at, updated_minute, id: PostgreSQL does not take a column that is null for a constant one. MariaDB
# sees the index's order in a DELETE so ordered, but in a SELECT only if its ORDER BY leaves completed_at out.
Index(
    "ix_rk_context_histories",
    rk_context.c.completed_at,
    rk_context.c.updated_minute,
    rk_context.c.id,
    sqlite_where=rk_context.c.completed_at.is_(None),
    postgresql_where=rk_context.c.completed_at.is_(None),
)

# How many tombstones there are, and which is the oldest. (A process of version 3 that makes a history or a completion
# mark of one leaves its `evicted_at`. In a tombstone `completed_at` is the same.)
Index(
    "ix_rk_context_evicted_at",
    rk_context.c.evicted_at,
    rk_context.c.completed_at,
    rk_context.c.id,
    sqlite_where=rk_context.c.evicted_at.is_not(None),
    postgresql_where=rk_context.c.evicted_at.is_not(None),
)

rk_parked = Table(
    "rk_parked",
    metadata,
    Column("id", _id(), primary_key=True),
    Column("name", String(255), nullable=False, comment="of the template"),
    Column("context_key", _exact(MAX_KEY), comment="the history that it had"),
    Column("message_id", Text),
    Column("destination", Text, comment="where it came from, and goes back to"),
    Column("payload", _bytes(), nullable=False, comment="as it was delivered, byte for byte"),
    Column("content_type", Text),
    Column("headers", _long_text(), nullable=False, comment="JSON object"),
    Column("reason", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("errors", _long_text(), nullable=False, comment="JSON array, oldest first"),
    Column("first_failed_at", Double),
    Column("last_failed_at", Double),
    Column("parked_at", Double, nullable=False),
    Index("ix_rk_parked_name", "name", "id"),
    **_on_mariadb,
    sqlite_autoincrement=True,
)

rk_job = Table(
    "rk_job",
    metadata,
    Column("id", _id(), primary_key=True),
    Column("instance", String(64), nullable=False, unique=True, comment="digest of name and parameters"),
    Column("name", String(255), nullable=False, comment="of the step"),
    Column("parameters", _long_text(), nullable=False, comment="JSON object"),
    Column("status", String(16), nullable=False, comment="new, running, finished, failed, stopped"),
    Column("reason", Text, comment="why it failed or was stopped"),
    Column("runs", Integer, nullable=False),
    Column("position", _long_text(), comment="JSON: the next run begins behind it"),
    Column("counts", _long_text(), nullable=False, comment="JSON object, of all runs"),
    Column("revision", BigInteger, nullable=False, comment="grows with every commit"),
    Column("fence", BigInteger, nullable=False, comment="grows with every claim"),
    Column("owner", Text, comment="who runs it"),
    Column("lease_until", Double, comment="it is believed to run until then; seconds since the epoch"),
    Column("started_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("finished_at", Double),
    Index("ix_rk_job_name", "name", "id"),
    **_on_mariadb,
    sqlite_autoincrement=True,
)


_COUNTED: Final = {
    "rk_context_inserted": ("INSERT ON rk_context WHEN NEW.completed_at IS NULL", "value + 1"),
    "rk_context_deleted": ("DELETE ON rk_context WHEN OLD.completed_at IS NULL", "value - 1"),
    "rk_context_reopened": (
        "UPDATE OF completed_at ON rk_context WHEN OLD.completed_at IS NOT NULL AND NEW.completed_at IS NULL",
        "value + 1",
    ),
    "rk_context_completed": (
        "UPDATE OF completed_at ON rk_context WHEN OLD.completed_at IS NULL AND NEW.completed_at IS NOT NULL",
        "value - 1",
    ),
}
_TRIGGER: Final = """\
CREATE TRIGGER IF NOT EXISTS {name} AFTER {when}
BEGIN UPDATE rk_schema SET value = {value} WHERE name = 'contexts'; END
"""

for _name, (_when, _value) in _COUNTED.items():
    _ddl: ExecutableDDLElement = DDL(  # type: ignore[no-untyped-call]
        _TRIGGER.format(name=_name, when=_when, value=_value)
    )
    event.listen(rk_context, "after_create", _ddl.execute_if(dialect="sqlite"))


# A random number of 63 bits, made by the database: a script for it, printed once, may run on many.
RANDOM: Final[dict[str, str]] = {
    "sqlite": "random() & 9223372036854775807",
    "postgresql": "('x' || md5(gen_random_uuid()::text))::bit(64)::bigint & 9223372036854775807",
    "mariadb": "CAST(CONV(HEX(RANDOM_BYTES(8)), 16, 10) AS UNSIGNED) & 9223372036854775807",
}
RANDOM["mysql"] = RANDOM["mariadb"]


@event.listens_for(rk_schema, "after_create")
def _seed(_table: Table, connection: Connection, **_options: Any) -> None:
    identity = literal_column(RANDOM[connection.dialect.name], BigInteger)
    for name, value in (("version", SCHEMA_VERSION), ("contexts", 0), ("identity", identity)):
        connection.execute(insert(rk_schema).values(name=name, value=value))
