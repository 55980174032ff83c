"""`FrontContextCache`: what this process stored last, before a store that many share; never a wrong count."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from inspect import isawaitable
from typing import Any

import attrs

from retrykit.cache import StoredContext, copied, is_cache
from retrykit.check import whole
from retrykit.lock import lock_of


@attrs.define(slots=False, eq=False)
class FrontContextCache:
    """A shared store with this process's memory in front: a message that comes back to the process which failed on it
    is looked up there, one round trip less.

    Memory is only believed as far as the store confirms it. What it says leads to nothing but the reservation of the
    next attempt, a compare-and-set: if anybody has stored anything meanwhile (a failure, a veto), that loses and the
    store itself is read. Whatever else would follow from what is remembered (exhausted, vetoed, running elsewhere) is
    asked of the store first. So counts are as exact as the store's, and a veto takes effect as soon. Without the
    reservation (`journal="never"`) the store is always read.

    `store`: any context cache, also an asynchronous one; everything it offers besides the verbs (`joined`,
    `store_clock`, bounds) is passed on. `capacity`: how many histories are remembered, those used last.
    """

    store: Any = attrs.field(validator=is_cache)
    capacity: int = attrs.field(default=10_000, validator=whole(1))
    _recent: OrderedDict[str, StoredContext] = attrs.field(
        init=False, factory=OrderedDict, repr=lambda recent: str(len(recent))
    )
    _lock: Any = attrs.field(init=False, default=attrs.Factory(lock_of, takes_self=True), repr=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "store":
            raise AttributeError(name)
        return getattr(self.store, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return FrontContextCache, (self.store, self.capacity)

    def recent(self, key: str) -> StoredContext | None:
        """What this process stored or read last under the key, if it was a history and is still remembered."""
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
            found = self._recent.get(key)
        return None if found is None else StoredContext(copied(found.snapshot), found.version)

    def keep(self, key: str, stored: StoredContext | None) -> None:
        """Remember, or (None) forget. Completion marks are not remembered: they lead to no attempt."""
        with self._lock:
            self._recent.pop(key, None)
            if stored is None or stored.snapshot.get("completed_at") is not None:
                return
            self._recent[key] = StoredContext(copied(stored.snapshot), stored.version)
            if len(self._recent) > self.capacity:
                self._recent.popitem(last=False)

    # The verbs are the store's, and as awaitable as the store's.

    def load(self, key: str) -> Any:
        """As the store's own."""
        found = self.store.load(key)
        return self._loaded_later(key, found) if isawaitable(found) else self._loaded(key, found)

    def _loaded(self, key: str, stored: StoredContext | None) -> StoredContext | None:
        self.keep(key, stored)
        return stored

    async def _loaded_later(self, key: str, found: Any) -> StoredContext | None:
        return self._loaded(key, await found)

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> Any:
        """As the store's own."""
        # Forgotten first: whatever interrupts the write, what is remembered is nothing that may have been replaced.
        self.keep(key, None)
        saved = self.store.save(key, snapshot, expected)
        return self._saved_later(key, snapshot, saved) if isawaitable(saved) else self._saved(key, snapshot, saved)

    def _saved(self, key: str, snapshot: Mapping[str, Any], version: int | None) -> int | None:
        self.keep(key, None if version is None else StoredContext(snapshot, version))
        return version

    async def _saved_later(self, key: str, snapshot: Mapping[str, Any], saved: Any) -> int | None:
        return self._saved(key, snapshot, await saved)

    def remove(self, key: str, expected: int | None = None) -> Any:
        """As the store's own."""
        self.keep(key, None)
        return self.store.remove(key, expected)

    def items(self, prefix: str = "", after: str | None = None) -> Any:
        """As the store's own."""
        return self.store.items(prefix, after)

    def expire(self, now: float | None = None, limit: int | None = None) -> Any:
        """As the store's own."""
        return self.store.expire(now, limit)
