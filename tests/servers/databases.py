"""Databases for tests of SQL stores, by name: "sqlite", "postgresql", "mariadb"; each with the tables, and empty.

On a server there is one database for a test process, whose tables are emptied for each test: making one takes longer
than most tests do.
"""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from retrykit.sql import SCHEMA_VERSION, create_tables

SERVERS = ("postgresql", "mariadb")
DATABASES = ("sqlite", *SERVERS)
DRIVERS = {
    "sqlite": ("pysqlite",),
    "postgresql": ("psycopg",),
    "mariadb": ("pymysql",),
}
ASYNC_DRIVERS = {
    "sqlite": ("aiosqlite",),
    "postgresql": ("asyncpg", "psycopg_async"),
    "mariadb": ("aiomysql", "asyncmy"),
}

_URLS = pytest.StashKey[dict[str, str]]()


def empty_database(request: pytest.FixtureRequest, name: str, driver: str | None = None) -> str:
    """The URL of an empty database, with tables if it is on a server, through a driver."""
    driver = driver or DRIVERS[name][0]
    if name == "sqlite":
        return f"sqlite+{driver}:///{request.getfixturevalue('tmp_path')}/histories.db"
    urls = request.config.stash.setdefault(_URLS, {})
    if name not in urls:
        urls[name] = _made(request.getfixturevalue(name))
    else:
        _emptied(urls[name])
    return with_driver(urls[name], driver)


def with_driver(url: str, driver: str) -> str:
    """The same database through another driver."""
    place = make_url(url)
    return place.set(drivername=f"{place.get_backend_name()}+{driver}").render_as_string(hide_password=False)


def _made(server: Any) -> str:
    url = str(server.fresh_database())
    engine = create_engine(url)
    create_tables(engine)
    engine.dispose()
    return url


def _emptied(url: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    _end_sessions(engine)
    with engine.connect() as connection:
        for table in ("rk_context", "rk_parked", "rk_job"):
            connection.execute(text(f"DELETE FROM {table}"))  # noqa: S608 - our own tables
        for table in ("orders", "customer", "work"):
            connection.execute(text(f"DROP TABLE IF EXISTS {table}"))
        connection.execute(text(f"UPDATE rk_schema SET value = {SCHEMA_VERSION} WHERE name = 'version'"))  # noqa: S608
    engine.dispose()


def _end_sessions(engine: Engine) -> None:
    """What a test that failed left open must not hold up the next one."""
    others = {
        "postgresql": "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
        "mariadb": "SELECT id FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
    }[engine.dialect.name]
    end = {"postgresql": "SELECT pg_terminate_backend({})", "mariadb": "KILL {}"}[engine.dialect.name]
    with engine.connect() as connection:
        for (session,) in connection.execute(text(others)).all():
            connection.execute(text(end.format(session)))
