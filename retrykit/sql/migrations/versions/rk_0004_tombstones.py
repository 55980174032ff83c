"""Tombstones: what is left of histories that a bound has dropped.

Processes of the version before go on with these tables until they are replaced: what they read there is a history.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import Column, Double, text

from retrykit.sql.migrations import steps

revision = "rk_0004"
down_revision = "rk_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add a column and its index."""
    if steps.present(4):
        return
    if not steps.has_column("rk_context", "evicted_at"):
        comment = "not null: a tombstone, what is left of a history"
        op.add_column("rk_context", Column("evicted_at", Double, comment=comment))
    there = text("evicted_at IS NOT NULL")
    op.create_index(
        "ix_rk_context_evicted_at",
        "rk_context",
        ["evicted_at", "completed_at", "id"],
        sqlite_where=there,
        postgresql_where=there,
        if_not_exists=True,
    )
    steps.set_row("version", 4)


def downgrade() -> None:
    """Back to version 3, to which a tombstone would be a completion mark: they go."""
    if steps.absent(4):
        return
    if steps.has_column("rk_context", "evicted_at", written=True):
        op.execute("DELETE FROM rk_context WHERE evicted_at IS NOT NULL AND completed_at = evicted_at")
        op.drop_index("ix_rk_context_evicted_at", "rk_context", if_exists=True)
        op.drop_column("rk_context", "evicted_at")
    steps.set_row("version", 3)
