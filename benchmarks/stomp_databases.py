"""The consumers of `stomp.py` that write to a database: a loop by hand, with the statements that retrykit makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import attrs
from sqlalchemy import bindparam, insert, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import sessionmaker
from stomp_raw import consuming, same_as_ours
from stomp_work import Contender, Course, Seat
from stores_sql import SqlStore, work
from stores_sql_floor import Statements

from retrykit import RetryState, RetryTemplate
from retrykit.cache import canonical_key
from retrykit.sql import rk_context

NAME = "orders"
WEEK = 7 * 86_400
INSERT_WORK = insert(work).values(done=1)
MARKS = {False: "", True: ", completion marks"}

Values = dict[str, Any]
_tokens = count(2**61)


def by_hand(store: SqlStore, *, marks: bool) -> str:
    return f"{store.title} by hand{MARKS[marks]}"


@attrs.frozen
class Place:
    """A database with the tables, and how the work's transaction is begun there."""

    store: SqlStore
    engine: Any
    url: str

    @classmethod
    def new(cls, store: SqlStore) -> Place:
        url = store.place()
        return cls(store, store.engine(url), url)

    @property
    def begin(self) -> Callable[[], Any]:
        return sessionmaker(self.engine).begin


class ByHand:
    """What retrykit does in the database, written down: where it has to look a message up, it stores a journal first.

    Whatever it stores was made beforehand.
    """

    def __init__(self, place: Place, *, marks: bool, looks_up: bool) -> None:
        self.journal, self.completed = _recorded(place)
        self.begin = place.begin
        self.alone = place.store.autocommitting(place.url).connect
        self.statements = Statements(place.engine.dialect.name)
        self.mark = _mark(self.statements, place.engine.dialect.name)
        self.marks, self.looks_up = marks, looks_up

    def __call__(self, key: str, handle: Callable[[], None]) -> None:
        journal = self._journal(key) if self.looks_up else None
        with self.begin() as session:
            session.execute(INSERT_WORK)
            handle()
            self._settle(session, key, journal)

    def _journal(self, key: str) -> int:
        with self.alone() as connection:
            assert connection.execute(self.statements.load, {"the_key": key}).one_or_none() is None
        with self.alone() as connection:
            return connection.execute(self.statements.insert, _new(key, self.journal)).one().id

    def _settle(self, session: Any, key: str, journal: int | None) -> None:
        which = {"the_key": key, "the_id": journal, "it_was": self.journal["revision"]}
        if journal is None and self.marks:
            session.execute(self.mark, _new(key, self.completed)).one()
        elif self.marks:
            session.execute(self.statements.update, {**self.completed, **which, "token": next(_tokens)})
        elif journal is not None:
            session.execute(self.statements.delete, which)


def _new(key: str, row: Values) -> Values:
    return {**row, "context_key": key, "token": next(_tokens)}


def _mark(statements: Statements, dialect: str) -> Any:
    """On SQLite a mark needs no room: whether there is any is asked for histories only."""
    if dialect != "sqlite":
        return statements.insert
    values = {column.name: bindparam(column.name, type_=column.type) for column in rk_context.c if column.name != "id"}
    key = [rk_context.c.context_key]
    new = sqlite.insert(rk_context).values(values).on_conflict_do_nothing(index_elements=key)
    return new.returning(rk_context.c.id, rk_context.c.token)


def _recorded(place: Place) -> tuple[Values, Values]:
    """The rows that retrykit stores of a message: while its attempt runs, and when it is completed."""
    cache = place.store.cache(place.url)
    template = RetryTemplate(name=NAME, context_cache=cache, remember_completed=WEEK)
    key, rows = ("/queue/bench.0.0", "model"), []

    def read() -> None:
        its = rk_context.c.context_key == canonical_key(NAME, key)
        with place.engine.connect() as connection:
            row = connection.execute(select(rk_context).where(its)).mappings().one()
            rows.append({name: value for name, value in row.items() if name not in ("id", "context_key")})

    template.execute(lambda _: read(), state=RetryState(key=key))
    read()
    template.forget(key)
    journal, completed = rows
    return journal, completed


@contextmanager
def _consuming(seat: Seat, course: Course, *, store: SqlStore, marks: bool) -> Iterator[None]:
    database = ByHand(Place.new(store), marks=marks, looks_up=seat.server.kind.looks_up)

    def handle(frame: Any) -> None:
        key = f"{NAME}({seat.destination},{frame.headers['message-id']})"
        database(key, lambda: course.handle(frame.body))

    with consuming(seat, handle, same_as_ours(seat)):
        yield


def contenders(store: SqlStore) -> list[Contender]:
    return [
        Contender(
            by_hand(store, marks=marks),
            "SQLAlchemy",
            partial(_consuming, store=store, marks=marks),
        )
        for marks in MARKS
    ]
