"""What `SqlRetryContextCache` promises beyond the contract: several processes, crashes, capacity, faults, cost."""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, text, update
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

import retrykit
from retrykit.errors import CacheCapacityError, CodecError, ContextCacheError
from retrykit.sql import (
    SCHEMA_VERSION,
    SqlRetryContextCache,
    create_tables,
    dropping,
    rk_context,
    rk_schema,
    rows,
    sqlite_engine,
)
from retrykit.sql import statements as sql
from retrykit.sql.dialects import SQLITE
from retrykit.sql.statements import statements_of
from tests.sql_written_by_others import SqlWrittenByOthers

MARK = {"completed_at": 1.0, "expires_at": 100.0, "retry_count": 0}


@pytest.fixture
def at_the_end():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/histories.db"


@pytest.fixture
def cache(url, at_the_end):
    return at_the_end.enter_context(SqlRetryContextCache(url))


@pytest.fixture
def opened(url, at_the_end):
    """Makes a cache on the file, with options."""
    return lambda **options: at_the_end.enter_context(SqlRetryContextCache(url, **options))


class Clock(retrykit.clock.SystemClock):
    now = 50.0

    def time(self):
        return Clock.now


def keys(cache):
    return [key for key, _ in cache.items()]


# -- processes


@pytest.fixture
def start(at_the_end):
    """Starts a Python process that runs a program with arguments; it is ended with the test."""

    def start(program, *arguments):
        home = str(Path(retrykit.sql.__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": home, "PYTHONWARNINGS": "error"}
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        at_the_end.callback(end, process)
        return process

    def end(process):
        if process.poll() is None:
            process.kill()
        process.communicate()

    return start


def finished(process):
    """What the process printed; it must have ended well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


COUNT = """
import sys, threading
from retrykit.sql import SqlRetryContextCache
url, threads, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache = SqlRetryContextCache(url)
def count():
    done = 0
    while done < rounds:
        stored = cache.load("a/1")
        number, expected = (0, None) if stored is None else (stored.snapshot["retry_count"], stored.version)
        done += cache.save("a/1", {"retry_count": number + 1}, expected) is not None
running = [threading.Thread(target=count) for _ in range(threads)]
print("ready", flush=True)
sys.stdin.readline()
[thread.start() for thread in running], [thread.join() for thread in running]
cache.close()
"""


def test_processes_that_count_on_one_key_at_once_lose_no_count(start, url, cache):
    processes = [start(COUNT, url, 4, 20) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        finished(process)
    assert cache.load("a/1").snapshot["retry_count"] == 3 * 4 * 20


CREATE = """
import sys
from retrykit.sql import SqlRetryContextCache
print("ready", flush=True)
sys.stdin.readline()
with SqlRetryContextCache(sys.argv[1]) as cache:
    print(cache.save(f"a/{sys.argv[2]}", {}, None) is not None)
"""


def test_processes_that_open_a_new_file_at_once_all_find_the_tables(start, url, opened):
    processes = [start(CREATE, url, number) for number in range(6)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [finished(process) for process in processes] == ["True\n"] * 6
    assert len(keys(opened())) == 6


def test_engines_that_create_the_tables_at_once_in_the_drivers_old_mode_all_find_them(tmp_path, at_the_end):
    engines = [create_engine(f"sqlite:///{tmp_path}/user.db", connect_args={"timeout": 60}) for _ in range(8)]
    for engine in engines:
        at_the_end.callback(engine.dispose)
    start, faults = threading.Barrier(8), []

    def create(engine):
        start.wait(60)
        try:
            create_tables(engine)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=create, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert SqlRetryContextCache(engines[0]).save("a/1", {}, None) is not None


WRITE_FOR_EVER = """
import itertools, sys
from sqlalchemy import text
from retrykit.sql import SqlRetryContextCache
cache = SqlRetryContextCache(sys.argv[1])
version = None
for number in itertools.count(1):
    with cache.engine.begin() as connection:
        joined = cache.joined(connection)
        connection.execute(text("INSERT INTO work (id) VALUES (:id)"), {"id": number})
        version = joined.save("a/1", {"retry_count": number, "filling": "x" * 20_000}, version)
        joined.save(f"b/{number}", {"retry_count": number}, None)
    print(number, flush=True)
"""


@pytest.mark.parametrize("told", [1, 7, 20])
def test_writer_that_is_killed_in_the_middle_leaves_no_half_write_and_loses_nothing_it_told(start, url, cache, told):
    with cache.engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (id INTEGER PRIMARY KEY)"))
    process = start(WRITE_FOR_EVER, url)
    heard = [int(process.stdout.readline()) for _ in range(told)]
    process.send_signal(signal.SIGKILL)
    heard += [int(line) for line in process.communicate(timeout=60)[0].split()]
    stored = cache.load("a/1")
    count = stored.snapshot["retry_count"]
    with cache.engine.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM work")) == count
        assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
    assert len(list(cache.items("b/"))) == count >= heard[-1]
    # The dead writer's lock died with it.
    assert cache.save("a/1", {"retry_count": count + 1}, stored.version) is not None


HOLD_THE_LOCK = """
import sys
from retrykit.sql import SqlRetryContextCache
cache = SqlRetryContextCache(sys.argv[1])
with cache.engine.begin() as connection:
    cache.joined(connection).save("a/half", {}, None)
    print("written", flush=True)
    sys.stdin.readline()
"""


def test_transaction_of_a_killed_process_is_undone_at_once(start, url, cache):
    process = start(HOLD_THE_LOCK, url)
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.wait(60)
    assert cache.load("a/half") is None
    assert cache.save("a/half", {}, None) is not None


def test_state_and_counts_survive_reopening(url):
    with SqlRetryContextCache(url, capacity=2) as cache:
        versions = {key: cache.save(key, {"key": key}, None) for key in ("a/1", "a/2")}
    with SqlRetryContextCache(url, capacity=2) as cache:
        assert {key: stored.version for key, stored in cache.items()} == versions
        with pytest.raises(CacheCapacityError):
            cache.save("a/3", {}, None)
        assert cache.remove("a/2", versions["a/2"])
    with SqlRetryContextCache(url, capacity=2) as cache:
        assert cache.save("a/2", {}, None) not in versions.values()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("whose", ["ours", "the user's"])
def test_forked_child_opens_connections_of_its_own(url, at_the_end, whose):
    engine = sqlite_engine(url) if whose == "ours" else create_engine(url)
    at_the_end.callback(engine.dispose)
    cache = SqlRetryContextCache(engine)
    parents = {id(connection_beneath(engine))}
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        new = id(connection_beneath(engine)) not in parents
        saved = cache.save("a/child", {}, None) is not None
        os.write(writer, b"ok" if new and saved else b"no")
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reader, 2)
    os.close(reader)
    os.close(writer)
    assert told == b"ok"
    assert cache.save("a/parent", {}, None) is not None
    assert keys(cache) == ["a/child", "a/parent"]


def connection_beneath(engine):
    with engine.connect() as connection:
        return connection.connection.dbapi_connection


# -- capacity, time to live, versions


def test_capacity_is_exact_under_threads(opened):
    cache = opened(capacity=10)
    refused = []

    def fill(thread):
        for number in range(10):
            try:
                cache.save(f"a/{thread}/{number}", {}, None)
            except CacheCapacityError:
                refused.append(number)

    threads = [threading.Thread(target=fill, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(keys(cache)), len(refused)) == (10, 30)


def test_completion_marks_take_no_room_from_histories(opened):
    cache = opened(capacity=2, clock=Clock())
    versions = [cache.save(f"a/{number}", {"retry_count": 1}, None) for number in range(2)]
    for number in range(5):
        assert cache.save(f"done/{number}", MARK, None) is not None
    with pytest.raises(CacheCapacityError):
        cache.save("a/new", {}, None)
    # A history that ends in a mark makes room, and a mark that becomes a history again takes it.
    mark = cache.save("a/0", MARK, versions[0])
    cache.save("a/new", {}, None)
    assert cache.save("a/0", {"retry_count": 1}, mark) is not None
    assert cache.remove("a/new")
    with pytest.raises(CacheCapacityError):
        cache.save("a/newer", {}, None)
    assert cache.remove("a/0")
    assert cache.save("a/newer", {}, None) is not None


def test_full_cache_drops_what_is_past_its_time_before_it_refuses_or_evicts(opened):
    cache = opened(capacity=2, time_to_live=10, clock=Clock())
    cache.save("a/old", {"last_failed_at": 30.0}, None)
    cache.save("a/young", {"last_failed_at": 45.0}, None)
    cache.save("a/new", {"last_failed_at": 50.0}, None)
    assert keys(cache) == ["a/new", "a/young"]
    with pytest.raises(CacheCapacityError):
        cache.save("a/newer", {}, None)


def test_eviction_takes_what_was_stored_longest_ago_to_the_minute_and_says_so(opened, monkeypatch, caplog):
    cache = opened(capacity=2, on_full="evict_oldest", clock=Clock())
    for now, key in enumerate(["a/1", "a/2"]):
        monkeypatch.setattr(Clock, "now", 60.0 * now)
        cache.save(key, {}, None)
    monkeypatch.setattr(Clock, "now", 120.0)
    cache.save("a/1", {"retry_count": 2}, cache.load("a/1").version)
    cache.save("a/3", {}, None)
    assert keys(cache) == ["a/1", "a/3"]
    assert "evicted the oldest, 'a/2'" in caplog.text


def test_capacity_that_was_lowered_is_kept_from_the_next_new_key_on(opened):
    wide = opened()
    for number in range(5):
        wide.save(f"a/{number}", {}, None)
    opened(capacity=2, on_full="evict_oldest").save("a/new", {}, None)
    assert len(keys(wide)) == 2


def test_history_lives_as_long_as_told_after_its_last_failure_and_a_mark_as_it_says_itself(opened):
    cache = opened(time_to_live=10, clock=Clock())
    cache.save("a/failed", {"last_failed_at": 30.0}, None)
    cache.save("a/started", {"started_at": 35.0}, None)
    cache.save("a/stored", {}, None)
    cache.save("a/mark", MARK, None)
    expired = {now: cache.expire(now) for now in (39.9, 40.0, 45.0, 60.0, 100.0)}
    assert expired == {39.9: 0, 40.0: 1, 45.0: 1, 60.0: 1, 100.0: 1}


def test_vetoed_history_lives_as_long_as_its_veto(opened):
    cache = opened(time_to_live=10, clock=Clock())
    cache.save("a/open", {"last_failed_at": 30.0, "veto": "poison"}, None)
    cache.save("a/until", {"last_failed_at": 30.0, "veto": "poison", "veto_until": 70.0}, None)
    cache.save("a/short", {"last_failed_at": 30.0, "veto": "poison", "veto_until": 31.0}, None)
    cache.save("a/said", {"veto": "poison", "expires_at": 50.0}, None)
    assert {now: cache.expire(now) for now in (39.9, 40.0, 50.0, 69.0, 70.0)} == {
        39.9: 0,
        40.0: 1,
        50.0: 1,
        69.0: 0,
        70.0: 1,
    }
    version = cache.load("a/open").version
    cache.save("a/open", {"last_failed_at": 30.0}, version)  # the veto is withdrawn
    assert cache.expire(71.0) == 1


def test_marks_past_their_time_are_dropped_by_the_way(opened, monkeypatch):
    monkeypatch.setattr(dropping, "PRUNE_EVERY", 10)
    monkeypatch.setattr(Clock, "now", 200.0)
    cache = opened(clock=Clock())
    for number in range(10):
        with Session(cache.engine) as session, session.begin():
            cache.joined(session).save(f"a/{number}", MARK, None)
    cache.save("a/later", MARK | {"expires_at": 300.0}, None)
    assert keys(cache) == ["a/later"]


def test_expire_goes_in_short_transactions_until_nothing_is_left(opened, monkeypatch):
    cache = opened()
    for number in range(25):
        cache.save(f"a/{number}", MARK, None)
    monkeypatch.setattr(retrykit.sql.cache, "CHUNK", 10)
    with statements(cache.engine) as seen:
        assert cache.expire(1_000.0) == 25
    assert [line.split()[0] for line in seen] == ["DELETE", "DELETE", "DELETE", "UPDATE"]


def test_there_are_as_many_tombstones_as_histories_or_as_asked(opened):
    bounds = {}, {"capacity": None}, {"capacity": 7}, {"capacity": 7, "tombstones": 0}
    assert [opened(**options).tombstones for options in bounds] == [100_000, 100_000, 7, 0]


def test_tombstones_are_counted_now_and_then_only(opened):
    cache = opened(capacity=1, on_full="evict_oldest", tombstones=250)
    with statements(cache.engine) as seen:
        for number in range(8):
            cache.save(f"a/{number}", {"retry_count": 1}, None)
    # After each hundredth that was made: the first time at three, of what this process has made.
    assert sum(line.startswith("SELECT count") for line in seen) == 2


def test_what_a_process_of_the_version_before_made_a_history_again_is_one(opened):
    cache = opened(capacity=1, on_full="evict_oldest", tombstones=1)
    cache.save("a/1", {"retry_count": 1}, None)
    cache.save("a/2", {"retry_count": 1}, None)
    with cache.engine.begin() as connection:
        version = cache.load("a/1").version
        revision = rows._next(version, mark=False) % rows.REVISIONS
        again = {"revision": revision, "completed_at": None, "expires_at": None, "snapshot": '{"retry_count":2}'}
        connection.execute(rk_context.update().where(rk_context.c.context_key == "a/1").values(again))
    assert keys(cache) == ["a/1", "a/2"]
    cache.save("a/3", {"retry_count": 1}, None)
    assert keys(cache) == ["a/3"]
    assert cache.load("a/2").snapshot["evicted"]["by"] == "capacity"
    assert cache.load("a/1") is None


class TestWrittenByOthers(SqlWrittenByOthers):
    pass


@pytest.mark.parametrize("revision", [0, 1, 2, 3, 4, 2**24 - 6, 2**24 - 5])
def test_revision_tells_what_a_row_is_and_grows(revision):
    version = 7 * rows.REVISIONS + revision
    assert not rows.is_used_up(version)
    history, mark = rows._next(version, mark=False), rows._next(version, mark=True)
    assert (history % 2, mark % 4) == (0, 1)
    assert all(version < number < 8 * rows.REVISIONS for number in (history, mark))
    assert (history | 3) < 8 * rows.REVISIONS


def test_tombstone_whose_row_has_used_up_its_revisions_becomes_a_history_again(opened):
    cache = opened(capacity=1, on_full="evict_oldest", tombstones=5)
    cache.save("a/1", {"retry_count": 1}, None)
    with cache.engine.begin() as connection:
        connection.execute(rk_context.update().values(revision=rows.REVISIONS - 2))
    cache.save("a/2", {"retry_count": 1}, None)
    version = cache.load("a/1").version
    assert version % rows.REVISIONS == rows.REVISIONS - 1
    again = cache.save("a/1", {"retry_count": 2}, version)
    assert again > version
    assert cache.save("a/1", {"retry_count": 3}, again) is not None
    assert cache.save("a/1", {}, version) is None


def test_items_are_read_in_pages(cache, monkeypatch):
    names = [f"a/{number:02}" for number in range(25)]
    for name in names:
        cache.save(name, {}, None)
    monkeypatch.setattr(retrykit.sql.cache, "PAGE", 10)
    monkeypatch.setattr(rows, "PAGE", 10)
    with statements(cache.engine) as seen:
        assert keys(cache) == names
    assert len(seen) == 3


def test_row_that_has_used_up_its_revisions_goes_on_with_versions_never_used(cache):
    cache.save("a/1", {}, None)
    with cache.engine.begin() as connection:
        connection.execute(update(rk_context).values(revision=rows.REVISIONS - 2))
    version = cache.load("a/1").version
    seen = [version]
    for number in range(4):
        version = cache.save("a/1", {"retry_count": number}, version)
        seen.append(version)
    assert sorted(set(seen)) == seen
    assert cache.load("a/1").version == version
    assert [cache.save("a/1", {}, old) for old in seen[:-1]] == [None] * 4
    assert cache.save("a/1", {}, seen[1] + 1) is None


# -- cost


class statements:  # noqa: N801 - used like a function
    """What an engine sends to the driver."""

    def __init__(self, engine):
        self.engine, self.seen = engine, []

    def __enter__(self):
        event.listen(self.engine, "before_cursor_execute", self.see)
        return self.seen

    def __exit__(self, *_):
        event.remove(self.engine, "before_cursor_execute", self.see)

    def see(self, *arguments):
        self.seen.append(arguments[2])


def test_each_verb_is_one_statement(cache):
    def sent(verb):
        with statements(cache.engine) as seen:
            verb()
        return [line.split()[0] for line in seen]

    assert sent(lambda: cache.load("a/1")) == ["SELECT"]
    assert sent(lambda: cache.save("a/1", {}, None)) == ["INSERT"]
    version = cache.load("a/1").version
    assert sent(lambda: cache.save("a/1", {}, version)) == ["UPDATE"]
    assert sent(lambda: cache.remove("a/1", version + 1)) == ["DELETE"]
    assert sent(lambda: list(cache.items())) == ["SELECT"]
    # What is over goes, but of histories a tombstone stays.
    assert sent(lambda: cache.expire(0.0)) == ["DELETE", "UPDATE"]


def test_each_joined_verb_is_one_statement_and_joining_is_none(cache):
    with Session(cache.engine) as session, session.begin():
        session.execute(text("SELECT 1"))
        with statements(cache.engine) as seen:
            joined = cache.joined(session)
            assert seen == []
            version = joined.save("a/1", MARK, None)
            joined.load("a/1")
            joined.save("a/1", MARK, version)
            joined.remove("a/1")
        assert [line.split()[0] for line in seen] == ["INSERT", "SELECT", "UPDATE", "DELETE"]


def test_no_verb_scans_the_table(cache):
    own = statements_of(SQLITE)
    common = (sql.UPDATE, sql.REMOVE, sql.REMOVE_VERSION, sql.FIRST_PAGE, sql.NEXT_PAGE)
    with cache.engine.begin() as connection:
        for query in (own.load, own.saver, own.expire, own.oldest, own.oldest_vetoed, *common):
            words = str(query.statement.compile(connection, compile_kwargs={"render_postcompile": True}))
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {words}", (1,) * words.count("?")).all()
            steps = [row[-1] for row in plan]
            assert not any(step.startswith("SCAN") and "INDEX" not in step for step in steps), (words, steps)
            assert not any("TEMP B-TREE" in step for step in steps), (words, steps)


# -- engines and their settings


def test_engine_of_ours_is_set_up_for_several_processes(cache):
    pragmas = {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 30_000, "foreign_keys": 1}
    with cache.engine.begin() as connection:
        assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas} == pragmas


def test_durability_of_the_process_is_faster_and_said(tmp_path, at_the_end):
    engine = sqlite_engine(f"sqlite:///{tmp_path}/x.db", durability="process", busy_timeout=0.5, foreign_keys=False)
    at_the_end.callback(engine.dispose)
    pragmas = {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 500, "foreign_keys": 0}
    with engine.begin() as connection:
        assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas} == pragmas


def test_settings_of_a_users_engine_stay_as_they_are(url, at_the_end):
    names = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
    engine = create_engine(url, poolclass=NullPool)
    at_the_end.callback(engine.dispose)

    def settings():
        with engine.connect() as connection:
            driver = connection.connection.dbapi_connection
            return [driver.isolation_level, *(connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names)]

    before = settings()
    cache = SqlRetryContextCache(engine)
    cache.save("a/1", {}, None)
    cache.close()
    assert settings() == before
    assert keys(cache) == ["a/1"]


def test_transactions_on_an_engine_of_ours_take_the_write_lock_unless_told_otherwise(cache, url, at_the_end):
    impatient = sqlite_engine(url, busy_timeout=0)
    at_the_end.callback(impatient.dispose)
    readers = impatient.execution_options(retrykit_begin="DEFERRED")
    with cache.engine.begin():
        with readers.begin() as connection:
            assert connection.scalar(text("SELECT count(*) FROM rk_context")) == 0
        with pytest.raises(ContextCacheError, match=r"database is locked .*only one on the same file can be joined"):
            SqlRetryContextCache(impatient).save("a/1", {}, None)
    with pytest.raises(ValueError, match="retrykit_begin"), impatient.execution_options(retrykit_begin="NOW").begin():
        pass


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:"])
def test_database_in_memory_that_threads_cannot_share_is_refused(address, at_the_end):
    engine = create_engine(address)
    at_the_end.callback(engine.dispose)
    with pytest.raises(ValueError, match="SingletonThreadPool each thread sees an empty in-memory database of its own"):
        SqlRetryContextCache(engine)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((7,), {}, TypeError),
        ((None,), {}, TypeError),
        (("no url",), {}, ValueError),
        (("oracle://user:hidden@host/db",), {}, ValueError),
        (("postgresql+nothing://user:hidden@host/db",), {}, ValueError),
        (("postgresql//user:hidden@host/db",), {}, ValueError),
        (("user:hidden@host",), {}, ValueError),
        (("postgresql://user:hidden@host:port/db",), {}, ValueError),
        (("mssql://host/db?password=hidden",), {}, ValueError),
        (("sqlite://",), {"capacity": 0}, ValueError),
        (("sqlite://",), {"capacity": True}, TypeError),
        (("sqlite://",), {"capacity": 1.5}, TypeError),
        (("sqlite://",), {"on_full": "panic"}, ValueError),
        (("sqlite://",), {"time_to_live": 0}, ValueError),
        (("sqlite://",), {"time_to_live": "1h"}, TypeError),
        (("sqlite://",), {"tombstones": -1}, ValueError),
        (("sqlite://",), {"tombstones": True}, TypeError),
        (("sqlite://",), {"tombstone_time_to_live": 0}, ValueError),
        (("sqlite://",), {"tombstone_time_to_live": "1h"}, TypeError),
        (("sqlite://",), {"clock": 7}, TypeError),
        (("sqlite://",), {"patience": -1}, ValueError),
        (("sqlite://",), {"patience": "5"}, TypeError),
    ],
)
def test_bad_arguments_are_refused_by_name_without_secrets(arguments, options, error):
    with pytest.raises(error, match=next(iter(options), "engine|url")) as caught:
        SqlRetryContextCache(*arguments, **options)
    errors = (caught.value, None if caught.value.__suppress_context__ else caught.value.__context__)
    assert "hidden" not in str(errors)


@pytest.mark.parametrize(
    "place",
    [
        "",
        ":memory:",
        "file::memory:?uri=true",
        "file:?uri=true",
        "file:retrykit?mode=memory&uri=true",
        "file:retrykit?mode=memory&cache=shared&uri=true",
        "file:/retrykit?vfs=memdb&uri=true",
    ],
)
def test_database_in_memory_is_one_for_all_threads_however_it_is_written(place, at_the_end):
    cache = at_the_end.enter_context(SqlRetryContextCache(f"sqlite:///{place}"))

    def save(number):
        for round_ in range(5):
            assert cache.save(f"a/{number}-{round_}", {}, None) is not None

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(save, range(8)))
    assert len(list(cache.items())) == 40


@pytest.mark.parametrize(
    ("options", "name"), [({"durability": "hope"}, "durability"), ({"busy_timeout": -1}, "busy_timeout")]
)
def test_bad_options_of_an_engine_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        sqlite_engine("sqlite://", **options)


# -- faults


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(ContextCacheError, match=rf"open failed: OperationalError: .*no directory {tmp_path}/missing"):
        SqlRetryContextCache(f"sqlite:///{tmp_path}/missing/histories.db")


def test_file_that_may_only_be_read_can_be_read_and_says_why_it_is_not_written(url, tmp_path, at_the_end):
    with SqlRetryContextCache(url) as cache:
        cache.save("a/1", {"retry_count": 1}, None)
    address = f"sqlite:///file:{tmp_path}/histories.db?mode=ro&uri=true"
    engine = create_engine(address)
    at_the_end.callback(engine.dispose)
    cache = SqlRetryContextCache(engine)
    assert cache.load("a/1").snapshot == {"retry_count": 1}
    for operation, verb in {"save": lambda: cache.save("a/2", {}, None), "remove": lambda: cache.remove("a/1")}.items():
        with pytest.raises(ContextCacheError, match=f"{operation} of 'a/[12]' failed: .*readonly database") as caught:
            verb()
        assert (caught.value.operation, caught.value.key[:2]) == (operation, "a/")


def test_file_that_is_no_database_is_said_to_be_none(tmp_path):
    (tmp_path / "histories.db").write_text("this is a letter to a friend, and no database at all\n" * 100)
    with pytest.raises(ContextCacheError, match="open failed: DatabaseError: file is not a database"):
        SqlRetryContextCache(f"sqlite:///{tmp_path}/histories.db")


def test_disk_that_is_full_is_a_fault_of_the_store_and_leaves_it_usable(cache):
    version = cache.save("a/1", {"retry_count": 1}, None)
    with cache.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(ContextCacheError, match="save of 'a/2' failed: OperationalError: database or disk is full"):
        cache.save("a/2", {"filling": "x" * 1_000_000}, None)
    assert keys(cache) == ["a/1"]
    assert cache.save("a/1", {"retry_count": 2}, version) is not None


def test_table_that_went_missing_is_a_fault_with_its_cause(cache):
    with cache.engine.begin() as connection:
        connection.execute(text("DROP TABLE rk_context"))
    with pytest.raises(ContextCacheError, match="load of 'a/1' failed: OperationalError: no such table") as caught:
        cache.load("a/1")
    assert isinstance(caught.value.__cause__.orig, sqlite3.OperationalError)


@pytest.mark.parametrize(
    ("version", "advice"),
    [(SCHEMA_VERSION + 1, "upgrade retrykit"), (1, "run: retrykit db upgrade --store sqlite:///")],
)
def test_tables_of_another_version_are_refused_with_what_to_do(cache, url, version, advice):
    with cache.engine.begin() as connection:
        connection.execute(update(rk_schema).where(rk_schema.c.name == "version").values(value=version))
    with pytest.raises(ContextCacheError, match=f"schema version {version}; .*: {advice}"):
        SqlRetryContextCache(url)


def test_stored_text_that_is_no_snapshot_is_damage_that_is_told(cache):
    cache.save("a/1", {}, None)
    for damage in ("{", "[1]"):
        with cache.engine.begin() as connection:
            connection.execute(update(rk_context).values(snapshot=damage))
        with pytest.raises(CodecError, match="the stored snapshot is no JSON"):
            cache.load("a/1")


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}, b"bytes"])
def test_snapshot_that_json_cannot_carry_is_refused_and_nothing_is_stored(cache, value):
    with pytest.raises(CodecError, match="'a/1' cannot be kept as JSON"):
        cache.save("a/1", {"attributes": {"odd": value}}, None)
    assert keys(cache) == []


def test_keys_that_no_database_can_hold_are_refused(cache):
    with pytest.raises(ValueError, match="at most 600 characters, not 601"):
        cache.save("k" * 601, {}, None)
    with pytest.raises(CodecError, match="no text that can be stored"):
        cache.save("\ud800", {}, None)


def test_odd_snapshots_are_kept_although_no_column_can_show_them(cache):
    odd = {
        "name": 7,
        "retry_count": "many",
        "last_failed_at": "now",
        "veto": ["no"],
        "exhausted": 1,
        "not_before": True,
    }
    cache.save("a/1", odd, None)
    cache.save("a/2", {"name": "\ud800\0" * 300, "veto": "x" * 5_000, "retry_count": 2**40}, None)
    assert dict(cache.load("a/1").snapshot) == odd
    with cache.engine.connect() as connection:
        name = connection.scalar(text("SELECT name FROM rk_context WHERE context_key = 'a/2'"))
    assert name == "??" * 127 + "?"


def test_columns_show_people_what_the_snapshot_says(cache):
    cache.save(
        "a/1", {"name": "orders", "retry_count": 3, "veto": "stop", "exhausted": True, "last_failed_at": 5}, None
    )
    with cache.engine.connect() as connection:
        row = connection.execute(
            text("SELECT name, retry_count, veto, exhausted, last_failed_at FROM rk_context")
        ).one()
    assert tuple(row) == ("orders", 3, "stop", 1, 5.0)


# -- the object


def test_repr_shows_where_and_the_bounds_but_no_secret(url, at_the_end):
    cache = at_the_end.enter_context(SqlRetryContextCache(f"{url}?timeout=5", capacity=7))
    assert repr(cache) == f"SqlRetryContextCache({url!r}, capacity=7, on_full='reject', time_to_live=None)"
    with cache.engine.begin() as connection:
        assert repr(cache.joined(connection)) == f"JoinedContextCache({url!r})"


def test_cache_of_a_url_can_be_pickled_and_finds_the_same_histories(opened, at_the_end):
    cache = opened(capacity=7, on_full="evict_oldest", time_to_live=60)
    cache.save("a/1", {"retry_count": 1}, None)
    again = at_the_end.enter_context(pickle.loads(pickle.dumps(cache)))  # noqa: S301 - our own
    assert repr(again) == repr(cache)
    assert again.load("a/1") == cache.load("a/1")


def test_cache_of_an_engine_cannot_be_pickled_and_says_why(cache):
    with pytest.raises(TypeError, match="made with an Engine, which cannot be pickled: make it with a URL"):
        pickle.dumps(SqlRetryContextCache(cache.engine))


def test_missing_sqlalchemy_names_the_feature_and_the_extra(start):
    program = (
        "import sys; sys.modules['sqlalchemy'] = None\ntry:\n import retrykit.sql\nexcept ImportError as e: print(e)"
    )
    expected = 'retrykit.sql keeps histories in a SQL database and needs SQLAlchemy: pip install "retrykit[sql]"\n'
    assert finished(start(program)) == expected
