"""`BlockingContextCache`: an asynchronous cache with blocking verbs, so that one contract suite checks both kinds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from typing import Any, Final, Self, TypeVar

from retrykit.cache import AsyncRetryContextCache, StoredContext

T = TypeVar("T")

DEADLINE: Final = 120.0


class BlockingContextCache:
    """The verbs of an asynchronous context cache as blocking ones, run on an event loop in a thread of its own.

    ```python
    class TestMyAsyncCache(ContextCacheContract):
        def make_cache(self, directory, **options):
            return BlockingContextCache(MyAsyncCache(directory, **options))
    ```

    `close` closes the cache (if it has a `close`) and ends the loop. A verb that takes more than 120 seconds raises
    `TimeoutError`.
    """

    def __init__(self, cache: AsyncRetryContextCache) -> None:
        self.cache = cache
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="blocking-cache", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop that the cache's connections belong to."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE)

    def load(self, key: str) -> StoredContext | None:
        """As the cache's own."""
        return self.run(self.cache.load(key))

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """As the cache's own."""
        return self.run(self.cache.save(key, snapshot, expected))

    def remove(self, key: str, expected: int | None = None) -> bool:
        """As the cache's own."""
        return self.run(self.cache.remove(key, expected))

    def expire(self, now: float | None = None, limit: int | None = None) -> int:
        """As the cache's own."""
        return self.run(self.cache.expire(now, limit))

    def items(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """As the cache's own, one after the other."""
        return self._each(self.cache.items(prefix, after))

    def _each(self, found: AsyncIterator[T]) -> Iterator[T]:
        items = aiter(found)
        nothing: Any = object()
        while (item := self.run(_next(items, nothing))) is not nothing:
            yield item

    def __getattr__(self, name: str) -> Any:
        # What a cache may have besides is there if the cache has it.
        if name not in {"evicted", "open_keys", "vetoed"}:
            raise AttributeError(name)
        verb = getattr(self.cache, name)
        if name == "evicted":
            return lambda *arguments: self._each(verb(*arguments))
        return lambda *arguments: self.run(verb(*arguments))

    def close(self) -> None:
        """Close the cache, and end the loop."""
        if self._loop.is_closed():
            return
        close = getattr(self.cache, "close", None)
        if close is not None:
            self.run(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _next(items: Any, default: T) -> T:
    return await anext(items, default)
