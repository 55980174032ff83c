"""Batch jobs: how far each is, and who runs it."""

from __future__ import annotations

from typing import Any

from alembic import op
from sqlalchemy import BigInteger, Column, Double, Integer, String, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeEngine

from retrykit.sql.migrations import steps

revision = "rk_0003"
down_revision = "rk_0002"
branch_labels = None
depends_on = None

_INNODB: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mariadb_engine": "InnoDB",
    "mariadb_charset": "utf8mb4",
}


def upgrade() -> None:
    """Make the table, unless it is there."""
    if steps.present(3):
        return
    op.create_table(
        "rk_job",
        Column("id", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True),
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
        if_not_exists=True,
        sqlite_autoincrement=True,
        **_INNODB,
    )
    op.create_index("ix_rk_job_name", "rk_job", ["name", "id"], if_not_exists=True)
    steps.set_row("version", 3)


def downgrade() -> None:
    """Back to version 2, if there are no jobs."""
    if steps.absent(3):
        return
    steps.refuse_to_drop("rk_job")
    op.drop_table("rk_job", if_exists=True)
    steps.set_row("version", 2)


def _long_text() -> TypeEngine[str]:
    return Text().with_variant(mysql.LONGTEXT(charset="utf8mb4"), "mysql", "mariadb")
