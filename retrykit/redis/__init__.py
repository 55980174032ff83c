"""Histories in Redis or Valkey, shared by all processes that use the same prefix."""

from __future__ import annotations

try:
    import redis as _redis  # noqa: F401 - asked for first, so that its absence gives one clear error
except ModuleNotFoundError as error:
    if error.name != "redis":
        raise
    msg = 'retrykit.redis keeps histories in Redis and needs redis-py: pip install "retrykit[redis]"'
    raise ModuleNotFoundError(msg, name="redis") from error

from retrykit.redis.cache import AsyncRedisRetryContextCache, RedisRetryContextCache

__all__ = ["AsyncRedisRetryContextCache", "RedisRetryContextCache"]
