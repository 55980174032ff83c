"""The work of `stores.py` on SQL databases by hand: SQLAlchemy Core, and the bare driver.

The statements are those that retrykit sends, on the same table; each is a transaction of its own. What retrykit does
besides is what this has not: it counts, decides, makes the JSON, reads it, and looks whether there is place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from sqlalchemy import (
    Double,
    Engine,
    Integer,
    bindparam,
    delete,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from stores_work import Floor, Loop

from retrykit.sql import rk_context, rk_schema

CAPACITY = 100_000
Values = dict[str, Any]

_c = rk_context.c
_tokens = count(2**62)
_saved = {column.name: bindparam(column.name, type_=column.type) for column in _c if column.name != "id"}
_kept = {name: given for name, given in _saved.items() if name != "context_key"}
_is_version = (_c.context_key == bindparam("the_key"), _c.id == bindparam("the_id"), _c.revision == bindparam("it_was"))
_clocks: dict[str, Any] = {
    "postgresql": literal_column("extract(epoch FROM clock_timestamp())::float8", Double),
    "mariadb": literal_column(
        "(TIMESTAMPDIFF(MICROSECOND, TIMESTAMP'1970-01-01 00:00:00', UTC_TIMESTAMP(6)) / 1e6)", Double
    ),
}


def _new(dialect: str) -> Any:
    """INSERT, unless the key is there already; on SQLite also unless there are too many."""
    if dialect == "postgresql":
        return postgresql.insert(rk_context).values(_saved).on_conflict_do_nothing(index_elements=[_c.context_key])
    if dialect == "mariadb":
        return mysql.insert(rk_context).values(_saved).on_duplicate_key_update(id=literal_column("id"))
    histories = select(rk_schema.c.value).where(rk_schema.c.name == "contexts").scalar_subquery()
    row = select(*_saved.values()).where(histories < bindparam("capacity", CAPACITY, Integer))
    return sqlite.insert(rk_context).from_select(list(_saved), row).on_conflict_do_nothing()


class Statements:
    """The four of them for one kind of database."""

    def __init__(self, dialect: str) -> None:
        clock = [_clocks[dialect]] if dialect in _clocks else []
        self.insert = _new(dialect).returning(_c.id, _c.token, *clock)
        self.load = select(_c.id, _c.revision, _c.snapshot, *clock).where(_c.context_key == bindparam("the_key"))
        self.update = update(rk_context).where(*_is_version).values(_kept)
        self.delete = delete(rk_context).where(*_is_version)


class SqlFloor(Floor):
    """What both have in common: the values."""

    def new_values(self, key: str, row: Values) -> Values:
        return {**row, "context_key": key, "token": next(_tokens)}

    def values(self, key: str, version: Any, row: Values) -> Values:
        return {**row, **self.which(key, version), "revision": version[1] + 2, "token": next(_tokens)}

    def which(self, key: str, version: Any) -> Values:
        return {"the_key": key, "the_id": version[0], "it_was": version[1]}


class CoreFloor(SqlFloor):
    """SQLAlchemy Core: a connection from the pool for each transaction."""

    def __init__(self, engine: Engine, stored: Mapping[str, Values]) -> None:
        super().__init__(stored)
        self.connect = engine.connect
        self.statements = Statements(engine.dialect.name)

    def insert(self, key: str, row: Values) -> None:
        values = self.new_values(key, row)
        with self.connect() as connection:
            assert connection.execute(self.statements.insert, values).one().token == values["token"]

    def load(self, key: str) -> Any:
        with self.connect() as connection:
            return connection.execute(self.statements.load, {"the_key": key}).one()

    def update(self, key: str, version: Any, row: Values) -> Any:
        values = self.values(key, version, row)
        with self.connect() as connection:
            assert connection.execute(self.statements.update, values).rowcount
        return version[0], values["revision"]

    def delete(self, key: str, version: Any) -> None:
        with self.connect() as connection:
            assert connection.execute(self.statements.delete, self.which(key, version)).rowcount


class SqlLoop(Loop):
    """A loop of the statements on either."""

    def told(self, found: Any) -> str:
        return str(found[2])

    def row(self, operation: str, facts: Mapping[str, Any], now: float) -> Values:
        text = json.dumps(facts, separators=(",", ":"))
        times = {"updated_at": now, "updated_minute": int(now // 60), "last_failed_at": facts["last_failed_at"]}
        return self.floor.stored[operation] | times | {"retry_count": facts["retry_count"], "snapshot": text}


class BareFloor(SqlFloor):
    """The driver alone: one connection for each thread, the same SQL as text."""

    def __init__(self, connection: Any, engine: Engine, stored: Mapping[str, Values]) -> None:
        super().__init__(stored)
        self.cursor = connection.cursor
        self.texts = {
            name: _as_text(statement, engine) for name, statement in vars(Statements(engine.dialect.name)).items()
        }

    def insert(self, key: str, row: Values) -> None:
        values = self.new_values(key, row)
        cursor = self._sent("insert", values)
        assert cursor.fetchone()[1] == values["token"]
        cursor.close()

    def load(self, key: str) -> Any:
        cursor = self._sent("load", {"the_key": key})
        found = cursor.fetchone()
        cursor.close()
        return found

    def update(self, key: str, version: Any, row: Values) -> Any:
        values = self.values(key, version, row)
        cursor = self._sent("update", values)
        assert cursor.rowcount
        cursor.close()
        return version[0], values["revision"]

    def delete(self, key: str, version: Any) -> None:
        cursor = self._sent("delete", self.which(key, version))
        assert cursor.rowcount
        cursor.close()

    def _sent(self, name: str, values: Values) -> Any:
        statement, parameters = self.texts[name]
        cursor = self.cursor()
        cursor.execute(statement, parameters(values))
        return cursor


def _as_text(statement: Any, engine: Engine) -> tuple[str, Callable[[Values], Any]]:
    """A statement as the driver wants it, and what makes the parameters so."""
    compiled = statement.compile(dialect=engine.dialect)
    names = compiled.positiontup
    constants = {name: value for name, value in compiled.params.items() if value is not None}

    def parameters(values: Values) -> Any:
        values |= constants
        return values if names is None else [values[name] for name in names]

    return str(compiled), parameters
