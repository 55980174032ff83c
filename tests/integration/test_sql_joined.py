"""Verbs that join the work's own transaction, on engines of ours and on engines as users make them."""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack, contextmanager

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import greenlet_spawn

from retrykit.errors import ContextCacheError
from retrykit.sql import SqlRetryContextCache, metadata, rk_context, sqlite_engine
from retrykit.sql.sqlite import reading
from tests.servers.databases import empty_database

MARK = {"completed_at": 1.0, "expires_at": 2.0, "retry_count": 0}


@pytest.fixture
def at_the_end():
    with ExitStack() as stack:
        yield stack


def of_ours(url):
    return sqlite_engine(url)


def as_made_by_default(url):
    engine = create_engine(url)
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
    return engine


def with_begin_of_its_own(url):
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def no_driver_begin(connection, _record):
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")

    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def with_the_drivers_modern_transactions(url):
    if sys.version_info < (3, 12):
        pytest.skip("sqlite3.connect(autocommit=) came with Python 3.12")

    def foreign_keys(connection, _record):
        connection.autocommit = True
        connection.execute("PRAGMA foreign_keys=ON")
        connection.autocommit = False

    engine = create_engine(url, connect_args={"autocommit": False})
    event.listen(engine, "connect", foreign_keys)
    return engine


def on_postgresql(url):
    return create_engine(url)


def on_postgresql_serializable(url):
    return create_engine(url, isolation_level="SERIALIZABLE")


def on_mariadb(url):
    return create_engine(url)  # REPEATABLE READ


def on_mariadb_read_committed(url):
    return create_engine(url, isolation_level="READ COMMITTED")


ON_SQLITE = [of_ours, as_made_by_default, with_begin_of_its_own, with_the_drivers_modern_transactions]
ON_SERVERS = [on_postgresql, on_postgresql_serializable, on_mariadb, on_mariadb_read_committed]


@pytest.fixture
def url(request, engine):
    """The database of the work."""
    if engine.dialect.name == "sqlite":
        folder = request.getfixturevalue("tmp_path")
        return f"sqlite:///{folder}/../{folder.name}/work.db"
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture(params=[*ON_SQLITE, *ON_SERVERS], ids=lambda make: make.__name__)
def engine(request, tmp_path, at_the_end):
    """The engine of the work, on a database with a constraint that is checked at COMMIT (at once on MariaDB)."""
    make = request.param
    if make in ON_SQLITE:
        engine = make(f"sqlite:///{tmp_path}/work.db")
    else:
        engine = make(empty_database(request, make.__name__.split("_")[1]))
    at_the_end.callback(engine.dispose)
    number = "SERIAL" if engine.dialect.name == "postgresql" else "INTEGER"
    grows = " AUTO_INCREMENT" if engine.dialect.name == "mariadb" else ""
    deferred = "" if engine.dialect.name == "mariadb" else " DEFERRABLE INITIALLY DEFERRED"
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE customer (id INTEGER PRIMARY KEY)"))
        reference = f"INTEGER REFERENCES customer (id){deferred}"
        connection.execute(text(f"CREATE TABLE orders (id {number} PRIMARY KEY{grows}, customer {reference})"))
    return engine


@pytest.fixture(params=["the same engine", "another engine on the same database"])
def cache(request, engine, url, at_the_end):
    if request.param == "the same engine":
        return SqlRetryContextCache(engine)
    return at_the_end.enter_context(SqlRetryContextCache(url))


@contextmanager
def rolled_back(engine):
    """A Session whose work is taken back in the end."""
    with Session(engine) as session:
        yield session
        session.rollback()


def order(transaction, customer=None):
    transaction.execute(text("INSERT INTO orders (customer) VALUES (:customer)"), {"customer": customer})


def orders(engine):
    with reading(engine).connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM orders"))


def test_what_is_joined_commits_with_the_work(cache, engine):
    with Session(engine) as session, session.begin():
        order(session)
        joined = cache.joined(session)
        version = joined.save("a/1", MARK, None)
        assert joined.load("a/1").version == version
    assert (dict(cache.load("a/1").snapshot), cache.load("a/1").version) == (MARK, version)
    assert orders(engine) == 1


def test_nobody_sees_what_is_joined_before_the_commit(cache, engine):
    with Session(engine) as session, session.begin():
        order(session)
        cache.joined(session).save("a/1", MARK, None)
        assert orders(engine) == 0
        assert cache.load("a/1") is None


@pytest.mark.parametrize("first", ["the work", "the cache"])
def test_what_is_joined_is_rolled_back_with_the_work(cache, engine, first):
    version = cache.save("a/1", {"retry_count": 1}, None)
    with rolled_back(engine) as session:
        if first == "the work":
            order(session)
        joined = cache.joined(session)
        assert joined.save("a/1", MARK, version) is not None
        assert joined.save("a/2", MARK, None) is not None
        assert joined.remove("a/2")
        assert joined.save("a/3", {"retry_count": 1}, None) is not None
        order(session)
    assert [(key, dict(stored.snapshot), stored.version) for key, stored in cache.items()] == [
        ("a/1", {"retry_count": 1}, version)
    ]
    assert orders(engine) == 0


def commit(session):
    session.commit()


def commit_and_roll_back(session):
    try:
        session.commit()
    except IntegrityError:
        session.rollback()
        raise


def commit_by_leaving(session):
    with session.get_transaction():
        pass


@pytest.mark.parametrize("end", [commit, commit_and_roll_back, commit_by_leaving])
def test_commit_that_a_deferred_constraint_fails_takes_back_what_is_joined(cache, engine, end):
    if engine.dialect.name == "mariadb":
        pytest.skip("MariaDB has no constraints that are checked at COMMIT")
    version = cache.save("a/1", {"retry_count": 1}, None)
    with Session(engine) as session:
        session.begin()
        order(session, customer=404)
        assert cache.joined(session).save("a/1", MARK, version) is not None
        assert cache.joined(session).remove("a/0") is False
        with pytest.raises(IntegrityError):
            end(session)
    assert (dict(cache.load("a/1").snapshot), cache.load("a/1").version) == ({"retry_count": 1}, version)
    assert orders(engine) == 0
    # The store goes on: the failed commit left no lock behind.
    assert cache.save("a/1", {"retry_count": 2}, version) is not None


def test_savepoint_that_is_rolled_back_takes_back_what_was_joined_in_it(cache, engine):
    with Session(engine) as session, session.begin():
        order(session)
        savepoint = session.begin_nested()
        cache.joined(session).save("a/1", MARK, None)
        savepoint.rollback()
        cache.joined(session).save("a/2", MARK, None)
    assert [key for key, _ in cache.items()] == ["a/2"]


def test_capacity_holds_inside_the_works_transaction_and_is_rolled_back_with_it(engine):
    cache = SqlRetryContextCache(engine, capacity=2, on_full="evict_oldest")
    for key in ("a/1", "a/2"):
        cache.save(key, {}, None)
    with rolled_back(engine) as session:
        order(session)
        cache.joined(session).save("a/3", {}, None)
        assert [key for key, _ in cache.joined(session).items()] == ["a/2", "a/3"]
        assert "evicted" in cache.joined(session).load("a/1").snapshot
    assert [key for key, _ in cache.items()] == ["a/1", "a/2"]
    assert cache.load("a/1").snapshot == {}
    cache.save("a/3", {}, None)
    assert [key for key, _ in cache.items()] == ["a/2", "a/3"]


def test_every_handle_of_sqlalchemy_on_a_transaction_can_be_joined(cache, engine):
    def save(transaction, key):
        assert cache.joined(transaction).save(key, MARK, None) is not None

    with sessionmaker(engine).begin() as session:
        save(session, "a/session")
    with Session(engine) as session, session.begin() as transaction:
        save(transaction, "a/session transaction")
    scoped = scoped_session(sessionmaker(engine))
    with scoped.begin():
        save(scoped, "a/scoped session")
    scoped.remove()
    with engine.begin() as connection:
        save(connection, "a/connection")
    with engine.connect() as connection, connection.begin() as transaction:
        save(transaction, "a/transaction")
    with engine.begin() as connection, Session(connection) as session:
        save(session, "a/session on a connection")
        session.commit()
    with Session(binds={rk_context: engine}) as session, session.begin():
        save(session, "a/session with binds")
    with Session(engine.execution_options(label="option")) as session, session.begin():
        save(session, "a/session on an engine with options")
    assert len(list(cache.items())) == 8


class Async:
    """As AsyncSession and AsyncConnection show what is beneath them."""

    def __init__(self, **beneath):
        self.__dict__.update(beneath)


def test_sync_session_beneath_an_async_one_is_joined_where_it_runs(cache, engine):
    def within():
        with Session(engine) as session, session.begin():
            assert cache.joined(Async(sync_session=session)).save("a/1", MARK, None) is not None
        with engine.begin() as connection:
            assert cache.joined(Async(sync_connection=connection)).save("a/2", MARK, None) is not None

    asyncio.run(greenlet_spawn(within))
    assert len(list(cache.items())) == 2


def test_sync_session_beneath_an_async_one_is_not_joined_elsewhere(cache, engine):
    refused = pytest.raises(TypeError, match="it needs an AsyncSqlRetryContextCache")
    with Session(engine) as session, session.begin(), refused:
        cache.joined(Async(sync_session=session))


@pytest.mark.parametrize("nothing", [None, object(), "session", 7])
def test_what_is_no_transaction_of_sqlalchemys_is_not_joined(cache, nothing):
    assert cache.joined(nothing) is None


def test_transaction_on_another_database_is_not_joined(cache, tmp_path, at_the_end):
    for url in (f"sqlite:///{tmp_path}/other.db", "sqlite://"):
        other = sqlite_engine(url)
        at_the_end.callback(other.dispose)
        with Session(other) as session, session.begin():
            assert cache.joined(session) is None
    with Session() as session:
        assert cache.joined(session) is None
    with Session(binds={metadata.tables["rk_parked"]: other}) as session:
        assert cache.joined(session) is None


def test_autocommit_is_no_transaction_to_join(url, at_the_end):
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    at_the_end.callback(engine.dispose)
    cache = SqlRetryContextCache(engine)
    with Session(engine) as session:
        assert cache.joined(session) is None
    assert cache.save("a/1", {}, None) is not None


def test_joined_verbs_end_with_the_transaction(cache, engine):
    with engine.connect() as connection:
        with connection.begin():
            joined = cache.joined(connection)
            joined.save("a/1", {}, None)
        with pytest.raises(ContextCacheError, match="the transaction that was joined is over"):
            joined.save("a/2", {}, None)
    with Session(engine) as session:
        with session.begin():
            joined = cache.joined(session)
        with pytest.raises(ContextCacheError, match="the transaction that was joined is over"):
            joined.remove("a/1")
    assert [key for key, _ in cache.items()] == ["a/1"]


def test_session_that_must_be_rolled_back_is_told_as_a_fault_of_the_store(cache, engine):
    with Session(engine) as session, session.begin():
        order(session)
        session.connection().invalidate()
        with pytest.raises(ContextCacheError, match="join failed: PendingRollbackError"):
            cache.joined(session)
        session.rollback()


def test_one_shared_connection_in_memory_is_joined_and_never_disturbed(at_the_end):
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    at_the_end.callback(engine.dispose)
    cache = SqlRetryContextCache(engine)
    with rolled_back(engine) as session:
        cache.joined(session).save("a/1", {}, None)
        for verb in (lambda: cache.save("a/2", {}, None), lambda: cache.load("a/1"), lambda: cache.remove("a/1")):
            with pytest.raises(ContextCacheError, match="a transaction is open on it"):
                verb()
        assert cache.joined(session).load("a/1") is not None
    assert list(cache.items()) == []


def test_database_in_memory_of_ours_is_taken_in_turn_and_joined(at_the_end):
    cache = at_the_end.enter_context(SqlRetryContextCache("sqlite://"))
    with Session(cache.engine) as session, session.begin():
        cache.joined(session).save("a/1", {}, None)
    assert [key for key, _ in cache.items()] == ["a/1"]
