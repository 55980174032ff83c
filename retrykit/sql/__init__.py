"""Histories and parked items in a SQL database, in the work's own transaction where they share one."""

from __future__ import annotations

try:
    import sqlalchemy as _sqlalchemy  # noqa: F401 - asked for first, so that its absence gives one clear error
except ModuleNotFoundError as error:
    if error.name != "sqlalchemy":
        raise
    msg = 'retrykit.sql keeps histories in a SQL database and needs SQLAlchemy: pip install "retrykit[sql]"'
    raise ModuleNotFoundError(msg, name="sqlalchemy") from error

from retrykit.sql.async_jobs import AsyncSqlJobStore
from retrykit.sql.asynchronous import AsyncJoinedContextCache, AsyncSqlRetryContextCache
from retrykit.sql.cache import JoinedContextCache, SqlRetryContextCache
from retrykit.sql.jobs import SqlJobStore
from retrykit.sql.migrations import migrations_path
from retrykit.sql.parked import (
    ParkedItem,
    park_in,
    park_in_transaction,
    parked_ids,
    parked_item,
    parked_items,
    remove_parked_in,
)
from retrykit.sql.schema import check_version, create_tables
from retrykit.sql.sqlite import async_sqlite_engine, sqlite_engine
from retrykit.sql.stored_jobs import Job, restart_job, stop_job, stored_job, stored_jobs
from retrykit.sql.tables import SCHEMA_VERSION, metadata, rk_context, rk_job, rk_parked, rk_schema
from retrykit.sql.tabular import SqlCursorReader, SqlWriter

__all__ = [
    "SCHEMA_VERSION",
    "AsyncJoinedContextCache",
    "AsyncSqlJobStore",
    "AsyncSqlRetryContextCache",
    "Job",
    "JoinedContextCache",
    "ParkedItem",
    "SqlCursorReader",
    "SqlJobStore",
    "SqlRetryContextCache",
    "SqlWriter",
    "async_sqlite_engine",
    "check_version",
    "create_tables",
    "metadata",
    "migrations_path",
    "park_in",
    "park_in_transaction",
    "parked_ids",
    "parked_item",
    "parked_items",
    "remove_parked_in",
    "restart_job",
    "rk_context",
    "rk_job",
    "rk_parked",
    "rk_schema",
    "sqlite_engine",
    "stop_job",
    "stored_job",
    "stored_jobs",
]
