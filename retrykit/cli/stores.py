"""Opening the store that a URL names, for commands: what is not there is not made."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode

import attrs

from retrykit.histories import Histories

if TYPE_CHECKING:
    from sqlalchemy import URL

SCHEMES: Final = "sqlite:///FILE, postgresql://…, mariadb://… or redis://…"
# A command does one thing after the other: where the application's URL names an asynchronous driver, or none, it takes
# the one that the extra brings.
_DRIVERS: Final = {"postgresql": "psycopg", "postgres": "psycopg", "mariadb": "pymysql", "mysql": "pymysql"}
_ASYNC: Final = frozenset({"", "aiomysql", "asyncmy", "asyncpg", "psycopg_async"})
_REDIS: Final = frozenset({"redis", "rediss", "valkey", "valkeys", "unix"})


class StoreError(Exception):
    """A URL of no store that can be; the text says why, without a password."""


class StoreMissingError(StoreError):
    """There is no store at a URL that could be one of a store."""


@attrs.frozen
class Store:
    """An open store: its histories, and what else there is in a SQL database."""

    cache: Any
    histories: Histories

    @property
    def engine(self) -> Any:
        """SQLAlchemy's engine; `StoreError` for a store that is no SQL database."""
        engine = getattr(self.cache, "engine", None)
        if engine is None:
            raise StoreError("parked items are kept in a SQL database")
        return engine


@contextmanager
def opened(url: str) -> Iterator[Store]:
    """The store at a URL, closed at the end.

    `StoreError` for a URL of no store, `StoreMissingError` for one that is not there, or whose driver is not installed;
    `RetryError` for one that cannot be used.
    """
    try:
        cache = _cache_at(url)
    except ImportError as error:
        # Its words say what to install.
        raise StoreMissingError(str(error)) from error
    except ValueError as error:
        raise StoreError(str(error)) from error
    with closing(cache), _without_advice():
        yield Store(cache, Histories(cache))


@contextmanager
def _without_advice() -> Iterator[None]:
    """What a server's settings mean is for the program to hear that keeps histories there, not for every command."""
    logger = logging.getLogger("retrykit.redis")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def with_driver(url: str) -> str:
    """The URL of a database, with a driver for blocking calls."""
    scheme, found, place = url.partition("://")
    backend, _, driver = scheme.partition("+")
    if backend == "sqlite":
        return f"sqlite{found}{place}"
    if backend not in _DRIVERS or driver not in _ASYNC:
        return url
    return f"{'postgresql' if backend == 'postgres' else backend}+{_DRIVERS[backend]}{found}{place}"


def _cache_at(url: str) -> Any:
    scheme, found, _ = url.partition("://")
    if found and scheme in _REDIS:
        return _redis_at(url)
    if not found or scheme.partition("+")[0] not in ("sqlite", *_DRIVERS):
        raise StoreError(f"the URL of a store is {SCHEMES}")
    return _sql_at(with_driver(url))


def _sql_at(url: str) -> Any:
    from retrykit.sql import SqlRetryContextCache
    from retrykit.sql.urls import database_url

    place = database_url(url)
    if place.password == "***":  # noqa: S105 - what is shown where a password was
        raise StoreError("this URL was printed without its password: RETRYKIT_STORE may have the whole one")
    if place.get_backend_name() == "sqlite":
        _check_file(place)
    # What the application's own cache refuses is its own rule: a veto of an operator is stored in any case.
    return SqlRetryContextCache(url, capacity=None)


def _redis_at(url: str) -> Any:
    from retrykit.redis import RedisRetryContextCache

    # Of its options one is the cache's own, the others are redis-py's.
    bare, _, query = url.partition("?")
    options = parse_qsl(query)
    prefix = dict(options).get("prefix", "retrykit")
    others = urlencode([option for option in options if option[0] != "prefix"])
    return RedisRetryContextCache(f"{bare}{'?' if others else ''}{others}", prefix=prefix, capacity=None)


def _check_file(place: URL) -> None:
    """Refuse a file that is not there, or is none of ours, before SQLite makes it or anything is written into it."""
    from retrykit.sql.sqlite import is_in_memory

    if is_in_memory(place):
        raise StoreError("a database in memory is nobody else's: give the file")
    name = (place.database or "").removeprefix("file:").partition("?")[0]
    path = Path(name).absolute()
    if not path.is_file():
        raise StoreMissingError(f"there is no file {path}")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'rk_schema'").fetchone()
    except sqlite3.Error as error:
        raise StoreMissingError(f"{path} cannot be read as a SQLite database: {error}") from error
    if found is None:
        raise StoreMissingError(f"there are no tables of retrykit in {path}")
