"""`SqlRetryContextCache`: histories of stateful retry in a SQL database, shared by all processes that use it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, overload
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine, Transaction

from retrykit.cache import StoredContext
from retrykit.check import Seconds, seconds, wrong_type, wrong_value
from retrykit.clock import Clock, StoreClock
from retrykit.errors import ContextCacheError
from retrykit.sql.capacity import OnFull
from retrykit.sql.connections import Connections, connections_of
from retrykit.sql.dialects import Database, database_of
from retrykit.sql.dropping import CHUNK
from retrykit.sql.engines import engine_of, is_async_engine, own_engine, sync_engine_of
from retrykit.sql.faults import STORE_FAULTS, worded, wording
from retrykit.sql.opening import opened
from retrykit.sql.places import Place
from retrykit.sql.resilience import resilience
from retrykit.sql.rows import PAGE, ContextRows, Page, checked, is_used_up, readable, rows_for
from retrykit.sql.transaction import commits_at_once, joinable
from retrykit.sql.urls import database_url, is_async, shown_url
from retrykit.tombstone import WEEK, checked_tombstones

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")
Kind = Literal["reading", "single", "several"]

PATIENCE: Final = 5.0

logger = logging.getLogger("retrykit.sql")

_SEVERAL: Final = (
    "the work of a Session on several connections, one of them of engine %s, is not joined, so its effects happen at "
    "least once: it commits one connection after the other, and what commits here could stay where the work is lost. "
    "Give the work a Session of its own for this database, or make it twophase=True"
)


class _Verbs(ABC):
    """The verbs of `RetryContextCache`, each in one short piece of work on a connection."""

    _rows: ContextRows
    _url: URL

    @abstractmethod
    def _perform(self, kind: Kind, work: Callable[[Connection, bool], T]) -> T:
        """Do the work on a connection of that kind. Its second argument: whether it may have been done before."""

    def load(self, key: str) -> StoredContext | None:
        """The snapshot of a key and its version; None if there is none."""
        rows = self._rows
        readable(key)
        try:
            return self._perform("reading", lambda connection, _: rows.load(connection, key))
        except STORE_FAULTS as error:
            raise worded(error, "load", key, self._url) from error

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        """Compare and set: store if the version is still `expected` (None: if the key is not there).

        Returns the new version; None for who lost, and then nothing was changed.

        `CacheCapacityError` when the store is full of histories and this is a new one; `CodecError` when JSON cannot
        carry the snapshot or text the key, `ValueError` when the key has more than 600 characters. Nothing is stored
        then.
        """
        rows = self._rows
        row = rows.row(checked(key), snapshot)
        kind: Kind = "single" if expected is None or not is_used_up(expected) else "several"
        try:
            return self._perform(kind, lambda connection, again: rows.save(connection, row, expected, again=again))
        except STORE_FAULTS as error:
            raise worded(error, "save", key, self._url) from error

    def remove(self, key: str, expected: int | None = None) -> bool:
        """Forget a key (if its version is still `expected`). False: it was not there, or had another version."""
        rows = self._rows
        readable(key)
        try:
            return self._perform(
                "single", lambda connection, again: rows.remove(connection, key, expected, again=again)
            )
        except STORE_FAULTS as error:
            raise worded(error, "remove", key, self._url) from error

    def items(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """Every key with its snapshot, ordered by key, from the one behind `after` on.

        Read in pages of 500, between which nothing is held open.
        """
        return self._pages("items", prefix, after)

    def _pages(self, verb: str, prefix: str, after: str | None) -> Iterator[tuple[str, StoredContext]]:
        while True:
            page = self._page(verb, prefix, after)
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1][0]

    def _page(self, verb: str, prefix: str, after: str | None) -> Page:
        readable(prefix)
        rows, evicted = self._rows, verb == "evicted"
        with wording(verb, prefix, self._url):
            return self._perform("reading", lambda connection, _: rows.page(connection, prefix, after, evicted=evicted))

    def expire(self, now: float | None = None, limit: int | None = None) -> int:
        """Drop the snapshots whose `expires_at` is `now` (epoch seconds) or earlier, 1,000 a transaction; how many.

        `now=None`: by the store's own time. `limit`: at most so many.
        """
        total = 0
        while limit is None or total < limit:
            chunk = CHUNK if limit is None else min(CHUNK, limit - total)
            dropped = self._expire(now, chunk)
            total += dropped
            if dropped < chunk:
                break
        self._trim(total)
        return total

    def _trim(self, dropped: int) -> None:
        """What was buried may be too much: that is looked at where it is no part of somebody's transaction."""
        rows = self._rows
        if not rows.within and (rows.pruning.buried or (dropped and not rows.tombstones)):
            with wording("expire", "", self._url):
                self._perform("single", lambda connection, _: rows.trim(connection))

    def _expire(self, now: float | None, chunk: int) -> int:
        rows = self._rows
        with wording("expire", "", self._url):
            return self._perform(
                "single",
                lambda connection, _: rows.expire(connection, rows.now() if now is None else now, chunk),
            )


class SqlRetryContextCache(_Verbs):
    """Histories in the table `rk_context` of a SQLite, PostgreSQL (15 or newer) or MariaDB (10.11 or newer) database.

    `engine`: a SQLAlchemy Engine, used as it is, or a URL, for which one is made (then `engine` is yours to use too,
    and `close()` ends it). An AsyncEngine, or the URL of an asynchronous driver, gives an `AsyncSqlRetryContextCache`.
    Give the work's Session the same engine, or one of the same database: then what is `joined` commits or rolls back
    with the work.

    SQLite has one write lock, and while the work's transaction holds it only `joined` verbs can go on. On your own
    engine nothing is set; what you want is in `sqlite_engine`: WAL, a long busy timeout, BEGIN IMMEDIATE. Only, what a
    failed COMMIT left open is rolled back when its connection goes back to the pool: SQLAlchemy takes it for ended.
    There the tables are made when the cache is, by one process of any number; on servers `retrykit db upgrade` makes
    them.

    `capacity`: how many histories are kept (completion marks do not count); None: no limit. On SQLite it is exact, on
    servers each process beyond the first may exceed it by a hundredth. A known key is always updated. A new one is
    refused with `CacheCapacityError` (`on_full="reject"`) or pushes out the one stored longest ago, to the minute
    (`"evict_oldest"`, logged; one with a veto only when all have one), once nothing past its time is left to drop.
    `time_to_live`: seconds after its last failure at which a history may be dropped, if it has no veto; None: never.
    Every 1,000th save drops up to 1,000 snapshots past their time; `expire` drops all. What capacity or time-to-live
    drops leaves a tombstone, from which its count goes on; what comes back from one needs room as a new key does.
    `tombstones`: how many are kept (None: as many as `capacity`, or 100,000; 0: none), which each process may exceed by
    a hundredth; `tombstone_time_to_live`: for how many seconds (None: until there are too many).

    On servers the server's clock decides what is over (`store_clock`), unless `clock` is given. When a connection is
    lost, the server starts or ends, or a deadlock comes up, a verb is tried again for up to `patience` seconds; that
    happens to `joined` verbs never. Other faults of the store, and those that last, are `ContextCacheError`, from
    SQLAlchemy's. Safe to use from any thread, and in a forked child, which opens connections of its own. Pickling
    needs a URL; the pickle contains it.
    """

    _in_loop = False

    @overload
    def __new__(cls, engine: Engine | URL | str, **options: Any) -> Self: ...

    @overload
    def __new__(cls, engine: AsyncEngine, **options: Any) -> Any: ...

    def __new__(cls, engine: Any, **options: Any) -> Any:  # noqa: ARG004 - they are __init__'s
        """One of the kind that the engine is."""
        kind: type[SqlRetryContextCache] = cls
        if cls is SqlRetryContextCache and _is_for_a_loop(engine):
            from retrykit.sql.asynchronous import AsyncSqlRetryContextCache

            kind = AsyncSqlRetryContextCache
        return super().__new__(kind)

    def __init__(
        self,
        engine: Engine | AsyncEngine | URL | str,
        *,
        capacity: int | None = 100_000,
        on_full: OnFull = "reject",
        time_to_live: Seconds | None = None,
        tombstones: int | None = None,
        tombstone_time_to_live: Seconds | None = WEEK,
        clock: Clock | None = None,
        patience: Seconds = PATIENCE,
    ) -> None:
        self._options = {
            **_options(capacity, on_full, time_to_live, clock),
            **checked_tombstones(tombstones, tombstone_time_to_live),
        }
        self._patience = _patience(patience)
        self._given = engine
        self._engine = engine_of(engine)
        self._own: Engine | AsyncEngine | None = None
        beneath = sync_engine_of(self._engine)
        self._url = beneath.url
        self._database: Database = database_of(beneath)  # type: ignore[assignment] # engine_of has asked
        if self._database.is_server and isinstance(engine, URL | str):
            self._own = own_engine(beneath.url)
        self._rows = rows_for(self._database, **self._options)
        self._rows_within = self._rows.in_a_transaction()
        self._connections = self._connect()
        evicts = self._rows.on_full == "evict_oldest"
        self._resilience = resilience(self._database, self._patience, evicts=evicts, in_loop=self._in_loop)
        self._place: Place | None = None
        self._told: WeakSet[Engine] = WeakSet()
        self._start()

    def _connect(self) -> Connections:
        own = None if self._own is None else sync_engine_of(self._own)
        return connections_of(sync_engine_of(self._engine), self._database, own, in_loop=self._in_loop)

    def _start(self) -> None:
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> Place:
        """Look whether the tables are there, and where; once."""
        if self._place is None:
            with wording("open", "", self._url):
                self._place = self._resilience.run(
                    lambda _: opened(sync_engine_of(self._engine), self._connections, self._database, self._rows)
                )
        return self._place

    @property
    def engine(self) -> Engine:
        """The engine; the work's Sessions may use it too."""
        return self._engine  # type: ignore[return-value] # an AsyncEngine makes this an AsyncSqlRetryContextCache

    @property
    def store_clock(self) -> StoreClock | None:
        """The server's time, as it is known here; None on SQLite, and where `clock` decides."""
        return self._rows.store_clock

    @property
    def capacity(self) -> int | None:
        """How many histories are kept."""
        return self._rows.capacity

    @property
    def time_to_live(self) -> float | None:
        """Seconds after its last failure at which a history may be dropped."""
        return self._rows.time_to_live

    @property
    def on_full(self) -> OnFull:
        """What happens to a new key in a full store."""
        return self._rows.on_full

    @property
    def tombstones(self) -> int:
        """How many tombstones are kept."""
        return self._rows.tombstones

    @property
    def may_forget(self) -> bool:
        """Whether a history can vanish although nobody settled it."""
        return self._rows.forgets

    def open_keys(self, prefix: str, limit: int) -> list[str] | None:
        """The keys of histories and tombstones that begin with the prefix; None when there are more than `limit`.

        Completion marks are left out. None, too, when there are more than 10,000 (and ten times `limit`) of all names:
        they would have to be looked through.
        """
        readable(prefix)
        with wording("open_keys", prefix, self._url):
            return self._perform("reading", lambda connection, _: self._rows.open_keys(connection, prefix, limit))

    def evicted(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        """The tombstones, in the order of their keys, read as `items` are."""
        return self._pages("evicted", prefix, after)

    def vetoed(self, keys: Collection[str]) -> dict[str, StoredContext]:
        """Those of the keys that have a veto, with what is stored: one statement, however many they are.

        Those that cannot be read are left out, and logged.
        """
        for key in keys:
            checked(key)
        with wording("vetoed", "", self._url):
            return self._perform("reading", lambda connection, _: self._rows.vetoed(connection, keys)) if keys else {}

    def joined(self, transaction: object) -> JoinedContextCache | None:
        """The same verbs inside the caller's open transaction; None if that is on another database, or AUTOCOMMIT.

        `transaction`: a Session (also scoped, also one with several binds if it has one for `rk_context`) or a
        Connection; of an AsyncSession or AsyncConnection the sync one beneath is taken, and the verbs belong inside
        its `run_sync`. It is begun if it was not. A version that a joined `save` returned holds only once that
        transaction has committed.

        None, too, for a Session that works on several connections: it commits one after the other, so what is saved
        here could stay where the work is lost. A warning says so, once for the engine (`twophase=True` makes it one
        commit, and is joined). A Session that comes to a second connection only later is refused by `save` and
        `remove`, with a `ContextCacheError`.
        """
        try:
            connection = joinable(transaction, sync_engine_of(self._engine), self._open())
        except STORE_FAULTS as error:
            raise worded(error, "join", "", self._url) from error
        if connection is None:
            return None
        if not commits_at_once(transaction):
            self._tell_of_several(connection)
            return None
        return JoinedContextCache(self._rows_within, connection, transaction)

    def _tell_of_several(self, connection: Connection) -> None:
        if connection.engine not in self._told:
            self._told.add(connection.engine)
            logger.warning(_SEVERAL, shown_url(connection.engine.url))

    def _perform(self, kind: Kind, work: Callable[[Connection, bool], T]) -> T:
        opener = getattr(self._connections, kind)

        def attempt(again: bool) -> T:  # noqa: FBT001 - as resilience calls it
            with opener() as connection:
                return work(connection, again)

        return self._resilience.run(attempt)

    def close(self) -> None:
        """Close the idle connections, if the engine was made from a URL."""
        if isinstance(self._given, URL | str):
            for engine in (self._engine, self._own):
                if engine is not None:
                    sync_engine_of(engine).dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        rows = self._rows
        bounds = f"capacity={rows.capacity}, on_full={rows.on_full!r}, time_to_live={rows.time_to_live}"
        return f"{type(self).__name__}({shown_url(self._url)!r}, {bounds})"

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self._given, URL | str):
            raise TypeError(f"{self!r} was made with an Engine, which cannot be pickled: make it with a URL")
        return _restored, (self._given, {**self._options, "patience": self._patience})


class JoinedContextCache(_Verbs):
    """The verbs of a `SqlRetryContextCache` inside somebody's open transaction: nothing here begins or commits."""

    def __init__(self, rows: ContextRows, connection: Connection, handle: object) -> None:
        self._rows = rows
        self._url = connection.engine.url
        self._connection = connection
        self._handle = handle
        self._transaction: Transaction | None = connection.get_transaction()

    def __repr__(self) -> str:
        return f"JoinedContextCache({shown_url(self._url)!r})"

    def _perform(self, kind: Kind, work: Callable[[Connection, bool], T]) -> T:
        # A Connection whose transaction is over would begin another one, that nobody commits.
        if self._transaction is None or not self._transaction.is_active:
            raise ContextCacheError("the transaction that was joined is over")
        if kind != "reading" and not commits_at_once(self._handle):
            raise ContextCacheError(
                "the Session that was joined works on several connections by now, and commits one after the other: "
                "what is saved here could stay where the work is lost"
            )
        # It is lost with its connection: nothing is tried again.
        return work(self._connection, False)


def _is_for_a_loop(engine: Any) -> bool:
    return is_async_engine(engine) or (isinstance(engine, str | URL) and is_async(database_url(engine)))


def _options(capacity: Any, on_full: Any, time_to_live: Any, clock: Any) -> dict[str, Any]:
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int)):
        raise wrong_type("capacity", "an int or None", capacity)
    if capacity is not None and capacity < 1:
        raise wrong_value("capacity", "at least 1", capacity)
    if on_full not in ("reject", "evict_oldest"):
        raise wrong_value("on_full", "one of 'reject', 'evict_oldest'", on_full)
    lifetime = None if time_to_live is None else seconds("time_to_live", time_to_live)
    if lifetime is not None and lifetime <= 0:
        raise wrong_value("time_to_live", "more than 0 seconds", time_to_live)
    if clock is not None and not isinstance(clock, Clock):
        raise wrong_type("clock", "a retrykit.Clock", clock)
    return {"capacity": capacity, "on_full": on_full, "time_to_live": lifetime, "clock": clock}


def _patience(given: Any) -> float:
    patience = seconds("patience", given)
    if patience < 0:
        raise wrong_value("patience", "0 or more seconds", given)
    return patience


def _restored(url: URL | str, options: dict[str, Any]) -> SqlRetryContextCache:
    return SqlRetryContextCache(url, **options)
