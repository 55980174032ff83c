"""Where histories are kept between deliveries: a compare-and-set store of JSON-able snapshots.

`RetryContextCache` is all that a store must do; `retrykit.testing.ContextCacheContract` checks one. No object of the
program is ever stored: a snapshot is plain JSON data (see `RetryContext.snapshot`), so there is no pickle, and any
process can read what another wrote.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from typing import Any, ClassVar, Final, Literal, Protocol, runtime_checkable

import attrs

from retrykit.check import as_seconds_or_none, has, more_than, one_of, whole
from retrykit.errors import CacheCapacityError
from retrykit.key import canonical_key
from retrykit.lock import lock_of
from retrykit.tombstone import WEEK, Bound, entombed
from retrykit.value import Value

__all__ = [
    "AsyncRetryContextCache",
    "JoinableContextCache",
    "MapRetryContextCache",
    "RetryContextCache",
    "StoredContext",
    "canonical_key",
]


SWEEP: Final = 1_000
"""After so many writes an in-memory cache forgets the completion marks that are over."""


@attrs.frozen(eq=False, repr=False)
class StoredContext(Value):
    """A snapshot and the version it was stored as."""

    snapshot: Mapping[str, Any]
    version: int


@runtime_checkable
class RetryContextCache(Protocol):
    """A store of histories. `key` is canonical text (`canonical_key`), at most 512 characters.

    The methods of a cache for `AsyncRetryTemplate` may be coroutine functions. Faults are raised as
    `ContextCacheError`. A store that several machines share has an attribute `store_clock`, a
    `retrykit.clock.StoreClock` that it keeps informed: then its time decides about leases and due times. One that may
    forget histories by itself (because it is full, or they are old) has an attribute `may_forget` that is true: then a
    history that is gone is not taken for one that somebody settled. `open_keys(prefix, limit)`, where a store has it,
    gives the keys of its histories and tombstones, completion marks left out, or None when there are more.
    `vetoed(keys)`, where a store has it, gives those of so many keys that have a veto, with what is stored of them, in
    one round trip; without it each is loaded. `evicted(prefix, after)`, where a store leaves tombstones, gives these as
    `items` gives all others. `shared` is false for a cache of one process only.
    """

    def load(self, key: str) -> StoredContext | None:
        """What is stored under the key, or None."""

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """Store the snapshot if the stored version still is `expected` (None: nothing is stored). One atomic step.

        Returns the new version, a number never used before for this key; None if somebody else was first, and nothing
        was changed. `CacheCapacityError` when the store is full and the key is new: a known key can always be stored.
        What is stored in place of a tombstone needs room as a new key does.
        """

    def remove(self, key: str, expected: int | None = None) -> bool:
        """Forget the key, if its version still is `expected` (None: whatever it is). Whether something was removed."""

    def items(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """All keys that begin with the prefix, in order, with what is stored, tombstones left out: for operators.

        `after`: only keys behind this one, found without reading those before it.
        """

    def expire(self, now: float | None = None, limit: int | None = None) -> int:
        """Forget what need not be kept any longer at `now` (seconds since the epoch). How many snapshots went.

        None: by the store's own clock; a store without one takes the machine's. `limit`: at most so many.
        """


@runtime_checkable
class JoinableContextCache(RetryContextCache, Protocol):
    """A cache that can take part in the work's own transaction, when both are in one database."""

    def joined(self, transaction: Any) -> RetryContextCache | None:
        """The same store, seen through the caller's open transaction.

        What is saved there commits or rolls back with the work. None when it is not on this store's database.
        """


class AsyncRetryContextCache(Protocol):
    """The same store for `AsyncRetryTemplate`, its verbs coroutine functions."""

    async def load(self, key: str) -> StoredContext | None:
        """As `RetryContextCache.load`."""

    async def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """As `RetryContextCache.save`."""

    async def remove(self, key: str, expected: int | None = None) -> bool:
        """As `RetryContextCache.remove`."""

    def items(self, prefix: str = "", after: str | None = None) -> AsyncIterator[tuple[str, StoredContext]]:
        """As `RetryContextCache.items`."""

    async def expire(self, now: float | None = None, limit: int | None = None) -> int:
        """As `RetryContextCache.expire`."""


is_cache = has("load", "save", "remove")


def identity(cache: Any) -> Any:
    """What makes two caches equal in two templates: in-memory ones compare by their bounds, not by what they hold."""
    return cache.bounds if isinstance(cache, MapRetryContextCache) else cache


@attrs.define(slots=False, eq=False)
class MapRetryContextCache:
    """Histories in this process's memory: for one process, tests, and as the default.

    `capacity`: how many histories at most. When it is full and a new key comes, `on_full="reject"` raises
    `CacheCapacityError` (the failure is then not remembered, and the business error stays what the caller sees),
    `"evict_oldest"` drops the one that was stored longest ago. `time_to_live`: seconds after which a history that was
    not touched may be dropped (`expire`); None keeps it. What is dropped leaves a tombstone, from which its count goes
    on: `tombstones` at most (None: as many as `capacity`; 0: none), for `tombstone_time_to_live` seconds (None: until
    there are too many). A pickled or copied cache has the same bounds and is empty: history in memory belongs to its
    process.
    """

    capacity: int = attrs.field(default=100_000, validator=whole(1))
    on_full: Literal["reject", "evict_oldest"] = attrs.field(
        default="reject", validator=one_of("reject", "evict_oldest"), kw_only=True
    )
    time_to_live: float | None = attrs.field(
        default=None, converter=as_seconds_or_none, validator=more_than(0), kw_only=True
    )
    tombstones: int | None = attrs.field(default=None, validator=whole(0, optional=True), kw_only=True, repr=False)
    tombstone_time_to_live: float | None = attrs.field(
        default=WEEK,
        converter=as_seconds_or_none,
        validator=more_than(0, optional=True),
        kw_only=True,
        repr=False,
    )
    _entries: dict[str, StoredContext] = attrs.field(init=False, factory=dict, repr=lambda entries: str(len(entries)))
    # Completion marks and the states of circuits: kept apart, because they take no place from histories and are never
    # evicted. Marks go when their time is over.
    _marks: dict[str, StoredContext] = attrs.field(init=False, factory=dict, repr=False)
    # What was dropped, in that order.
    _graves: dict[str, StoredContext] = attrs.field(init=False, factory=dict, repr=False)
    _look_again: float = attrs.field(init=False, default=0.0, repr=False)
    _lock: Any = attrs.field(init=False, default=attrs.Factory(lock_of, takes_self=True), repr=False)
    shared: ClassVar[bool] = False
    """No other process has it: whether an attempt still runs is known here without leases."""
    _versions: Iterator[int] = attrs.field(init=False, factory=lambda: itertools.count(1), repr=False)

    @property
    def may_forget(self) -> bool:
        """Whether a history can vanish although nobody settled it."""
        return self.on_full == "evict_oldest" or self.time_to_live is not None

    @property
    def bounds(self) -> tuple[Any, ...]:
        """What it was made with."""
        return (self.capacity, self.on_full, self.time_to_live, self.tombstones, self.tombstone_time_to_live)

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is stored: no history, no mark, no tombstone. Known without waiting for who stores."""
        return not (self._entries or self._marks or self._graves)

    def __len__(self) -> int:
        return len(self._entries) + len(self._marks)

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        capacity, on_full, time_to_live, tombstones, lasts = self.bounds
        others = {"on_full": on_full, "time_to_live": time_to_live, "tombstones": tombstones}
        return _empty, (capacity, others | {"tombstone_time_to_live": lasts})

    def _home_of(self, key: str) -> dict[str, StoredContext]:
        if key in self._marks:
            return self._marks
        return self._graves if key in self._graves else self._entries

    def load(self, key: str) -> StoredContext | None:
        """What is stored under the key, or None."""
        with self._lock:
            found = self._home_of(key).get(key)
        return None if found is None else StoredContext(copied(found.snapshot), found.version)

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """Store if the version still is `expected`; the new version, or None."""
        kept = copied(snapshot)
        completed_at = kept.get("completed_at")
        is_mark = completed_at is not None or "breaker" in kept
        with self._lock:
            home = self._home_of(key)
            found = home.get(key)
            if (None if found is None else found.version) != expected:
                return None
            if not is_mark and (found is None or home is self._graves):
                self._make_room(key, kept)
            # Taken out and put back: the dict's order is the order in which histories were last stored.
            home.pop(key, None)
            version = next(self._versions)
            (self._marks if is_mark else self._entries)[key] = StoredContext(kept, version)
            if completed_at is not None and version % SWEEP == 0:
                self._drop_over(completed_at)
            return version

    def _make_room(self, key: str, snapshot: Mapping[str, Any]) -> None:
        if len(self._entries) < self.capacity:
            return
        # The time is that of the snapshot: its template's clock, not this machine's. Looking at all is not done for
        # each.
        now = _touched_at(snapshot)
        if self.time_to_live is not None and now is not None and now >= self._look_again:
            self._look_again = now + self.time_to_live / 100
            self._drop_over(now)
        if len(self._entries) < self.capacity:
            return
        if self.on_full == "reject":
            raise CacheCapacityError(capacity=self.capacity, key=key)
        # A veto is somebody's word, to be kept: those go last.
        free = (one for one, stored in self._entries.items() if not stored.snapshot.get("veto"))
        self._bury(next(free, next(iter(self._entries))), now, "capacity")

    def _bury(self, key: str, now: float | None, by: Bound) -> None:
        """Drop a history. Its tombstone has its version: it says nothing that whoever knows that does not know."""
        stored = self._entries[key]
        # Of who is vetoed before he was ever tried no time is known: then it is the time of what goes.
        at = now or _touched_at(stored.snapshot) or time.time()
        self._graves[key] = StoredContext(entombed(stored.snapshot, at, by), stored.version)
        # Only now: whoever asks whether anything `is_empty` does not wait for the lock.
        del self._entries[key]
        most = self.capacity if self.tombstones is None else self.tombstones
        while len(self._graves) > most:
            del self._graves[next(iter(self._graves))]

    def remove(self, key: str, expected: int | None = None) -> bool:
        """Forget the key, if its version still is `expected`."""
        with self._lock:
            home = self._home_of(key)
            found = home.get(key)
            if found is None or expected not in (None, found.version):
                return False
            del home[key]
            return True

    def items(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """All keys that begin with the prefix, in order; only those behind `after`, if it is given."""
        with self._lock:
            keys = sorted(
                key
                for key in (*self._entries, *self._marks)
                if key.startswith(prefix) and (after is None or key > after)
            )
        for key in keys:
            # Not what was buried in between.
            with self._lock:
                stored = self._entries.get(key) or self._marks.get(key)
            if stored is not None:
                yield key, StoredContext(copied(stored.snapshot), stored.version)

    def evicted(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """The tombstones whose keys begin with the prefix, in order; only those behind `after`, if it is given."""
        with self._lock:
            wanted = (key for key in self._graves if key.startswith(prefix) and (after is None or key > after))
            found = [(key, self._graves[key]) for key in sorted(wanted)]
        for key, stored in found:
            yield key, StoredContext(copied(stored.snapshot), stored.version)

    def open_keys(self, prefix: str, limit: int) -> list[str] | None:
        """The keys of histories and tombstones that begin with the prefix; None when there are more than `limit`."""
        with self._lock:
            found = [key for key in (*self._entries, *self._graves) if key.startswith(prefix)]
        return found if len(found) <= limit else None

    def vetoed(self, keys: Collection[str]) -> dict[str, StoredContext]:
        """Those of the keys that have a veto, with what is stored."""
        with self._lock:
            known = ((key, self._entries.get(key) or self._graves.get(key)) for key in keys)
            found = {key: stored for key, stored in known if stored is not None and stored.snapshot.get("veto")}
        return {key: StoredContext(copied(stored.snapshot), stored.version) for key, stored in found.items()}

    def expire(self, now: float | None = None, limit: int | None = None) -> int:
        """Drop completion marks and tombstones that are over, and histories not touched for `time_to_live`."""
        with self._lock:
            return self._drop_over(time.time() if now is None else now, limit)

    def _drop_over(self, now: float, limit: int | None = None) -> int:
        dropped = 0
        for home in (self._graves, self._marks, self._entries):
            is_over = self._is_worn if home is self._graves else self._is_over
            all_over = (key for key, stored in home.items() if is_over(stored.snapshot, now))
            over = list(itertools.islice(all_over, None if limit is None else limit - dropped))
            dropped += len(over)
            for key in over:
                if home is self._entries:
                    self._bury(key, now, "time_to_live")
                else:
                    del home[key]
        return dropped

    def _is_over(self, snapshot: Mapping[str, Any], now: float) -> bool:
        until = snapshot.get("expires_at")
        vetoed = snapshot.get("veto_until", math.inf) if snapshot.get("veto") else 0.0
        if until is None and self.time_to_live is not None and vetoed <= now:
            touched = _touched_at(snapshot)
            until = None if touched is None else touched + self.time_to_live
        return until is not None and until <= now

    def _is_worn(self, tombstone: Mapping[str, Any], now: float) -> bool:
        lasts = self.tombstone_time_to_live
        return lasts is not None and float(tombstone["evicted"]["at"]) + lasts <= now


def _touched_at(snapshot: Mapping[str, Any]) -> float | None:
    return snapshot.get("last_failed_at") or snapshot.get("started_at")


_WHOLE: Final = frozenset({str, int, float, bool, type(None)})


def copied(value: Any) -> Any:
    """A copy of JSON data, so that neither side sees what the other does to its own."""
    kind = value.__class__
    # Most parts are no containers: asking each whether it is a Mapping costs more than all the rest.
    if kind in _WHOLE:
        return value
    if kind is list or kind is tuple:
        return [part if part.__class__ in _WHOLE else copied(part) for part in value]
    if kind is dict or isinstance(value, Mapping):
        return {name: part if part.__class__ in _WHOLE else copied(part) for name, part in value.items()}
    return copied(list(value)) if isinstance(value, list | tuple) else value


def _empty(capacity: int, others: Mapping[str, Any]) -> MapRetryContextCache:
    return MapRetryContextCache(capacity, **others)
