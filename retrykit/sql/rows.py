"""The verbs of a context cache as statements on an open connection: who commits is somebody else's business.

A version is two numbers in one: the row's id, which the database never gives out twice, and the row's revision, which
grows with every save. So a version that was removed cannot come back with the key (the ABA problem): a new row has a
new id. Revisions of histories are even, those of completion marks (and circuits) odd, those of tombstones odd and 3
more than a multiple of 4: a version alone tells what a row was, and so whether its end or its change makes room for a
history, or needs some. (Completion marks of schema version 3 may look like tombstones: then they need some too.)

Whoever lost the connection while saving does not know whether it was done. So a save may be done again: the second time
it loses against the first, and the row's token, random and the same in both, tells that the winner was itself.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import time
from collections.abc import Collection, Mapping
from typing import Any, Final

import attrs
from sqlalchemy import Connection

from retrykit.cache import StoredContext
from retrykit.clock import Clock, StoreClock
from retrykit.errors import CacheCapacityError, CodecError
from retrykit.sql.capacity import room_of
from retrykit.sql.dialects import Database
from retrykit.sql.dropping import Dropping, Row
from retrykit.sql.statements import (
    FIRST_EVICTED,
    FIRST_PAGE,
    NEXT_EVICTED,
    NEXT_PAGE,
    OPEN,
    OPEN_KEYS,
    REMOVE,
    REMOVE_VERSION,
    UPDATE,
    statements_of,
)
from retrykit.sql.tables import MAX_KEY
from retrykit.tombstone import cuttable

logger = logging.getLogger("retrykit.sql")

_encode: Final = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode
_decode: Final = json.JSONDecoder().raw_decode

REVISIONS: Final = 2**24
MAX_ID: Final = 2**62
PAGE: Final = 500
LOOKED_THROUGH: Final = 10_000
CIRCUIT: Final = 0.0
MARK: Final = 1
TOMBSTONE: Final = 3
"""What revisions of them leave, divided by 4."""
MANY: Final = 100_000
"""So many tombstones are kept where there is no other bound."""

Page = list[tuple[str, StoredContext]]


@attrs.frozen(kw_only=True, eq=False)
class ContextRows(Dropping):
    """The verbs, and the rules of a full store. `within`: as they are in somebody's transaction."""

    def in_a_transaction(self) -> ContextRows:
        """The same verbs, with the same account of what is there, as they are in somebody's transaction."""
        return attrs.evolve(self, within=True)

    # -- what is asked

    def load(self, connection: Connection, key: str) -> StoredContext | None:
        """The snapshot and its version."""
        sent = time.monotonic()
        statement = self.sql.load_joined if self.within else self.sql.load
        row = statement.on(connection, {"the_key": key}).first()
        if row is None:
            return None
        self._observe(sent, row)
        return _stored(row)

    def page(self, connection: Connection, prefix: str, after: str | None, *, evicted: bool = False) -> Page:
        """The next snapshots, or tombstones, by key, at most `PAGE`; fewer means that these were the last."""
        first, following = (FIRST_EVICTED, NEXT_EVICTED) if evicted else (FIRST_PAGE, NEXT_PAGE)
        statement, start = (first, prefix) if after is None else (following, max(after, prefix))
        rows = statement.on(connection, {"start": start, "page": PAGE}).rows
        # Keys are ordered by code point, so those with the prefix stand together.
        wanted = itertools.takewhile(lambda row: row.context_key.startswith(prefix), rows)
        return [(row.context_key, _stored(row)) for row in wanted]

    def open_keys(self, connection: Connection, prefix: str, limit: int) -> list[str] | None:
        """The keys of histories and tombstones that begin with the prefix.

        None if there are too many, or too many to look through.
        """
        most = max(10 * limit, LOOKED_THROUGH)
        if OPEN.on(connection, {"most": most + 1}).first()[0] > most:
            return None
        given = {"prefix": prefix, "length": len(prefix), "most": most, "most_keys": limit + 1}
        keys = [row.context_key for row in OPEN_KEYS.on(connection, given).rows]
        return keys if len(keys) <= limit else None

    def vetoed(self, connection: Connection, keys: Collection[str]) -> dict[str, StoredContext]:
        """Those of the keys that have a veto, as far as they can be read."""
        rows = self.sql.vetoed.on(connection, {"the_keys": json.dumps([*dict.fromkeys(keys)])}).rows
        found = {}
        for row in rows:
            try:
                found[row.context_key] = _stored(row)
            except CodecError as error:
                logger.warning("the veto of %r cannot be read, and forbids nothing: %s", row.context_key, error)
        return found

    def _observe(self, sent: float, row: Any) -> None:
        if self.store_clock is not None:
            self.store_clock.observe(sent, row.now, time.monotonic())

    # -- what is saved

    def row(self, key: str, snapshot: Mapping[str, Any]) -> Row:
        """A snapshot as a row of the table; `CodecError` if it can be none."""
        now = self.now()
        # The state of a circuit takes no place from histories either.
        completed_at = CIRCUIT if "breaker" in snapshot else _number(snapshot.get("completed_at"))
        return {
            "context_key": checked(key),
            "revision": 0 if completed_at is None else MARK,
            "token": secrets.randbits(63),
            "name": _text(snapshot.get("name"), 255),
            "retry_count": _count(snapshot.get("retry_count")),
            "last_failed_at": _number(snapshot.get("last_failed_at")),
            "not_before": _number(snapshot.get("not_before")),
            "veto": _text(snapshot.get("veto"), 2_000),
            "exhausted": snapshot.get("exhausted") is True,
            "completed_at": completed_at,
            "expires_at": self._until(snapshot, now),
            "updated_at": now,
            "updated_minute": int(now // 60),
            "snapshot": _encoded(key, snapshot, cut=self.forgets and self.tombstones > 0),
            "evicted_at": None,
        }

    def save(self, connection: Connection, row: Row, expected: int | None, *, again: bool = False) -> int | None:
        """Compare and set; the new version, or None for the one who lost. `again`: it may have been done before."""
        version = self._insert(connection, row) if expected is None else self._update(connection, row, expected)
        if again:
            # What the first try took or freed is in no account.
            self.room.lost_sight()
            version = self._own(connection, row, expected) if version is None else version
        self._prune(connection)
        return version

    def _own(self, connection: Connection, row: Row, expected: int | None) -> int | None:
        """The version that is there, if it is of this very save."""
        found = self.sql.saver.on(connection, {"the_key": row["context_key"]}).first()
        if found is None or found.token != row["token"]:
            return None
        if expected is None and row["completed_at"] is None:
            self.room.taken()
        return int(found.id * REVISIONS + found.revision)

    def _insert(self, connection: Connection, row: Row) -> int | None:
        bounded = self.capacity is not None and row["completed_at"] is None
        made = self._put(connection, row, bounded=bounded)
        while made is None and bounded and self._is_new(connection, row):
            if not self._make_room(connection):
                raise CacheCapacityError(capacity=self.capacity, key=row["context_key"])
            # Somebody else may take the room first: then more has to go.
            made = self._put(connection, row, bounded=True)
        return None if made is None else int(made.id) * REVISIONS + row["revision"]

    def _put(self, connection: Connection, row: Row, *, bounded: bool) -> Any:
        """Insert. The row that came of it, if it did, and is this one."""
        sent = time.monotonic()
        if bounded:
            made = self.room.insert(connection, self.sql.insert, row)
        else:
            made = self.sql.insert.on(connection, row).first()
        if made is None or made.token != row["token"]:
            return None
        if not bounded:
            self._observe(sent, made)
        return made

    def _is_new(self, connection: Connection, row: Row) -> bool:
        return self.sql.saver.on(connection, {"the_key": row["context_key"]}).first() is None

    def _update(self, connection: Connection, row: Row, expected: int) -> int | None:
        which = _which(row["context_key"], expected)
        if which is None:
            return None
        parity = row["revision"] & 1
        version = _next(expected, mark=parity == 1)
        values = {**row, **which, "revision": version % REVISIONS}
        if is_used_up(expected):
            made = self._begin_anew(connection, row, which)
        elif parity == 0 and expected & 3 == TOMBSTONE and self.capacity is not None:
            return version if self._revive(connection, values) else None
        else:
            made = version if UPDATE.on(connection, values).rowcount else None
        if made is not None and expected & 1 != parity:
            self._changed(freed=parity == 1)
        return made

    def _revive(self, connection: Connection, values: Row) -> bool:
        """A tombstone becomes a history again, for which there must be room as for a new one."""
        while not self.room.revive(connection, values):
            there = self.sql.saver.on(connection, {"the_key": values["context_key"]}).first()
            if there is None or (there.id, there.revision) != (values["the_id"], values["the_revision"]):
                return False
            if not self._make_room(connection):
                raise CacheCapacityError(capacity=self.capacity, key=values["context_key"])
        return True

    def _begin_anew(self, connection: Connection, row: Row, which: Row) -> int | None:
        """The row has used up its revisions: it gets a new id."""
        if not REMOVE_VERSION.on(connection, which).rowcount:
            return None
        made = self.sql.insert.on(connection, row).first()
        return int(made.id) * REVISIONS + int(row["revision"])

    # -- what goes

    def remove(self, connection: Connection, key: str, expected: int | None, *, again: bool = False) -> bool:
        """Whether there was something, of that version, to remove. `again`: it may have been done before."""
        which = {"the_key": key} if expected is None else _which(key, expected)
        if which is None:
            return False
        gone = (REMOVE if expected is None else REMOVE_VERSION).on(connection, which).rowcount > 0
        if gone and expected is None:
            self.room.lost_sight()
        elif gone and expected is not None and expected & 1 == 0:
            self._changed(freed=True)
        return gone or (again and self.sql.saver.on(connection, {"the_key": key}).first() is None)

    def _changed(self, *, freed: bool) -> None:
        """A history has become a mark or nothing, or a mark a history."""
        if not freed:
            self.room.taken()
        elif self.within:
            # It may be rolled back: who has no place looks again.
            self.room.lost_sight()
        else:
            self.room.freed(1)

    def _until(self, snapshot: Mapping[str, Any], now: float) -> float | None:
        """When it may be dropped: as it says itself, else so long after it was last touched (by their clock).

        While it is vetoed, never.
        """
        until = _number(snapshot.get("expires_at"))
        if until is not None or self.time_to_live is None:
            return until
        end = _number(snapshot.get("veto_until"))
        if snapshot.get("veto") is not None and end is None:
            return None
        touched = _number(snapshot.get("last_failed_at")) or _number(snapshot.get("started_at"))
        return max((now if touched is None else touched) + self.time_to_live, end or 0.0)


def rows_for(
    database: Database, *, capacity: int | None, tombstones: int | None = None, clock: Clock | None, **rules: Any
) -> ContextRows:
    """The verbs for one kind of database."""
    asks_the_server = database.is_server and clock is None
    if tombstones is None:
        tombstones = MANY if capacity is None else capacity
    return ContextRows(
        **rules,
        capacity=capacity,
        tombstones=tombstones,
        clock=clock,
        store_clock=StoreClock() if asks_the_server else None,
        sql=statements_of(database),
        room=room_of(capacity, by_the_process=database.is_server),
    )


def is_used_up(version: int) -> bool:
    """Whether a row has used up its revisions: its next save takes two statements, so it needs a transaction."""
    return version % REVISIONS >= REVISIONS - 4


def _next(version: int, *, mark: bool) -> int:
    """The next version of a row that is going to be a completion mark, or a history."""
    return version + 1 + -version % 4 if mark else version + 2 - version % 2


def checked(key: str) -> str:
    """The key, if every database can store it."""
    if len(key) > MAX_KEY:
        raise ValueError(f"key: must have at most {MAX_KEY} characters, not {len(key)}: {key[:40]!r}…")
    return readable(key)


def readable(key: str) -> str:
    """The key, if databases can compare with it: a lone surrogate or a NUL is a str to Python and an error to them."""
    try:
        key.encode()
    except UnicodeEncodeError as error:
        msg = f"the key {key!r} is no text that can be stored: {error.reason}"
        raise CodecError(msg, reason=error.reason, key=key) from error
    if "\0" in key:
        raise CodecError(f"the key {key!r} is no text that can be stored: it contains NUL", reason="NUL", key=key)
    return key


def _which(key: str, version: int) -> Row | None:
    """The parameters of a version; None for a number that can be no version."""
    row_id, revision = divmod(version, REVISIONS)
    return {"the_key": key, "the_id": row_id, "the_revision": revision} if 0 < row_id < MAX_ID else None


def _stored(row: Any) -> StoredContext:
    return StoredContext(_decoded(row.snapshot), row.id * REVISIONS + row.revision)


def _encoded(key: str, snapshot: Mapping[str, Any], *, cut: bool) -> str:
    try:
        # Escapes keep what databases refuse in text (lone surrogates, NUL) out of it.
        return cuttable(snapshot, _encode) if cut else _encode(snapshot)
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"the snapshot of {key!r} cannot be kept as JSON: {error}"
        raise CodecError(msg, reason=str(error), key=key) from error


def _decoded(text: str) -> dict[str, Any]:
    try:
        snapshot, end = _decode(text)
    except ValueError as error:
        raise CodecError(reason=f"the stored snapshot is no JSON: {error}") from error
    if end != len(text):
        raise CodecError(reason=f"the stored snapshot is no JSON: it goes on behind character {end}")
    if not isinstance(snapshot, dict):
        raise CodecError(reason=f"the stored snapshot is no JSON object but {type(snapshot).__name__}")
    return snapshot


# The columns beside the snapshot are for people; a snapshot of another shape is kept all the same.


def storable(text: str) -> str:
    """The text as every database can store it: what it refuses (lone surrogates, NUL) becomes "?"."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def _text(value: object, length: int) -> str | None:
    return storable(value)[:length] if isinstance(value, str) else None


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None
