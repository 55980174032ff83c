"""Run the version scripts for `retrykit.sql.migrate`, which brings the connection, or the dialect to write SQL for."""

from __future__ import annotations

from typing import Any

from alembic import context

from retrykit.sql.tables import metadata

VERSION_TABLE = "rk_alembic_version"


def _write(asked: dict[str, Any]) -> None:
    dialect = asked["dialect"]
    # MariaDB commits by itself with every change of a table.
    transactional = dialect not in ("mysql", "mariadb")
    context.configure(
        dialect_name=dialect,
        dialect_opts={"paramstyle": "named"},
        literal_binds=True,
        transactional_ddl=transactional,
        version_table=VERSION_TABLE,
    )
    with context.begin_transaction():
        for statement in asked["before"]:
            context.execute(statement)
        context.run_migrations()


def _run(asked: dict[str, Any]) -> None:
    context.configure(connection=asked["connection"], target_metadata=metadata, version_table=VERSION_TABLE)
    # The transaction, and the lock in it, are those of whoever brings the connection.
    context.run_migrations()


(_write if context.is_offline_mode() else _run)(context.config.attributes)
