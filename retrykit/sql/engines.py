"""The engine of a cache: the user's own, unchanged, or one that is made from a URL.

From the URL of a server two are made. `engine` is as SQLAlchemy makes them, for the work's Sessions. The verbs of the
cache have connections of their own, in AUTOCOMMIT mode: a verb is one statement and its transaction, so BEGIN, COMMIT
and the pool's ROLLBACK would be three journeys to the server for nothing.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from sqlalchemy import URL, Engine

from retrykit.check import shown, wrong_type
from retrykit.sql.dialects import SQLITE, database_of
from retrykit.sql.fork import forget_at_fork
from retrykit.sql.silence import limit_silence
from retrykit.sql.sqlite import async_sqlite_engine, creator_for, sqlite_engine, undo_what_a_failed_commit_left
from retrykit.sql.transaction import names_fault
from retrykit.sql.urls import database_url, is_async, missing_driver

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

CONNECTIONS: Final = 10

# A server that is gone without a word is noticed: at the start after 10 seconds, later after about a minute.
_LIBPQ: Final[dict[str, Any]] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "psycopg": _LIBPQ,
    "psycopg_async": _LIBPQ,
    "psycopg2": _LIBPQ,
    "asyncpg": {"timeout": 10},
    "pymysql": {"connect_timeout": 10},
    "aiomysql": {"connect_timeout": 10},
    "asyncmy": {"connect_timeout": 10},
}
# A statement of ours that takes so long was lost on its way. Of the work's own nobody knows how long they take.
SILENCE: Final = 60.0
_OWN_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "asyncpg": {"command_timeout": SILENCE},
    "pymysql": {"read_timeout": SILENCE, "write_timeout": SILENCE},
}


def engine_of(given: object) -> Engine | AsyncEngine:
    """The engine from an engine, a URL or its text. TypeError for anything else, ValueError for other databases."""
    if isinstance(given, str | URL):
        return _engine_for(database_url(given))
    if not (isinstance(given, Engine) or is_async_engine(given)):
        raise wrong_type("engine", "a sqlalchemy Engine or AsyncEngine, or a database URL", given)
    engine = sync_engine_of(given)
    if database_of(engine) is None:
        name = shown(engine.dialect.name)
        raise ValueError(f"engine: must be of SQLite, PostgreSQL or MariaDB; {name} is not supported")
    if (fault := names_fault(engine)) is not None:
        raise ValueError(f"engine: {fault}")
    if database_of(engine) is SQLITE:
        undo_what_a_failed_commit_left(engine)
    forget_at_fork(engine)
    return given


def is_async_engine(given: object) -> TypeGuard[AsyncEngine]:
    """Whether it is an AsyncEngine: what makes them need not be installed (greenlet), and is not loaded to ask."""
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return module is not None and isinstance(given, module.AsyncEngine)


def sync_engine_of(engine: Engine | AsyncEngine) -> Engine:
    """What runs the statements of an engine of either kind."""
    return engine if isinstance(engine, Engine) else engine.sync_engine


def own_engine(url: URL) -> Engine | AsyncEngine:
    """The second engine for the URL of a server: every statement a transaction of its own."""
    options = {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    engine = _server_engine(url, _OWN_SETTINGS, pool_size=CONNECTIONS, max_overflow=0, **options)
    if isinstance(engine, Engine) and engine.driver == "psycopg":
        limit_silence(engine, SILENCE)
    return engine


def _engine_for(url: URL) -> Engine | AsyncEngine:
    if database_of(url) is SQLITE:
        return async_sqlite_engine(url) if is_async(url) else sqlite_engine(url)
    return _server_engine(url, {})


def _server_engine(url: URL, settings: dict[str, dict[str, Any]], **options: Any) -> Engine | AsyncEngine:
    driver = url.get_dialect().driver
    wanted = _SETTINGS.get(driver, {}) | settings.get(driver, {})
    arguments = {name: value for name, value in wanted.items() if name not in url.query}
    options = {"hide_parameters": True, "pool_recycle": 3_600, "connect_args": arguments, **options}
    try:
        engine: Engine | AsyncEngine = creator_for(url)(url, **options)
    except ModuleNotFoundError as error:
        raise missing_driver(url, error) from error
    forget_at_fork(sync_engine_of(engine))
    return engine
