"""Redis as one of the stores of `stores.py`: started here, filled, measured, and worked on by hand.

By hand means the scripts that retrykit itself sends, through redis-py's `Script`, and through its bare
`execute_command` on one connection for each thread.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from typing import Any

import redis
from stores_places import BARE, BARE_LOOP, BY_HAND, FRONTED, LOOP, OURS, Sent, Store
from stores_work import NAME, SECOND, Contender, Floor, Look, Loop, Ours, recorded

from retrykit import FrontContextCache
from retrykit.cache import canonical_key
from retrykit.redis import RedisRetryContextCache
from retrykit.redis.scripts import LOAD, REMOVE, SAVE
from tests.servers.redis_server import RedisServer, redis_missing

CAPACITY = 100_000
SPACE = b"{retrykit}:"
INDEXES = (SPACE + b"keys", SPACE + b"stored", SPACE + b"ends", SPACE + b"graves")
DONE = b"+"
_versions = count(2**62)
_writers = count()

# What SAVE leaves behind for one history, without the caller's data having to travel for each.
FILLING = """
local space = '{retrykit}:'
for number = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local id = redis.sha1hex(number)
  local member = ARGV[3] .. id
  redis.call('SET', space .. 'h:' .. member, string.sub(id, 1, 16) .. ARGV[4])
  redis.call('ZADD', space .. 'keys', 0, member)
  redis.call('ZADD', space .. 'stored', 1700000000 + number, member)
end
"""


# ---- by hand

Run = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], bytes]


class RedisFloor(Floor):
    """The scripts, sent by `run`. A version is that of the record: 16 hexadecimal digits."""

    def __init__(self, run: Run, stored: Mapping[str, Any]) -> None:
        super().__init__({name: snapshot.encode() for name, snapshot in stored.items()})
        self.run = run
        self.receipt = SPACE + b"w:by-hand.%d" % next(_writers)

    def insert(self, key: str, row: Any) -> None:
        self._save(key, b"", row)

    def load(self, key: str) -> bytes:
        answer = self.run(LOAD, (SPACE + b"h:" + key.encode(), *INDEXES), ())
        assert answer[17:18] == DONE
        return answer[18:]

    def update(self, key: str, version: Any, row: Any) -> Any:
        return self._save(key, version[:16], row)

    def delete(self, key: str, version: Any) -> None:
        keys = (SPACE + b"h:" + key.encode(), *INDEXES, self.receipt)
        assert self.run(REMOVE, keys, (b"%016x" % next(_versions), version[:16]))[17:18] == DONE

    def _save(self, key: str, expected: bytes, snapshot: bytes) -> bytes:
        version = b"%016x" % next(_versions)
        keys = (SPACE + b"h:" + key.encode(), *INDEXES, self.receipt)
        values = (version, expected, snapshot, b"reject", b"", b"0", CAPACITY, b"0", b"", b"", b"604800.0")
        assert self.run(SAVE, keys, values)[17:18] == DONE
        return version


class RedisLoop(Loop):
    """A loop of the scripts, however they are sent."""

    def told(self, found: bytes) -> bytes:
        return found[16:]

    def row(self, operation: str, facts: Mapping[str, Any], now: float) -> bytes:
        return json.dumps(facts, separators=(",", ":")).encode()


def scripted(client: redis.Redis) -> Run:
    """redis-py as its documentation shows it."""
    scripts = {script.sha: client.register_script(script.text) for script in (LOAD, SAVE, REMOVE)}
    return lambda script, keys, values: scripts[script.sha](keys=keys, args=values)


def bare(client: redis.Redis) -> Run:
    """The command, and nothing around it."""
    for script in (LOAD, SAVE, REMOVE):
        client.script_load(script.text)
    execute = client.execute_command
    return lambda script, keys, values: execute("EVALSHA", script.sha, len(keys), *keys, *values)


# ---- the store


class RedisStore(Store):
    """Private; every write is on the disk before it is answered."""

    title = "Redis"

    @classmethod
    def missing(cls) -> str | None:
        return redis_missing()

    def start(self) -> None:
        self.server = self.stack.enter_context(RedisServer(durable=True))
        self.admin = self.client(self.server.url())
        # It would come as soon as the file has doubled, in the middle of something.
        self.admin.config_set("auto-aof-rewrite-percentage", 0)

    def client(self, place: str, **options: Any) -> redis.Redis:
        client = redis.Redis.from_url(place, **options)
        self.stack.callback(client.close)
        return client

    @property
    def version(self) -> str:
        return str(self.admin.info("server")["redis_version"])

    def place(self) -> str:
        return self.server.fresh_database()

    def cache(self, place: str, **options: Any) -> Any:
        cache = RedisRetryContextCache(place, **options)
        self.stack.callback(cache.close)
        return cache

    def contenders(self, place: str) -> list[Contender]:
        cache = self.cache(place)
        stored = recorded(cache, self._reader(place))
        ours, fronted = Ours(cache), Ours(FrontContextCache(self.cache(place)))
        by_hand = scripted(self.client(place))

        def bare_floor(stack: ExitStack) -> RedisFloor:
            client = redis.Redis.from_url(place, single_connection_client=True)
            stack.callback(client.close)
            return RedisFloor(bare(client), stored)

        return [
            Contender(OURS, lambda _: ours, "retrykit"),
            Contender(FRONTED, lambda _: fronted, "retrykit"),
            Contender(LOOP, lambda _: RedisLoop(RedisFloor(by_hand, stored)), "redis", by_hand=True),
            Contender(BARE_LOOP, lambda stack: RedisLoop(bare_floor(stack)), "redis", by_hand=True),
            Contender(BY_HAND, lambda _: RedisFloor(by_hand, stored), "redis", by_hand=True),
            Contender(BARE, bare_floor, "redis", by_hand=True),
        ]

    def _reader(self, place: str) -> Callable[[str], str]:
        client = self.client(place)
        return lambda key: client.get(SPACE + b"h:" + key.encode())[16:].decode()

    def look(self, place: str) -> Look:
        cache = self.cache(place)

        def look(prefix: str) -> list[tuple[Any, ...]]:
            # Versions are random: how often a history was stored they do not tell.
            return [
                (stored.snapshot["retry_count"], None, len(json.dumps(stored.snapshot)))
                for _, stored in cache.items(prefix)
            ]

        return look

    def fill(self, place: str, first: int, last: int) -> None:
        client = self.client(place)
        snapshot = recorded(self.cache(place), self._reader(place))[SECOND]
        filling = client.register_script(FILLING)
        for begin in range(first, last + 1, 5_000):
            filling(args=[begin, min(last, begin + 4_999), canonical_key(NAME, ""), snapshot])

    def settled(self, place: str) -> None:
        """It is done when it is answered."""

    def key(self, number: int) -> str:
        return canonical_key(NAME, hashlib.sha1(str(number).encode()).hexdigest())  # noqa: S324 - to scatter keys

    def size(self, place: str) -> int:
        return int(self.admin.info("memory")["used_memory"])

    def counting(self) -> AbstractContextManager[Callable[[], Sent]]:
        return self._counting()

    @contextmanager
    def _counting(self) -> Iterator[Callable[[], Sent]]:
        def take() -> Sent:
            stats = self.admin.info("commandstats")
            self.admin.config_resetstat()
            # What scripts call is listed too: it does not travel.
            calls = {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval")}
            return Sent([name for name, times in calls.items() for _ in range(times)])

        take()
        yield take

    def transaction(self, cache: Any) -> None:
        """There is none that work and history could share."""

    def do_work(self, transaction: Any) -> None:
        """Nor a statement in it."""
