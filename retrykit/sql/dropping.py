"""What goes out of a store, and what is left of it: snapshots past their time, the oldest histories where the rule is
to evict, and tombstones when there are too many.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import attrs
from sqlalchemy import Connection

from retrykit.clock import Clock, StoreClock
from retrykit.sql.capacity import OnFull, Room
from retrykit.sql.prepared import Prepared
from retrykit.sql.statements import TOMBSTONES, Statements
from retrykit.tombstone import WEEK, Bound, epitaph

logger = logging.getLogger("retrykit.sql")

CHUNK: Final = 1_000
PRUNE_EVERY: Final = 1_000

Row = dict[str, Any]


@attrs.define(eq=False)
class Pruning:
    """When the next save drops what is past its time."""

    saves: int = 0
    pruned_at: int = 0
    trimmed_at: int = 0
    buried: int = 0
    """So many tombstones were made since somebody looked whether there are too many."""


@attrs.frozen(kw_only=True, eq=False)
class Dropping:
    """The bounds of a store, and what is done about them. `within`: as it is in somebody's transaction."""

    capacity: int | None
    on_full: OnFull
    time_to_live: float | None
    tombstones: int
    tombstone_time_to_live: float | None = WEEK
    clock: Clock | None
    store_clock: StoreClock | None
    sql: Statements
    room: Room
    within: bool = False
    pruning: Pruning = attrs.field(factory=Pruning)

    @property
    def forgets(self) -> bool:
        """Whether a history can vanish although nobody settled it."""
        return self.on_full == "evict_oldest" or self.time_to_live is not None

    def now(self) -> float:
        """The time that decides what is over: the given clock's, else the store's as far as it is known."""
        if self.clock is not None:
            return self.clock.time()
        store = self.store_clock
        return store.time() if store is not None and store.known else time.time()

    def expire(self, connection: Connection, now: float, chunk: int) -> int:
        """Drop at most `chunk` snapshots whose time is over; how many. Of histories a tombstone is left.

        Both statements look at those whose time was over first: what the first has left of these, the second takes.
        """
        if self.tombstones == 0:
            dropped = self._chosen("expire").on(connection, {"now": now, "chunk": chunk}).rowcount
        else:
            dropped = self._chosen("sweep").on(connection, {"now": now, "chunk": chunk}).rowcount
            given = {"now": now, "chunk": chunk - dropped, **self._burial(now, "time_to_live")}
            buried = self._chosen("bury_expired").on(connection, given).rowcount if dropped < chunk else 0
            self.pruning.buried += buried
            dropped += buried
        if dropped:
            self.room.lost_sight()
        return dropped

    def _chosen(self, name: str) -> Prepared:
        """The statement, as it is in somebody's transaction or outside of any."""
        statement: Prepared = getattr(self.sql, f"{name}_joined" if self.within else name)
        return statement

    def _burial(self, now: float, by: Bound) -> Row:
        lasts = self.tombstone_time_to_live
        return {"buried_at": now, "buried_until": None if lasts is None else now + lasts, "epitaph": epitaph(now, by)}

    def trim(self, connection: Connection) -> None:
        """Drop the oldest tombstones, if there are too many, whoever made them."""
        self.pruning.buried = 0
        surplus = int(TOMBSTONES.on(connection, {}).first()[0]) - self.tombstones
        while surplus > 0 and self.sql.trim.on(connection, {"surplus": min(surplus, CHUNK)}).rowcount:
            surplus -= CHUNK

    def _prune(self, connection: Connection) -> None:
        """Drop by the way what is past its time, once in so many saves."""
        pruning = self.pruning
        pruning.saves += 1
        due = pruning.saves % PRUNE_EVERY == 0 if self.within else pruning.saves - pruning.pruned_at >= PRUNE_EVERY
        # In somebody's transaction it may have to be left: then it is due for the next save outside.
        if due and (self.expire(connection, self.now(), CHUNK) or not self.within):
            pruning.pruned_at = pruning.saves
        # What others bury without end, such as operators, is trimmed by who saves.
        looks = pruning.buried > self.tombstones // 100 or pruning.saves - pruning.trimmed_at >= PRUNE_EVERY
        if looks and not self.within:
            pruning.trimmed_at = pruning.saves
            self.trim(connection)

    def _make_room(self, connection: Connection) -> bool:
        """What is past its time goes first; then, if that is the rule, the oldest histories."""
        if self.room.may_look and self.expire(connection, self.now(), CHUNK):
            return True
        if self.on_full == "reject":
            return False
        surplus = self.room.surplus(connection)
        return surplus <= 0 or self._evict(connection, min(surplus, CHUNK)) > 0

    def _evict(self, connection: Connection, surplus: int) -> int:
        keys = self._drop(connection, "", surplus) or self._drop(connection, "_vetoed", surplus)
        for key in keys:
            logger.warning("the context cache is full (%s histories): evicted the oldest, %r", self.capacity, key)
        self.room.freed(len(keys))
        if not keys:
            # Others have them all in their hands, or there are not as many as it seemed.
            self.room.lost_sight()
        return len(keys)

    def _drop(self, connection: Connection, which: str, surplus: int) -> list[str]:
        sql, given = self.sql, {"surplus": surplus}
        oldest, drop = getattr(sql, f"oldest{which}"), sql.evict
        if self.tombstones:
            given |= self._burial(self.now(), "capacity")
            oldest, drop = getattr(sql, f"bury_oldest{which}") or oldest, sql.bury
        rows = oldest.on(connection, given).rows
        if drop is not None:
            chosen = ((row, {**given, "the_id": row.id, "the_revision": row.revision}) for row in rows)
            rows = [row for row, one in chosen if drop.on(connection, one).rowcount]
        if self.tombstones:
            self.pruning.buried += len(rows)
        return [row.context_key for row in rows]
