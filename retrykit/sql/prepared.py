"""Statements whose text is made once, for the tables by their own names (`names_fault`).

SQLAlchemy finds the text of a statement by the statement's structure, each time it is executed: that is half of what
executing one costs here. The statements of this package are few and never change, so they keep their texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, CursorResult, Dialect, Executable

Parameters = Mapping[str, Any]


class Prepared:
    """A statement of SQLAlchemy Core."""

    __slots__ = ("_texts", "statement")

    def __init__(self, statement: Executable) -> None:
        self.statement = statement
        self._texts: WeakKeyDictionary[Dialect, tuple[str, Callable[[Parameters], Any]]] = WeakKeyDictionary()

    def on(self, connection: Connection, parameters: Parameters) -> CursorResult[Any]:
        """Execute it."""
        made = self._texts.get(connection.dialect) or self._make(connection.dialect)
        return connection.exec_driver_sql(made[0], made[1](parameters))

    def _make(self, dialect: Dialect) -> tuple[str, Callable[[Parameters], Any]]:
        compiled: Any = self.statement.compile(dialect=dialect)  # type: ignore[attr-defined]
        made = self._texts[dialect] = (str(compiled), _giver(compiled))
        return made


def _giver(compiled: Any) -> Callable[[Parameters], Any]:
    """What takes from the parameters those that the driver wants, as it wants them."""
    fixed = {name: bind.value for name, bind in compiled.binds.items() if not bind.required}
    if not compiled.positional:
        return lambda parameters: {**fixed, **parameters}
    names = tuple(compiled.positiontup)
    if fixed or len(names) < 2:  # noqa: PLR2004 - itemgetter gives tuples from two on
        return lambda parameters: tuple(parameters[name] if name in parameters else fixed[name] for name in names)
    return itemgetter(*names)
