"""What histories need that processes on many hosts share.

A token of each save, a random identity of the database, and indexes that MariaDB serves too. Processes of the version
before go on with these tables until they are replaced.
"""

from __future__ import annotations

from typing import Final

from alembic import op
from sqlalchemy import BigInteger, Column, String, literal_column, text

from retrykit.sql.migrations import steps

revision = "rk_0002"
down_revision = "rk_0001"
branch_labels = None
depends_on = None

_RANDOM: Final = {
    "sqlite": "random() & 9223372036854775807",
    "postgresql": "('x' || md5(gen_random_uuid()::text))::bit(64)::bigint & 9223372036854775807",
    "mariadb": "CAST(CONV(HEX(RANDOM_BYTES(8)), 16, 10) AS UNSIGNED) & 9223372036854775807",
}
_BEFORE: Final = "version, or contexts: how many histories there are (SQLite)"
_AFTER: Final = "version; identity: a random number; contexts: how many histories there are (SQLite)"


def upgrade() -> None:
    """Add columns, fill them, change the indexes; steps are skipped that were done before an interruption."""
    if steps.present(2):
        return
    for column in _columns():
        if not steps.has_column("rk_context", column.name):
            op.add_column("rk_context", column)
    minute = "CAST(updated_at / 60 AS INTEGER)" if steps.on("sqlite") else "FLOOR(updated_at / 60)"
    op.execute(f"UPDATE rk_context SET updated_minute = {minute}")  # noqa: S608 - one of the two above
    _replace_index("updated_at", "histories", ["completed_at", "updated_minute", "id"])
    if steps.on("postgresql"):
        op.execute("ALTER TABLE rk_context SET (fillfactor = 70)")
    _say_what_rows_there_are(_BEFORE, _AFTER)
    steps.set_row("identity", literal_column(_random(), BigInteger))
    steps.set_row("version", 2)


def downgrade() -> None:
    """Back to version 1, which keeps every history: what is dropped is made anew by an upgrade."""
    if steps.absent(2):
        return
    _replace_index("histories", "updated_at", ["updated_at"])
    for name in ("updated_minute", "token"):
        if steps.has_column("rk_context", name, written=True):
            op.drop_column("rk_context", name)
    if steps.on("postgresql"):
        op.execute("ALTER TABLE rk_context RESET (fillfactor)")
    _say_what_rows_there_are(_AFTER, _BEFORE)
    steps.remove_row("identity")
    steps.set_row("version", 1)


def _columns() -> list[Column[int]]:
    saved = "random, of the last save: tells its writer, whose connection was lost, that it was done"
    minute = "updated_at in whole minutes: seldom changes with it, so it can be indexed"
    return [
        Column("token", BigInteger, nullable=False, server_default=text("0"), comment=saved),
        Column("updated_minute", BigInteger, nullable=False, server_default=text("0"), comment=minute),
    ]


def _replace_index(old: str, new: str, columns: list[str]) -> None:
    op.drop_index(f"ix_rk_context_{old}", "rk_context", if_exists=True)
    histories = text("completed_at IS NULL")
    op.create_index(
        f"ix_rk_context_{new}",
        "rk_context",
        columns,
        sqlite_where=histories,
        postgresql_where=histories,
        if_not_exists=True,
    )


def _say_what_rows_there_are(old: str, new: str) -> None:
    if steps.on("sqlite"):
        return  # has no comments
    op.alter_column(
        "rk_schema", "name", comment=new, existing_comment=old, existing_type=String(50), existing_nullable=False
    )


def _random() -> str:
    return next(expression for dialect, expression in _RANDOM.items() if steps.on(dialect))
