"""What SQLite needs to be shared by threads and processes: its settings and its write lock.

SQLAlchemy 2.1 leaves BEGIN to the driver, and Python's driver (in the transaction control it has by default) sends
one only before the first INSERT, UPDATE or DELETE, and a deferred one. A deferred transaction that has read and then
wants to write fails at once with "database is locked" when another process wrote in between, whatever the busy
timeout is. So `sqlite_engine` takes BEGIN over, and says IMMEDIATE. On an engine made elsewhere nothing is changed:
there the verbs of a cache send their own `BEGIN IMMEDIATE`.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import parse_qsl
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool, StaticPool
from sqlalchemy.util.concurrency import in_greenlet

from retrykit.check import Seconds, seconds, wrong_value
from retrykit.sql.fork import forget_at_fork
from retrykit.sql.urls import database_url, is_async, missing_driver, shown_url

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

BEGIN: Final = "retrykit_begin"
_MODES: Final = ("IMMEDIATE", "DEFERRED", "EXCLUSIVE", None)
_SYNCHRONOUS: Final = {"power": "FULL", "process": "NORMAL"}

_log = logging.getLogger("retrykit.sql")

_ours: WeakSet[Dialect] = WeakSet()
_watched: WeakSet[Pool] = WeakSet()
_files: WeakKeyDictionary[Pool, str] = WeakKeyDictionary()


def sqlite_engine(
    url: str | URL,
    *,
    busy_timeout: Seconds = 30.0,
    durability: Literal["power", "process"] = "power",
    foreign_keys: bool = True,
    **options: Any,
) -> Engine:
    """An engine for a SQLite database that threads and processes share: for the work's Sessions and the cache alike.

    Files: WAL journal; every transaction begins with BEGIN IMMEDIATE, so it waits up to `busy_timeout` seconds for
    the write lock instead of failing in the middle (read-only work:
    `engine.execution_options(retrykit_begin="DEFERRED")`). `durability`: "power" keeps what was committed through a
    loss of power (synchronous=FULL), "process" through the death of the process (NORMAL). Foreign keys are enforced.
    In memory (`:memory:`, `mode=memory`): one connection, which threads take in turn; a forked child has a copy, if no
    other thread was using it at that moment. Further options go to `sqlalchemy.create_engine`. ValueError for another
    database's URL.
    """
    place = sqlite_url(url)
    if is_async(place):
        raise wrong_value("url", "of a blocking driver (async_sqlite_engine takes the others)", shown_url(place))
    return _made(place, busy_timeout, durability, foreign_keys, options)  # type: ignore[no-any-return]


def async_sqlite_engine(
    url: str | URL,
    *,
    busy_timeout: Seconds = 30.0,
    durability: Literal["power", "process"] = "power",
    foreign_keys: bool = True,
    **options: Any,
) -> AsyncEngine:
    """As `sqlite_engine`, for `sqlite+aiosqlite://`: an AsyncEngine."""
    place = sqlite_url(url)
    if not is_async(place):
        raise wrong_value("url", "of an asynchronous driver, such as sqlite+aiosqlite", shown_url(place))
    return _made(place, busy_timeout, durability, foreign_keys, options)  # type: ignore[no-any-return]


def _made(place: URL, busy_timeout: Any, durability: Any, foreign_keys: Any, options: Any) -> Any:  # noqa: PLR0917 - the options of both kinds
    if durability not in _SYNCHRONOUS:
        raise wrong_value("durability", "one of 'power', 'process'", durability)
    waiting = seconds("busy_timeout", busy_timeout)
    if waiting < 0:
        raise wrong_value("busy_timeout", "0 or more seconds", busy_timeout)
    options.setdefault("hide_parameters", True)
    options["connect_args"] = {"timeout": waiting, "check_same_thread": False, **options.get("connect_args", {})}
    if is_in_memory(place):
        pool = AsyncAdaptedQueuePool if is_async(place) else QueuePool
        options = {"poolclass": pool, "pool_size": 1, "max_overflow": 0, **options}
    made = _created(place, options)
    engine = made if isinstance(made, Engine) else made.sync_engine
    _take_over(engine, wal=not is_in_memory(place), synchronous=_SYNCHRONOUS[durability], foreign_keys=foreign_keys)
    _ours.add(engine.dialect)
    undo_what_a_failed_commit_left(engine)
    forget_at_fork(engine)
    return made


def creator_for(url: URL) -> Callable[..., Any]:
    """`create_engine`, or for an asynchronous driver `create_async_engine`."""
    if not is_async(url):
        return create_engine
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine


def _created(place: URL, options: dict[str, Any]) -> Any:
    try:
        return creator_for(place)(place, **options)
    except ModuleNotFoundError as error:
        raise missing_driver(place, error) from error


def sqlite_url(url: str | URL) -> URL:
    """The URL, parsed. ValueError, without the password, for what is no URL or no SQLite one."""
    parsed = database_url(url)
    if parsed.get_backend_name() != "sqlite":
        raise wrong_value("url", "a sqlite URL", shown_url(parsed))
    return parsed


def is_in_memory(url: URL) -> bool:
    """Whether each connection would have a database of its own, or share one that waits for no lock."""
    name = url.database or ""
    if not name.startswith("file:"):
        return name in ("", ":memory:")
    path, _, options = name.removeprefix("file:").partition("?")
    asked = {**dict(parse_qsl(options)), **url.query}
    return path in ("", ":memory:") or asked.get("mode") == "memory" or asked.get("vfs") == "memdb"


def _take_over(engine: Engine, *, wal: bool, synchronous: str, foreign_keys: bool) -> None:
    settings = [f"PRAGMA synchronous={synchronous}", f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}"]

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # no BEGIN of the driver's own
        try:
            if wal:
                _switch_to_wal(connection, engine.dialect.loaded_dbapi.OperationalError)
            for setting in settings:
                connection.execute(setting).close()
        except BaseException:
            # The pool does not have it yet, and nobody else would close it.
            connection.close()
            raise

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        mode = connection.get_execution_options().get(BEGIN, "IMMEDIATE")
        if mode not in _MODES:
            raise wrong_value(f"execution option {BEGIN}", f"one of {_MODES}", mode)
        if mode is not None:
            connection.exec_driver_sql(f"BEGIN {mode}")


def _switch_to_wal(connection: Any, busy: type[Exception]) -> None:
    """Once per file. The switch does not wait for other connections as statements do: wait for the lock, try again."""
    for _ in range(100):
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except busy as error:
            if "locked" not in str(error):
                raise
            connection.execute("BEGIN IMMEDIATE").close()
            connection.rollback()
        else:
            return
    connection.execute("PRAGMA journal_mode=WAL").close()


def in_transaction(connection: Any) -> bool:
    """Whether a transaction is open at SQLite, whatever SQLAlchemy thinks. `connection`: the driver's."""
    beneath = getattr(connection, "driver_connection", connection)  # beneath what an async driver is dressed in
    return bool(getattr(beneath, "in_transaction", False))


def reading(engine: Engine) -> Engine:
    """The same engine for single reads: on one of ours they take no write lock, and no BEGIN at all."""
    return engine.execution_options(**{BEGIN: None})


def needs_no_begin(engine: Engine) -> bool:
    """Whether it is one of ours: without a BEGIN each statement is a transaction, which waits for the lock it needs."""
    return engine.dialect in _ours


def start_writing(connection: Connection) -> None:
    """Take the write lock, if no transaction is open at the driver: BEGIN IMMEDIATE waits, an upgrade does not."""
    if connection.dialect.name != "sqlite":
        return
    if not connection.in_transaction():
        connection.begin()
    if not in_transaction(connection.connection.dbapi_connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def file_of(connection: Connection) -> str:
    """The file beneath, as SQLite itself resolved it; "" for a database in memory. Asked once per pool."""
    pool = connection.engine.pool
    found = _files.get(pool)
    if found is None:
        file = connection.exec_driver_sql("SELECT file FROM pragma_database_list WHERE name = 'main'").scalar()
        found = _files[pool] = os.path.realpath(file) if file else ""
    return found


def check_shareable(engine: Engine) -> None:
    """Refuse an in-memory database of which every connection would see its own, empty one: ValueError."""
    pool = engine.pool
    if isinstance(pool, StaticPool):
        return
    if isinstance(pool, QueuePool) and pool.size() == 1 and pool._max_overflow == 0:  # noqa: SLF001 - not told otherwise
        return
    with reading(engine).connect() as connection:
        file = file_of(connection)
    if not file:
        advice = "give the URL 'sqlite://' instead, or poolclass=StaticPool, or use a file"
        fault = f"with {type(pool).__name__} each thread sees an empty in-memory database of its own"
        raise ValueError(f"engine: {fault}: {advice}")


def undo_what_a_failed_commit_left(engine: Engine) -> None:
    """Roll back what is still open on a connection that goes back to its pool, or is closed.

    A COMMIT that a deferred constraint fails leaves SQLite's transaction open. SQLAlchemy 2.1 holds it for ended,
    unless it is told to roll back, and hands the connection to the next one with the failed work still on it: seen by
    reads, and committed by luck.

    An asynchronous connection on which a statement was cancelled is closed while its cursors are still there: SQLite
    then keeps it, transaction and write lock included, until they are garbage and collected. Until the statement has
    come to its end it is not even closed.
    """
    if engine.pool not in _watched:
        _watched.add(engine.pool)
        event.listen(engine.pool, "reset", _roll_back_leftovers)
        if engine.dialect.is_async:
            event.listen(engine.pool, "invalidate", _interrupt)
            event.listen(engine.pool, "close", _roll_back_before_closing)


def _interrupt(connection: Any, _record: Any, _error: BaseException | None) -> None:
    beneath = getattr(connection.driver_connection, "_connection", None)
    if isinstance(beneath, sqlite3.Connection):
        beneath.interrupt()


def _roll_back_before_closing(connection: Any, _record: Any) -> None:
    # Whatever is open now: a BEGIN may be waiting for the lock. Where nobody can wait, garbage is being collected.
    if not in_greenlet():
        return
    try:
        connection.rollback()
    except Exception as error:  # noqa: BLE001 - it is to be closed all the more
        _log.warning("a SQLite connection is closed that could not be rolled back: %r", error)


def _roll_back_leftovers(connection: Any, _record: Any, state: Any) -> None:
    if in_transaction(connection) and not state.terminate_only:
        connection.rollback()
