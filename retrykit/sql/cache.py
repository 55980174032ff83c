"""`SqlRetryContextCache`: histories of stateful retry in a SQL database, shared by all processes that use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

from sqlalchemy import URL, Connection, Engine, Transaction
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from retrykit.cache import StoredContext
from retrykit.check import Seconds, seconds, wrong_type, wrong_value
from retrykit.clock import SYSTEM_CLOCK, Clock
from retrykit.errors import CodecError, ContextCacheError
from retrykit.sql.rows import CHUNK, PAGE, ContextRows, OnFull
from retrykit.sql.schema import open_tables
from retrykit.sql.sqlite import alone, database_of, engine_of, hint, reading, start_writing
from retrykit.sql.transaction import joinable


class _Verbs(ABC):
    """The verbs of `RetryContextCache`, each in one short piece of work on a connection."""

    _rows: ContextRows
    _url: URL

    @abstractmethod
    def _connected(self, *, write: bool) -> AbstractContextManager[Connection]:
        """The connection for one verb."""

    def load(self, key: str) -> StoredContext | None:
        """The snapshot of a key and its version; None if there is none."""
        with _faults("load", key, self._url), self._connected(write=False) as connection:
            return self._rows.load(connection, key)

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """Compare and set: store if the version is still `expected` (None: if the key is not there).

        Returns the new version; None for who lost, and then nothing was changed.

        `CacheCapacityError` when the store is full of histories and this is a new one; `CodecError` when JSON cannot
        carry the snapshot, `ValueError` when the key has more than 600 characters. Nothing is stored then.
        """
        with _faults("save", key, self._url), self._connected(write=True) as connection:
            return self._rows.save(connection, key, snapshot, expected)

    def remove(self, key: str, expected: int | None = None) -> bool:
        """Forget a key (if its version is still `expected`). False: it was not there, or had another version."""
        with _faults("remove", key, self._url), self._connected(write=True) as connection:
            return self._rows.remove(connection, key, expected)

    def items(self, prefix: str = "") -> Iterator[tuple[str, StoredContext]]:
        """Every key with its snapshot, ordered by key; read in pages of 500, between which nothing is held open."""
        after: str | None = None
        while True:
            with _faults("items", prefix, self._url), self._connected(write=False) as connection:
                page = self._rows.page(connection, prefix, after)
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1][0]

    def expire(self, now: float) -> int:
        """Drop the snapshots whose `expires_at` is `now` (epoch seconds) or earlier, 1,000 a transaction; how many."""
        total = 0
        while True:
            with _faults("expire", "", self._url), self._connected(write=True) as connection:
                dropped = self._rows.expire(connection, now)
            total += dropped
            if dropped < CHUNK:
                return total


class SqlRetryContextCache(_Verbs):
    """Histories in the table `rk_context` of a SQLite database (other databases follow).

    `engine`: a SQLAlchemy Engine, used as it is, or a URL, for which `sqlite_engine` makes one (then `engine` is
    yours to use too, and `close()` ends it). Give the work's Session the same engine or the same file: SQLite has one
    write lock, and while the work's transaction holds it only `joined` verbs can go on; they commit or roll back with
    the work, on whichever engine it is. On your own engine nothing is set; what you want is in `sqlite_engine`: WAL,
    a long busy timeout, BEGIN IMMEDIATE. Only, what a failed COMMIT left open is rolled back when its connection goes
    back to the pool: SQLAlchemy takes it for ended.

    `capacity`: how many histories are kept (exact; completion marks do not count); None: no limit. A known key is
    always updated. A new one is refused with `CacheCapacityError` (`on_full="reject"`) or pushes out the one stored
    longest ago (`"evict_oldest"`, logged), once nothing past its time is left to drop. `time_to_live`: seconds after
    its last failure at which a history may be dropped; None: never. Every 1,000th save drops up to 1,000 snapshots
    past their time; `expire` drops all. `clock` tells that time.

    Tables are made when the cache is, by one process of any number. Faults of the store are `ContextCacheError`, from
    SQLAlchemy's. Safe to use from any thread, and in a forked child, which opens connections of its own. Pickling
    needs a URL; the pickle contains it.
    """

    def __init__(
        self,
        engine: Engine | URL | str,
        *,
        capacity: int | None = 100_000,
        on_full: OnFull = "reject",
        time_to_live: Seconds | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._rows = _rules(capacity, on_full, time_to_live, clock)
        self._given = engine
        with _faults("open", "", None if isinstance(engine, str) else getattr(engine, "url", None)):
            self._engine = engine_of(engine)
        self._url = self._engine.url
        self._reader = reading(self._engine)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with _faults("open", "", self._url):
            open_tables(self._engine)
            with self._reader.connect() as connection:
                self._file = database_of(connection)

    @property
    def engine(self) -> Engine:
        """The engine; the work's Sessions may use it too."""
        return self._engine

    def joined(self, transaction: object) -> JoinedContextCache | None:
        """The same verbs inside the caller's open transaction; None if that is on another database, or AUTOCOMMIT.

        `transaction`: a Session (also scoped, also one with several binds if it has one for `rk_context`) or a
        Connection; of an AsyncSession or AsyncConnection the sync one beneath is taken, and the verbs belong inside
        its `run_sync`. It is begun if it was not. A version that a joined `save` returned holds only once that
        transaction has committed.
        """
        with _faults("join", "", self._url):
            connection = joinable(transaction, self._engine, self._file)
        return None if connection is None else JoinedContextCache(self._rows, connection)

    def close(self) -> None:
        """Close the idle connections, if the engine was made from a URL."""
        if not isinstance(self._given, Engine):
            self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        rows = self._rows
        bounds = f"capacity={rows.capacity}, on_full={rows.on_full!r}, time_to_live={rows.time_to_live}"
        return f"SqlRetryContextCache({_shown(self._url)!r}, {bounds})"

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self._given, Engine):
            raise TypeError(f"{self!r} was made with an Engine, which cannot be pickled: make it with a URL")
        rows = self._rows
        options = {
            "capacity": rows.capacity,
            "on_full": rows.on_full,
            "time_to_live": rows.time_to_live,
            "clock": rows.clock,
        }
        return _restored, (self._given, options)

    @contextmanager
    def _connected(self, *, write: bool) -> Iterator[Connection]:
        with alone(self._engine):
            if not write:
                with self._reader.connect() as connection:
                    yield connection
                return
            with self._engine.begin() as connection:
                start_writing(connection)
                yield connection


class JoinedContextCache(_Verbs):
    """The verbs of a `SqlRetryContextCache` inside somebody's open transaction: nothing here begins or commits."""

    def __init__(self, rows: ContextRows, connection: Connection) -> None:
        self._rows = rows
        self._url = connection.engine.url
        self._connection = connection
        self._transaction: Transaction | None = connection.get_transaction()

    def __repr__(self) -> str:
        return f"JoinedContextCache({_shown(self._url)!r})"

    @contextmanager
    def _connected(self, *, write: bool) -> Iterator[Connection]:
        # A Connection whose transaction is over would begin another one, that nobody commits.
        if self._transaction is None or not self._transaction.is_active:
            raise ContextCacheError("the transaction that was joined is over")
        yield self._connection


def _rules(capacity: Any, on_full: Any, time_to_live: Any, clock: Any) -> ContextRows:
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int)):
        raise wrong_type("capacity", "an int or None", capacity)
    if capacity is not None and capacity < 1:
        raise wrong_value("capacity", "at least 1", capacity)
    if on_full not in ("reject", "evict_oldest"):
        raise wrong_value("on_full", "one of 'reject', 'evict_oldest'", on_full)
    lifetime = None if time_to_live is None else seconds("time_to_live", time_to_live)
    if lifetime is not None and lifetime <= 0:
        raise wrong_value("time_to_live", "more than 0 seconds", time_to_live)
    if not isinstance(clock, Clock):
        raise wrong_type("clock", "a retrykit.Clock", clock)
    return ContextRows(capacity=capacity, on_full=on_full, time_to_live=lifetime, clock=clock)


def _restored(url: URL | str, options: dict[str, Any]) -> SqlRetryContextCache:
    return SqlRetryContextCache(url, **options)


def _shown(url: URL) -> str:
    """The URL without its password, nor the options, some of which are secrets too."""
    return url.set(query={}).render_as_string(hide_password=True)


@contextmanager
def _faults(operation: str, key: str, url: URL | None) -> Iterator[None]:
    """Word a fault of the store: the operation, the key, the database's own text; never parameters or passwords."""
    try:
        yield
    except UnicodeEncodeError as error:
        msg = f"{operation} of {key!r}: the key is no text that can be stored: {error.reason}"
        raise CodecError(msg, reason=error.reason, operation=operation, key=key) from error
    except SQLAlchemyError as error:
        told = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
        first = str(told).partition("\n")[0][:300]
        what = f"{operation} of {key!r}" if key else operation
        msg = (
            f"context cache: {what} failed: {type(told).__name__}: {first}{hint(error, url) if url is not None else ''}"
        )
        raise ContextCacheError(msg, operation=operation, key=key) from error
