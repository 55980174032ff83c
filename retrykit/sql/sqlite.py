"""What SQLite needs to be shared by threads and processes: its settings, its write lock, and care at fork.

SQLAlchemy 2.1 leaves BEGIN to the driver, and Python's driver (in the transaction control it has by default) sends
one only before the first INSERT, UPDATE or DELETE, and a deferred one. A deferred transaction that has read and then
wants to write fails at once with "database is locked" when another process wrote in between, whatever the busy
timeout is. So `sqlite_engine` takes BEGIN over, and says IMMEDIATE. On an engine made elsewhere nothing is changed:
there the verbs of a cache send their own `BEGIN IMMEDIATE`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qsl
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.pool import Pool, QueuePool, StaticPool

from retrykit.check import Seconds, seconds, shown, wrong_type, wrong_value
from retrykit.errors import ContextCacheError

BEGIN: Final = "retrykit_begin"
_MODES: Final = ("IMMEDIATE", "DEFERRED", "EXCLUSIVE", None)
_SYNCHRONOUS: Final = {"power": "FULL", "process": "NORMAL"}

_known: WeakSet[Engine] = WeakSet()
_inherited: list[Pool] = []
_watched: WeakSet[Pool] = WeakSet()
_databases: WeakKeyDictionary[Pool, str] = WeakKeyDictionary()
_locks: WeakKeyDictionary[Pool, threading.RLock] = WeakKeyDictionary()
_locks_lock: Final = threading.Lock()


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
    In memory (`:memory:`, `mode=memory`): one connection, which threads take in turn. Further options go to
    `sqlalchemy.create_engine`. ValueError for another database's URL.
    """
    place = sqlite_url(url)
    if durability not in _SYNCHRONOUS:
        raise wrong_value("durability", "one of 'power', 'process'", durability)
    waiting = seconds("busy_timeout", busy_timeout)
    if waiting < 0:
        raise wrong_value("busy_timeout", "0 or more seconds", busy_timeout)
    options.setdefault("hide_parameters", True)
    options["connect_args"] = {"timeout": waiting, "check_same_thread": False, **options.get("connect_args", {})}
    if is_in_memory(place):
        options = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, **options}
    engine = create_engine(place, **options)
    _take_over(engine, wal=not is_in_memory(place), synchronous=_SYNCHRONOUS[durability], foreign_keys=foreign_keys)
    undo_what_a_failed_commit_left(engine)
    forget_at_fork(engine)
    return engine


def sqlite_url(url: str | URL) -> URL:
    """The URL, parsed. ValueError, without the password, for what is no URL or no SQLite one."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The cause quotes the text, and nobody knows where in that a password is.
        given = "a text with '@'" if "@" in str(url) else shown(url)
        raise ValueError(f"url: must be a database URL such as 'sqlite:///retrykit.db', not {given}") from None
    if parsed.get_backend_name() != "sqlite":
        place = parsed.set(query={}).render_as_string(hide_password=True)
        raise wrong_value("url", "a sqlite URL (other databases are not supported yet)", place)
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


def driver_connection(connection: Connection) -> Any:
    """The driver's own connection beneath."""
    return connection.connection.dbapi_connection


def reading(engine: Engine) -> Engine:
    """The same engine for single reads: on one of ours they take no write lock, and no BEGIN at all."""
    return engine.execution_options(**{BEGIN: None})


def start_writing(connection: Connection) -> None:
    """Take the write lock, if no transaction is open at the driver: BEGIN IMMEDIATE waits, an upgrade does not."""
    if connection.dialect.name != "sqlite":
        return
    if not connection.in_transaction():
        connection.begin()
    if not driver_connection(connection).in_transaction:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def database_of(connection: Connection) -> str:
    """The file beneath, as SQLite itself resolved it; "" for a database in memory. Asked once per pool."""
    pool = connection.engine.pool
    found = _databases.get(pool)
    if found is None:
        file = connection.exec_driver_sql("SELECT file FROM pragma_database_list WHERE name = 'main'").scalar()
        found = _databases[pool] = os.path.realpath(file) if file else ""
    return found


def check_shareable(engine: Engine) -> None:
    """Refuse an in-memory database of which every connection would see its own, empty one: ValueError."""
    pool = engine.pool
    if isinstance(pool, StaticPool):
        return
    if isinstance(pool, QueuePool) and pool.size() == 1 and pool._max_overflow == 0:  # noqa: SLF001 - not told otherwise
        return
    with reading(engine).connect() as connection:
        file = database_of(connection)
    if not file:
        advice = "give the URL 'sqlite://' instead, or poolclass=StaticPool, or use a file"
        fault = f"with {type(pool).__name__} each thread sees an empty in-memory database of its own"
        raise ValueError(f"engine: {fault}: {advice}")


@contextmanager
def alone(engine: Engine) -> Iterator[None]:
    """What a verb holds while it runs: a lock where all threads share one connection, else nothing."""
    pool = engine.pool
    if not isinstance(pool, StaticPool):
        yield
        return
    with _locks_lock:
        lock = _locks.setdefault(pool, threading.RLock())
    with lock:
        _refuse_to_disturb(pool)
        yield


def _refuse_to_disturb(pool: StaticPool) -> None:
    """On a StaticPool our COMMIT would commit, and our giving it back would roll back, whatever else is open on it."""
    record = pool.connection
    if getattr(record.dbapi_connection, "in_transaction", False):
        msg = (
            "the in-memory database has one connection for all (StaticPool) and a transaction is open on it: "
            "join that transaction, or use a file, or retrykit.sql.sqlite_engine('sqlite://')"
        )
        raise ContextCacheError(msg)


def undo_what_a_failed_commit_left(engine: Engine) -> None:
    """Roll back what is still open on a connection that goes back to its pool.

    A COMMIT that a deferred constraint fails leaves SQLite's transaction open. SQLAlchemy 2.1 holds it for ended,
    unless it is told to roll back, and hands the connection to the next one with the failed work still on it: seen by
    reads, and committed by luck.
    """
    if engine.pool not in _watched:
        _watched.add(engine.pool)
        event.listen(engine.pool, "reset", _roll_back_leftovers)


def _roll_back_leftovers(connection: Any, _record: Any, _state: Any) -> None:
    if getattr(connection, "in_transaction", False):
        connection.rollback()


def forget_at_fork(engine: Engine) -> None:
    """In a forked child, leave the parent's connections alone: two processes on one connection corrupt the file."""
    _known.add(engine)


def _leave_to_the_parent() -> None:
    for engine in list(_known):
        if isinstance(engine.pool, StaticPool) or is_in_memory(engine.url):
            continue  # a copy in this process's memory, no shared file
        # Kept, not closed: closing would touch files and locks that are the parent's.
        _inherited.append(engine.pool)
        engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


def hint(error: BaseException, url: URL) -> str:
    """What to do about a fault of SQLite's, if that can be told."""
    text = str(error)
    if "locked" in text:
        return " (the work's own transaction may hold the lock: only one on the same file can be joined)"
    if isinstance(error, OperationalError) and "unable to open" in text and url.database:
        folder = Path(url.database).absolute().parent
        return f" (in {folder})" if folder.is_dir() else f" (no directory {folder})"
    return ""


def engine_of(engine: object) -> Engine:
    """An Engine from an Engine, a URL or its text. TypeError for anything else, async engines included."""
    if isinstance(engine, str | URL):
        return sqlite_engine(engine)
    if not isinstance(engine, Engine):
        if hasattr(engine, "sync_engine"):
            raise TypeError(
                "engine: an async engine cannot run sync verbs: give a sync Engine or URL of the same database"
            )
        raise wrong_type("engine", "a sqlalchemy.Engine or a database URL", engine)
    if engine.dialect.name != "sqlite":
        raise ValueError(f"engine: only SQLite is supported yet, not {shown(engine.dialect.name)}")
    check_shareable(engine)
    undo_what_a_failed_commit_left(engine)
    forget_at_fork(engine)
    return engine
