"""The verbs of a context cache as statements on an open connection: who commits is somebody else's business.

A version is two numbers in one: the row's id, which the database never gives out twice, and the row's revision, which
grows with every save. So a version that was removed cannot come back with the key (the ABA problem): a new row has a
new id. Every save is one statement whose WHERE holds the expected version, and the row count tells who lost.

Capacity counts histories; completion marks have an end of their own (`expires_at`). The count is kept by triggers
(see `tables`), so asking for it is one look at one row, inside the INSERT itself.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import attrs
from sqlalchemy import Connection, Integer, bindparam, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from retrykit.cache import StoredContext
from retrykit.clock import Clock
from retrykit.errors import CacheCapacityError, CodecError
from retrykit.sql.tables import MAX_KEY, rk_context, rk_schema

logger = logging.getLogger("retrykit.sql")

OnFull = Literal["reject", "evict_oldest"]

REVISIONS: Final = 2**24
MAX_ID: Final = 2**62
PAGE: Final = 500
CHUNK: Final = 1_000
PRUNE_EVERY: Final = 1_000

_c = rk_context.c
_SAVED: Final = tuple(column.name for column in rk_context.c if column.name not in ("id", "context_key", "revision"))
_NEW: Final = ("context_key", "revision", *_SAVED)


def _given(name: str) -> Any:
    return bindparam(name, type_=_c[name].type)


_histories = (
    select(func.coalesce(func.max(rk_schema.c.value), 0)).where(rk_schema.c.name == "contexts").scalar_subquery()
)
_is_version = (
    _c.context_key == bindparam("the_key"),
    _c.id == bindparam("the_id"),
    _c.revision == bindparam("the_revision"),
)
_expired = select(_c.id).where(_c.expires_at <= bindparam("now")).order_by(_c.expires_at).limit(CHUNK)
_oldest = (
    select(_c.id)
    .where(_c.completed_at.is_(None))
    .order_by(_c.completed_at, _c.updated_minute, _c.id)
    .limit(bindparam("surplus", type_=Integer))
)

LOAD: Final = select(_c.id, _c.revision, _c.snapshot).where(_c.context_key == bindparam("the_key"))
INSERT: Final = (
    insert(rk_context)
    .values({name: _given(name) for name in _NEW})
    .on_conflict_do_nothing(index_elements=[_c.context_key])
    .returning(_c.id)
)
INSERT_IF_ROOM: Final = (
    insert(rk_context)
    .from_select(_NEW, select(*map(_given, _NEW)).where(_histories < bindparam("capacity", type_=Integer)))
    .on_conflict_do_nothing(index_elements=[_c.context_key])
    .returning(_c.id)
)
UPDATE: Final = (
    update(rk_context)
    .where(*_is_version)
    .values({"revision": _c.revision + 1} | {name: _given(name) for name in _SAVED})
)
REMOVE: Final = delete(rk_context).where(_c.context_key == bindparam("the_key"))
REMOVE_VERSION: Final = delete(rk_context).where(*_is_version)
HISTORIES: Final = select(_histories)
EXPIRE: Final = delete(rk_context).where(_c.id.in_(_expired))
EVICT: Final = delete(rk_context).where(_c.id.in_(_oldest)).returning(_c.context_key)
_PAGE_ROWS: Final = select(_c.context_key, _c.id, _c.revision, _c.snapshot).order_by(_c.context_key).limit(PAGE)
FIRST_PAGE: Final = _PAGE_ROWS.where(_c.context_key >= bindparam("start"))
NEXT_PAGE: Final = _PAGE_ROWS.where(_c.context_key > bindparam("start"))

Page = list[tuple[str, StoredContext]]


@attrs.frozen(kw_only=True)
class ContextRows:
    """The verbs, and the rules of a full store. One is shared by a cache and all that it joins."""

    capacity: int | None
    on_full: OnFull
    time_to_live: float | None
    clock: Clock
    _saves: Iterator[int] = attrs.field(factory=itertools.count, init=False, eq=False, repr=False)

    def load(self, connection: Connection, key: str) -> StoredContext | None:
        """The snapshot and its version."""
        row = connection.execute(LOAD, {"the_key": key}).first()
        return None if row is None else _stored(row)

    def save(self, connection: Connection, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """Compare and set; the new version, or None for the one who lost."""
        row = self._row(key, snapshot)
        version = self._insert(connection, row) if expected is None else self._update(connection, row, expected)
        if next(self._saves) % PRUNE_EVERY == PRUNE_EVERY - 1:
            self._drop_expired(connection, self.clock.time())
        return version

    def remove(self, connection: Connection, key: str, expected: int | None) -> bool:
        """Whether there was something, of that version, to remove."""
        if expected is None:
            return connection.execute(REMOVE, {"the_key": key}).rowcount > 0
        which = _which(key, expected)
        return which is not None and connection.execute(REMOVE_VERSION, which).rowcount > 0

    def page(self, connection: Connection, prefix: str, after: str | None) -> Page:
        """The next snapshots by key, at most `PAGE`; fewer means that these were the last."""
        statement, start = (FIRST_PAGE, prefix) if after is None else (NEXT_PAGE, after)
        rows = connection.execute(statement, {"start": start}).all()
        # Keys are ordered by code point, so those with the prefix stand together.
        wanted = itertools.takewhile(lambda row: row.context_key.startswith(prefix), rows)
        return [(row.context_key, _stored(row)) for row in wanted]

    def expire(self, connection: Connection, now: float) -> int:
        """Drop at most `CHUNK` snapshots whose time is over; how many."""
        return self._drop_expired(connection, now)

    def _insert(self, connection: Connection, row: dict[str, Any]) -> int | None:
        found = self._try_insert(connection, row)
        if found is None and self._bounded(row) and self._is_new(connection, row) and self._make_room(connection):
            found = self._try_insert(connection, row)
        if found is None and self._bounded(row) and self._is_new(connection, row):
            raise CacheCapacityError(capacity=self.capacity, key=row["context_key"])
        return found

    def _try_insert(self, connection: Connection, row: dict[str, Any]) -> int | None:
        if self._bounded(row):
            made = connection.execute(INSERT_IF_ROOM, {**row, "capacity": self.capacity}).first()
        else:
            made = connection.execute(INSERT, row).first()
        return None if made is None else int(made.id) * REVISIONS

    def _bounded(self, row: Mapping[str, Any]) -> bool:
        return self.capacity is not None and row["completed_at"] is None

    def _is_new(self, connection: Connection, row: Mapping[str, Any]) -> bool:
        return connection.execute(LOAD, {"the_key": row["context_key"]}).first() is None

    def _make_room(self, connection: Connection) -> bool:
        """What is past its time goes first; then, if that is the rule, the oldest histories."""
        dropped = self._drop_expired(connection, self.clock.time())
        if self.on_full == "evict_oldest" and self.capacity is not None:
            surplus = (connection.scalar(HISTORIES) or 0) - self.capacity + 1
            dropped += self._evict(connection, surplus) if surplus > 0 else 0
        return dropped > 0

    def _evict(self, connection: Connection, surplus: int) -> int:
        keys = connection.scalars(EVICT, {"surplus": surplus}).all()
        for key in keys:
            logger.warning("the context cache is full (%s histories): evicted the oldest, %r", self.capacity, key)
        return len(keys)

    def _drop_expired(self, connection: Connection, now: float) -> int:
        return connection.execute(EXPIRE, {"now": now}).rowcount

    def _update(self, connection: Connection, row: dict[str, Any], expected: int) -> int | None:
        which = _which(row["context_key"], expected)
        if which is None:
            return None
        if which["the_revision"] == REVISIONS - 1:
            return self._begin_anew(connection, row, which)
        changed = connection.execute(UPDATE, {**row, **which}).rowcount
        return expected + 1 if changed else None

    def _begin_anew(self, connection: Connection, row: dict[str, Any], which: dict[str, Any]) -> int | None:
        """The row has used up its revisions: it gets a new id."""
        if not connection.execute(REMOVE_VERSION, which).rowcount:
            return None
        made = connection.execute(INSERT, row).one()
        return int(made.id) * REVISIONS

    def _row(self, key: str, snapshot: Mapping[str, Any]) -> dict[str, Any]:
        now = self.clock.time()
        return {
            "context_key": _checked(key),
            "revision": 0,
            "token": secrets.randbits(63),
            "name": _text(snapshot.get("name"), 255),
            "retry_count": _count(snapshot.get("retry_count")),
            "last_failed_at": _number(snapshot.get("last_failed_at")),
            "not_before": _number(snapshot.get("not_before")),
            "veto": _text(snapshot.get("veto"), 2_000),
            "exhausted": snapshot.get("exhausted") is True,
            "completed_at": _number(snapshot.get("completed_at")),
            "expires_at": self._until(snapshot, now),
            "updated_at": now,
            "updated_minute": int(now // 60),
            "snapshot": _encoded(key, snapshot),
        }

    def _until(self, snapshot: Mapping[str, Any], now: float) -> float | None:
        """When it may be dropped: as it says itself, else so long after it was last touched (by their clock)."""
        until = _number(snapshot.get("expires_at"))
        if until is not None or self.time_to_live is None:
            return until
        touched = _number(snapshot.get("last_failed_at")) or _number(snapshot.get("started_at"))
        return (now if touched is None else touched) + self.time_to_live


def _which(key: str, version: int) -> dict[str, Any] | None:
    """The parameters of a version; None for a number that can be no version."""
    row_id, revision = divmod(version, REVISIONS)
    return {"the_key": key, "the_id": row_id, "the_revision": revision} if 0 < row_id < MAX_ID else None


def _stored(row: Any) -> StoredContext:
    return StoredContext(_decoded(row.snapshot), row.id * REVISIONS + row.revision)


def _encoded(key: str, snapshot: Mapping[str, Any]) -> str:
    try:
        # Escapes keep what databases refuse in text (lone surrogates, NUL) out of it.
        return json.dumps(snapshot, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"the snapshot of {key!r} cannot be kept as JSON: {error}"
        raise CodecError(msg, reason=str(error), key=key) from error


def _decoded(text: str) -> dict[str, Any]:
    try:
        snapshot = json.loads(text)
    except ValueError as error:
        raise CodecError(reason=f"the stored snapshot is no JSON: {error}") from error
    if not isinstance(snapshot, dict):
        raise CodecError(reason=f"the stored snapshot is no JSON object but {type(snapshot).__name__}")
    return snapshot


def _checked(key: str) -> str:
    if len(key) > MAX_KEY:
        raise ValueError(f"key: must have at most {MAX_KEY} characters, not {len(key)}: {key[:40]!r}…")
    return key


# The columns beside the snapshot are for people; a snapshot of another shape is kept all the same.


def _text(value: object, length: int) -> str | None:
    return value.encode("utf-8", "replace").decode()[:length].replace("\0", "?") if isinstance(value, str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**31 else None
