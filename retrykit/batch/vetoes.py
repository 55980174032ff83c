"""Vetoes from outside: which items of a chunk somebody has forbidden, as the context cache of the template knows."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from inspect import isawaitable
from typing import Any

from retrykit.batch.errors import VetoedError
from retrykit.batch.report import SkippedItem
from retrykit.batch.source import Chunk
from retrykit.batch.work import Work
from retrykit.cache import MapRetryContextCache, StoredContext
from retrykit.errors import CodecError
from retrykit.history import History
from retrykit.key import check_key

_log = logging.getLogger("retrykit.batch")


def vetoed(step: Any, chunk: Chunk, asked: Iterable[int]) -> Work[dict[int, SkippedItem]]:
    """Those of the items with these indexes that are vetoed, as they are to be recorded, by index.

    One read of the cache, outside of every transaction of the step: nothing that it holds or sees is drawn in. A cache
    that has no `vetoed` is asked for each key; one of this process alone, which is empty, for none. A cache that cannot
    be read forbids nothing: that is logged.
    """
    template, cache = step.template, step.template.context_cache
    if isinstance(cache, MapRetryContextCache) and not cache.shared and not len(cache) and cache.open_keys("", 0) == []:
        return {}
    keys = dict(_keys(step, chunk, asked))
    texts = {index: template.key_of(key) for index, key in keys.items()}
    try:
        found = yield from _stored(cache, [*dict.fromkeys(texts.values())])
        reasons = _reasons(found, template)
    except Exception:  # noqa: BLE001 - a store's fault changes no outcome: it is logged
        _log.exception("step %s: whether items are vetoed could not be read", step.name)
        return {}
    return {
        index: _record(chunk, index, VetoedError(name=template.name, key=keys[index], reason=reasons[text]))
        for index, text in texts.items()
        if text in reasons
    }


def _record(chunk: Chunk, index: int, veto: VetoedError) -> SkippedItem:
    return SkippedItem(
        item=chunk.items[index],
        number=chunk.number + index + 1,
        phase="veto",
        error=veto,
        attempts=0,
        key=veto.__dict__["key"],
        reason=str(veto),
    )


def _keys(step: Any, chunk: Chunk, asked: Iterable[int]) -> Iterator[tuple[int, Any]]:
    without: list[tuple[int, Exception]] = []
    for index in asked:
        try:
            key = step.key(chunk.items[index])
            check_key(key)
        except Exception as fault:  # noqa: BLE001 - the user's function; whether an item is at fault will be seen
            without.append((chunk.number + index + 1, fault))
        else:
            yield index, key
    if without:
        # Once, although a key that is wrong is wrong for all of them.
        number, first = without[0]
        others = f" (nor have {len(without) - 1} others of its chunk)" if len(without) > 1 else ""
        _log.warning("step %s: item %d has no key that could be vetoed%s: %r", step.name, number, others, first)


def _stored(cache: Any, keys: list[str]) -> Work[dict[str, StoredContext]]:
    ask = getattr(cache, "vetoed", None)
    if ask is not None:
        return (yield partial(ask, keys))  # type: ignore[no-any-return]
    found: dict[str, StoredContext] = {}
    for key in keys:
        stored = yield partial(cache.load, key)
        if stored is not None:
            found[key] = stored
    return found


def _reasons(found: dict[str, StoredContext], template: Any) -> dict[str, str]:
    """Why the items are forbidden now, by canonical key; without those that are not, or were brought to their end."""
    reasons = {}
    now = template.time() if found else 0.0
    for key, stored in found.items():
        try:
            history = History.from_json(stored.snapshot)
        except CodecError as fault:
            _log.warning("the veto of %r cannot be read, and forbids nothing: %s", key, fault)
            continue
        history.lapse(now)
        if history.veto is not None and history.completed_at is None:
            reasons[key] = history.veto
    return reasons


def begin_after(asked: Any, begin: Callable[[], Any]) -> Any:
    """The context manager that `begin` gives, to be entered when what was asked is known."""
    return BeginAfter(asked, begin) if isawaitable(asked) else begin()


class BeginAfter:
    """A transaction that waits for an answer before it is begun."""

    manager: Any = None

    def __init__(self, asked: Awaitable[None], begin: Callable[[], Any]) -> None:
        self._asked = asked
        self._begin = begin

    @property
    def gen(self) -> Any:
        """The generator of the context manager, if it is made of one."""
        return getattr(self.manager, "gen", None)

    async def __aenter__(self) -> Any:
        await self._asked
        manager = self.manager = self._begin()
        return (await manager.__aenter__()) if hasattr(manager, "__aenter__") else manager.__enter__()

    async def __aexit__(self, *error: object) -> Any:
        manager = self.manager
        return (await manager.__aexit__(*error)) if hasattr(manager, "__aexit__") else manager.__exit__(*error)
