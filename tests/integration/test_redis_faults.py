"""What becomes of histories in Redis when processes, connections and servers fail."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis.asyncio
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

import retrykit
from retrykit.errors import ContextCacheError
from retrykit.redis import AsyncRedisRetryContextCache, RedisRetryContextCache, scripts
from tests.servers.process import free_port
from tests.servers.proxy import TcpProxy
from tests.servers.redis_server import RedisServer, redis_missing

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


@pytest.fixture
def proxy(redis_server):
    with TcpProxy(redis_server.port) as proxy:
        yield proxy


def keys(cache):
    return [key for key, _ in cache.items()]


def bump(cache, key):
    """Count one more under a key, whatever others do at the same time."""
    while True:
        stored = cache.load(key)
        count, expected = (0, None) if stored is None else (stored.snapshot["retry_count"], stored.version)
        if cache.save(key, {"retry_count": count + 1}, expected) is not None:
            return


# -- processes


@pytest.fixture
def start(at_the_end):
    """Starts a Python process that runs a program with arguments; it is ended with the test."""

    def start(program, *arguments):
        home = str(Path(retrykit.__file__).parents[1])
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": home, "PYTHONWARNINGS": "error"},
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
from retrykit.redis import RedisRetryContextCache
url, threads, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache = RedisRetryContextCache(url, patience=60)
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


def go(processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def test_processes_that_count_on_one_key_at_once_lose_no_count(start, url, cache):
    processes = [start(COUNT, url, 4, 25) for _ in range(2)]
    go(processes)
    for process in processes:
        finished(process)
    assert cache.load("a/1").snapshot["retry_count"] == 2 * 4 * 25


def test_count_is_exact_while_requests_and_answers_are_lost(start, url, cache, proxy):
    processes = [start(COUNT, proxy.via(url), 4, 50) for _ in range(2)]
    go(processes)
    for lost in range(0, 80, 8):
        proxy.lose_answers(scripts.SAVE.sha, times=7)
        proxy.lose_requests(scripts.SAVE.sha)
        proxy.await_lost(lost + 8)
    for process in processes:
        finished(process)
    assert cache.load("a/1").snapshot["retry_count"] == 2 * 4 * 50


FORK = """
import os, sys
from retrykit.redis import RedisRetryContextCache
cache = RedisRetryContextCache(sys.argv[1])
version = cache.save("a/1", {"by": "parent"}, None)
child = os.fork()
if not child:
    for number in range(200):
        assert cache.load("a/1").snapshot == {"by": "parent"}
        assert cache.save(f"child/{number}", {}, None)
    cache.close()
    os._exit(0)
for number in range(200):
    assert cache.load("a/1").version == version
    assert cache.save(f"parent/{number}", {}, None)
assert os.waitpid(child, 0)[1] == 0
cache.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_goes_on_with_connections_of_its_own(start, url, cache):
    finished(start(FORK, url))
    assert len(keys(cache)) == 401


# -- answers that are lost


@pytest.fixture
def doubtful(proxy, url, opened):
    """A cache behind the proxy that has sent something of each kind already."""
    cache = opened(url=proxy.via(url))
    cache.remove("b/1", cache.save("b/1", {}, None))
    return cache


def test_save_whose_answer_is_lost_is_made_once_and_answered_with_its_version(doubtful, proxy, cache):
    proxy.lose_answers(b"EVALSHA")
    version = doubtful.save("a/1", {"retry_count": 1}, None)
    assert proxy.lost == 1
    assert (cache.load("a/1").snapshot, cache.load("a/1").version) == ({"retry_count": 1}, version)
    proxy.lose_answers(b"EVALSHA")
    second = doubtful.save("a/1", {"retry_count": 2}, version)
    assert cache.load("a/1").version == second != version


def test_remove_whose_answer_is_lost_says_that_it_removed(doubtful, proxy, cache):
    version = doubtful.save("a/1", {}, None)
    proxy.lose_answers(b"EVALSHA")
    assert doubtful.remove("a/1", version) is True
    assert doubtful.remove("a/1", version) is False
    assert cache.load("a/1") is None


def test_request_that_is_lost_is_sent_again(doubtful, proxy, cache):
    proxy.lose_requests(b"EVALSHA", times=2)
    version = doubtful.save("a/1", {"retry_count": 1}, None)
    assert proxy.lost == 2
    assert cache.load("a/1").version == version


def lost_in_between(doubtful, proxy, write, meanwhile):
    """What a write returns whose answer is lost, when others do something before it can ask again."""
    proxy.lose_answers(b"EVALSHA")
    proxy.lose_requests(b"EVALSHA", times=10_000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(write)
        proxy.await_lost(2)
        meanwhile()
        proxy.heal()
        return answer.result(DEADLINE)


def test_save_whose_answer_is_lost_was_made_even_if_others_have_saved_since(doubtful, proxy, cache):
    """Else it would be counted a second time, on top of theirs."""
    version = lost_in_between(
        doubtful, proxy, lambda: doubtful.save("a/1", {"retry_count": 1}, None), lambda: bump(cache, "a/1")
    )
    assert version is not None
    assert cache.load("a/1").snapshot == {"retry_count": 2}
    assert doubtful.save("a/1", {}, version) is None, "its version is not the newest"


def test_save_whose_answer_is_lost_brings_nothing_back_that_others_have_removed_since(doubtful, proxy, cache):
    version = lost_in_between(doubtful, proxy, lambda: doubtful.save("a/1", {}, None), lambda: cache.remove("a/1"))
    assert version is not None
    assert cache.load("a/1") is None


def test_remove_whose_answer_is_lost_removes_nothing_that_others_have_stored_since(doubtful, proxy, cache):
    doubtful.save("a/1", {"retry_count": 3}, None)
    assert lost_in_between(doubtful, proxy, lambda: doubtful.remove("a/1"), lambda: bump(cache, "a/1")) is True
    assert cache.load("a/1").snapshot == {"retry_count": 1}


@pytest.mark.parametrize("protocol", [2, 3])
def test_client_that_sends_again_by_itself_does_no_harm(proxy, url, at_the_end, cache, *, protocol):
    """The default of redis-py: on a lost connection the command goes out again, up to ten times."""
    again = Retry(ExponentialBackoff(cap=0.1, base=0.01), 10)
    client = redis.Redis.from_url(proxy.via(url), retry=again, protocol=protocol)
    at_the_end.callback(client.close)
    theirs = RedisRetryContextCache(client, patience=0)
    theirs.save("b/1", {}, None)
    proxy.lose_answers(b"EVALSHA", times=3)
    version = theirs.save("a/1", {"retry_count": 1}, None)
    assert proxy.lost == 3, "redis-py itself has sent it four times"
    assert cache.load("a/1").version == version
    assert client.get_retry() is not None
    assert client.get_connection_kwargs()["retry"] == again


def test_client_made_from_a_url_sends_each_command_once(cache):
    assert cache.client.get_connection_kwargs()["retry"].get_retries() == 0


def test_connection_that_was_cut_while_idle_costs_no_patience(proxy, url, opened):
    impatient = opened(url=proxy.via(url), patience=0)
    version = impatient.save("a/1", {}, None)
    assert proxy.cut() == 1
    assert impatient.load("a/1").version == version


def test_answers_that_do_not_come_are_waited_for_as_long_as_the_url_says(proxy, url, opened):
    impatient = opened(url=f"{proxy.via(url)}?socket_timeout=0.2", patience=0)
    impatient.load("a/1")
    proxy.stall()
    with pytest.raises(ContextCacheError, match=r"load of 'a/1' failed: TimeoutError"):
        impatient.load("a/1")
    proxy.resume()
    assert impatient.load("a/1") is None


def test_asynchronous_save_whose_answer_is_lost_is_made_once(proxy, url, cache):
    async def work():
        async with AsyncRedisRetryContextCache(proxy.via(url)) as doubtful:
            await doubtful.save("b/1", {}, None)
            proxy.lose_answers(b"EVALSHA", times=2)
            return await doubtful.save("a/1", {"retry_count": 1}, None)

    assert cache.load("a/1") is None
    version = asyncio.run(work())
    assert proxy.lost == 2
    assert cache.load("a/1").version == version


def test_task_that_is_cancelled_in_a_verb_leaves_the_cache_usable(proxy, url):
    async def work():
        async with AsyncRedisRetryContextCache(proxy.via(url)) as cache:
            version = await cache.save("a/1", {"retry_count": 1}, None)
            proxy.stall()
            waiting = [asyncio.create_task(cache.load("a/1")) for _ in range(5)]
            await asyncio.sleep(0.05)
            for task in waiting:
                task.cancel()
            answers = await asyncio.gather(*waiting, return_exceptions=True)
            proxy.resume()
            # One whose bytes were on their way when the proxy stalled may have been answered.
            assert sum(task.cancelled() for task in waiting) >= 4
            assert all(task.cancelled() or answers[n].version == version for n, task in enumerate(waiting))
            for number in range(5):
                assert await cache.load(f"none/{number}") is None
            assert (await cache.load("a/1")).version == version

    asyncio.run(work())


# -- servers that go away


def test_script_that_the_server_forgot_is_sent_again_in_the_same_breath(cache, client):
    version = cache.save("a/1", {}, None)
    for _ in range(2):
        client.script_flush()
        assert cache.load("a/1").version == version
        client.script_flush()
        version = cache.save("a/1", {"again": True}, version)
    client.script_flush()
    assert keys(cache) == ["a/1"]
    client.script_flush()
    assert cache.expire() == 0
    client.script_flush()
    assert cache.remove("a/1", version)


def test_verb_waits_for_a_server_that_starts_again_and_everything_is_there(own_server, opened):
    cache = opened(url=own_server.url(), patience=60)
    version = cache.save("a/1", {"retry_count": 1}, None)
    own_server.kill()
    with ThreadPoolExecutor(2) as pool:
        loading = pool.submit(cache.load, "a/1")
        saving = pool.submit(cache.save, "a/2", {}, None)
        own_server.start()
        assert loading.result(DEADLINE).version == version
        assert saving.result(DEADLINE) is not None
    assert cache.save("a/1", {"retry_count": 2}, version) is not None
    assert keys(cache) == ["a/1", "a/2"]


def test_no_version_comes_back_after_everything_was_flushed(cache, client):
    versions = []
    for _ in range(5):
        versions += [cache.save(f"a/{number}", {}, None) for number in range(20)]
        client.flushdb()
    assert len(set(versions)) == 100
    cache.save("a/1", {}, None)
    assert not any(cache.remove("a/1", version) for version in versions)


def test_server_that_is_absent_is_a_fault_after_the_patience_and_no_earlier(at_the_end):
    port = free_port()
    cache = RedisRetryContextCache(f"redis://:secret@127.0.0.1:{port}", patience=0.3)
    begun = time.monotonic()
    with pytest.raises(ContextCacheError) as caught:
        cache.load("orders/1")
    assert 0.1 < time.monotonic() - begun < 30
    assert str(caught.value).startswith("context cache: load of 'orders/1' failed: ConnectionError: Error 111")
    assert (caught.value.operation, caught.value.key) == ("load", "orders/1")
    assert isinstance(caught.value.__cause__, redis.ConnectionError)
    assert "secret" not in f"{caught.value} {cache!r}"


def test_wrong_password_is_a_fault_at_once_that_does_not_show_it(redis_server, opened):
    wrong = opened(url=f"redis://:wr0ng@127.0.0.1:{redis_server.port}/1", patience=600)
    with pytest.raises(ContextCacheError, match="save of 'a/1' failed: AuthenticationError: ") as caught:
        wrong.save("a/1", {"text": "c0ntent"}, None)
    assert "wr0ng" not in str(caught.value)
    assert "c0ntent" not in str(caught.value)
    none = opened(url=f"redis://127.0.0.1:{redis_server.port}/1", patience=600)
    with pytest.raises(ContextCacheError, match="load of 'a/1' failed: AuthenticationError: "):
        none.load("a/1")


def test_what_is_no_fault_of_the_network_is_not_tried_again(cache, client):
    client.lpush("{retrykit}:h:a/1", "somebody else's list")
    with pytest.raises(ContextCacheError, match="load of 'a/1' failed: ResponseError: WRONGTYPE"):
        cache.load("a/1")


def test_server_that_is_full_refuses_to_save_and_still_removes(own_server, opened):
    cache = opened(url=own_server.url())
    version = cache.save("a/1", {}, None)
    with redis.Redis.from_url(own_server.url()) as client:
        client.config_set("maxmemory", 1)
    with pytest.raises(ContextCacheError, match="save of 'a/2' failed: OutOfMemoryError: "):
        cache.save("a/2", {}, None)
    assert keys(cache) == ["a/1"]
    assert cache.remove("a/1", version) is True


# -- what the server does not keep


def test_history_that_the_server_threw_away_is_told_from_one_that_never_was(cache, client, caplog):
    cache.save("a/1", {}, None)
    cache.save("a/2", {}, None)
    client.delete("{retrykit}:h:a/1", "{retrykit}:h:a/2")
    assert cache.load("a/0") is None
    assert caplog.messages == []
    assert cache.load("a/1") is None
    assert "the history of 'a/1' is gone from Redis" in caplog.text
    assert keys(cache) == []
    assert "the history of 'a/2' is gone from Redis" in caplog.text
    caplog.clear()
    assert (cache.load("a/1"), keys(cache)) == (None, [])
    assert caplog.messages == [], "it is said once"


def test_history_that_the_server_threw_away_takes_no_room_once_it_is_missed(opened, client):
    cache = opened(capacity=2)
    cache.save("a/1", {}, None)
    cache.save("a/2", {}, None)
    client.delete("{retrykit}:h:a/1")
    cache.load("a/1")
    assert cache.save("a/3", {}, None) is not None
    assert keys(cache) == ["a/2", "a/3"]


def settings_of(cache, caplog):
    with caplog.at_level(logging.WARNING, "retrykit.redis"):
        cache.load("a/1")
        cache.load("a/1")
    return [message for message in caplog.messages if "append-only" in message or "maxmemory" in message]


def test_settings_that_let_the_server_forget_are_warned_of_once(own_server, opened, caplog):
    with redis.Redis.from_url(own_server.url()) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
    evicts, forgets = settings_of(opened(url=own_server.url()), caplog)
    assert evicts.startswith(f"redis://127.0.0.1:{own_server.port}/0 throws histories away when its memory is full")
    assert "(maxmemory-policy allkeys-lru)" in evicts
    assert "(appendonly no): after a restart it has forgotten" in forgets


def test_settings_that_keep_everything_are_no_news(cache, caplog):
    assert settings_of(cache, caplog) == []
