"""The threads that an event loop of handlers has to spare."""

from __future__ import annotations

import threading

import pytest

from retrykit.messaging.coroutines import spare_threads
from retrykit.messaging.coroutines.spare_threads import SpareThreads

PATIENCE = 20.0


@pytest.fixture
def threads():
    made = SpareThreads()
    yield made
    made.shutdown()


def test_calls_run_side_by_side_in_daemons(threads):
    together = threading.Barrier(3)
    futures = [threads.submit(together.wait, PATIENCE) for _ in range(3)]
    assert sorted(future.result(PATIENCE) for future in futures) == [0, 1, 2]
    assert threads.submit(lambda: threading.current_thread().daemon).result(PATIENCE)


def test_a_thread_that_has_nothing_to_do_takes_the_next_call(threads):
    for _ in range(20):
        names = {threads.submit(lambda: threading.current_thread().name).result(PATIENCE) for _ in range(20)}
    assert len(names) <= 2  # the second call may come before the first thread is at rest


def test_more_calls_than_there_may_be_threads_wait_for_their_turn(threads, monkeypatch):
    monkeypatch.setattr(spare_threads, "MOST", 2)
    go_on = threading.Event()
    futures = [threads.submit(go_on.wait, PATIENCE) for _ in range(5)]
    go_on.set()
    assert [future.result(PATIENCE) for future in futures] == [True] * 5
    assert len(threads._daemons) == 2


def test_arguments_go_in_and_errors_come_out(threads):
    assert threads.submit(int, "11", base=2).result(PATIENCE) == 3
    with pytest.raises(SystemExit):
        threads.submit(exit_now).result(PATIENCE)
    assert threads.submit(int).result(PATIENCE) == 0


def exit_now():
    raise SystemExit


def test_a_call_that_was_cancelled_before_its_turn_is_not_made(threads, monkeypatch):
    monkeypatch.setattr(spare_threads, "MOST", 1)
    go_on, calls = threading.Event(), []
    first = threads.submit(go_on.wait, PATIENCE)
    second = threads.submit(calls.append, "second")
    assert second.cancel()
    go_on.set()
    assert first.result(PATIENCE)
    threads.submit(calls.append, "third").result(PATIENCE)
    assert calls == ["third"]


def test_shutdown_waits_for_what_was_submitted_and_takes_no_more(threads):
    calls = []
    for number in range(10):
        threads.submit(calls.append, number)
    threads.shutdown()
    assert sorted(calls) == list(range(10))
    with pytest.raises(RuntimeError, match="it has ended"):
        threads.submit(int)
