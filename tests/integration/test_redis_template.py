"""Stateful retry with its histories in Redis: counts, vetoes, marks and recoveries that processes share."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import retrykit
from retrykit import (
    AsyncRetryTemplate,
    ExhaustedRetryError,
    FixedBackOffPolicy,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    TerminatedRetryError,
)
from retrykit.redis import AsyncRedisRetryContextCache, RedisRetryContextCache, scripts
from tests.servers.process import free_port
from tests.servers.proxy import TcpProxy

DEADLINE = 120


@pytest.fixture
def at_the_end():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def url(redis_server):
    return redis_server.fresh_database()


@pytest.fixture
def proxy(redis_server):
    with TcpProxy(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
def template(url, at_the_end):
    """Makes a template with a cache of its own, as another process would."""

    def template(*, through=None, patience=5.0, **options):
        cache = at_the_end.enter_context(RedisRetryContextCache(through or url, patience=patience))
        defaults = {"name": "orders", "retry_policy": SimpleRetryPolicy(max_attempts=3), "context_cache": cache}
        return RetryTemplate(**(defaults | options))

    return template


def deliver(template, work, *, redelivered=True, recover=None, key="m-1"):
    state = RetryState(key=key, redelivered=redelivered, recover_on_redelivery=False)
    return template.execute(work, recover, state=state)


class Work:
    """Fails so many times, and remembers the attempts."""

    def __init__(self, failures=1_000):
        self.failures = failures
        self.attempts = []

    def __call__(self, context):
        self.attempts.append(context.attempt)
        if len(self.attempts) <= self.failures:
            raise OSError(f"failure {len(self.attempts)}")
        return "done"


CONSUMER = """
import sys
from retrykit import RetryError, RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.redis import RedisRetryContextCache
url, limit = sys.argv[1], int(sys.argv[2])
cache = RedisRetryContextCache(url)
template = RetryTemplate(
    name="orders", retry_policy=SimpleRetryPolicy(limit), context_cache=cache, remember_completed=60
)
def work(context):
    print("attempt", flush=True)
    raise OSError("no")
def recover(context):
    print("recovered", context.retry_count, flush=True)
print("ready", flush=True)
sys.stdin.readline()
over = False
while not over:
    try:
        template.execute(work, recover, state=RetryState(key="m-1", recover_on_redelivery=False))
        over = True
    except (OSError, RetryError):
        pass
template.context_cache.close()
"""


def consumers(number, *arguments):
    """What that many processes print together."""
    environment = {**os.environ, "PYTHONPATH": str(Path(retrykit.__file__).parents[1]), "PYTHONWARNINGS": "error"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", CONSUMER, *map(str, arguments)]
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(number)]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate(timeout=DEADLINE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * number, told
    return "".join(out for out, _ in told).split("\n")[:-1]


def test_processes_that_get_one_message_make_no_more_attempts_than_allowed_and_recover_it_once(url):
    told = consumers(3, url, 10)
    assert told.count("attempt") == 10
    assert [line for line in told if line != "attempt"] == ["recovered 10"]


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from retrykit import RetryState, RetryTemplate
from retrykit.redis import RedisRetryContextCache
url, step, redelivered = sys.argv[1], sys.argv[2], sys.argv[3] == "again"
remember = 60 if step == "after the mark" else None
template = RetryTemplate(name="orders", context_cache=RedisRetryContextCache(url), remember_completed=remember)
def die():
    os.kill(os.getpid(), signal.SIGKILL)
@contextmanager
def transaction():
    yield
    print("committed", flush=True)
    if step == "after the commit":
        die()
def work(context):
    if step == "in the second attempt" and context.attempt == 2:
        die()
    if step == "in the second attempt":
        raise OSError("no")
    print("worked", flush=True)
for _ in range(2):
    try:
        template.execute(work, state=RetryState(key="m-1", redelivered=redelivered), transaction=transaction)
        die()
    except OSError:
        redelivered = True
"""


def killed(url, step, delivery="again"):
    """A consumer that kills itself at a step; what it has done by then."""
    environment = {**os.environ, "PYTHONPATH": str(Path(retrykit.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, url, step, delivery]
    ended = subprocess.run(command, env=environment, timeout=DEADLINE, check=False, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    return ended.stdout.split()


def test_another_process_goes_on_where_one_was_killed(url, template):
    killed(url, "in the second attempt", "first")
    work, recovered = Work(), []
    shared = template()
    assert deliver(shared, work, recover=lambda context: recovered.append(context.retry_count) or "parked") == "parked"
    assert (work.attempts, recovered) == ([3], [3])


# What docs/howto/redis.md says of a crash between two steps.


def test_crash_between_the_commit_and_the_end_of_the_history_is_a_counted_attempt_and_the_work_runs_again(
    url, template
):
    assert killed(url, "after the commit") == ["worked", "committed"]
    work = Work(failures=0)
    assert deliver(template(), work) == "done"
    assert work.attempts == [2]


def test_crash_after_the_commit_of_a_first_delivery_leaves_nothing_and_the_work_runs_again(url, template):
    assert killed(url, "after the commit", "first") == ["worked", "committed"]
    work = Work(failures=0)
    assert deliver(template(), work) == "done"
    assert work.attempts == [1]


def test_crash_after_the_history_ended_leaves_nothing_and_the_work_runs_again(url, template):
    assert killed(url, "after the end") == ["worked", "committed"]
    work = Work(failures=0)
    assert deliver(template(), work) == "done"
    assert work.attempts == [1]


def test_crash_after_the_mark_was_stored_lets_the_next_delivery_be_answered_without_the_work(url, template):
    assert killed(url, "after the mark") == ["worked", "committed"]
    work = Work(failures=0)
    assert deliver(template(remember_completed=60), work) is None
    assert work.attempts == []


def test_failure_is_counted_before_anyone_hears_of_it(template):
    first, second = template(), template()
    work = Work()
    with pytest.raises(OSError, match="failure 1"):
        deliver(first, work, redelivered=False)
    (found,) = second.context_cache.items()
    assert found[0] == "orders/m-1"
    assert found[1].snapshot["retry_count"] == 1
    with pytest.raises(OSError, match="failure 2"):
        deliver(second, work)
    for shared in (first, second):
        with pytest.raises(ExhaustedRetryError) as caught:
            deliver(shared, work)
        assert str(caught.value.__cause__ or caught.value.__context__).endswith("failure 3")
    assert work.attempts == [1, 2, 3]


def test_lost_answer_is_counted_once(template, proxy, url):
    doubtful = template(through=proxy.via(url), patience=60)
    work = Work()
    for _ in range(2):
        with pytest.raises(OSError, match="failure"):
            deliver(doubtful, work, key="another")
    proxy.lose_answers(scripts.SAVE.sha, times=2)
    with pytest.raises(OSError, match="failure 3"):
        deliver(doubtful, work, redelivered=False)
    with pytest.raises(OSError, match="failure 4"):
        deliver(doubtful, work)
    assert proxy.lost == 2
    stored = doubtful.context_cache.load("orders/m-1")
    assert (stored.snapshot["retry_count"], work.attempts[2:]) == (2, [1, 2])


def test_veto_of_one_process_holds_in_all(template):
    first, second = template(), template()
    work = Work()
    with pytest.raises(OSError, match="failure 1"):
        deliver(first, work, redelivered=False)
    first.veto("m-1", "the customer is gone")
    with pytest.raises(ExhaustedRetryError, match="the customer is gone"):
        deliver(second, work)
    assert deliver(second, work, recover=lambda context: context.veto_reason) == "the customer is gone"
    assert work.attempts == [1]


def test_veto_comes_before_the_first_attempt_too(template):
    template().veto("m-1", "not today")
    work = Work()
    with pytest.raises(TerminatedRetryError, match="not today"):
        deliver(template(), work)
    assert work.attempts == []


def test_duplicate_of_a_completed_item_is_answered_by_the_mark(template):
    first, second = template(remember_completed=3600), template(remember_completed=3600)
    work = Work(failures=1)
    with pytest.raises(OSError, match="failure 1"):
        deliver(first, work, redelivered=False)
    assert deliver(first, work) == "done"
    assert deliver(second, work) is None
    assert work.attempts == [1, 2]
    (found,) = second.context_cache.items()
    assert found[1].snapshot["completed_at"] > 0


def test_recovery_happens_once_whoever_gets_the_message_at_once(template):
    templates = [template(remember_completed=3600) for _ in range(6)]
    work, recovered, start = Work(), [], threading.Barrier(6)
    for _ in range(2):
        with pytest.raises(OSError, match="failure"):
            deliver(templates[0], work)

    def recover(context):
        recovered.append(context.retry_count)

    def receive(shared):
        start.wait(DEADLINE)
        try:
            deliver(shared, work, recover=recover)
        except TerminatedRetryError:
            return "later"
        return "over"

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(receive, templates))
    assert recovered == [3]
    assert "over" in told
    assert work.attempts == [1, 2, 3]


def test_pauses_are_due_by_the_clock_of_the_server(template):
    class Ahead(retrykit.SystemClock):
        """A machine whose clock is a day ahead: it would take every pause for over."""

        def time(self):
            return super().time() + 86_400

        def sleep(self, seconds):
            slept.append(seconds)

    slept = []
    options = {"back_off_policy": FixedBackOffPolicy(600), "clock": Ahead()}
    first, second = template(**options), template(**options)
    work = Work(failures=1)
    first.context_cache.load("orders/none")
    with pytest.raises(OSError, match="failure 1"):
        deliver(first, work, redelivered=False)
    assert deliver(second, work) == "done"
    (pause,) = slept
    assert 590 < pause <= 600


def test_absent_server_hides_no_business_error_and_is_noted_on_it(template, caplog):
    alone = template(through=f"redis://:secret@127.0.0.1:{free_port()}", patience=0.1)
    work = Work()
    for _ in range(2):
        with caplog.at_level(logging.ERROR, "retrykit"), pytest.raises(OSError, match="failure") as caught:
            deliver(alone, work, redelivered=False)
        (note,) = caught.value.__notes__
        assert note.startswith("retrykit: this failure of 'orders' was not stored: ContextCacheError: context cache: ")
        assert "save of 'orders/m-1' failed: ConnectionError" in note
    assert "secret" not in caplog.text
    assert work.attempts == [1, 1]
    assert deliver(alone, Work(failures=0)) == "done"


def test_server_that_was_flushed_in_the_middle_of_an_attempt_costs_the_count_and_nothing_else(template):
    shared = template()
    attempts = []

    def work(context):
        attempts.append(context.attempt)
        if len(attempts) == 2:
            shared.context_cache.client.flushdb()
        raise OSError("no")

    for outcome in (OSError, OSError, OSError, ExhaustedRetryError):
        with pytest.raises(outcome):
            deliver(shared, work)
    assert attempts == [1, 2, 2, 3]


def test_asynchronous_template_counts_vetoes_remembers_and_recovers_on_asyncio(url):
    async def work(context):
        attempts.append(context.attempt)
        await asyncio.sleep(0)
        if len(attempts) < 3:
            raise OSError("no")
        return "done"

    async def receive(shared, key="m-1", recover=None):
        return await shared.execute(
            work, recover, state=RetryState(key=key, redelivered=True, recover_on_redelivery=False)
        )

    async def everything():
        async with AsyncRedisRetryContextCache(url) as cache, AsyncRedisRetryContextCache(url) as other:
            options = {"name": "orders", "remember_completed": 60, "retry_policy": SimpleRetryPolicy(max_attempts=3)}
            first = AsyncRetryTemplate(context_cache=cache, **options)
            second = AsyncRetryTemplate(context_cache=other, **options)
            for shared in (first, second):
                with pytest.raises(OSError, match="no"):
                    await receive(shared)
            assert await receive(first) == "done"
            assert await receive(second) is None
            assert attempts == [1, 2, 3]
            await first.veto("m-2", "never")
            assert await receive(second, "m-2", recover=lambda context: context.veto_reason) == "never"
            assert [key async for key, _ in other.items()] == ["orders/m-1", "orders/m-2"]

    attempts = []
    asyncio.run(everything())


def test_asynchronous_consumers_of_one_message_make_no_more_attempts_than_allowed(url):
    async def work(context):
        attempts.append(context.attempt)
        await asyncio.sleep(0.001)
        raise OSError("no")

    async def everything():
        async with AsyncRedisRetryContextCache(url) as cache:
            options = {"name": "orders", "retry_policy": SimpleRetryPolicy(8), "remember_completed": 60}
            shared = AsyncRetryTemplate(context_cache=cache, **options)

            async def consume():
                over = False
                while not over:
                    try:
                        await shared.execute(
                            work,
                            lambda context: recovered.append(context.retry_count),
                            state=RetryState(key="m-1", recover_on_redelivery=False),
                        )
                        over = True
                    except (OSError, TerminatedRetryError):
                        await asyncio.sleep(0)

            await asyncio.gather(*(consume() for _ in range(10)))

    attempts, recovered = [], []
    asyncio.run(everything())
    assert len(attempts) == 8
    assert recovered == [8]
