"""The SQL stores of `stores.py`: each started here, with tables, and filled, measured, counted."""

from __future__ import annotations

import hashlib
import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    Table,
    bindparam,
    create_engine,
    event,
    insert,
    literal_column,
    make_url,
    select,
    text,
)
from sqlalchemy.orm import sessionmaker
from stores_places import BARE, BARE_LOOP, BY_HAND, FRONTED, LOOP, ON_ENGINE, OURS, Sent, Store
from stores_sql_floor import BareFloor, CoreFloor, SqlLoop
from stores_work import NAME, SECOND, Contender, Look, Ours, recorded

from retrykit import FrontContextCache
from retrykit.cache import canonical_key
from retrykit.sql import SqlRetryContextCache, create_tables, rk_context, sqlite_engine
from tests.servers.mariadb import MariaDb, mariadb_missing
from tests.servers.postgresql import PostgreSql, postgresql_missing

POOL = 10
work = Table("work", MetaData(), Column("done", Integer))
# A version is the id of a row and its revision, which goes up by two with every history that is stored.
REVISIONS = 2**24


class SqlStore(Store):
    """What the SQL stores have in common."""

    scattered: ClassVar[str]
    numbers: ClassVar[str]

    def place(self) -> str:
        place = self.new_database()
        engine = self.engine(place)
        create_tables(engine)
        with engine.begin() as connection:
            work.create(connection)
        return place

    @abstractmethod
    def new_database(self) -> str: ...

    @abstractmethod
    def connect(self, place: str) -> Any:
        """A connection of the bare driver, each of whose statements is a transaction unless BEGIN says otherwise."""

    def engine(self, place: str, **options: Any) -> Engine:
        """An engine as its users make it."""
        engine = create_engine(place, **options)
        self.stack.callback(engine.dispose)
        return engine

    def autocommitting(self, place: str) -> Engine:
        """An engine for single statements."""
        return self.engine(
            place, pool_size=POOL, max_overflow=0, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True
        )

    def cache(self, place: str, **options: Any) -> Any:
        cache = SqlRetryContextCache(place, **options)
        self.stack.callback(cache.close)
        return cache

    def contenders(self, place: str) -> list[Contender]:
        cache = self.cache(place)
        stored = recorded(cache, self._reader(place))
        ours, fronted = Ours(cache), Ours(FrontContextCache(self.cache(place)))
        core = CoreFloor(self.autocommitting(place), stored)
        loop = SqlLoop(core)
        return [
            Contender(OURS, lambda _: ours, "retrykit"),
            Contender(FRONTED, lambda _: fronted, "retrykit"),
            *self.more_of_ours(place),
            Contender(LOOP, lambda _: loop, "SQLAlchemy", by_hand=True),
            Contender(BARE_LOOP, lambda stack: SqlLoop(self._bare(stack, place, stored)), self.driver, by_hand=True),
            Contender(BY_HAND, lambda _: core, "SQLAlchemy", by_hand=True),
            Contender(BARE, lambda stack: self._bare(stack, place, stored), self.driver, by_hand=True),
        ]

    driver: ClassVar[str]

    def more_of_ours(self, place: str) -> list[Contender]:
        ours = Ours(SqlRetryContextCache(self.engine(place, pool_size=POOL)))
        return [Contender(ON_ENGINE, lambda _: ours, "retrykit")]

    def _bare(self, stack: ExitStack, place: str, stored: Mapping[str, Any]) -> BareFloor:
        connection = self.connect(place)
        stack.callback(connection.close)
        return BareFloor(connection, self.engine(place), stored)

    def _reader(self, place: str) -> Callable[[str], dict[str, Any]]:
        engine = self.autocommitting(place)

        def read(key: str) -> dict[str, Any]:
            with engine.connect() as connection:
                row = connection.execute(select(rk_context).where(rk_context.c.context_key == key)).mappings().one()
            return {name: value for name, value in row.items() if name not in ("id", "context_key")}

        return read

    def look(self, place: str) -> Look:
        cache = self.cache(place)

        def look(prefix: str) -> list[tuple[Any, ...]]:
            return [
                (stored.snapshot["retry_count"], stored.version % REVISIONS // 2 + 1, len(str(stored.snapshot)))
                for _, stored in cache.items(prefix)
            ]

        return look

    def fill(self, place: str, first: int, last: int) -> None:
        row = recorded(self.cache(place), self._reader(place))[SECOND]
        values = {name: bindparam(name, type_=rk_context.c[name].type) for name in row}
        key = literal_column(f"'{canonical_key(NAME, '')}' || {self.scattered}")
        rows = select(key, *values.values()).select_from(text(self.numbers))
        statement = insert(rk_context).from_select(["context_key", *values], rows)
        engine = self.engine(place)
        for begin in range(first, last + 1, 50_000):
            numbers = {"first": begin, "last": min(last, begin + 49_999)}
            with engine.begin() as connection:
                self.prepare(connection)
                connection.execute(statement, {**row, **numbers})

    def prepare(self, connection: Any) -> None:
        """Whatever filling needs."""

    def key(self, number: int) -> str:
        return canonical_key(NAME, hashlib.md5(str(number).encode()).hexdigest())  # noqa: S324 - to scatter keys

    def settled(self, place: str) -> None:
        with self.autocommitting(place).connect() as connection:
            for statement in self.stocktaking:
                connection.execute(text(statement))

    stocktaking: ClassVar[tuple[str, ...]]
    measured: ClassVar[str]

    def size(self, place: str) -> int:
        with self.autocommitting(place).connect() as connection:
            return int(connection.execute(text(self.measured)).scalar_one())

    def counting(self) -> AbstractContextManager[Callable[[], Sent]]:
        return _counting()

    def transaction(self, cache: Any) -> Callable[[], Any]:
        return sessionmaker(cache.engine).begin

    def do_work(self, transaction: Any) -> None:
        transaction.execute(insert(work).values(done=1))


@contextmanager
def _counting() -> Iterator[Callable[[], Sent]]:
    """Of all engines; without BEGIN, and without the user's own statement, which tells which transaction is theirs."""
    sent: list[tuple[str, Any]] = []
    theirs: list[Any] = []

    def note(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if work.name in statement.split():
            theirs.append(connection)
        elif not statement.startswith("BEGIN"):
            sent.append((statement, connection))

    def take() -> Sent:
        within = sum(any(connection is each for each in theirs) for _, connection in sent)
        taken = Sent([statement for statement, _ in sent], within)
        sent.clear()
        theirs.clear()
        return taken

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield take
    finally:
        event.remove(Engine, "before_cursor_execute", note)


class SqliteStore(SqlStore):
    """A file, kept through a loss of power."""

    title = "SQLite"
    driver = "sqlite3"
    scattered = "md5(i)"
    numbers = (
        "(WITH RECURSIVE numbers(i) AS (SELECT :first UNION ALL SELECT i + 1 FROM numbers WHERE i < :last) "
        "SELECT i FROM numbers)"
    )
    stocktaking = ("PRAGMA wal_checkpoint(TRUNCATE)",)
    measured = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"

    @classmethod
    def missing(cls) -> str | None:
        return None

    def start(self) -> None:
        self.folder = Path(self.stack.enter_context(TemporaryDirectory(prefix="retrykit-sqlite-")))
        self._numbers = count(1)

    @property
    def version(self) -> str:
        return sqlite3.sqlite_version

    def new_database(self) -> str:
        return f"sqlite:///{self.folder}/{next(self._numbers)}.db"

    def engine(self, place: str, **options: Any) -> Engine:
        engine = sqlite_engine(place, **options)
        self.stack.callback(engine.dispose)
        return engine

    def autocommitting(self, place: str) -> Engine:
        # Its connections are set as ours are; nothing sends BEGIN.
        return self.engine(place, pool_size=POOL, max_overflow=0).execution_options(retrykit_begin=None)

    def more_of_ours(self, place: str) -> list[Contender]:
        return []

    def connect(self, place: str) -> Any:
        file = make_url(place).database
        assert file
        connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=30)
        for setting in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {setting}").close()
        return connection

    def prepare(self, connection: Any) -> None:
        connection.connection.driver_connection.create_function(
            "md5",
            1,
            lambda number: hashlib.md5(str(number).encode()).hexdigest(),  # noqa: S324 - to scatter keys
            deterministic=True,
        )


class _PostgreSql(PostgreSql):
    # The tests' servers are small; these are what PostgreSQL itself comes with.
    def _command(self) -> list[str]:
        return [*super()._command(), "-c", "shared_buffers=128MB", "-c", "max_wal_size=1GB"]


class PostgreSqlStore(SqlStore):
    """Private, with fsync."""

    title = "PostgreSQL"
    driver = "psycopg"
    scattered = "md5(i::text)"
    numbers = "generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS i"
    stocktaking = ("VACUUM ANALYZE rk_context", "CHECKPOINT")
    measured = "SELECT pg_total_relation_size('rk_context')"

    @classmethod
    def missing(cls) -> str | None:
        return postgresql_missing()

    def start(self) -> None:
        self.server = self.stack.enter_context(_PostgreSql(durable=True))

    @property
    def version(self) -> str:
        with self.connect(self.server.url()) as connection:
            return str(connection.execute("SHOW server_version").fetchone()[0])

    def new_database(self) -> str:
        return self.server.fresh_database()

    def connect(self, place: str) -> Any:
        import psycopg

        conninfo = make_url(place).set(drivername="postgresql").render_as_string(hide_password=False)
        return psycopg.connect(conninfo, autocommit=True)


class _MariaDb(MariaDb):
    # The tests' servers are small. Who keeps a million histories gives them the memory; with the default of 128 MB the
    # disk would be measured.
    def _command(self) -> list[str]:
        return [*super()._command(), "--innodb-buffer-pool-size=3G", "--innodb-log-file-size=512M"]


class MariaDbStore(SqlStore):
    """Private, with fsync."""

    title = "MariaDB"
    driver = "pymysql"
    scattered = "md5(seq)"
    numbers = "seq_1_to_1000000 WHERE seq BETWEEN :first AND :last"
    stocktaking = ("ANALYZE TABLE rk_context",)
    measured = (
        "SELECT file_size FROM information_schema.innodb_sys_tablespaces WHERE name = concat(database(), '/rk_context')"
    )

    @classmethod
    def missing(cls) -> str | None:
        return mariadb_missing()

    def start(self) -> None:
        self.server = self.stack.enter_context(_MariaDb(durable=True))

    @property
    def version(self) -> str:
        with self.connect(self.server.url()) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT version()")
            return str(cursor.fetchone()[0])

    def new_database(self) -> str:
        return self.server.fresh_database()

    def connect(self, place: str) -> Any:
        import pymysql

        url = make_url(place)
        where = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
        return pymysql.connect(**where, database=url.database, charset="utf8mb4", autocommit=True)

    def prepare(self, connection: Any) -> None:
        # Strings are concatenated as everywhere else.
        connection.execute(text("SET sql_mode = concat(@@sql_mode, ',PIPES_AS_CONCAT')"))
