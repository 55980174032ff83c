"""Connections that are lost: what was in doubt is looked up, what did not happen is done, and nothing is done twice."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from retrykit.errors import ContextCacheError
from retrykit.sql import AsyncSqlRetryContextCache, SqlRetryContextCache
from retrykit.testing import BlockingContextCache
from tests.servers.databases import ASYNC_DRIVERS, DRIVERS, SERVERS, empty_database, with_driver
from tests.servers.proxy import TcpProxy

WAYS = [
    (name, driver, given)
    for name in SERVERS
    for driver in (*DRIVERS[name], *ASYNC_DRIVERS[name])
    for given in ("url", "engine")
]
LOST = ("answer", "request")


@pytest.fixture
def at_the_end():
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=WAYS, ids="-".join)
def way(request):
    return request.param


@pytest.fixture
def url(request, way):
    return empty_database(request, way[0])


@pytest.fixture
def proxy(url, at_the_end):
    return at_the_end.enter_context(TcpProxy(make_url(url).port))


@pytest.fixture
def opened(way, url, proxy, at_the_end):
    """Makes a cache whose connections go through the proxy."""
    _, driver, given = way
    address = with_driver(proxy.via(url), driver)
    is_async = driver not in sum(DRIVERS.values(), ())

    def engine():
        return (create_async_engine if is_async else create_engine)(address)

    def opened(**options):
        engine_or_url = address if given == "url" else engine()
        cache = SqlRetryContextCache(engine_or_url, **options)
        if isinstance(cache, AsyncSqlRetryContextCache):
            blocking = at_the_end.enter_context(BlockingContextCache(cache))
            at_the_end.callback(lambda: blocking.run(cache.engine.dispose()))
            return blocking
        at_the_end.callback(cache.engine.dispose)
        return at_the_end.enter_context(cache)

    return opened


@pytest.fixture
def cache(opened):
    return opened()


@pytest.fixture
def beside(url, at_the_end):
    """Another cache, whose connections are never lost."""
    return at_the_end.enter_context(SqlRetryContextCache(url))


def lose(proxy, what, to):
    (proxy.lose_answers if what == "answer" else proxy.lose_requests)(to)


def content(cache):
    return {key: (dict(stored.snapshot), stored.version) for key, stored in cache.items()}


@pytest.mark.parametrize("lost", LOST)
def test_new_history_is_stored_once_and_its_version_is_told(cache, beside, proxy, lost):
    assert cache.load("a/1") is None
    lose(proxy, lost, b"INSERT INTO rk_context")
    version = cache.save("a/1", {"retry_count": 1}, None)
    proxy.await_lost(1)
    assert content(beside) == {"a/1": ({"retry_count": 1}, version)}


@pytest.mark.parametrize("lost", LOST)
def test_change_is_made_once_and_its_version_is_told(cache, beside, proxy, lost):
    version = cache.save("a/1", {"retry_count": 1}, None)
    lose(proxy, lost, b"UPDATE rk_context")
    changed = cache.save("a/1", {"retry_count": 2}, version)
    proxy.await_lost(1)
    assert changed > version
    assert content(beside) == {"a/1": ({"retry_count": 2}, changed)}


@pytest.mark.parametrize("lost", LOST)
def test_removal_is_made_and_told(cache, beside, proxy, lost):
    for number in (1, 2):
        version = cache.save("a/1", {"retry_count": 1}, None)
        lose(proxy, lost, b"DELETE FROM rk_context")
        assert cache.remove("a/1", version if number == 1 else None)
        assert proxy.lost == number
        assert content(beside) == {}


@pytest.mark.parametrize("lost", LOST)
def test_reading_is_done_again(cache, proxy, lost):
    version = cache.save("a/1", {"retry_count": 1}, None)
    lose(proxy, lost, b"SELECT rk_context")
    assert cache.load("a/1").version == version
    proxy.await_lost(1)


@pytest.mark.parametrize("way", [way for way in WAYS if way[2] == "engine" and way[0] == "mariadb"], indirect=True)
@pytest.mark.parametrize("lost", LOST)
def test_commit_in_doubt_is_looked_up(cache, beside, proxy, lost):
    version = cache.save("a/1", {"retry_count": 1}, None)
    lose(proxy, lost, b"COMMIT")
    changed = cache.save("a/1", {"retry_count": 2}, version)
    proxy.await_lost(1)
    assert content(beside) == {"a/1": ({"retry_count": 2}, changed)}


@pytest.mark.parametrize("lost", LOST)
def test_who_was_overtaken_while_the_connection_was_lost_has_lost(cache, beside, proxy, lost):
    version = cache.save("a/1", {"retry_count": 1}, None)
    lose(proxy, lost, b"UPDATE rk_context")
    proxy.refuse()
    with ThreadPoolExecutor(1) as threads:
        saving = threads.submit(cache.save, "a/1", {"retry_count": 2}, version)
        proxy.await_lost(1)
        now = beside.load("a/1")
        others = beside.save("a/1", {"retry_count": now.snapshot["retry_count"] + 1}, now.version)
        proxy.accept()
        assert saving.result(30) is None
    assert content(beside)["a/1"][1] == others


def test_connections_that_were_cut_while_they_were_idle_are_replaced_without_a_word(cache, beside, proxy, caplog):
    version = cache.save("a/1", {"retry_count": 1}, None)
    for count in range(2, 5):
        assert proxy.cut() >= 1
        version = cache.save("a/1", {"retry_count": count}, version)
    assert content(beside) == {"a/1": ({"retry_count": 4}, version)}
    assert [record for record in caplog.records if record.name.startswith("retrykit")] == []


def test_server_that_is_away_for_a_while_is_waited_for(cache, beside, proxy):
    version = cache.save("a/1", {"retry_count": 1}, None)
    proxy.refuse()
    proxy.cut()
    with ThreadPoolExecutor(1) as threads:
        saving = threads.submit(cache.save, "a/1", {"retry_count": 2}, version)
        with pytest.raises(TimeoutError):
            saving.result(0.3)
        proxy.accept()
        assert saving.result(30) > version
    assert content(beside)["a/1"][0] == {"retry_count": 2}


@pytest.mark.parametrize("patience", [0, 0.2])
def test_server_that_stays_away_is_a_fault_when_patience_is_over(opened, proxy, patience):
    cache = opened(patience=patience)
    version = cache.save("a/1", {"retry_count": 1}, None)
    proxy.refuse()
    proxy.cut()
    begun = time.monotonic()
    with pytest.raises(ContextCacheError, match=r"save of 'a/1' failed: \w+: ") as caught:
        cache.save("a/1", {"retry_count": 2}, version)
    assert time.monotonic() - begun < 5
    assert (caught.value.operation, caught.value.key) == ("save", "a/1")
    proxy.accept()
    # At the next verb it is looked for anew: a pool that holds dead connections may need one more.
    for _ in range(3):
        try:
            assert cache.load("a/1").version == version
        except ContextCacheError:
            assert patience == 0
        else:
            return
    raise AssertionError("the server is back, and the cache did not find it")


def test_bounds_hold_although_answers_are_lost(opened, beside, proxy):
    cache = opened(capacity=2)
    versions = {}
    for key in ("a/1", "a/2"):
        lose(proxy, "answer", b"INSERT INTO rk_context")
        versions[key] = cache.save(key, {}, None)
    with pytest.raises(ContextCacheError, match="full"):
        cache.save("a/3", {}, None)
    assert cache.remove("a/1", versions["a/1"])
    assert cache.save("a/3", {}, None) is not None
    assert sorted(content(beside)) == ["a/2", "a/3"]


@pytest.mark.parametrize("way", [(name, *DRIVERS[name], "url") for name in SERVERS], indirect=True, ids="-".join)
def test_joined_verb_is_never_tried_again_and_the_work_is_lost_with_it(cache, beside, proxy):
    with cache.engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (id INTEGER PRIMARY KEY)"))
    proxy.lose_answers(b"INSERT INTO rk_context")
    with Session(cache.engine) as session:
        session.execute(text("INSERT INTO work (id) VALUES (1)"))
        joined = cache.joined(session)
        with pytest.raises(ContextCacheError, match="save of 'a/1' failed"):
            joined.save("a/1", {"completed_at": 1.0}, None)
        session.rollback()
    proxy.await_lost(1)
    with beside.engine.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM work")) == 0
    assert content(beside) == {}


@pytest.mark.parametrize("way", [(name, *DRIVERS[name], "url") for name in SERVERS], indirect=True, ids="-".join)
def test_cache_waits_at_its_start_for_a_server_that_is_about_to_come(opened, proxy):
    proxy.refuse()
    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(opened)
        with pytest.raises(TimeoutError):
            opening.result(0.3)
        proxy.accept()
        assert opening.result(30).load("a/1") is None


# -- servers that say nothing

PSYCOPG = ("postgresql", "psycopg", "url")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("retrykit.sql.engines.SILENCE", 0.5)


@pytest.mark.parametrize("way", [PSYCOPG], indirect=True, ids="-".join)
def test_psycopg_does_not_wait_for_ever_for_a_server_that_is_there_and_silent(impatient, opened, proxy):
    cache = opened(patience=0)
    cache.save("a/1", {}, None)
    proxy.stall()
    with pytest.raises(ContextCacheError, match=r"no answer from the server for 0\.5 seconds"):
        cache.load("a/1")
    proxy.resume()
    assert cache.load("a/1") is not None


@pytest.mark.parametrize("way", [PSYCOPG], indirect=True, ids="-".join)
def test_statement_that_psycopg_gave_up_is_ended_at_a_server_that_is_well(impatient, opened, url, at_the_end):
    cache = opened(patience=0)
    version = cache.save("a/1", {}, None)
    engine = create_engine(url)
    at_the_end.callback(engine.dispose)
    with engine.begin() as connection:
        connection.execute(text("SELECT * FROM rk_context FOR UPDATE")).close()
        with pytest.raises(ContextCacheError, match="no answer"):
            cache.save("a/1", {"retry_count": 1}, version)
    assert cache.load("a/1").version == version
