"""`RedisRetryContextCache`: histories of stateful retry in Redis or Valkey, shared by all who use the same prefix."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from time import monotonic
from typing import Any, ClassVar, Final, Self, TypeVar

import redis
import redis.asyncio
from redis.client import NEVER_DECODE
from redis.exceptions import NoScriptError

from retrykit.cache import StoredContext
from retrykit.check import Seconds
from retrykit.clock import Clock, StoreClock
from retrykit.context import RetryContext
from retrykit.redis.client import (
    BACK_OFF,
    FAULTS,
    address_of,
    client_of,
    is_async,
    patience_of,
    say_what_settings_mean,
    worded,
)
from retrykit.redis.requests import MOMENT, PAGE_SIZE, OnFull, Request, checked_requests
from retrykit.template import AsyncRetryTemplate, RetryTemplate
from retrykit.tombstone import WEEK

T = TypeVar("T")
Client = redis.Redis | redis.RedisCluster
AsyncClient = redis.asyncio.Redis | redis.asyncio.RedisCluster

OBSERVE_EVERY: Final = 0.05
"""Every answer tells the server's time; to look at it more often than this many seconds makes it no more exact."""

SETTINGS: Final = ("maxmemory-policy", "appendonly")
# Answers come as bytes, whatever the client makes of its own.
_RAW: Final[dict[str, Any]] = {NEVER_DECODE: True}


class RedisRetryContextCache:
    """Histories in Redis (7 or later) or Valkey; each verb is one script and one round trip.

    `client`: a `redis.Redis` or `redis.RedisCluster`, on which nothing is changed, or a URL (`redis://`, `rediss://`,
    `unix://`, `valkey://`, `valkeys://`), for which one is made that `close()` ends. A client of `redis.asyncio` gives
    an `AsyncRedisRetryContextCache`. `prefix`: caches with the same prefix share their histories; all that they store
    has names that begin with `{prefix}:`, which keeps it in one slot of a cluster.

    `capacity`: how many histories are kept (exact, for all who share the prefix; completion marks do not count); None:
    no limit. A known key is always updated. A new one is refused with `CacheCapacityError` (`on_full="reject"`) or
    pushes out the one stored longest ago (`"evict_oldest"`, logged), once nothing past its time is left to drop.
    `time_to_live`: seconds after its last failure at which a history may be dropped; None: never. Every 100th save
    drops up to 200 snapshots past their time; `expire` drops all. What capacity or time-to-live drops leaves a
    tombstone, from which its count goes on; what comes back from one needs room as a new key does. `tombstones`: how
    many are kept (None: as many as `capacity`, or 100,000; 0: none), `tombstone_time_to_live`: for how many seconds
    (None: until there are too many). The server's clock tells that time, and the time of leases and pauses
    (`store_clock`); `clock` puts another in its place.

    `patience`: for so many seconds a verb that met a lost connection, a starting server or a failover tries again
    before it raises `ContextCacheError`; 0: never. A write that arrives twice, because the answer to the first was
    lost, is made once. Safe to use from any thread, and in a forked child. Pickling needs a URL; the pickle contains
    it.

    The first verb asks once for two settings of the server, and logs a warning if they let it forget histories. There
    is no `joined`: work and history commit apart, so an effect happens at least once (see "Keep histories in Redis").
    """

    _asynchronous: ClassVar[bool] = False

    def __new__(cls, client: Client | AsyncClient | str, **options: Any) -> Self:  # noqa: ARG004 - they are __init__'s
        """One of the kind that the client is."""
        kind: Any = AsyncRedisRetryContextCache if cls is RedisRetryContextCache and is_async(client) else cls
        return object.__new__(kind)  # type: ignore[no-any-return] # of this class, or of the one below

    def __init__(
        self,
        client: Client | AsyncClient | str,
        *,
        prefix: str = "retrykit",
        capacity: int | None = 100_000,
        on_full: OnFull = "reject",
        time_to_live: Seconds | None = None,
        tombstones: int | None = None,
        tombstone_time_to_live: Seconds | None = WEEK,
        clock: Clock | None = None,
        patience: Seconds = 5.0,
    ) -> None:
        rules = {
            "prefix": prefix,
            "capacity": capacity,
            "on_full": on_full,
            "time_to_live": time_to_live,
            "tombstones": tombstones,
            "tombstone_time_to_live": tombstone_time_to_live,
            "clock": clock,
        }
        self._requests = checked_requests(**rules)
        self._again = patience_of(patience)
        self._options = {**rules, "patience": patience}
        self._given = client
        self._client = client_of(client, asynchronous=self._asynchronous)
        self._execute = self._client.execute_command
        self._address = address_of(self._client)
        self.store_clock = None if clock is not None else StoreClock(None if self._asynchronous else self._ask_for_time)
        self._observe_again = 0.0
        self._looked = False
        self._patient: Any = self._template()

    def _template(self) -> Any:
        return RetryTemplate(name="retrykit.redis", retry_policy=self._again, back_off_policy=BACK_OFF)

    @property
    def client(self) -> Any:
        """The client, made from a URL or given."""
        return self._client

    @property
    def tombstones(self) -> int:
        """How many tombstones are kept."""
        return self._requests.tombstones

    @property
    def may_forget(self) -> bool:
        """Redis may: it restarts, fails over, throws away. So what is gone is not taken for settled by somebody."""
        return True

    def load(self, key: str) -> StoredContext | None:
        """The snapshot of a key and its version; None if there is none."""
        return self._send(self._requests.load(key))

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """Compare and set: store if the version is still `expected` (None: if the key is not there).

        Returns the new version; None for who lost, and then nothing was changed.

        `CacheCapacityError` when the store is full of histories and this is a new one; `CodecError` when JSON cannot
        carry the snapshot, `ValueError` when the key has more than 600 characters. Nothing is stored then.
        """
        return self._send(self._requests.save(key, snapshot, expected))

    def remove(self, key: str, expected: int | None = None) -> bool:
        """Forget a key (if its version is still `expected`). False: it was not there, or had another version."""
        return self._send(self._requests.remove(key, expected))

    def items(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """Every key with its snapshot, ordered by key, only those behind `after` if it is given; in pages of 500."""
        while True:
            found, after = self._send(self._requests.page(prefix, after))
            yield from found
            if after is None:
                return

    def expire(self, now: float | None = None, limit: int | None = None) -> int:
        """Drop the snapshots whose `expires_at` is `now` (epoch seconds) or earlier, 1,000 at a time; how many.

        Without `now`: by the server's clock, or the one that was given. `limit`: at most so many.
        """
        total, goes_on = 0, True
        while goes_on:
            dropped, goes_on = self._send(self._requests.expire(now, None if limit is None else limit - total))
            total += dropped
        return total

    def evicted(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """The tombstones, in the order of their keys, only those behind `after` if it is given; in pages of 500."""
        cursor, keys = b"0", set[str]()
        while True:
            cursor, found = self._send(self._requests.graves(prefix, cursor))
            keys.update(found)
            if cursor == b"0":
                break
        for page in _pages_of(keys, after):
            yield from self._send(self._requests.evicted(page))

    def open_keys(self, prefix: str, limit: int) -> list[str] | None:
        """The keys of histories and tombstones that begin with the prefix, not of completion marks; None: too many.

        Too many are more than `limit`, or so many of others that looking through them would take long.
        """
        return self._send(self._requests.open_keys(prefix, limit))

    def vetoed(self, keys: Collection[str]) -> dict[str, StoredContext]:
        """Those of the keys that have a veto, with what is stored: one round trip, however many they are.

        Those that cannot be read are left out, and logged.
        """
        return self._send(self._requests.vetoed(keys)) if keys else {}

    def open(self) -> None:
        """Ask the server for its time: a program that begins with this learns at once whether there is a server.

        A program need not: nothing is sent before the first verb.
        """
        self._send(self._requests.time())

    def close(self) -> None:
        """Close the connections, if the client was made from a URL."""
        if isinstance(self._given, str):
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        hidden = ("clock", "tombstones", "tombstone_time_to_live")
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items() if name not in hidden)
        return f"{type(self).__name__}({self._address!r}, {options})"

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self._given, str):
            raise TypeError(f"{self!r} was made with a client, which cannot be pickled: make it with a URL")
        return _restored, (type(self), self._given, self._options)

    def _send(self, request: Request[T]) -> T:
        try:
            answer = self._ask(request)
        except FAULTS as error:
            # A copy that is still on its way must find this writer's receipt: the name is not used again.
            answer = self._ask_again(request, error)
        else:
            if request.writer is not None:
                self._requests.give_back(request.writer)
        if not self._looked:
            self._look()
        return request.read(answer)

    def _ask_again(self, request: Request[Any], error: Exception) -> Any:
        """What the template decides about, as soon as there is something to decide."""
        failed = iter((error,))

        def attempt(_: RetryContext) -> Any:
            for first in failed:
                raise first
            return self._ask(request)

        try:
            return self._patient.execute(attempt)
        except FAULTS as last:
            raise worded(request.operation, request.key, last) from last

    def _ask(self, request: Request[Any]) -> Any:
        sent = monotonic()
        try:
            answer = self._execute("EVALSHA", request.script.sha, *request.arguments, **_RAW)
        except NoScriptError:
            answer = self._execute("EVAL", request.script.text, *request.arguments, **_RAW)
        if sent >= self._observe_again:
            self._observe(sent, answer)
        return answer

    def _ask_for_time(self) -> None:
        # Without patience: whoever needs it goes on without.
        request = self._requests.time()
        try:
            self._ask(request)
        except FAULTS as error:
            raise worded(request.operation, request.key, error) from error

    def _observe(self, sent: float, answer: Any) -> None:
        self._observe_again = sent + OBSERVE_EVERY
        if self.store_clock is not None:
            moment = answer[0] if type(answer) is list else answer
            self.store_clock.observe(sent, float(moment[:MOMENT]), monotonic())

    def _look(self) -> None:
        self._looked = True
        try:
            settings = self._client.config_get(*SETTINGS)
        except FAULTS as error:
            say_what_settings_mean(error, self._address)
        else:
            say_what_settings_mean(settings, self._address)


class AsyncRedisRetryContextCache(RedisRetryContextCache):
    """The same cache for `AsyncRetryTemplate` on asyncio: its verbs are coroutine functions.

    `client`: a `redis.asyncio.Redis` or `redis.asyncio.RedisCluster`, or a URL. Its connections belong to one event
    loop. Nothing is sent before the first verb.
    """

    _asynchronous: ClassVar[bool] = True

    def _template(self) -> Any:
        return AsyncRetryTemplate(name="retrykit.redis", retry_policy=self._again, back_off_policy=BACK_OFF)

    async def load(self, key: str) -> StoredContext | None:  # type: ignore[override] # awaited, as the class says
        """As `RedisRetryContextCache.load`."""
        return await self._send(self._requests.load(key))

    async def save(  # type: ignore[override] # as in `load`
        self, key: str, snapshot: Mapping[str, Any], expected: int | None
    ) -> int | None:
        """As `RedisRetryContextCache.save`."""
        return await self._send(self._requests.save(key, snapshot, expected))

    async def remove(self, key: str, expected: int | None = None) -> bool:  # type: ignore[override] # as in `load`
        """As `RedisRetryContextCache.remove`."""
        return await self._send(self._requests.remove(key, expected))

    async def items(  # type: ignore[override] # as in `load`
        self, prefix: str = "", after: str | None = None
    ) -> AsyncIterator[tuple[str, StoredContext]]:
        """As `RedisRetryContextCache.items`."""
        while True:
            found, after = await self._send(self._requests.page(prefix, after))
            for item in found:
                yield item
            if after is None:
                return

    async def expire(self, now: float | None = None, limit: int | None = None) -> int:  # type: ignore[override] # as in `load`
        """As `RedisRetryContextCache.expire`."""
        total, goes_on = 0, True
        while goes_on:
            dropped, goes_on = await self._send(self._requests.expire(now, None if limit is None else limit - total))
            total += dropped
        return total

    async def evicted(  # type: ignore[override] # as in `load`
        self, prefix: str = "", after: str | None = None
    ) -> AsyncIterator[tuple[str, StoredContext]]:
        """As `RedisRetryContextCache.evicted`."""
        cursor, keys = b"0", set[str]()
        while True:
            cursor, found = await self._send(self._requests.graves(prefix, cursor))
            keys.update(found)
            if cursor == b"0":
                break
        for page in _pages_of(keys, after):
            for item in await self._send(self._requests.evicted(page)):
                yield item

    async def open_keys(self, prefix: str, limit: int) -> list[str] | None:  # type: ignore[override] # as in `load`
        """As `RedisRetryContextCache.open_keys`."""
        return await self._send(self._requests.open_keys(prefix, limit))

    async def vetoed(self, keys: Collection[str]) -> dict[str, StoredContext]:  # type: ignore[override] # as in `load`
        """As `RedisRetryContextCache.vetoed`."""
        return await self._send(self._requests.vetoed(keys)) if keys else {}

    async def open(self) -> None:  # type: ignore[override] # as in `load`
        """Ask the server for its time, so that it is known before the first attempt: to be awaited at the start.

        Else the fence of an attempt before which nothing was asked of Redis goes by this machine's clock.
        """
        await self._send(self._requests.time())

    async def close(self) -> None:  # type: ignore[override] # as in `load`
        """Close the connections, if the client was made from a URL."""
        if isinstance(self._given, str):
            await self._client.aclose()

    def __enter__(self) -> Self:
        raise TypeError("AsyncRedisRetryContextCache is closed asynchronously: use `async with`")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, request: Request[T]) -> T:  # type: ignore[override] # as in `load`
        try:
            answer = await self._ask(request)
        except FAULTS as error:
            # A copy that is still on its way must find this writer's receipt: the name is not used again.
            answer = await self._ask_again(request, error)
        else:
            if request.writer is not None:
                self._requests.give_back(request.writer)
        if not self._looked:
            await self._look()
        return request.read(answer)

    async def _ask_again(self, request: Request[Any], error: Exception) -> Any:
        failed = iter((error,))

        async def attempt(_: RetryContext) -> Any:
            for first in failed:
                raise first
            return await self._ask(request)

        try:
            return await self._patient.execute(attempt)
        except FAULTS as last:
            raise worded(request.operation, request.key, last) from last

    async def _ask(self, request: Request[Any]) -> Any:
        sent = monotonic()
        try:
            answer = await self._execute("EVALSHA", request.script.sha, *request.arguments, **_RAW)
        except NoScriptError:
            answer = await self._execute("EVAL", request.script.text, *request.arguments, **_RAW)
        if sent >= self._observe_again:
            self._observe(sent, answer)
        return answer

    async def _look(self) -> None:  # type: ignore[override] # as in `load`
        self._looked = True
        try:
            settings = await self._client.config_get(*SETTINGS)
        except FAULTS as error:
            say_what_settings_mean(error, self._address)
        else:
            say_what_settings_mean(settings, self._address)


def _pages_of(keys: Collection[str], after: str | None) -> Iterator[list[str]]:
    wanted = sorted(key for key in keys if after is None or key > after)
    return (wanted[first : first + PAGE_SIZE] for first in range(0, len(wanted), PAGE_SIZE))


def _restored(kind: type[RedisRetryContextCache], url: str, options: dict[str, Any]) -> RedisRetryContextCache:
    return kind(url, **options)
