"""Histories, completion marks and parked items.

What `create_tables` of retrykit 0.1.0 made.
"""

from __future__ import annotations

from typing import Any

from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, LargeBinary, String, Text, text
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

from retrykit.sql.migrations import steps

revision = "rk_0001"
down_revision = None
branch_labels = ("retrykit",)
depends_on = None

_INNODB: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
}
_COUNTED = {
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
_TRIGGER = """\
CREATE TRIGGER IF NOT EXISTS {name} AFTER {when}
BEGIN UPDATE rk_schema SET value = {value} WHERE name = 'contexts'; END
"""


def upgrade() -> None:
    """Make the tables, unless they are there."""
    if steps.present(1):
        return
    _make_schema()
    _make_context()
    _make_parked()
    steps.set_row("contexts", 0)
    steps.set_row("version", 1)


def downgrade() -> None:
    """Drop the tables, if nothing is in them."""
    if steps.absent(1):
        return
    steps.refuse_to_drop("rk_context", "rk_parked")
    for name in ("rk_parked", "rk_context", "rk_schema"):
        op.drop_table(name, if_exists=True)


def _make_schema() -> None:
    op.create_table(
        "rk_schema",
        Column(
            "name", String(50), primary_key=True, comment="version, or contexts: how many histories there are (SQLite)"
        ),
        Column("value", BigInteger, nullable=False),
        if_not_exists=True,
        **_INNODB,
    )


def _make_context() -> None:
    op.create_table(
        "rk_context",
        Column("id", _id(), primary_key=True, comment="never given out twice"),
        Column("context_key", _exact(), nullable=False, unique=True, comment="canonical text of template name and key"),
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
        Column(
            "snapshot", _long_text(), nullable=False, comment="JSON; the columns above repeat parts of it for people"
        ),
        if_not_exists=True,
        sqlite_autoincrement=True,
        **_INNODB,
    )
    _make_index("expires_at", "expires_at IS NOT NULL")
    _make_index("updated_at", "completed_at IS NULL")
    if steps.on("sqlite"):
        for name, (when, value) in _COUNTED.items():
            op.execute(_TRIGGER.format(name=name, when=when, value=value))


def _make_index(name: str, where: str) -> None:
    op.create_index(
        f"ix_rk_context_{name}",
        "rk_context",
        [name],
        sqlite_where=text(where),
        postgresql_where=text(where),
        if_not_exists=True,
    )


def _make_parked() -> None:
    op.create_table(
        "rk_parked",
        Column("id", _id(), primary_key=True),
        Column("name", String(255), nullable=False, comment="of the template"),
        Column("context_key", _exact(), comment="the history that it had"),
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
        if_not_exists=True,
        sqlite_autoincrement=True,
        **_INNODB,
    )
    op.create_index("ix_rk_parked_name", "rk_parked", ["name", "id"], if_not_exists=True)


def _id() -> TypeEngine[int]:
    return BigInteger().with_variant(Integer(), "sqlite")


def _exact() -> TypeEngine[str]:
    servers = mysql.VARCHAR(600, charset="utf8mb4", collation="utf8mb4_nopad_bin")
    return String(600).with_variant(String(600, collation="C"), "postgresql").with_variant(servers, "mysql", "mariadb")


def _long_text() -> TypeEngine[str]:
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), "mysql", "mariadb")


def _bytes() -> TypeEngine[bytes]:
    return LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
