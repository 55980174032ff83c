"""What the version scripts have in common. The row `version` of `rk_schema` is the truth, alembic's table is not."""

from __future__ import annotations

from typing import Any

from alembic import op
from sqlalchemy import BigInteger, String, column, inspect, table
from sqlalchemy.sql.elements import ColumnElement

from retrykit.errors import ContextCacheError
from retrykit.sql.schema import read_schema

_schema = table("rk_schema", column("name", String), column("value", BigInteger))


def on(*dialects: str) -> bool:
    """Whether the database is one of these; "mariadb" is MySQL's dialect too."""
    name = op.get_context().dialect.name
    return ("mariadb" if name == "mysql" else name) in dialects


def present(version: int) -> bool:
    """Whether the tables have this version already, or a later one; False when SQL is written, for who knows where."""
    if op.get_context().as_sql:
        return False
    return read_schema(op.get_bind()).get("version", 0) >= version


def absent(version: int) -> bool:
    """Whether the tables are older already; False when SQL is written."""
    return not op.get_context().as_sql and not present(version)


def has_column(table: str, name: str, *, written: bool = False) -> bool:
    """Whether a table has a column; `written` when SQL is written."""
    if op.get_context().as_sql:
        return written
    return any(column["name"] == name for column in inspect(op.get_bind()).get_columns(table))


def refuse_to_drop(*tables: str) -> None:
    """`ContextCacheError` if there is anything in these tables."""
    if op.get_context().as_sql:
        return
    there = inspect(op.get_bind()).get_table_names()
    for name in tables:
        if name in there and op.get_bind().execute(table(name, column("id")).select().limit(1)).first() is not None:
            raise ContextCacheError(f"{name} is not empty, and its rows would be gone with it: delete them first")


def set_row(name: str, value: int | ColumnElement[int]) -> None:
    """Write a row of `rk_schema`, whether it was there or not."""
    remove_row(name)
    _execute(_schema.insert().values(name=name, value=value))


def remove_row(name: str) -> None:
    """Delete a row of `rk_schema`."""
    _execute(_schema.delete().where(_schema.c.name == name))


def _execute(statement: Any) -> None:
    op.execute(statement)
