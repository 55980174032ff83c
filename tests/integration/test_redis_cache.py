from __future__ import annotations

from contextlib import ExitStack

import pytest
import redis.asyncio

from retrykit.redis import AsyncRedisRetryContextCache, RedisRetryContextCache
from retrykit.testing import BlockingContextCache, TombstoneContract


class RedisContract(TombstoneContract):
    __test__ = False

    @pytest.fixture(autouse=True)
    def database(self, redis_server):
        """An empty database; what was opened on it is closed with the test."""
        with ExitStack() as stack:
            self.url = redis_server.fresh_database()
            self.at_the_end = stack
            yield


class TestUrl(RedisContract):
    __test__ = True

    def make_cache(self, directory, **options):
        return self.at_the_end.enter_context(
            RedisRetryContextCache(self.url, prefix=f"orders of {directory.name}", **options)
        )


class TestUrlOfTheOlderProtocol(RedisContract):
    __test__ = True

    def make_cache(self, directory, **options):
        return self.at_the_end.enter_context(
            RedisRetryContextCache(f"{self.url}?protocol=2", prefix=directory.name, **options)
        )


class TestClientThatDecodesAnswersInAnEncodingOfItsOwn(RedisContract):
    __test__ = True

    def make_cache(self, directory, **options):
        client = redis.Redis.from_url(self.url, decode_responses=True, encoding="latin-1")
        self.at_the_end.callback(client.close)
        return RedisRetryContextCache(client, prefix=directory.name, **options)


class TestAsync(RedisContract):
    __test__ = True

    def make_cache(self, directory, **options):
        cache = AsyncRedisRetryContextCache(self.url, prefix=directory.name, **options)
        return self.at_the_end.enter_context(BlockingContextCache(cache))


class TestAsyncClientThatDecodesAnswers(RedisContract):
    __test__ = True

    def make_cache(self, directory, **options):
        client = redis.asyncio.Redis.from_url(f"{self.url}?protocol=2", decode_responses=True)
        # An asynchronous client decides which cache it is.
        cache = self.at_the_end.enter_context(
            BlockingContextCache(RedisRetryContextCache(client, prefix=directory.name, **options))
        )
        self.at_the_end.callback(lambda: cache.run(client.aclose()))
        return cache
