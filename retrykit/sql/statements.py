"""The statements on `rk_context`, built once for each kind of database.

Every save is one statement whose WHERE holds the expected version, and the row count tells who lost. Whatever drops
many rows takes those that nobody has locked: it never waits for somebody's work, nor deadlocks with another process
that drops too. (SQLAlchemy leaves FOR UPDATE out on SQLite, which has one writer at a time anyway.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import attrs
from sqlalchemy import (
    ColumnElement,
    Delete,
    Double,
    Executable,
    Integer,
    Select,
    String,
    Update,
    bindparam,
    case,
    delete,
    exists,
    func,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects import sqlite

from retrykit.sql.dialects import AN_OBJECT, Database
from retrykit.sql.prepared import Prepared
from retrykit.sql.tables import rk_context, rk_schema
from retrykit.tombstone import CLOSING, CUT, SEAM

_c = rk_context.c

SAVED: Final = tuple(column.name for column in _c if column.name not in ("id", "context_key"))
NEW: Final = ("context_key", *SAVED)


def _given(name: str) -> Any:
    return bindparam(name, type_=_c[name].type)


_is_key = _c.context_key == bindparam("the_key")
_is_version = (_is_key, _c.id == bindparam("the_id"), _c.revision == bindparam("the_revision"))
_expired = (
    select(_c.id)
    .where(_c.expires_at <= bindparam("now"))
    .order_by(_c.expires_at)
    .limit(bindparam("chunk", type_=Integer))
    .with_for_update(skip_locked=True)
)
_is_history = _c.completed_at.is_(None)
# A process of schema version 3 that makes a history or a completion mark of a tombstone leaves its `evicted_at`.
_is_tombstone = (_c.evicted_at.is_not(None), _c.completed_at == _c.evicted_at)
_other = rk_context.alias("other")
_all_vetoed = ~exists(select(_other.c.id).where(_other.c.completed_at.is_(None), _other.c.veto.is_(None)))


def _of(chosen: Any, condition: ColumnElement[bool]) -> Select[Any]:
    """Those of some rows: each statement looks at the same ones, however many of the other kind there are."""
    return select(chosen.c.id).where(condition)


def _oldest(condition: Any) -> Select[Any]:
    return (
        select(_c.id)
        .where(_c.completed_at.is_(None), condition)
        .order_by(_c.completed_at, _c.updated_minute, _c.id)
        .limit(bindparam("surplus", type_=Integer))
        .with_for_update(skip_locked=True, of=rk_context)
    )


# What is looked through for the open keys of one name: the histories and tombstones of all names, as far as there are
# not too many.
_open_histories = (
    select(_c.context_key)
    .where(_is_history)
    .order_by(_c.completed_at, _c.updated_minute, _c.id)
    .limit(bindparam("most", type_=Integer))
    .subquery()
)
_open_tombstones = select(_c.context_key).where(*_is_tombstone).limit(bindparam("most", type_=Integer)).subquery()
_open = union_all(select(_open_histories.c.context_key), select(_open_tombstones.c.context_key)).subquery()
_page = (
    select(_c.context_key, _c.id, _c.revision, _c.snapshot)
    .order_by(_c.context_key)
    .limit(bindparam("page", type_=Integer))
)
_living = _page.where(or_(_c.evicted_at.is_(None), _is_history, _c.completed_at != _c.evicted_at))
_evicted = _page.where(*_is_tombstone)
_counter = select(func.coalesce(func.max(rk_schema.c.value), 0)).where(rk_schema.c.name == "contexts").scalar_subquery()

# SQLite's triggers keep the counter: asking for it is one look at one row, inside the INSERT itself.
INSERT_IF_ROOM: Final = Prepared(
    sqlite.insert(rk_context)
    .from_select(NEW, select(*map(_given, NEW)).where(_counter < bindparam("capacity", type_=Integer)))
    .on_conflict_do_nothing(index_elements=[_c.context_key])
    .returning(_c.id, _c.token)
)
COUNTER: Final = Prepared(select(_counter))

_update = update(rk_context).where(*_is_version).values({name: _given(name) for name in SAVED})
UPDATE: Final = Prepared(_update)
UPDATE_IF_ROOM: Final = Prepared(_update.where(_counter < bindparam("capacity", type_=Integer)))
REMOVE: Final = Prepared(delete(rk_context).where(_is_key))
REMOVE_VERSION: Final = Prepared(delete(rk_context).where(*_is_version))
HISTORIES: Final = Prepared(select(func.count()).select_from(rk_context).where(_is_history))
TOMBSTONES: Final = Prepared(select(func.count()).select_from(rk_context).where(*_is_tombstone))
_saver = select(_c.id, _c.revision, _c.token).where(_is_key)
OPEN: Final = Prepared(select(func.count()).select_from(_open))
OPEN_KEYS: Final = Prepared(
    select(_open.c.context_key)
    .where(func.substr(_open.c.context_key, 1, bindparam("length", type_=Integer)) == bindparam("prefix", type_=String))
    .limit(bindparam("most_keys", type_=Integer))
)
_from, _behind = _c.context_key >= bindparam("start"), _c.context_key > bindparam("start")
FIRST_PAGE: Final = Prepared(_living.where(_from))
NEXT_PAGE: Final = Prepared(_living.where(_behind))
FIRST_EVICTED: Final = Prepared(_evicted.where(_from))
NEXT_EVICTED: Final = Prepared(_evicted.where(_behind))

# All keys are one parameter: so the statement is the same for any number of them.
_VETOED: Final = (
    "SELECT rk_context.id, rk_context.revision, rk_context.context_key, rk_context.snapshot FROM {} "
    "WHERE rk_context.veto IS NOT NULL"
)


@attrs.frozen(kw_only=True, eq=False)
class Statements:
    """Those that differ between the databases."""

    load: Prepared
    load_joined: Prepared
    saver: Prepared
    vetoed: Prepared
    insert: Prepared
    expire: Prepared
    expire_joined: Prepared
    # What deletes the oldest histories and returns their keys; or, where no statement can do both, what returns their
    # rows, and what deletes one of them. A veto that is forgotten lets happen what somebody has forbidden: it goes when
    # there is nothing else.
    oldest: Prepared
    oldest_vetoed: Prepared
    evict: Prepared | None = None
    # The same where tombstones are left: what deletes all but histories, what makes tombstones of these, and what
    # deletes the oldest tombstones.
    sweep: Prepared
    sweep_joined: Prepared
    bury_expired: Prepared
    bury_expired_joined: Prepared
    bury_oldest: Prepared | None = None
    bury_oldest_vetoed: Prepared | None = None
    bury: Prepared | None = None
    trim: Prepared


@cache
def statements_of(database: Database) -> Statements:
    """The statements for one kind of database."""
    clock = () if database.clock is None else (database.clock.label("now"),)
    load = select(_c.id, _c.revision, _c.snapshot, *clock).where(_is_key)
    insert = database.insert_or_nothing({name: _given(name) for name in NEW})
    reading_now = (load.with_for_update(), _saver.with_for_update()) if database.reads_the_past else (load, _saver)
    return Statements(
        load=Prepared(load),
        load_joined=Prepared(reading_now[0]),
        saver=Prepared(reading_now[1]),
        vetoed=Prepared(text(_VETOED.format(database.among))),
        insert=Prepared(insert.returning(_c.id, _c.token, *clock)),
        **{name: Prepared(statement) for name, statement in _dropping(database).items()},
    )


def _dropping(database: Database) -> Mapping[str, Executable]:
    if database.is_chosen is None:
        return database.texts
    undisturbed = _expired if database.undisturbed is None else _expired.where(database.undisturbed)
    past, past_undisturbed = (query.add_columns(_c.completed_at).subquery() for query in (_expired, undisturbed))
    oldest, oldest_vetoed = _oldest(_c.veto.is_(None)), _oldest(_all_vetoed)
    chosen, bury = database.is_chosen, _burying(database.finds, database.is_chosen)

    def delete_chosen(query: Select[Any]) -> Delete:
        return delete(rk_context).where(chosen(query))

    return {
        "expire": delete_chosen(_expired),
        "expire_joined": delete_chosen(undisturbed),
        "oldest": delete_chosen(oldest).returning(_c.context_key),
        "oldest_vetoed": delete_chosen(oldest_vetoed).returning(_c.context_key),
        "sweep": delete_chosen(_of(past, past.c.completed_at.is_not(None))),
        "sweep_joined": delete_chosen(_of(past_undisturbed, past_undisturbed.c.completed_at.is_not(None))),
        "bury_expired": bury(_of(past, past.c.completed_at.is_(None))),
        "bury_expired_joined": bury(_of(past_undisturbed, past_undisturbed.c.completed_at.is_(None))),
        "bury_oldest": bury(oldest).returning(_c.context_key),
        "bury_oldest_vetoed": bury(oldest_vetoed).returning(_c.context_key),
        "trim": delete_chosen(_oldest_tombstones),
    }


_oldest_tombstones = (
    select(_c.id)
    .where(*_is_tombstone)
    .order_by(_c.evicted_at, _c.completed_at, _c.id)
    .limit(bindparam("surplus", type_=Integer))
    .with_for_update(skip_locked=True)
)


def _burying(finds: str, is_chosen: Callable[[Select[Any]], ColumnElement[bool]]) -> Callable[[Select[Any]], Update]:
    """What makes tombstones of the histories that a query chooses.

    Nobody reads their snapshots for that: each is cut where its writer has prepared it (`retrykit.tombstone`). What is
    no object with something in it stays as it is, which nobody can read either.
    """
    found, seam = (getattr(func, finds)(_c.snapshot, mark) for mark in (CUT, SEAM))
    epitaph = bindparam("epitaph", type_=String)
    buried = case(
        (_c.snapshot == "{}", "{" + func.substr(epitaph, 2)),
        (~_c.snapshot.like(AN_OBJECT), _c.snapshot),
        (found > 0, func.substr(_c.snapshot, 1, found - 1) + CLOSING[:-1] + epitaph),
        (seam > 0, func.substr(_c.snapshot, 1, seam - 1) + epitaph),
        else_=func.substr(_c.snapshot, 1, func.length(_c.snapshot) - 1) + epitaph,
    )
    values = {
        "snapshot": buried,
        "revision": _c.revision.bitwise_or(3),
        "completed_at": bindparam("buried_at", type_=Double),
        "evicted_at": bindparam("buried_at", type_=Double),
        "expires_at": bindparam("buried_until", type_=Double),
    }

    def bury(chosen: Select[Any]) -> Update:
        return update(rk_context).where(is_chosen(chosen)).values(values)

    return bury
