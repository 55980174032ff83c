"""The operators' face of a context cache: look at histories, veto, forget, prune, export.

An *item* is named by `(name, key)`, the template's name and the key, or by its canonical text as it is shown. Every
change is a compare-and-set that is done again when somebody else was first, so that no failure that is counted
meanwhile is lost. Each verb is written once, as a generator of things to do with the cache: `Histories` does them, and
`AsyncHistories` awaits them.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import aclosing
from itertools import islice
from typing import Any, Final, TypeVar

import attrs

from retrykit.cache import StoredContext, is_cache
from retrykit.check import Seconds, has, seconds, wrong_type, wrong_value
from retrykit.clock import SYSTEM_CLOCK, Clock
from retrykit.context import until
from retrykit.history import History
from retrykit.key import Key, canonical_key, check_key, key_to_json, lease_key
from retrykit.memory import is_known
from retrykit.summary import HistoryFilter, HistorySummary, RunningAttempt, Veto

__all__ = [
    "AsyncHistories",
    "Histories",
    "HistoryFilter",
    "HistoryPage",
    "HistorySummary",
    "Item",
    "Pruned",
    "RunningAttempt",
    "Veto",
]

T = TypeVar("T")

Item = str | tuple[str, Key]
"""`(name, key)`, or the canonical text."""

Work = Generator[Callable[[Any], Any], Any, T]
"""What a verb does: yields functions of the cache, is sent what they gave."""

CHUNK: Final = 500
PAGE: Final = 50
EVERY: Final = HistoryFilter()


@attrs.frozen
class HistoryPage:
    """Some histories in the order of their canonical keys, and where the next page begins (None: it is the last).

    A page with a `next` may be the last one all the same: nobody looked on.
    """

    histories: tuple[HistorySummary, ...]
    next: str | None


@attrs.frozen(kw_only=True)
class Pruned:
    """What `prune` has done so far (or would do): how many entries it has looked at one by one, how many were past
    their time (completion marks, and histories past the time-to-live of their cache), how many histories were older
    than asked.
    """

    looked_at: int = 0
    expired: int = 0
    older: int = 0

    @property
    def total(self) -> int:
        """How many entries went."""
        return self.expired + self.older


Progress = Callable[[Pruned], None]


# -- the verbs


@attrs.frozen
class _Verbs:
    """What both faces are made of: `cache`, and the clock that counts where the store has none."""

    cache: Any = attrs.field(validator=is_cache)
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, validator=has("time"))

    def now(self) -> float:
        """Seconds since the epoch, by the store's clock if it has one."""
        store = getattr(self.cache, "store_clock", None)
        return float(store.time() if store is not None and store.known else self.clock.time())

    def _summary(self, text: str, stored: StoredContext, now: float | None = None) -> HistorySummary:
        now = self.now() if now is None else now
        return HistorySummary.of(text, stored.snapshot, stored.version, now)

    def _get(self, item: Item) -> Work[HistorySummary | None]:
        text = text_of(item)
        stored = yield _load(text)
        if stored is None:
            return None
        running = stored.snapshot.get("in_flight", ())
        believed = []
        for flight in running:
            lease = yield _load(lease_key(stored.snapshot.get("name", ""), text, flight["fence"]))
            believed += [flight if lease is None else {**flight, "until": lease.snapshot["until"]}]
        snapshot = {**stored.snapshot, "in_flight": believed} if believed else stored.snapshot
        return self._summary(text, StoredContext(snapshot, stored.version))

    def _page(self, where: HistoryFilter, limit: int, after: str | None) -> Work[HistoryPage]:
        _check_limit(limit)
        found: list[HistorySummary] = []
        for prefix in where.prefixes(after):
            items = self._items(where.verbs, prefix, after)
            while chunk := (yield _take(items, limit)):
                found += self._those(where, chunk)
                if len(found) >= limit:
                    yield _close(items)
                    return HistoryPage(tuple(found[:limit]), found[limit - 1].canonical_key)
        return HistoryPage(tuple(found), None)

    def _items(self, verbs: Iterable[str], prefix: str, after: str | None = None) -> Any:
        """The iterator over a range of what the verbs give, as far as the cache has them."""
        behind = after if after is not None and after.startswith(prefix) else None
        found = [getattr(self.cache, verb)(prefix, behind) for verb in verbs if hasattr(self.cache, verb)]
        if len(found) == 1:
            return found[0]
        return _merged(found) if found and hasattr(found[0], "__anext__") else heapq.merge(*found, key=_key_of)

    def _those(self, where: HistoryFilter, chunk: list[tuple[str, StoredContext]]) -> Iterator[HistorySummary]:
        now = self.now()
        for text, stored in chunk:
            if _is_history(stored):
                summary = self._summary(text, stored, now)
                if where(summary):
                    yield summary

    def _veto(self, item: Item, reason: str, lasts: Seconds | None) -> Work[HistorySummary]:
        _check_reason(reason)
        until(lasts, 0.0)

        def change(history: History) -> History | None:
            now = self.now()
            end = until(lasts, now)
            if history.completed_at is not None:
                if history.expires_at is None or history.expires_at > now:
                    return None
                # The mark is over: the next delivery would take no notice of what is in it.
                history = History(fence=history.fence)
            history.veto, history.veto_until = reason, end
            return history

        summary = yield from self._change(item, change, new=True)
        assert summary is not None  # noqa: S101 - a vetoed history is never dropped
        return summary

    def _withdraw(self, item: Item) -> Work[HistorySummary | None]:
        def change(history: History) -> History | None:
            if history.veto is None:
                return None
            history.withdraw_veto()
            return history

        return (yield from self._change(item, change, new=False))

    def _change(
        self, item: Item, change: Callable[[History], History | None], *, new: bool
    ) -> Work[HistorySummary | None]:
        """Load, change, compare and set, until nobody was faster. `change` gives None to leave it as it is."""
        text = text_of(item)
        while True:
            stored: StoredContext | None = yield _load(text)
            if stored is None and not new:
                return None
            name, key = _identity(item, stored)
            history = change(History() if stored is None else History.from_json(stored.snapshot))
            if history is None:
                return None if stored is None else self._summary(text, stored)
            if stored is not None and not is_known(history) and not history.fence:
                # It says no more than that nothing has happened: no attempt was made either, whose fence is to be kept.
                if (yield _remove(text, stored.version)):
                    return None
                continue
            snapshot = history.to_json(name, key)
            version = yield _save(text, snapshot, None if stored is None else stored.version)
            if version is not None:
                return self._summary(text, StoredContext(snapshot, version))

    def _forget(self, item: Item) -> Work[bool]:
        return bool((yield _remove(text_of(item), None)))

    def _sent(self, item: Item) -> Work[HistorySummary | None]:
        def change(history: History) -> History | None:
            if not history.outbox:
                return None
            history.outbox.clear()
            return history

        return (yield from self._change(item, change, new=False))

    def _prune(
        self, older_than: Seconds | None, name: str | None, progress: Progress, *, dry_run: bool
    ) -> Work[Pruned]:
        if older_than is not None and seconds("older_than", older_than) <= 0:
            raise wrong_value("older_than", "more than 0 seconds", older_than)
        done = Pruned()
        if name is None and not dry_run:
            done = yield from self._expire(progress)
            if older_than is None:
                return done
        for prefix in HistoryFilter(name=name).prefixes(None):
            items = self._items(("items", "evicted"), prefix)
            while chunk := (yield _take(items, CHUNK)):
                done = yield from self._prune_chunk(done, chunk, older_than, dry_run=dry_run)
                progress(done)
        return done

    def _expire(self, progress: Progress) -> Work[Pruned]:
        """What the store itself may drop: in pieces where it can."""
        done, dropped = Pruned(), CHUNK
        # Where the store has no clock, its own rule is the cache's clock, unless another was given here.
        ours = getattr(self.cache, "store_clock", None) is None and self.clock is not SYSTEM_CLOCK
        now = self.clock.time() if ours else None
        while dropped >= CHUNK:
            dropped = yield lambda cache: cache.expire(now, CHUNK)
            done = attrs.evolve(done, expired=done.expired + dropped)
            progress(done)
        return done

    def _prune_chunk(
        self, done: Pruned, chunk: list[tuple[str, StoredContext]], older_than: Seconds | None, *, dry_run: bool
    ) -> Work[Pruned]:
        now = self.now()
        for text, stored in chunk:
            done = attrs.evolve(done, looked_at=done.looked_at + 1)
            kind = self._prunable(text, stored, now, older_than)
            if kind is None or (not dry_run and not (yield _remove(text, stored.version))):
                continue
            done = attrs.evolve(done, **{kind: getattr(done, kind) + 1})
        return done

    def _prunable(self, text: str, stored: StoredContext, now: float, older_than: Seconds | None) -> str | None:
        if not _is_history(stored):
            return None
        summary = self._summary(text, stored, now)
        if summary.over:
            return "expired"
        touched = summary.touched_at
        stays = summary.completed_at is not None or summary.vetoed or summary.is_running or touched is None
        if older_than is None or stays:
            return None
        assert touched is not None  # noqa: S101 - else it stays
        return "older" if touched.timestamp() + seconds("older_than", older_than) <= now else None


class Histories(_Verbs):
    """The histories of a cache, as operators see and change them.

    `clock` says what time it is where the store does not (`store_clock`): give the template's own. Safe to use from any
    thread, as the cache is. What the store refuses is its `ContextCacheError`.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[HistorySummary]:
        return self.find()

    def find(self, where: HistoryFilter = EVERY, *, after: str | None = None) -> Iterator[HistorySummary]:
        """The histories that the filter lets through, in the order of their canonical keys, behind `after`.

        Read as they are asked for, while others go on changing them.
        """
        for prefix in where.prefixes(after):
            for item in self._items(where.verbs, prefix, after):
                yield from self._those(where, [item])

    def page(self, where: HistoryFilter = EVERY, *, limit: int = PAGE, after: str | None = None) -> HistoryPage:
        """At most `limit` of them, behind `after` (a page's `next`); no more is read than that takes."""
        return self._done(self._page(where, limit, after))

    def get(self, item: Item) -> HistorySummary | None:
        """What is stored about one item; None if nothing is."""
        return self._done(self._get(item))

    def veto(self, item: Item, reason: str, *, lasts: Seconds | None = None) -> HistorySummary:
        """Forbid further attempts of an item: it takes effect at its next delivery, in every process.

        `lasts`: seconds (or a `timedelta`) until the veto ends by itself; None: it holds until it is withdrawn. An
        item that was never seen may be vetoed by name and key (`LookupError` when only its canonical text is known).
        Of one whose completion is remembered nothing is changed: see `completed_at` in what is returned.
        """
        return self._done(self._veto(item, reason, lasts))

    def withdraw_veto(self, item: Item) -> HistorySummary | None:
        """Allow further attempts again, as far as the policy does.

        What is stored afterwards; None if there is nothing (any more).
        """
        return self._done(self._withdraw(item))

    def forget(self, item: Item) -> bool:
        """Drop what is stored about an item, its veto too: its next delivery is the first. Whether there was anything.

        Of an item that is done with the mark is dropped: a duplicate would be handled again.
        """
        return self._done(self._forget(item))

    def sent(self, item: Item) -> None:
        """What was kept with the mark of a completed item, to be sent again, has been sent: it is kept no longer."""
        self._done(self._sent(item))

    def prune(
        self,
        *,
        older_than: Seconds | None = None,
        name: str | None = None,
        dry_run: bool = False,
        progress: Progress = lambda _: None,
    ) -> Pruned:
        """Drop what is past its time by the store's clock: completion marks, histories past their time-to-live.

        `older_than`: histories and tombstones too that nothing has happened to for so many seconds (or a `timedelta`),
        but for vetoed ones and those with an attempt that is believed to run. `name`: of this template only, and then
        no time-to-live but the marks' own is known. Each is dropped in a transaction of its own, or in one with others
        of bounded number, and only if nobody has changed it since it was looked at. `progress` is told now and then.
        `dry_run` changes nothing, and counts what would go; of a time-to-live of histories it does not know either.
        """
        return self._done(self._prune(older_than, name, progress, dry_run=dry_run))

    def export(self, where: HistoryFilter = EVERY, *, after: str | None = None) -> Iterator[str]:
        """One line of JSON for each history: `HistorySummary.to_json`."""
        return map(_line, self.find(where, after=after))

    def _done(self, work: Work[T]) -> T:
        answer = None
        while True:
            try:
                step = work.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            answer = step(self.cache)


class AsyncHistories(_Verbs):
    """`Histories` for asynchronous caches (and others): the same verbs, awaited."""

    __slots__ = ()

    def __aiter__(self) -> AsyncGenerator[HistorySummary]:
        return self.find()

    async def find(self, where: HistoryFilter = EVERY, *, after: str | None = None) -> AsyncGenerator[HistorySummary]:
        """As `Histories.find`."""
        for prefix in where.prefixes(after):
            items = self._items(where.verbs, prefix, after)
            try:
                while chunk := await _awaited(_take(items, 1)(self.cache)):
                    for summary in self._those(where, chunk):
                        yield summary
            finally:
                await _awaited(_close(items)(self.cache))

    async def page(self, where: HistoryFilter = EVERY, *, limit: int = PAGE, after: str | None = None) -> HistoryPage:
        """As `Histories.page`."""
        return await self._done(self._page(where, limit, after))

    async def get(self, item: Item) -> HistorySummary | None:
        """As `Histories.get`."""
        return await self._done(self._get(item))

    async def veto(self, item: Item, reason: str, *, lasts: Seconds | None = None) -> HistorySummary:
        """As `Histories.veto`."""
        return await self._done(self._veto(item, reason, lasts))

    async def withdraw_veto(self, item: Item) -> HistorySummary | None:
        """As `Histories.withdraw_veto`."""
        return await self._done(self._withdraw(item))

    async def forget(self, item: Item) -> bool:
        """As `Histories.forget`."""
        return await self._done(self._forget(item))

    async def sent(self, item: Item) -> None:
        """As `Histories.sent`."""
        await self._done(self._sent(item))

    async def prune(
        self,
        *,
        older_than: Seconds | None = None,
        name: str | None = None,
        dry_run: bool = False,
        progress: Progress = lambda _: None,
    ) -> Pruned:
        """As `Histories.prune`."""
        return await self._done(self._prune(older_than, name, progress, dry_run=dry_run))

    async def export(self, where: HistoryFilter = EVERY, *, after: str | None = None) -> AsyncGenerator[str]:
        """As `Histories.export`."""
        async with aclosing(self.find(where, after=after)) as found:
            async for summary in found:
                yield _line(summary)

    async def _done(self, work: Work[T]) -> T:
        answer = None
        while True:
            try:
                step = work.send(answer)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            answer = await _awaited(step(self.cache))


async def _awaited(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value


# -- what is done with the cache


def _load(text: str) -> Callable[[Any], Any]:
    return lambda cache: cache.load(text)


def _save(text: str, snapshot: Mapping[str, Any], expected: int | None) -> Callable[[Any], Any]:
    return lambda cache: cache.save(text, snapshot, expected)


def _remove(text: str, expected: int | None) -> Callable[[Any], Any]:
    return lambda cache: cache.remove(text, expected)


def _take(items: Any, size: int) -> Callable[[Any], Any]:
    """The next ones of an iterator, blocking or not."""
    if hasattr(items, "__anext__"):
        return lambda _cache: _taken(items, size)
    return lambda _cache: list(islice(items, size))


async def _taken(items: Any, size: int) -> list[Any]:
    chunk: list[Any] = []
    while len(chunk) < size and (item := await anext(items, None)) is not None:
        chunk.append(item)
    return chunk


def _key_of(item: tuple[str, StoredContext]) -> str:
    return item[0]


async def _merged(iterators: Iterable[Any]) -> AsyncGenerator[Any]:
    """What `heapq.merge` does, of asynchronous iterators."""
    heads = [(item, items) for items in iterators if (item := await anext(items, None)) is not None]
    while heads:
        first = min(range(len(heads)), key=lambda number: heads[number][0][0])
        item, items = heads.pop(first)
        yield item
        following = await anext(items, None)
        if following is not None:
            heads.append((following, items))


def _close(items: Any) -> Callable[[Any], Any]:
    """Let go of an iterator that was not read to its end."""
    close = getattr(items, "aclose", None) or getattr(items, "close", None)
    return lambda _cache: None if close is None else close()


# -- items and snapshots


def text_of(item: Item) -> str:
    """The canonical text of an item. `TypeError` for what names none."""
    if isinstance(item, str):
        return item
    if not isinstance(item, tuple) or len(item) != 2:  # noqa: PLR2004 - name and key
        raise wrong_type("item", "(name, key) or a canonical key", item)
    name, key = item
    check_key(key)
    return canonical_key(name, key)


def _identity(item: Item, stored: StoredContext | None) -> tuple[str, Any]:
    """Name and key, as snapshots have them."""
    if stored is not None:
        return stored.snapshot.get("name", ""), stored.snapshot.get("key")
    if isinstance(item, tuple):
        return item[0], key_to_json(item[1])
    msg = f"nothing is stored under {item!r}: an item that was never seen is named by template and key"
    raise LookupError(msg)


def _check_limit(limit: object) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise wrong_type("limit", "an int", limit)
    if limit < 1:
        raise wrong_value("limit", "at least 1", limit)


def _check_reason(reason: object) -> None:
    if not isinstance(reason, str):
        raise wrong_type("reason", "a str", reason)
    if not reason:
        raise wrong_value("reason", "a text that says why", reason)


def _is_history(stored: StoredContext) -> bool:
    """Whether it is one, or a completion mark: circuits and renewed leases are kept in the same stores."""
    return "breaker" not in stored.snapshot and "lease" not in stored.snapshot


def _line(summary: HistorySummary) -> str:
    return json.dumps(summary.to_json())
