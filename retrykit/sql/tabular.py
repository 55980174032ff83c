"""Rows of a database as the input and the output of batch jobs: `SqlCursorReader`, `SqlWriter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, Select, Table, insert
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.orm import Session

from retrykit.check import shown, wrong_type, wrong_value
from retrykit.sql.sqlite import reading
from retrykit.sql.transaction import is_asynchronous

_SYNC: Final = (Connection, Session)


class SqlCursorReader:
    """The rows of a query in the order of a key, read in pages: a position is the key of the last row.

    `select`: a `select(…)` whose rows have the column `key`, unique and not null, of a kind that JSON has (numbers,
    texts). Each page is read on a connection of its own, behind the key that was read last, and in the order of the
    key; nothing is held open between pages, so a writer may change the same table. Rows that appear behind the
    position while it is read are read too; those before it are not.

    `ValueError` for a key that is NULL, before the first row is given, and for one that comes twice, when it comes.
    """

    def __init__(self, engine: Engine, select: Select[Any], *, key: str, page: int = 1_000) -> None:
        if not isinstance(engine, Engine):
            raise wrong_type("engine", "a sqlalchemy Engine", engine)
        if not isinstance(select, Select):
            raise wrong_type("select", "a select(…)", select)
        if select._limit_clause is not None or select._offset_clause is not None or select._fetch_clause is not None:  # noqa: SLF001 - they have no other names
            raise wrong_value("select", "without LIMIT and OFFSET, which each page has its own of", str(select))
        if isinstance(page, bool) or not isinstance(page, int) or page < 1:
            raise wrong_value("page", "an int, at least 1", page)
        if not isinstance(key, str) or key not in select.selected_columns:
            raise wrong_value("key", f"one of {select.selected_columns.keys()}", key)
        self._engine = reading(engine) if engine.dialect.name == "sqlite" else engine
        self._column = select.selected_columns[key]
        self._select = select.order_by(None).order_by(self._column)
        self._key = key
        self._page = page

    def __repr__(self) -> str:
        return f"SqlCursorReader(key={self._key!r}, page={self._page})"

    def read_from(self, position: Any) -> Iterator[tuple[Any, Any]]:
        """Each row (its columns are attributes) with its key."""
        rows = self._page_behind(position, first=True)
        while True:
            for row in rows:
                before, position = position, getattr(row, self._key)
                if position is None or position == before:
                    raise self._wrong(position)
                if row is not rows[-1] or len(rows) <= self._page:
                    yield row, position
            if len(rows) <= self._page:
                return
            position = before
            rows = self._page_behind(position)

    def _page_behind(self, position: Any, *, first: bool = False) -> Sequence[Row[Any]]:
        """One row more than wanted: it shows whether the page ends between two rows with the same key."""
        query = self._select if position is None else self._select.where(self._column > position)
        with self._engine.connect() as connection:
            rows = connection.execute(query.limit(self._page + 1)).all()
            if first and (position is not None or len(rows) > self._page):
                self._refuse_nulls(connection)
        return rows

    def _refuse_nulls(self, connection: Connection) -> None:
        """No page behind a key has a row without one: some databases sort it last, and it would never be seen."""
        if connection.execute(self._select.where(self._column.is_(None)).limit(1)).first() is not None:
            raise self._wrong(None)

    def _wrong(self, position: Any) -> ValueError:
        return wrong_value(f"key {self._key!r}", "unique and not null", position)


class SqlWriter:
    """Inserts items into a table: `ChunkStep(writer=SqlWriter(orders), …)`.

    Items are mappings of column names to values. Those with the same columns are inserted by one statement; where
    neighbors have different ones another begins, so that an absent column has its default, and the order is kept. Let a
    processor choose where items have more than the table. The transaction is a Session or a Connection; of an
    AsyncSession or AsyncConnection what comes of the statement is an awaitable, for an `AsyncChunkStep`.
    """

    needs_transaction = True
    """Said to the step: without one it is refused when it is made."""

    def __init__(self, table: Table) -> None:
        if not isinstance(table, Table):
            raise wrong_type("table", "a sqlalchemy Table", table)
        self.table = table
        self._insert = insert(table)
        self._columns = frozenset(table.c.keys())

    def __repr__(self) -> str:
        return f"SqlWriter({self.table.name!r})"

    def __call__(self, transaction: Session | Connection, items: Sequence[Mapping[str, Any]]) -> Any:
        """Insert them. `TypeError` for an item that is no mapping, `ValueError` for one with a name that is no column
        of the table: then none is inserted.
        """
        if not hasattr(transaction, "execute"):
            raise wrong_type("transaction", "a Session or a Connection", transaction)
        if not isinstance(transaction, _SYNC) and is_asynchronous(transaction):
            return self._insert_later(transaction, self._runs(items))
        if _may_be_alike(items):
            self._check(items[0])
            try:
                return transaction.execute(self._insert, items)
            except StatementError as error:
                if isinstance(error, DBAPIError) or _are_alike(items):
                    raise
                # SQLAlchemy has refused an item that lacks a column of the first, before anything was sent.
        for run in self._runs(items):
            transaction.execute(self._insert, run)
        return None

    async def _insert_later(self, transaction: Any, runs: list[Sequence[Mapping[str, Any]]]) -> None:
        for run in runs:
            await transaction.execute(self._insert, run)

    def _runs(self, items: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
        """The items, parted where their columns change. One statement would take those of the first for all, and leave
        out what others have besides.
        """
        alike = _are_alike(items)
        runs: list[Sequence[Mapping[str, Any]]] = [items] if alike else [list(run) for _, run in groupby(items, _keys)]
        for run in runs:
            self._check(run[0])
        return runs

    def _check(self, item: Mapping[str, Any]) -> None:
        """A statement leaves out what it has no column for, and says nothing."""
        if self._columns.issuperset(_keys(item)):
            return
        unknown = [name for name in item.keys() if name not in self._columns]  # noqa: SIM118 - as in `_keys`
        known, table = shown(self.table.c.keys()), self.table.name
        raise wrong_value("items", f"mappings of columns of {table!r} ({known}), which has no {shown(unknown)}", item)


def _may_be_alike(items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the items have as many columns, all in all, as if each had those of the first.

    If some have others, then some lack one of the first, and SQLAlchemy refuses those by itself. That is a fraction of
    what `_are_alike` costs, and this is asked of every item that is ever written.
    """
    try:
        return sum(map(len, items)) == len(items[0]) * len(items)
    except TypeError:
        return False


def _are_alike(items: Sequence[Mapping[str, Any]]) -> bool:
    keys = _keys(items[0])
    try:
        return all(item.keys() == keys for item in items)
    except AttributeError:
        return False


def _keys(item: Mapping[str, Any]) -> Any:
    try:
        return item.keys()
    except AttributeError:
        raise wrong_type("items", "mappings of column names to values", item) from None
