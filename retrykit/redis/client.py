"""Clients of redis-py: made from a URL, told from one another, and what their faults mean."""

from __future__ import annotations

import logging
from typing import Any, Final

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.check import seconds, wrong_type, wrong_value
from retrykit.errors import ContextCacheError
from retrykit.policy import (
    CompositeRetryPolicy,
    NeverRetryPolicy,
    PredicateRetryPolicy,
    RetryPolicy,
    TimeoutRetryPolicy,
)

logger = logging.getLogger("retrykit.redis")

TIMEOUT: Final = 5.0
"""Seconds that a client made from a URL waits for a connection, and for an answer, unless the URL says otherwise."""

SCHEMES: Final = ("redis://", "rediss://", "unix://", "valkey://", "valkeys://")
FAULTS: Final = (exceptions.RedisError, OSError)
BACK_OFF: Final = ExponentialBackOffPolicy(initial=0.01, max_interval=0.5, jitter="equal")

_SYNC: Final = (redis.Redis, redis.RedisCluster)
_ASYNC: Final = (redis.asyncio.Redis, redis.asyncio.RedisCluster)

# Of the connection errors these are final: another try says the same again.
_FINAL: Final = (exceptions.AuthenticationError, exceptions.AuthorizationError)
_PASSING: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
    exceptions.ClusterError,
    exceptions.SlotNotCoveredError,
    OSError,
)
# Answers that redis-py has no class for: a long script is running; too few replicas are connected just now.
_PASSING_ANSWERS: Final = ("BUSY ", "NOREPLICAS ")


def is_async(client: object) -> bool:
    """Whether it is a client whose commands are awaited."""
    return isinstance(client, _ASYNC)


def client_of(given: Any, *, asynchronous: bool) -> Any:
    """The client itself, or one made from a URL.

    Nothing is changed on a client that was given. One that is made here sends a command once: it is this cache that
    tries again, for as long as its patience lasts.
    """
    if isinstance(given, str):
        return _from_url(given, asynchronous=asynchronous)
    # A pipeline is a client to redis-py, and answers nothing before it is executed.
    if not isinstance(given, _ASYNC if asynchronous else _SYNC) or hasattr(given, "command_stack"):
        kinds = "redis.asyncio.Redis or RedisCluster" if asynchronous else "redis.Redis or RedisCluster"
        raise wrong_type("client", f"a URL, or a {kinds}", given)
    return given


def _from_url(url: str, *, asynchronous: bool) -> Any:
    # Neither the URL nor what redis-py says about it: the password may be in both.
    if not url.startswith(SCHEMES):
        raise ValueError(f"client: must be a client of redis-py or a URL that begins with {', '.join(SCHEMES)}")
    # redis-py speaks with Valkey, and does not know it by name.
    url = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
    kind = redis.asyncio.Redis if asynchronous else redis.Redis
    retry = (AsyncRetry if asynchronous else Retry)(NoBackoff(), 0)
    try:
        client = kind.from_url(url, retry=retry, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
        # Made and thrown away unconnected: an option that no connection knows is refused now, not at the first use.
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, NameError, exceptions.RedisError):
        # NameError: what some versions of redis-py meet when the protocol is no number.
        raise ValueError(
            "client: redis-py cannot read the URL: "
            "its port and database must be numbers, special characters of a password are written as %XX, "
            "and its options are those of a connection"
        ) from None
    return client


def address_of(client: Any) -> str:
    """Where the client leads to, as a URL without secrets."""
    pool: Any = getattr(client, "connection_pool", None)
    known = getattr(pool, "connection_kwargs", {})
    database = known.get("db") or 0
    if "path" in known:
        return f"unix://{known['path']}?db={database}"
    if "host" not in known:
        # Of a cluster, or found by sentinels: the client knows by itself.
        return type(client).__name__ if pool is None else type(pool).__name__
    encrypted = issubclass(pool.connection_class, (redis.SSLConnection, redis.asyncio.SSLConnection))
    host = f"[{known['host']}]" if ":" in known["host"] else known["host"]
    return f"{'rediss' if encrypted else 'redis'}://{host}:{known.get('port', 6379)}/{database}"


def patience_of(value: Any) -> RetryPolicy:
    """The policy for verbs that met a fault which may pass."""
    patience = seconds("patience", value)
    if patience < 0:
        raise wrong_value("patience", "at least 0 seconds", value)
    if not patience:
        return NeverRetryPolicy()
    return CompositeRetryPolicy((PredicateRetryPolicy(may_pass), TimeoutRetryPolicy(patience)))


def may_pass(error: BaseException) -> bool:
    """Whether the same request may be answered if it is sent again: lost connections, starting servers, failovers."""
    if isinstance(error, exceptions.ResponseError) and str(error).startswith(_PASSING_ANSWERS):
        return True
    return isinstance(error, _PASSING) and not isinstance(error, _FINAL)


def worded(operation: str, key: str, error: BaseException) -> ContextCacheError:
    """A fault of the store in words: the operation, the key, the server's own text; never parameters or passwords."""
    what = f"{operation} of {key!r}" if key else operation
    told = str(error).partition("\n")[0][:300]
    msg = f"context cache: {what} failed: {type(error).__name__}: {told}"
    return ContextCacheError(msg, operation=operation, key=key)


def say_what_settings_mean(settings: Any, address: str) -> None:
    """Warn of settings that let the server forget histories; whoever may not ask is told nothing."""
    if isinstance(settings, Exception):
        logger.debug("%s does not show its settings: %s", address, settings)
        return
    known = {_text(name): _text(value) for name, value in settings.items()}
    policy = known.get("maxmemory-policy", "noeviction")
    if policy != "noeviction":
        logger.warning(
            "%s throws histories away when its memory is full (maxmemory-policy %s), and such an item begins at "
            "attempt 1 again: set maxmemory-policy noeviction, or give the histories a server of their own",
            address,
            policy,
        )
    if known.get("appendonly", "yes") != "yes":
        logger.warning(
            "%s keeps no append-only file (appendonly no): after a restart it has forgotten what was stored since its "
            "last snapshot; set appendonly yes",
            address,
        )


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
