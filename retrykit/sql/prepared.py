"""Statements whose text is made once, for the tables by their own names (`names_fault`), run on the driver's cursor.

SQLAlchemy finds the text of a statement by the statement's structure, and describes what comes back by the cursor's,
each time it is executed: that is two thirds of what executing one costs here. The statements of this package are few
and never change, so they keep both. The connection, its transaction and the meaning of errors stay SQLAlchemy's; and
where somebody listens to what goes to the driver (`before_cursor_execute`, an echo, a tracer) it is executed by
SQLAlchemy, to be heard. As text for the driver: `before_execute`, which is for statements of Core, hears none of them.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import attrs
from sqlalchemy import Connection, Dialect, Executable

Parameters = Mapping[str, Any]

# Not promised by SQLAlchemy: without it there is no shorter way.
_TRANSLATES: Final = hasattr(Connection, "_handle_dbapi_exception")


class Answer(NamedTuple):
    """What came of a statement: its rows, whose columns are attributes, and how many rows it changed."""

    rows: Sequence[Any]
    rowcount: int

    def first(self) -> Any:
        """The first row; None if there is none."""
        return self.rows[0] if self.rows else None


@attrs.define(eq=False)
class _Text:
    """A statement as one dialect writes it."""

    text: str
    give: Callable[[Parameters], Any]
    row: Callable[[Any], Any] | None = None


class Prepared:
    """A statement of SQLAlchemy Core."""

    __slots__ = ("_texts", "statement")

    def __init__(self, statement: Executable) -> None:
        self.statement = statement
        self._texts: WeakKeyDictionary[Dialect, _Text] = WeakKeyDictionary()

    def on(self, connection: Connection, parameters: Parameters) -> Answer:
        """Execute it."""
        made = self._texts.get(connection.dialect) or self._make(connection.dialect)
        given = made.give(parameters)
        if _unheard(connection):
            return _executed(connection, made, given)
        # The work may have its own results streamed: what changes something cannot be.
        result = connection.exec_driver_sql(made.text, given, execution_options={"stream_results": False})
        return Answer(result.all() if result.returns_rows else (), result.rowcount)

    def _make(self, dialect: Dialect) -> _Text:
        compiled: Any = self.statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        made = self._texts[dialect] = _Text(str(compiled), _giver(compiled))
        return made


def _unheard(connection: Connection) -> bool:
    """Whether a statement may go to the driver past SQLAlchemy: its transaction is in order, and nobody listens."""
    dialect = connection.dialect
    listening = connection.dispatch.before_cursor_execute or connection.dispatch.after_cursor_execute
    told = listening or dialect.dispatch.do_execute or connection._echo  # noqa: SLF001 - asked nowhere else
    if told or dialect.is_async or not _TRANSLATES:
        return False
    if not connection.in_transaction():
        if connection.get_transaction() is not None:
            return False
        connection.begin()
    return True


def _executed(connection: Connection, made: _Text, given: Any) -> Answer:
    cursor = None
    try:
        cursor = connection.connection.cursor()
        cursor.execute(made.text, given)
        rows = _rows(cursor, made)
        answer = Answer(rows, cursor.rowcount)
        cursor.close()
    except BaseException as error:  # noqa: BLE001 - raised again, as SQLAlchemy's where it is the driver's
        drivers = isinstance(error, connection.dialect.loaded_dbapi.Error)
        connection._handle_dbapi_exception(error, made.text if drivers else None, given, cursor, None)  # noqa: SLF001 - see above
    return answer


def _rows(cursor: Any, made: _Text) -> Sequence[Any]:
    if cursor.description is None:
        return ()
    if made.row is None:
        made.row = _row_of([column[0] for column in cursor.description])
    return list(map(made.row, cursor.fetchall()))


def _row_of(names: list[str]) -> Callable[[Any], Any]:
    kind: Any = namedtuple("Row", names, rename=True)  # type: ignore[misc] # noqa: PYI024 - named by the statement
    make: Callable[[Any], Any] = kind._make
    return make


def _giver(compiled: Any) -> Callable[[Parameters], Any]:
    """What takes from the parameters those that the driver wants, as it wants them."""
    fixed = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
    if not compiled.positional:
        return lambda parameters: {**fixed, **parameters}
    names = tuple(compiled.positiontup)
    if fixed or len(names) < 2:  # noqa: PLR2004 - itemgetter gives tuples from two on
        return lambda parameters: tuple(parameters[name] if name in parameters else fixed[name] for name in names)
    return itemgetter(*names)
