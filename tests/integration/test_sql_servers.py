"""What a SQL store promises on servers, beyond the contract: order, bounds, time, isolation, faults, engines."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest
from sqlalchemy import create_engine, event, make_url, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from retrykit import RetryState, RetryTemplate
from retrykit.clock import SystemClock
from retrykit.errors import CacheCapacityError, CodecError, ContextCacheError
from retrykit.sql import (
    SCHEMA_VERSION,
    SqlRetryContextCache,
    create_tables,
    dropping,
    park_in,
    parked_item,
    rk_context,
    rk_schema,
    rows,
)
from retrykit.sql.dialects import database_of
from retrykit.sql.statements import statements_of
from retrykit.tombstone import epitaph
from tests.servers.databases import SERVERS, empty_database, with_driver
from tests.sql_written_by_others import SqlWrittenByOthers

MARK = {"completed_at": 1.0, "expires_at": 100.0, "retry_count": 0}


@pytest.fixture
def at_the_end():
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=SERVERS)
def url(request):
    return empty_database(request, request.param)


@pytest.fixture
def opened(url, at_the_end):
    """Makes a cache on the database, with options."""
    return lambda **options: at_the_end.enter_context(SqlRetryContextCache(url, **options))


@pytest.fixture
def cache(opened):
    return opened()


@pytest.fixture
def engine(url, at_the_end):
    """Somebody else's engine on the database."""
    engine = create_engine(url)
    at_the_end.callback(engine.dispose)
    return engine


@pytest.fixture(params=["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def isolated(request, url, at_the_end):
    """Somebody else's engine, at an isolation level."""
    engine = create_engine(url, isolation_level=request.param)
    at_the_end.callback(engine.dispose)
    return engine


class Clock(SystemClock):
    now = 50.0

    def time(self):
        return Clock.now


def keys(cache):
    return [key for key, _ in cache.items()]


def own(cache):
    """The engine of the verbs."""
    return cache._own


@contextmanager
def statements(engine):
    seen = []

    def see(*arguments):
        seen.append(arguments[2].split()[0])

    event.listen(engine, "before_cursor_execute", see)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", see)


def together(*works):
    with ThreadPoolExecutor(len(works)) as threads:
        return [future.result(60) for future in [threads.submit(work) for work in works]]


# -- keys


def test_items_come_in_the_order_of_code_points_also_beyond_the_basic_plane(cache):
    names = ["Z", "a", "a ", "z", "é", "\u07ff", "\uff5e", "\uffee", "😀", "😀a", "\U0010fffd"]
    for name in reversed(names):
        assert cache.save(name, {}, None) is not None
    assert keys(cache) == names == sorted(names)


def test_longest_keys_differ_by_their_last_character(cache):
    for last in "ab":
        assert cache.save("😀" * 599 + last, {"last": last}, None) is not None
    assert {last: cache.load("😀" * 599 + last).snapshot["last"] for last in "ab"} == {"a": "a", "b": "b"}
    with pytest.raises(ValueError, match="at most 600 characters, not 601"):
        cache.save("😀" * 601, {}, None)


@pytest.mark.parametrize("key", ["\ud800", "a\0b"])
def test_keys_that_no_database_can_hold_are_refused_before_it_sees_them(cache, engine, key):
    with Session(engine) as session, session.begin():
        joined = cache.joined(session)
        for verb in (lambda: joined.save(key, {}, None), lambda: joined.load(key), lambda: joined.remove(key)):
            with pytest.raises(CodecError, match="no text that can be stored"):
                verb()
        # The transaction goes on.
        assert joined.save("a/1", {}, None) is not None


def test_odd_snapshots_are_kept_although_no_column_can_show_them(cache):
    odd = {"name": "\ud800\0" * 300, "veto": "x" * 5_000, "retry_count": 2**40, "last_failed_at": 10**400}
    cache.save("a/1", odd, None)
    assert dict(cache.load("a/1").snapshot) == odd


@pytest.mark.parametrize("url", ["mariadb"], indirect=True)
def test_database_whose_own_text_is_latin1_keeps_every_text(request, url, at_the_end):
    server = request.getfixturevalue("mariadb")
    database = server.fresh_database()
    at_the_end.callback(server.drop_database, database)
    engine = create_engine(database)
    at_the_end.callback(engine.dispose)
    with engine.begin() as connection:
        connection.execute(text("ALTER DATABASE CHARACTER SET latin1"))
    create_tables(engine)
    cache = SqlRetryContextCache(engine)
    snapshot = {"name": "注文 😀", "veto": "ёлка 😀"}
    assert cache.save("注文/😀", snapshot, None) is not None
    with engine.begin() as connection:
        number = park_in(
            connection, b"\xff", name="注文 😀", reason="ёлка", attempts=1, message_id="ё", headers={"ё": "ё"}
        )
        assert tuple(connection.execute(text("SELECT name, veto FROM rk_context")).one()) == tuple(snapshot.values())
    item = parked_item(engine, number)
    assert (item.name, item.reason, item.message_id, item.headers) == ("注文 😀", "ёлка", "ё", {"ё": "ё"})


# -- cost


def test_each_verb_is_one_statement_without_begin_and_commit(cache):
    def sent(verb):
        with statements(own(cache)) as seen, statements(cache.engine) as others:
            verb()
        assert others == []
        return seen

    cache.save("a/0", {}, None)  # the first one counts
    commits = []
    event.listen(own(cache), "commit", commits.append)
    assert sent(lambda: cache.load("a/1")) == ["SELECT"]
    assert sent(lambda: cache.save("a/1", {}, None)) == ["INSERT"]
    version = cache.load("a/1").version
    assert sent(lambda: cache.save("a/1", {}, version)) == ["UPDATE"]
    assert sent(lambda: cache.remove("a/1", version + 2)) == ["DELETE"]
    assert sent(lambda: cache.remove("a/1")) == ["DELETE"]
    assert sent(lambda: list(cache.items())) == ["SELECT"]
    # What is over goes, but of histories a tombstone stays.
    assert sent(cache.expire) == ["DELETE", "UPDATE"]
    assert commits == []


def test_each_joined_verb_is_one_statement_and_joining_is_none(cache, at_the_end):
    with Session(cache.engine) as session, session.begin():
        session.execute(text("SELECT 1"))
        with statements(cache.engine) as seen, statements(own(cache)) as others:
            joined = cache.joined(session)
            assert seen == []
            version = joined.save("a/1", MARK, None)
            joined.load("a/1")
            joined.save("a/1", MARK, version)
            joined.remove("a/1")
        assert (seen, others) == (["INSERT", "SELECT", "UPDATE", "DELETE"], [])


def test_foreign_engine_is_asked_once_whether_it_is_on_the_same_database(cache, engine):
    for asked in (["SAVEPOINT", "SELECT", "SELECT", "RELEASE"], []):
        with Session(engine) as session, session.begin(), statements(engine) as seen:
            assert cache.joined(session) is not None
        assert seen == asked


VERSION = {"the_id": 1, "the_revision": 0}
BURIAL = {"buried_at": 1.0, "buried_until": None, "epitaph": epitaph(1.0, "capacity")}
DROPPING = (
    *("expire", "oldest", "oldest_vetoed", "evict"),
    *("sweep", "bury_expired", "bury_oldest", "bury_oldest_vetoed", "bury", "trim"),
)


def plan_of(connection, query, values):
    made = query._make(connection.dialect)
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET enable_seqscan = off")
        return " ".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {made.text}", made.give(values)))
    plan = connection.exec_driver_sql(f"EXPLAIN {made.text}", made.give(values)).mappings().all()
    return [(row["table"], row["type"], row["Extra"] or "") for row in plan]


@pytest.mark.parametrize("name", ["load", "saver", *DROPPING])
def test_no_verb_scans_or_sorts_the_table(cache, name):
    with cache.engine.begin() as connection:
        joined = cache.joined(connection)
        for number in range(600):
            joined.save(f"a/{number}", MARK if number % 2 else {"veto": "poison"} if number % 3 else {}, None)
    is_mariadb = cache.engine.dialect.name == "mariadb"
    query = getattr(statements_of(database_of(cache.engine)), name)
    if query is None:
        pytest.skip("this is done by another statement there")
    with cache.engine.connect() as connection:
        connection.execute(text("ANALYZE TABLE rk_context" if is_mariadb else "ANALYZE")).close()
        plan = plan_of(
            connection, query, {"the_key": "a/1", "now": 1.0, "chunk": 10, "surplus": 1, **VERSION, **BURIAL}
        )
        connection.rollback()
    if is_mariadb:
        assert not any((kind == "ALL" and table == "rk_context") or "filesort" in extra for table, kind, extra in plan)
    else:
        assert "Seq Scan" not in plan
        assert "Sort" not in plan


# -- capacity, time to live, versions


def test_capacity_is_exact_for_the_threads_of_one_process(opened):
    cache = opened(capacity=10)
    refused = []

    def fill(thread):
        for number in range(10):
            try:
                cache.save(f"a/{thread}/{number}", {}, None)
            except CacheCapacityError:
                refused.append(number)

    together(*(lambda thread=thread: fill(thread) for thread in range(8)))
    assert len(keys(cache)) + len(refused) == 80
    assert len(keys(cache)) == 10


def test_further_process_exceeds_the_capacity_by_a_hundredth_at_most(opened):
    first, second = opened(capacity=300), opened(capacity=300)

    def fill(cache, name):
        for number in range(400):
            try:
                cache.save(f"{name}/{number}", {}, None)
            except CacheCapacityError:
                return

    together(lambda: fill(first, "a"), lambda: fill(second, "b"))
    assert 300 <= len(keys(first)) <= 303


def test_histories_are_counted_seldom(opened):
    cache = opened(capacity=500)
    with statements(own(cache)) as seen:
        for number in range(51):
            cache.save(f"a/{number}", {}, None)
    # At first, and after each hundredth of the capacity.
    assert seen.count("SELECT") == 11


def test_full_store_is_looked_at_again_once_a_second_not_for_each_new_key(opened, monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr("retrykit.sql.capacity.time.monotonic", lambda: now[0])
    cache, other = opened(capacity=2), opened()
    for number in range(2):
        cache.save(f"a/{number}", {}, None)

    def refused():
        with statements(own(cache)) as seen, pytest.raises(CacheCapacityError):
            cache.save("a/new", {}, None)
        return seen

    refused()
    assert refused() == ["SELECT"]  # whether the key is known
    assert other.remove("a/0")
    assert refused() == ["SELECT"]
    now[0] += 1.0
    assert cache.save("a/new", {}, None) is not None


def test_history_that_ends_or_goes_makes_room_at_once(opened):
    cache = opened(capacity=2)
    versions = [cache.save(f"a/{number}", {"retry_count": 1}, None) for number in range(2)]
    with pytest.raises(CacheCapacityError):
        cache.save("a/new", {}, None)
    mark = cache.save("a/0", MARK, versions[0])
    assert cache.save("a/new", {}, None) is not None
    # A mark that becomes a history again takes room, and finds it always.
    assert cache.save("a/0", {"retry_count": 1}, mark) is not None
    assert cache.remove("a/1")
    with pytest.raises(CacheCapacityError):
        cache.save("a/newer", {}, None)
    assert cache.remove("a/0")
    assert cache.save("a/newer", {}, None) is not None


def test_circuits_take_no_room_from_histories(opened):
    cache = opened(capacity=1)
    assert cache.save("a/1", {}, None) is not None
    assert cache.save("a@breaker0", {"breaker": {}}, None) is not None
    assert cache.open_keys("a", 5) == ["a/1"]


def test_joined_history_that_is_rolled_back_takes_no_room(opened):
    cache = opened(capacity=1)
    for _ in range(3):
        with Session(cache.engine) as session:
            assert cache.joined(session).save("a/1", {}, None) is not None
            session.rollback()
    assert cache.save("a/2", {}, None) is not None


def test_threads_that_evict_at_once_all_find_room(opened):
    cache = opened(capacity=5, on_full="evict_oldest")

    def fill(thread):
        for number in range(15):
            assert cache.save(f"a/{thread}/{number}", {}, None) is not None

    together(*(lambda thread=thread: fill(thread) for thread in range(6)))
    assert len(keys(cache)) <= 5


class TestWrittenByOthers(SqlWrittenByOthers):
    pass


def test_what_was_stored_longest_ago_is_evicted_to_the_minute_and_said(opened, monkeypatch, caplog):
    cache = opened(capacity=2, on_full="evict_oldest", clock=Clock())
    for now, key in {0.0: "a/1", 60.0: "a/2"}.items():
        monkeypatch.setattr(Clock, "now", now)
        cache.save(key, {}, None)
    monkeypatch.setattr(Clock, "now", 120.0)
    cache.save("a/1", {"retry_count": 2}, cache.load("a/1").version)
    cache.save("a/3", {}, None)
    assert keys(cache) == ["a/1", "a/3"]
    assert "evicted the oldest, 'a/2'" in caplog.text


def test_vetoed_histories_are_evicted_oldest_first_once_there_are_no_others(opened):
    cache = opened(capacity=2, on_full="evict_oldest")
    cache.save("a/0", {"veto": "poison"}, None)
    cache.save("a/1", {}, None)
    for number in range(2, 5):
        cache.save(f"a/{number}", {"veto": "poison"}, None)
    assert keys(cache) == ["a/3", "a/4"]


def test_vetoed_history_is_not_evicted_for_others_that_are_being_worked_on(opened, engine):
    cache = opened(capacity=2, on_full="evict_oldest", patience=0)
    cache.save("a/1", {"veto": "poison"}, None)
    version = cache.save("a/2", {}, None)
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
        assert cache.joined(connection).save("a/2", {"retry_count": 2}, version) is not None
        with pytest.raises(CacheCapacityError):
            cache.save("a/3", {}, None)
    assert keys(cache) == ["a/1", "a/2"]


def test_eviction_passes_over_what_somebody_is_working_on(opened, engine):
    cache = opened(capacity=2, on_full="evict_oldest", patience=0)
    version = cache.save("a/1", {}, None)
    cache.save("a/2", {}, None)
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
        assert cache.joined(connection).remove("a/1", version)
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(cache.save, "a/3", {}, None).result(10) is not None
    assert keys(cache) == ["a/3"]


def test_marks_past_their_time_are_dropped_by_the_way(opened, monkeypatch):
    monkeypatch.setattr(dropping, "PRUNE_EVERY", 10)
    cache = opened()
    for number in range(9):
        cache.save(f"a/{number}", MARK, None)
    cache.save("a/later", MARK | {"expires_at": time.time() + 1_000}, None)
    assert keys(cache) == ["a/later"]


def test_joined_save_drops_marks_only_where_that_cannot_fail_or_hold_up_the_work(cache, isolated, monkeypatch):
    monkeypatch.setattr(dropping, "PRUNE_EVERY", 5)
    with Session(isolated) as session, session.begin():
        for number in range(5):
            cache.joined(session).save(f"a/{number}", MARK, None)
        dropped = "COMMITTED" in session.connection().get_isolation_level()
    assert keys(cache) == ([] if dropped else [f"a/{number}" for number in range(5)])
    # What was left is due for the next save outside.
    cache.save("a/later", MARK | {"expires_at": time.time() + 1_000}, None)
    assert keys(cache) == ["a/later"]


def test_expiring_passes_over_what_somebody_is_working_on(cache, engine):
    for number in range(3):
        cache.save(f"a/{number}", MARK, None)
    with engine.begin() as connection:
        connection.execute(text("SELECT id FROM rk_context WHERE context_key = 'a/1' FOR UPDATE"))
        assert cache.expire() == 2
    assert cache.expire() == 1


def test_processes_that_expire_at_once_share_the_work_and_do_not_stop_each_other(opened):
    caches = [opened() for _ in range(4)]
    with caches[0].engine.begin() as connection:
        joined = caches[0].joined(connection)
        for number in range(600):
            joined.save(f"a/{number}", MARK, None)
    assert sum(together(*(cache.expire for cache in caches))) == 600


def test_row_that_has_used_up_its_revisions_goes_on_with_versions_never_used(cache):
    cache.save("a/1", {}, None)
    with cache.engine.begin() as connection:
        connection.execute(update(rk_context).values(revision=rows.REVISIONS - 6))
    version = cache.load("a/1").version
    seen = [version]
    for number in range(5):
        version = cache.save("a/1", {"retry_count": number} if number % 2 else MARK, version)
        seen.append(version)
    assert sorted(set(seen)) == seen
    assert cache.load("a/1").version == version
    assert [cache.save("a/1", {}, old) for old in seen[:-1]] == [None] * 5


# -- the server's time


def test_servers_clock_is_known_from_the_start_without_asking_again(cache):
    assert cache.store_clock.known
    with statements(own(cache)) as seen:
        assert abs(cache.store_clock.time() - time.time()) < 5
    assert seen == []


def test_whatever_was_stored_or_loaded_tells_the_servers_time(opened):
    cache = opened()
    observed = []
    object.__setattr__(cache._rows, "store_clock", Observed(observed))
    cache.save("a/1", MARK, None)
    cache.load("a/1")
    assert [sent <= received and abs(at - time.time()) < 5 for sent, at, received in observed] == [True, True]


class Observed:
    known = False

    def __init__(self, seen):
        self.observe = lambda *observation: seen.append(observation)


def test_server_whose_clock_differs_decides_what_is_over(opened):
    ahead = 10_000.0
    cache = opened()
    cache.store_clock.observe(time.monotonic(), time.time() + ahead, time.monotonic())
    cache.save("a/1", MARK | {"expires_at": time.time() + ahead / 2}, None)
    cache.save("a/2", MARK | {"expires_at": time.time() + ahead * 2}, None)
    cache.store_clock.observe(time.monotonic(), time.time() + ahead, time.monotonic())
    assert cache.expire() == 1
    assert keys(cache) == ["a/2"]


def test_time_of_mariadb_is_that_of_its_session_and_of_no_time_zone(request, at_the_end):
    engine = create_engine(empty_database(request, "mariadb"))
    at_the_end.callback(engine.dispose)

    @event.listens_for(engine, "connect")
    def set_time(connection, _record):
        with connection.cursor() as cursor:
            cursor.execute("SET timestamp=1700000000.25, time_zone='-11:30'")

    cache = SqlRetryContextCache(engine)
    assert cache.store_clock.time() == pytest.approx(1_700_000_000.25, abs=5)


def test_clock_that_is_given_decides_instead_of_the_servers(opened):
    cache = opened(clock=Clock(), time_to_live=10)
    assert cache.store_clock is None
    cache.save("a/1", {}, None)
    assert (cache.expire(59.0), cache.expire(60.0)) == (0, 1)


# -- isolation


def lost(work):
    """Whether the transaction was refused because of what happened beside it."""
    try:
        work()
    except ContextCacheError as error:
        words = str(error.__cause__)
        assert any(fault in words for fault in ("could not serialize", "Deadlock", "Record has changed")), words
        return True
    return False


def test_settling_what_somebody_else_changed_meanwhile_is_seen_or_refused_and_never_done(cache, isolated):
    version = cache.save("a/1", {"retry_count": 1}, None)
    with Session(isolated) as session:
        session.begin()
        session.execute(text("SELECT count(*) FROM rk_context")).scalar()  # its snapshot is taken now
        changed = []
        thread = threading.Thread(target=lambda: changed.append(cache.save("a/1", {"retry_count": 2}, version)))
        if isolated.dialect.name == "mariadb" and "SERIALIZABLE" in str(session.connection().get_isolation_level()):
            pytest.skip("there the first read has locked the table's rows")
        thread.start()
        thread.join(30)
        joined = cache.joined(session)
        refused = lost(lambda: joined.remove("a/1", version) and pytest.fail("removed another version"))
        if not refused:
            # Why it lost is seen too: asking again and again for the old version would never end.
            assert joined.load("a/1").version == changed[0]
            assert joined.remove("a/1", changed[0])
        session.rollback()
    assert cache.load("a/1").snapshot == {"retry_count": 2}


def test_mark_that_somebody_else_made_meanwhile_is_seen_or_refused(cache, isolated):
    with Session(isolated) as session:
        session.begin()
        session.execute(text("SELECT 1")).scalar()
        if isolated.dialect.name == "postgresql" or "SERIALIZABLE" not in session.connection().get_isolation_level():
            session.execute(text("SELECT count(*) FROM rk_context")).scalar()
        theirs = cache.save("a/1", MARK, None)
        joined = cache.joined(session)
        refused = lost(lambda: joined.save("a/1", MARK, None) is None or pytest.fail("made a second mark"))
        if not refused:
            assert joined.load("a/1").version == theirs
        session.rollback()


def test_history_that_somebody_else_settled_meanwhile_is_gone_or_the_work_is_refused(cache, isolated):
    version = cache.save("a/1", {"retry_count": 1}, None)
    with Session(isolated) as session:
        session.begin()
        if isolated.dialect.name == "postgresql" or "SERIALIZABLE" not in session.connection().get_isolation_level():
            session.execute(text("SELECT count(*) FROM rk_context")).scalar()
        assert cache.remove("a/1", version)
        joined = cache.joined(session)
        refused = lost(lambda: joined.save("a/1", MARK, version) is None or pytest.fail("brought it back"))
        if not refused:
            assert joined.load("a/1") is None
            assert joined.save("a/1", MARK, None) is not None
            session.commit()
    assert (cache.load("a/1") is None) == refused


def test_write_waits_for_the_work_that_holds_the_row_and_then_loses(cache, engine):
    version = cache.save("a/1", {"retry_count": 1}, None)
    with Session(engine) as session, ThreadPoolExecutor(1) as threads:
        session.begin()
        assert cache.joined(session).save("a/1", MARK, version) is not None
        waiting = threads.submit(cache.save, "a/1", {"retry_count": 2}, version)
        assert cache.load("a/1").version == version  # reading waits for nobody
        session.commit()
        assert waiting.result(30) is None
    assert cache.load("a/1").snapshot == MARK


# -- engines and faults


def test_another_database_of_the_same_server_is_not_joined(request, cache, url, at_the_end):
    server = request.getfixturevalue(make_url(url).get_backend_name())
    for has_tables in (False, True):
        other = server.fresh_database()
        at_the_end.callback(server.drop_database, other)
        engine = create_engine(other)
        at_the_end.callback(engine.dispose)
        if has_tables:
            create_tables(engine)
        with Session(engine) as session, session.begin():
            assert cache.joined(session) is None
            # Asking has not spoilt the work's transaction.
            assert session.scalar(text("SELECT 1")) == 1


def test_caches_by_different_names_of_one_database_know_each_other(cache, url, at_the_end):
    place = make_url(url)
    address = place.set(host="localhost")
    other = at_the_end.enter_context(SqlRetryContextCache(address))
    version = cache.save("a/1", {}, None)
    assert other.load("a/1").version == version
    with Session(other.engine) as session, session.begin():
        assert cache.joined(session) is not None
    drivers = {"postgresql": "psycopg", "mariadb": "pymysql"}
    if place.get_backend_name() == "mariadb":
        mysql = create_engine(url.replace("mariadb+", "mysql+"))
        at_the_end.callback(mysql.dispose)
        with Session(mysql) as session, session.begin():
            assert cache.joined(session).save("a/2", MARK, None) is not None
    assert keys(at_the_end.enter_context(SqlRetryContextCache(with_driver(url, drivers[place.get_backend_name()]))))


def test_settings_of_a_users_engine_stay_as_they_are(url, at_the_end):
    engine = create_engine(url, isolation_level="REPEATABLE READ", pool_size=1, max_overflow=0)
    at_the_end.callback(engine.dispose)

    def level():
        with engine.connect() as connection:
            return connection.get_isolation_level(), connection.connection.dbapi_connection

    before = level()
    cache = SqlRetryContextCache(engine)
    cache.save("a/1", {}, None)
    cache.load("a/1")
    with cache._connections.several() as connection:
        assert connection.get_isolation_level() == "READ COMMITTED"
    cache.close()
    assert level() == before


def test_names_of_tables_that_are_translated_are_refused_with_what_to_do(cache, engine):
    translated = engine.execution_options(schema_translate_map={None: "elsewhere"})
    with pytest.raises(
        ValueError, match=r"engine: its schema_translate_map sends tables .* 'elsewhere', .* search path"
    ):
        SqlRetryContextCache(translated)
    with translated.begin() as connection, pytest.raises(ContextCacheError, match="cannot be joined: its schema_trans"):
        cache.joined(connection)
    with cache.engine.connect() as connection:
        connection.execution_options(schema_translate_map={None: "elsewhere"})
        with pytest.raises(ContextCacheError, match="cannot be joined: its schema_translate_map"):
            cache.joined(connection)


def test_names_of_the_works_own_schema_may_be_translated(engine):
    translated = engine.execution_options(schema_translate_map={"tenant": "elsewhere"})
    cache = SqlRetryContextCache(translated)
    with translated.begin() as connection:
        assert cache.joined(connection).save("a/1", {}, None) is not None
    assert keys(cache) == ["a/1"]


def test_tables_that_are_not_there_are_asked_for_by_their_command_without_the_password(request, url, at_the_end):
    place = make_url(url)
    server = request.getfixturevalue(place.get_backend_name())
    empty = server.fresh_database()
    at_the_end.callback(server.drop_database, empty)
    with pytest.raises(ContextCacheError, match=r"retrykit db upgrade, with the URL of \w+\+\w+://retrykit") as caught:
        SqlRetryContextCache(empty)
    assert place.password not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "advice"), [(SCHEMA_VERSION + 1, "upgrade retrykit"), (1, "run: retrykit db upgrade")]
)
def test_tables_of_another_version_are_refused_with_what_to_do(cache, url, version, advice):
    with cache.engine.begin() as connection:
        connection.execute(update(rk_schema).where(rk_schema.c.name == "version").values(value=version))
    with pytest.raises(ContextCacheError, match=f"schema version {version}; .*{advice}"):
        SqlRetryContextCache(url)


@pytest.mark.parametrize("url", ["mariadb"], indirect=True)
def test_mysql_is_refused_with_what_it_lacks(url, at_the_end):
    engine = create_engine(url.replace("mariadb+", "mysql+"))
    at_the_end.callback(engine.dispose)
    engine.connect().close()
    engine.dialect.is_mariadb = False
    with pytest.raises(
        ContextCacheError, match=r"the server is MySQL, .*no INSERT … RETURNING.*MariaDB 10.11 or newer"
    ):
        SqlRetryContextCache(engine)


def test_server_that_is_too_old_is_refused(url, at_the_end):
    engine = create_engine(url)
    at_the_end.callback(engine.dispose)
    engine.connect().close()
    engine.dialect.server_version_info = (9, 6)
    with pytest.raises(ContextCacheError, match=r"the server has version 9\.6: \w+ [\d.]+ or newer is needed"):
        SqlRetryContextCache(engine)


def test_wrong_password_is_told_at_once_and_not_shown(url):
    wrong = make_url(url).set(password="hidden-wrong")
    begun = time.monotonic()
    with pytest.raises(ContextCacheError, match="open failed: OperationalError: ") as caught:
        SqlRetryContextCache(wrong, patience=30)
    assert time.monotonic() - begun < 10
    assert "hidden-wrong" not in str(caught.value)


def test_faults_tell_no_parameters(cache, url):
    cache.save("a/1", {}, None)
    with cache.engine.begin() as connection:
        connection.execute(text("ALTER TABLE rk_context RENAME TO rk_elsewhere"))
    try:
        with pytest.raises(
            ContextCacheError, match=r"save of 'a/2' failed: \w+: .*rk_context.*are the tables there"
        ) as caught:
            cache.save("a/2", {"attributes": {"card": "4711"}}, None)
        assert "4711" not in f"{caught.value}{caught.value.__cause__}"
    finally:
        with cache.engine.begin() as connection:
            connection.execute(text("ALTER TABLE rk_elsewhere RENAME TO rk_context"))


def consumer_of(url, engine, tables=("rk_context", "rk_parked", "rk_schema")):
    """The URL of a user who may do what consumers need, and nothing more."""
    place = make_url(url)
    with engine.begin() as connection:
        if place.get_backend_name() == "postgresql":
            connection.execute(text("DROP OWNED BY consumer" if exists(connection) else "SELECT 1"))
            connection.execute(text("DROP ROLE IF EXISTS consumer"))
            connection.execute(text("CREATE ROLE consumer LOGIN PASSWORD 'secret'"))
            connection.execute(text("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO consumer"))
        else:
            connection.execute(text("CREATE OR REPLACE USER consumer@'%' IDENTIFIED BY 'secret'"))
        for table in tables:
            connection.execute(text(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO consumer"))
    return place.set(username="consumer", password="secret")


def exists(connection):
    return connection.scalar(text("SELECT count(*) FROM pg_roles WHERE rolname = 'consumer'"))


def test_consumer_needs_no_rights_but_those_on_the_rows(url, engine, at_the_end):
    address = consumer_of(url, engine)
    cache = at_the_end.enter_context(SqlRetryContextCache(address, capacity=2, on_full="evict_oldest"))
    versions = [cache.save(f"a/{number}", {}, None) for number in range(4)]
    assert cache.save("a/3", MARK, versions[3]) is not None
    assert (cache.expire(), keys(cache)) == (1, ["a/2"])
    theirs = create_engine(address)
    at_the_end.callback(theirs.dispose)
    with Session(theirs) as session, session.begin():
        assert cache.joined(session).remove("a/2")
        park_in(session, b"", name="orders", reason="no", attempts=1)


@pytest.fixture
def stranger(url, engine, at_the_end):
    """An engine of a user of the same database who has no rights on the tables of the cache."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (n integer PRIMARY KEY)"))
    at_the_end.callback(drop_work, engine)
    stranger = create_engine(consumer_of(url, engine, ["work"]))
    at_the_end.callback(stranger.dispose)
    return stranger


def drop_work(engine):
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE work"))


def insert_work(context):
    context.transaction.execute(text("INSERT INTO work VALUES (1)"))
    return "done"


def rows_of_work(engine):
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM work"))


def test_work_that_may_not_see_the_tables_commits_unjoined_and_that_is_said_once(cache, engine, stranger, caplog):
    template = RetryTemplate(name="orders", context_cache=cache, remember_completed=60)
    state = RetryState(key="m-1", redelivered=True)
    with stranger.begin() as connection:
        assert cache.joined(connection) is None
    assert template.execute(insert_work, state=state, transaction=stranger.begin) == "done"
    assert template.execute(insert_work, state=state, transaction=stranger.begin) is None
    assert rows_of_work(engine) == 1
    (said,) = [record.getMessage() for record in caplog.records if record.name == "retrykit.sql"]
    assert "at least once" in said
    assert "grant its user" in said
    assert "secret" not in said


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_work_in_an_aborted_transaction_is_a_failed_attempt_joined_or_not(cache, engine, stranger):
    template = RetryTemplate(name="orders", context_cache=cache, remember_completed=60)

    def swallow(context):
        insert_work(context)
        with suppress(DBAPIError):
            context.transaction.execute(text("SELECT * FROM nowhere"))
        return "done"

    for number, theirs in enumerate([engine, cache.engine, stranger, stranger]):
        state = RetryState(key=number, redelivered=True)
        with pytest.raises(ContextCacheError, match="transaction is aborted, so its COMMIT would be a ROLLBACK"):
            template.execute(swallow, state=state, transaction=theirs.begin)
        assert cache.load(template.key_of(number)).snapshot["retry_count"] == 1
    assert rows_of_work(engine) == 0
    assert template.execute(insert_work, state=RetryState(key=0, redelivered=True), transaction=engine.begin) == "done"
    assert rows_of_work(engine) == 1


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_transaction_whose_driver_does_not_tell_that_it_is_aborted_is_not_joined_either(cache, url, stranger):
    async def joined(engine):
        shared = SqlRetryContextCache(engine)
        theirs = create_async_engine(with_driver(url, "asyncpg"))
        async with theirs.connect() as connection:
            with suppress(DBAPIError):
                await connection.execute(text("SELECT * FROM nowhere"))
            with pytest.raises(ContextCacheError, match="aborted"):
                await shared.joined(connection)
            await connection.rollback()
            assert await shared.joined(connection) is not None
        await theirs.dispose()
        await engine.dispose()

    asyncio.run(joined(create_async_engine(with_driver(url, "asyncpg"))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_opens_connections_of_its_own(cache):
    def session(cache):
        query = "SELECT pg_backend_pid()" if cache.engine.dialect.name == "postgresql" else "SELECT connection_id()"
        numbers = []
        for engine in (cache.engine, own(cache)):
            with engine.connect() as connection:
                numbers.append(connection.scalar(text(query)))
        return numbers

    parents = session(cache)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        others = not set(session(cache)) & set(parents)
        saved = cache.save("a/child", {}, None) is not None
        os.write(writer, b"ok" if others and saved else b"no")
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reader, 2)
    os.close(reader)
    os.close(writer)
    assert told == b"ok"
    assert session(cache) == parents
    assert cache.save("a/parent", {}, None) is not None
    assert keys(cache) == ["a/child", "a/parent"]


def test_repr_shows_where_and_the_bounds_but_no_secret(opened, url):
    cache = opened(capacity=7)
    assert make_url(url).password not in repr(cache)
    assert "capacity=7, on_full='reject', time_to_live=None)" in repr(cache)


def test_cache_of_a_url_can_be_pickled_and_finds_the_same_histories(opened, at_the_end):
    cache = opened(capacity=7, on_full="evict_oldest", time_to_live=60, patience=1)
    cache.save("a/1", {"retry_count": 1}, None)
    again = at_the_end.enter_context(pickle.loads(pickle.dumps(cache)))  # noqa: S301 - our own
    assert repr(again) == repr(cache)
    assert again.load("a/1") == cache.load("a/1")
    assert (again.capacity, again.on_full, again.time_to_live, again.may_forget) == (7, "evict_oldest", 60.0, True)
