from __future__ import annotations

import threading

import pytest

from retrykit.messaging.counters import Counters, Tally


def test_what_several_threads_count_adds_up():
    tally = Tally()
    threads = [threading.Thread(target=lambda: [tally.add(received=1, parked=2) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.snapshot() == Counters(received=2_000, parked=4_000)


def test_a_snapshot_does_not_change():
    tally = Tally()
    before = tally.snapshot()
    tally.add(received=1)
    assert (before, tally.snapshot()) == (Counters(), Counters(received=1))


def test_what_is_not_counted_is_an_error():
    with pytest.raises(KeyError, match="recieved"):
        Tally().add(recieved=1)
