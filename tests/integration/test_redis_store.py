"""What `RedisRetryContextCache` promises beyond the contract: rights, time, bounds, cost, bad input."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis.asyncio
import redis.sentinel

import retrykit
from retrykit.cache import RetryContextCache
from retrykit.errors import CacheCapacityError, CodecError, ContextCacheError
from retrykit.redis import AsyncRedisRetryContextCache, RedisRetryContextCache, scripts
from retrykit.testing import BlockingContextCache
from tests.doubles import pickled
from tests.servers.process import free_port
from tests.servers.redis_server import RedisServer, redis_missing
from tests.written_by_others import WrittenByOthers

MARK = {"completed_at": 1.0, "expires_at": 100.0}
DEADLINE = 60


@pytest.fixture
def at_the_end():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def url(redis_server):
    return redis_server.fresh_database()


@pytest.fixture
def client(url, at_the_end):
    return at_the_end.enter_context(redis.Redis.from_url(url))


@pytest.fixture
def opened(url, at_the_end):
    """Makes a cache on the database, with options."""
    return lambda **options: at_the_end.enter_context(RedisRetryContextCache(options.pop("url", url), **options))


@pytest.fixture
def cache(opened):
    return opened()


@pytest.fixture
def own_server():
    """A server that a test may kill."""
    if (reason := redis_missing()) is not None:
        pytest.skip(reason)
    with RedisServer() as server:
        yield server


def keys(cache):
    return [key for key, _ in cache.items()]


def test_two_prefixes_know_nothing_of_each_other(opened):
    ours, theirs = opened(prefix="ours"), opened(prefix="theirs", capacity=1)
    ours.save("a/1", {}, None)
    ours.save("a/2", {}, None)
    theirs.save("a/1", {"theirs": True}, None)
    assert (keys(ours), keys(theirs)) == (["a/1", "a/2"], ["a/1"])
    assert ours.remove("a/1")
    assert theirs.load("a/1").snapshot == {"theirs": True}


def rights_of_the_manual():
    page = (Path(__file__).parents[2] / "docs/howto/redis.md").read_text(encoding="utf-8")
    found = re.search(r"^ACL SETUSER orders on >password ~\{orders\}:\* (.*)$", page, re.MULTILINE)
    return found[1].split()


def test_user_with_the_rights_of_the_manual_can_do_everything_and_is_told_nothing(redis_server, client, opened, caplog):
    # SELECT because this database has a number.
    client.execute_command(
        "ACL SETUSER", "app", "reset", "on", ">app", "~{retrykit}:*", "+select", *rights_of_the_manual()
    )
    database = client.get_connection_kwargs()["db"]
    cache = opened(url=f"redis://app:app@127.0.0.1:{redis_server.port}/{database}", capacity=2, on_full="evict_oldest")
    version = cache.save("a/1", {}, None)
    assert cache.load("a/1").version == version
    cache.save("a/2", {}, None)
    cache.save("a/3", {}, None)
    cache.save("a/mark", MARK, None)
    assert keys(cache) == ["a/2", "a/3", "a/mark"]
    assert cache.expire(200.0) == 1
    assert cache.remove("a/2")
    assert [message for message in caplog.messages if "evicted the oldest" not in message] == []
    stranger = opened(url=f"redis://app:app@127.0.0.1:{redis_server.port}/{database}", prefix="another")
    with pytest.raises(ContextCacheError, match="load of 'a/1' failed: NoPermissionError: "):
        stranger.load("a/1")


# -- time


def test_clock_of_the_server_is_known_after_the_first_answer(cache, client):
    assert not cache.store_clock.known
    cache.load("a/1")
    seconds, microseconds = client.time()
    assert abs(cache.store_clock.time() - (seconds + microseconds / 1e6)) < 1


def test_server_is_asked_for_its_time_when_that_is_needed_first(cache, url):
    assert cache.store_clock.become_known()

    async def ask():
        async with AsyncRedisRetryContextCache(url) as shared:
            assert not shared.store_clock.become_known(), "it would have to be awaited"
            await shared.open()
            return shared.store_clock.known

    assert asyncio.run(ask())


def test_opening_tells_at_once_whether_there_is_a_server(cache):
    assert cache.open() is None
    with (
        RedisRetryContextCache(f"redis://127.0.0.1:{free_port()}", patience=0) as absent,
        pytest.raises(ContextCacheError, match="context cache: open failed: ConnectionError"),
    ):
        absent.open()
    with pytest.raises(ContextCacheError, match="context cache: open failed: ConnectionError"):
        absent.store_clock.become_known()


def test_clock_that_is_given_decides_instead(opened):
    class Clock(retrykit.SystemClock):
        def time(self):
            return 50.0

    cache = opened(clock=Clock(), time_to_live=10)
    assert cache.store_clock is None
    cache.save("a/1", {}, None)
    cache.save("a/2", {"last_failed_at": 30.0}, None)
    cache.save("a/3", {"completed_at": 1.0, "expires_at": 51.0}, None)
    assert cache.expire() == 1
    assert keys(cache) == ["a/1", "a/3"]
    assert (cache.expire(59.0), cache.expire(60.0)) == (1, 1)


def test_time_to_live_begins_with_the_last_failure_or_else_now_by_the_server_s_clock(opened, client):
    cache = opened(time_to_live=1_000)
    now = client.time()[0]
    cache.save("a/failed", {"last_failed_at": now - 900.0}, None)
    cache.save("a/begun", {"started_at": now - 500.0}, None)
    cache.save("a/unknown", {}, None)
    assert cache.expire(now + 50.0) == 0
    assert cache.expire(now + 150.0) == 1
    assert cache.expire(now + 550.0) == 1
    assert keys(cache) == ["a/unknown"]
    assert cache.expire(now + 990.0) == 0
    assert cache.expire(now + 1_100.0) == 1


# -- bounds


def test_completion_marks_and_states_of_circuits_take_no_room_and_are_never_evicted(opened):
    cache = opened(capacity=1, on_full="evict_oldest")
    for number in range(3):
        cache.save(f"mark/{number}", {"completed_at": 1.0, "expires_at": 4e9}, None)
    cache.save("a@breaker", {"breaker": {}}, None)
    cache.save("a/1", {}, None)
    cache.save("a/2", {}, None)
    assert keys(cache) == ["a/2", "a@breaker", "mark/0", "mark/1", "mark/2"]


def test_history_that_becomes_a_mark_makes_room(opened):
    cache = opened(capacity=1)
    version = cache.save("a/1", {}, None)
    cache.save("a/1", {"completed_at": 1.0, "expires_at": 4e9}, version)
    assert cache.save("a/2", {}, None) is not None


def test_full_cache_drops_what_is_over_before_it_refuses_or_evicts(opened, caplog):
    for on_full in ("reject", "evict_oldest"):
        cache = opened(prefix=on_full, capacity=2, on_full=on_full)
        cache.save("a/1", {}, None)
        cache.save("a/2", {"expires_at": 100.0}, None)
        assert cache.save("a/3", {}, None) is not None
        assert keys(cache) == ["a/1", "a/3"]
    assert "evicted" not in caplog.text


def test_history_stored_longest_ago_is_evicted_and_logged(opened, caplog):
    cache = opened(capacity=2, on_full="evict_oldest")
    version = cache.save("a/1", {}, None)
    cache.save("a/2", {}, None)
    cache.save("a/1", {"again": True}, version)
    cache.save("a/3", {}, None)
    assert keys(cache) == ["a/1", "a/3"]
    assert "the context cache is full (2 histories): evicted the oldest, 'a/2'" in caplog.messages


def test_what_a_process_that_knows_no_tombstones_made_of_one_is_never_trimmed(opened, client):
    cache = opened(capacity=2, on_full="evict_oldest", tombstones=1)
    history, mark = cache.save("a/1", {"retry_count": 1}, None), cache.save("a/2", {"completed_at": 1.0}, None)
    # It does not take them from the index of tombstones.
    client.zadd("{retrykit}:graves", {"a/1": 1.0, "a/2": 2.0})
    cache.save("b/1", {"retry_count": 1}, None)
    assert (cache.load("a/1").version, cache.load("a/2").version) == (history, mark)
    assert client.zcard("{retrykit}:graves") == 1
    cache.save("b/2", {"retry_count": 1}, None)
    assert keys(cache) == ["a/2", "b/1", "b/2"]
    assert cache.load("a/1").snapshot["evicted"]["by"] == "capacity"


def test_known_history_is_updated_in_a_store_that_is_too_full_also_when_it_is_past_its_time(opened):
    first = opened(time_to_live=1_000)
    versions = [first.save(f"a/{number}", {"retry_count": 1, "last_failed_at": 1.0}, None) for number in range(3)]
    small = opened(capacity=1, time_to_live=1_000)
    assert small.save("a/1", {"retry_count": 2, "last_failed_at": 4e9}, versions[1]) is not None


def test_tombstones_take_no_more_than_their_record_and_one_place(opened, client):
    cache = opened(capacity=1, on_full="evict_oldest")
    cache.save("a/1", {"retry_count": 1, "last_error": {"type": "T", "traceback": "x" * 8_000}}, None)
    before = client.memory_usage("{retrykit}:h:a/1")
    cache.save("a/2", {"retry_count": 1}, None)
    assert client.memory_usage("{retrykit}:h:a/1") < before / 20
    assert client.zscore("{retrykit}:keys", "a/1") is None
    assert cache.remove("a/1")
    assert client.zcard("{retrykit}:graves") == 0


class TestWrittenByOthers(WrittenByOthers):
    @pytest.fixture
    def overwrite(self, client):
        def put(_cache, key, written):
            record = client.get("{retrykit}:h:" + key)
            # Its first 16 bytes are its version.
            client.set("{retrykit}:h:" + key, record[:16] + (written if isinstance(record, str) else written.encode()))

        return put

    @pytest.fixture
    def pruned_often(self):
        return 1


def test_capacity_that_was_lowered_is_reached_by_evicting(opened):
    plenty = opened()
    for number in range(50):
        plenty.save(f"a/{number:02}", {}, None)
    cache = opened(capacity=10, on_full="evict_oldest")
    cache.save("b/1", {}, None)
    assert keys(cache) == [*(f"a/{number}" for number in range(41, 50)), "b/1"]


def test_capacity_is_exact_for_all_who_share_the_prefix(opened):
    caches = [opened(capacity=50) for _ in range(4)]
    stored, refused = [], []

    def fill(number):
        for other in range(25):
            try:
                stored.append(caches[number].save(f"a/{number}/{other}", {}, None))
            except CacheCapacityError:
                refused.append(other)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert (len(stored), len(refused), len(keys(caches[0]))) == (50, 50, 50)


def test_what_is_over_goes_by_itself_while_new_things_come(cache, client):
    for number in range(300):
        cache.save(f"mark/{number}", MARK, None)
    assert client.zcard("{retrykit}:keys") <= 100
    assert client.zcard("{retrykit}:ends") <= 100


def test_expire_and_items_go_through_more_than_one_page(cache):
    for number in range(2_100):
        cache.save(f"mark/{number:04}", MARK | {"expires_at": 4e9}, None)
    assert keys(cache) == [f"mark/{number:04}" for number in range(2_100)]
    assert [key for key, _ in cache.items("mark/1", "mark/0999")] == [f"mark/1{number:03}" for number in range(1_000)]
    assert cache.expire(5e9, 1_500) == 1_500
    assert cache.expire(5e9) == 600
    assert keys(cache) == []


def test_open_keys_are_not_looked_for_among_too_many_others(cache, client):
    cache.save("a/1", {}, None)
    client.zadd("{retrykit}:stored", {f"b/{number}": number for number in range(9_999)})
    assert cache.open_keys("a/", 10) == ["a/1"]
    client.zadd("{retrykit}:stored", {"b/9999": 1})
    assert cache.open_keys("a/", 10) is None
    assert cache.open_keys("a/", 1_001) == ["a/1"]


def test_nothing_is_left_of_what_was_removed(cache, client):
    """No more than the receipt of the last write, which goes by itself."""
    for number in range(20):
        version = cache.save(f"a/{number}", {"expires_at": 4e9}, None)
        assert cache.remove(f"a/{number}", version if number % 2 else None)
    (receipt,) = client.keys()
    assert receipt.startswith(b"{retrykit}:w:")
    assert 0 < client.ttl(receipt) <= scripts.RECEIPTS


def test_receipts_are_as_many_as_writes_at_once(cache, client):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: cache.save(f"a/{number}", {}, None), range(200)))
    assert len(client.keys("{retrykit}:w:*")) <= 4


def calls(client):
    return {name: stats["calls"] for name, stats in client.info("commandstats").items()}


def test_every_verb_is_one_round_trip(own_server, opened):
    cache = opened(url=own_server.url(), capacity=2, on_full="evict_oldest")
    version = cache.save("a/1", {}, None)
    cache.remove("b/1"), cache.expire(), keys(cache), cache.load("b/1")
    verbs = (
        lambda: cache.load("a/1"),
        lambda: cache.save("a/1", {}, version),
        lambda: cache.save("a/2", {}, None),
        lambda: cache.save("a/3", {}, None),
        lambda: cache.remove("a/3"),
        lambda: keys(cache),
        cache.expire,
    )
    with redis.Redis.from_url(own_server.url()) as client:
        before = client.info("stats")["total_commands_processed"]
        scripts_before = calls(client)["cmdstat_evalsha"]
        assert client.info("stats")["total_commands_processed"] - before == 2
        for verb in verbs:
            verb()
        assert calls(client)["cmdstat_evalsha"] - scripts_before == len(verbs)
        assert not {"cmdstat_keys", "cmdstat_scan"} & calls(client).keys()


# -- bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"capacity": 0}, ValueError, "capacity: must be at least 1, not 0"),
        ({"capacity": 1.5}, TypeError, "capacity: must be an int or None, not float 1.5"),
        ({"capacity": True}, TypeError, "capacity: must be an int or None, not bool True"),
        ({"on_full": "panic"}, ValueError, "on_full: must be one of 'reject', 'evict_oldest', not 'panic'"),
        ({"time_to_live": 0}, ValueError, "time_to_live: must be more than 0 seconds, not 0"),
        ({"time_to_live": "1"}, TypeError, "time_to_live: must be seconds"),
        ({"tombstones": -1}, ValueError, "tombstones: must be 0 or more, not -1"),
        ({"tombstones": 1.5}, TypeError, "tombstones: must be an int or None, not float 1.5"),
        ({"tombstone_time_to_live": 0}, ValueError, "tombstone_time_to_live: must be more than 0 seconds, not 0"),
        ({"clock": time}, TypeError, "clock: must be a retrykit.Clock or None"),
        ({"patience": -1}, ValueError, "patience: must be at least 0 seconds, not -1"),
        ({"patience": None}, TypeError, "patience: must be seconds"),
        ({"prefix": ""}, ValueError, "prefix: must be 1 to 80 printable characters, none of them a brace, not ''"),
        ({"prefix": "a{b}"}, ValueError, "prefix: must be 1 to 80 printable characters"),
        ({"prefix": b"a"}, TypeError, "prefix: must be a str, not bytes"),
    ],
)
def test_option_that_makes_no_sense_is_refused_before_anything_is_sent(options, error, words):
    with pytest.raises(error) as caught:
        RedisRetryContextCache(f"redis://127.0.0.1:{free_port()}", **options)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    "url",
    [
        "http://:s3cret@localhost",
        "s3cret",
        "redis://:s3cret#@localhost",
        "redis://user:s3cret@localhost:s3cret",
        "redis://:s3cret@localhost:6379?protocol=s3cret",
        "redis://:s3cret@localhost:6379?s3cret=1",
        "redis://:s3cret@[localhost",
    ],
)
@pytest.mark.parametrize("kind", [RedisRetryContextCache, AsyncRedisRetryContextCache])
def test_url_that_cannot_be_read_is_refused_without_being_shown(url, kind):
    with pytest.raises(ValueError, match="client: ") as caught:
        kind(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_client_of_the_wrong_kind_is_refused(client):
    with pytest.raises(TypeError, match=r"client: must be a URL, or a redis.Redis or RedisCluster, not int 7"):
        RedisRetryContextCache(7)
    with pytest.raises(
        TypeError, match=r"client: must be a URL, or a redis\.asyncio\.Redis or RedisCluster, not Redis"
    ):
        AsyncRedisRetryContextCache(client)
    with client.pipeline() as pipeline, pytest.raises(TypeError, match=r"client: .* not Pipeline"):
        RedisRetryContextCache(pipeline)


def test_key_that_is_too_long_or_no_text_is_refused(cache):
    with pytest.raises(ValueError, match="key: must have at most 600 characters, not 601"):
        cache.save("k" * 601, {}, None)
    for verb in (
        lambda: cache.load("\ud800"),
        lambda: cache.save("\ud800", {}, None),
        lambda: list(cache.items("\ud800")),
    ):
        with pytest.raises(CodecError, match=r"of '\\ud800': the key is no text that can be stored"):
            verb()


def test_snapshot_that_json_cannot_carry_is_refused_and_nothing_is_stored(cache):
    endless = []
    endless.append(endless)
    for value in (object(), float("nan"), float("inf"), endless, {1, 2}):
        with pytest.raises(CodecError, match="the snapshot of 'a/1' cannot be kept as JSON"):
            cache.save("a/1", {"value": value}, None)
    assert keys(cache) == []


def test_facts_of_the_wrong_kind_are_kept_and_mean_nothing(cache):
    odd = {"expires_at": "soon", "last_failed_at": 10**400, "completed_at": None, "started_at": True}
    cache.save("a/1", odd, None)
    assert cache.load("a/1").snapshot == odd
    assert cache.expire(1e300) == 0


@pytest.mark.parametrize(
    "record", [b"x", b"s3cret", b"no version here " + b"{}", b"0" * 16 + b"[]", b"0" * 16 + b"s3cret"]
)
def test_record_that_cannot_be_read_is_a_fault_that_does_not_show_it(cache, client, record):
    version = cache.save("a/1", {}, None)
    client.set("{retrykit}:h:a/1", record)
    with pytest.raises(CodecError, match="a/1") as caught:
        cache.load("a/1")
    assert "s3cret" not in str(caught.value)
    assert cache.save("a/1", {}, version) is None
    assert cache.remove("a/1")


def test_hostile_keys_and_snapshots_are_data(cache):
    evil = '"} return redis.call("FLUSHALL") --'
    version = cache.save(evil, {evil: evil}, None)
    assert cache.load(evil).snapshot == {evil: evil}
    assert cache.remove(evil, version)


# -- the object itself


def test_repr_shows_where_and_how_and_no_password(redis_server, client):
    url = redis_server.url(3)
    options = "prefix='p', capacity=5, on_full='reject', time_to_live=None, patience=5.0"
    shown = f"('redis://127.0.0.1:{redis_server.port}/3', {options})"
    assert repr(RedisRetryContextCache(url, prefix="p", capacity=5)) == f"RedisRetryContextCache{shown}"
    assert repr(AsyncRedisRetryContextCache(url, prefix="p", capacity=5)) == f"AsyncRedisRetryContextCache{shown}"
    assert "unix:///run/redis.sock?db=2" in repr(RedisRetryContextCache("unix://:pw@/run/redis.sock?db=2"))
    assert "'rediss://example.org:6379/0'" in repr(RedisRetryContextCache("rediss://me:pw@example.org?client_name=x"))
    assert "'redis://[::1]:7/0'" in repr(RedisRetryContextCache("redis://[::1]:7"))
    assert "'rediss://example.org:6379/0'" in repr(RedisRetryContextCache("valkeys://me:valkey@example.org"))
    assert f"redis://127.0.0.1:{redis_server.port}/" in repr(RedisRetryContextCache(client))


def test_pickle_of_a_cache_made_from_a_url_is_the_same_store(url, opened, at_the_end):
    cache = opened(prefix="p", capacity=5, patience=1)
    version = cache.save("a/1", {}, None)
    restored = at_the_end.enter_context(pickled(cache))
    assert repr(restored) == repr(cache)
    assert restored.load("a/1").version == version
    again = pickled(AsyncRedisRetryContextCache(url, prefix="p"))
    assert type(again) is AsyncRedisRetryContextCache


def test_cache_made_with_a_client_cannot_be_pickled_and_says_why(client):
    with pytest.raises(TypeError, match="was made with a client, which cannot be pickled: make it with a URL"):
        pickled(RedisRetryContextCache(client))


def test_client_that_was_given_stays_open(client):
    with RedisRetryContextCache(client) as cache:
        cache.save("a/1", {}, None)
    assert client.ping()


def test_it_is_a_context_cache_that_joins_no_transaction(cache):
    assert isinstance(cache, RetryContextCache)
    assert not hasattr(cache, "joined")
    assert cache.may_forget


class ServerAtASocket(RedisServer):
    def _command(self):
        return [*super()._command(), "--unixsocket", str(self.base / "redis.sock"), "--unixsocketperm", "777"]


def test_socket_of_the_machine_will_do(redis_server, opened):
    with ServerAtASocket() as server:
        cache = opened(url=f"unix://:{server.password}@{server.base}/redis.sock")
        assert cache.save("a/1", {}, None)
        assert keys(cache) == ["a/1"]


class ServerOfACluster(RedisServer):
    def _command(self):
        command = [word if word != "4096" else "1" for word in super()._command()]
        return [*command, "--cluster-enabled", "yes", "--cluster-port", str(free_port())]


@pytest.fixture
def cluster(redis_server):
    """A cluster of one: it refuses what a cluster of many would."""
    with ServerOfACluster() as server, redis.Redis.from_url(server.url()) as client:
        client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        deadline = time.monotonic() + DEADLINE
        while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            assert time.monotonic() < deadline
        yield server


def live_through_everything(cache):
    version = cache.save("a/1", {}, None)
    version = cache.save("a/1", {"again": True}, version)
    assert cache.load("a/1").version == version
    for number in range(4):
        cache.save(f"b{{{number}}}", {"expires_at": 100.0 if number else None}, None)
    assert keys(cache) == ["a/1", "b{0}", "b{3}"]
    assert None not in {cache.save("b{4}", {}, None), cache.save("b{5}", {}, None)}
    assert keys(cache) == ["b{0}", "b{4}", "b{5}"]
    assert cache.remove("b{4}") is True
    assert cache.expire() == 0


def test_cluster_keeps_everything_in_one_slot(cluster, at_the_end):
    client = at_the_end.enter_context(redis.RedisCluster.from_url(cluster.url()))
    cache = RedisRetryContextCache(client, capacity=3, on_full="evict_oldest")
    live_through_everything(cache)
    assert repr(cache).startswith("RedisRetryContextCache('RedisCluster', prefix=")


def test_client_that_sentinels_find_is_a_client():
    client = redis.sentinel.Sentinel([("127.0.0.1", free_port())]).master_for("orders")
    with RedisRetryContextCache(client, patience=0) as cache:
        assert "SentinelConnectionPool" in repr(cache)
        with pytest.raises(ContextCacheError, match="load of 'a/1' failed: MasterNotFoundError"):
            cache.load("a/1")
    client.close()


def test_cluster_is_used_asynchronously_too(cluster, at_the_end):
    client = redis.asyncio.RedisCluster.from_url(cluster.url())
    made = RedisRetryContextCache(client, capacity=3, on_full="evict_oldest")
    cache = at_the_end.enter_context(BlockingContextCache(made))
    at_the_end.callback(lambda: cache.run(client.aclose()))
    live_through_everything(cache)


# -- asynchronous


def test_asynchronous_cache_asks_nothing_before_its_first_verb_and_closes_in_its_own_way():
    async def work():
        cache = AsyncRedisRetryContextCache(f"redis://127.0.0.1:{free_port()}", patience=0.1)
        with pytest.raises(TypeError, match="use `async with`"), cache:
            pass
        async with cache:
            with pytest.raises(ContextCacheError, match="context cache: load of 'a/1' failed: ConnectionError"):
                await cache.load("a/1")

    asyncio.run(work())


def test_asynchronous_cache_goes_through_more_than_one_page_and_is_silent_where_it_may_not_ask(
    client, redis_server, caplog
):
    client.execute_command("ACL SETUSER", "tasks", "reset", "on", ">app", "~*", "+@all", "-config")
    database = client.get_connection_kwargs()["db"]

    async def work():
        async with AsyncRedisRetryContextCache(f"redis://tasks:app@127.0.0.1:{redis_server.port}/{database}") as cache:
            for number in range(1_100):
                await cache.save(f"mark/{number:04}", MARK | {"expires_at": 4e9}, None)
            found = [key async for key, _ in cache.items()]
            return found, await cache.expire(5e9)

    assert asyncio.run(work()) == ([f"mark/{number:04}" for number in range(1_100)], 1_100)
    assert caplog.messages == []


def test_tasks_that_count_on_one_key_at_once_lose_no_count(url, cache):
    async def work():
        async with AsyncRedisRetryContextCache(url) as shared:

            async def count():
                for _ in range(20):
                    while True:
                        stored = await shared.load("a/1")
                        number, expected = (stored.snapshot["n"], stored.version) if stored else (0, None)
                        if await shared.save("a/1", {"n": number + 1}, expected):
                            break

            await asyncio.gather(*(count() for _ in range(20)))

    asyncio.run(work())
    assert cache.load("a/1").snapshot == {"n": 400}


def test_stored_text_is_plain_json_behind_the_version(cache, client):
    version = cache.save("a/1", {"retry_count": 1, "name": "é"}, None)
    record = client.get("{retrykit}:h:a/1")
    assert int(record[:16], 16) == version
    assert json.loads(record[16:]) == {"retry_count": 1, "name": "é"}


def test_missing_redis_names_the_feature_and_the_extra():
    program = (
        "import sys; sys.modules['redis'] = None\n"
        "try:\n    import retrykit.redis\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(retrykit.__file__).parents[1])}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True, timeout=DEADLINE
    ).stdout
    assert told == 'retrykit.redis keeps histories in Redis and needs redis-py: pip install "retrykit[redis]"\n'
