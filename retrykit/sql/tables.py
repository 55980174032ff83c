"""The tables: `rk_context` (histories and completion marks), `rk_parked` (items put aside), `rk_schema` (its version).

The types say what SQLite, PostgreSQL and MariaDB must agree on. Keys are compared byte by byte everywhere (collation
C, utf8mb4_nopad_bin): a store that found `Order-1` under `order-1` would merge two histories. Ids are never given out
twice, not even after a delete (AUTOINCREMENT, IDENTITY, AUTO_INCREMENT of InnoDB): versions of histories are made of
them.

`metadata` may be merged into an application's own migrations. The counter of histories is kept by triggers on SQLite
only: its writers come one after the other anyway. On servers with concurrent writers one counter row would make them
do so.
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
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
    insert,
    select,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.types import TypeEngine

from retrykit.errors import ContextCacheError
from retrykit.sql.sqlite import reading, start_writing

SCHEMA_VERSION: Final = 1
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


_innodb: dict[str, Any] = {f"{dialect}_engine": "InnoDB" for dialect in ("mysql", "mariadb")}

rk_schema = Table(
    "rk_schema",
    metadata,
    Column("name", String(50), primary_key=True, comment="version, or contexts: how many histories there are (SQLite)"),
    Column("value", BigInteger, nullable=False),
    **_innodb,
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
    **_innodb,
    sqlite_autoincrement=True,
)

Index(
    "ix_rk_context_expires_at",
    rk_context.c.expires_at,
    sqlite_where=rk_context.c.expires_at.is_not(None),
    postgresql_where=rk_context.c.expires_at.is_not(None),
)
# Which history was stored longest ago, however many completion marks lie around it.
Index(
    "ix_rk_context_updated_at",
    rk_context.c.updated_at,
    sqlite_where=rk_context.c.completed_at.is_(None),
    postgresql_where=rk_context.c.completed_at.is_(None),
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
    **_innodb,
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


@event.listens_for(rk_schema, "after_create")
def _seed(_table: Table, connection: Connection, **_options: Any) -> None:
    connection.execute(
        insert(rk_schema), [{"name": "version", "value": SCHEMA_VERSION}, {"name": "contexts", "value": 0}]
    )


def create_tables(engine: Engine) -> None:
    """Create what is missing, in one transaction: any number of processes may do so at once.

    `ContextCacheError` if the tables there have another version.
    """
    if _version(engine) is None:
        with engine.begin() as connection:
            start_writing(connection)
            # The checks for existence come after the lock: who waited for it finds everything there.
            metadata.create_all(connection)
    check_version(engine)


def check_version(engine: Engine) -> None:
    """Refuse tables of another version of the schema, before anything is read half or written wrong."""
    found = _version(engine)
    if found == SCHEMA_VERSION:
        return
    advice = "upgrade retrykit" if found is not None and found > SCHEMA_VERSION else "run: retrykit db upgrade"
    msg = f"the tables have schema version {found}; this retrykit works with version {SCHEMA_VERSION}: {advice}"
    raise ContextCacheError(msg, found=found, expected=SCHEMA_VERSION)


def _version(engine: Engine) -> int | None:
    with reading(engine).connect() as connection:
        if not connection.dialect.has_table(connection, "rk_schema"):
            return None
        return connection.scalar(select(rk_schema.c.value).where(rk_schema.c.name == "version"))
