"""Who reads a connection: the worker that waits, or the thread that stands by."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from functools import partial

import pytest

import retrykit.messaging.stomp.reading
from retrykit.messaging.stomp.reading import OWN_SECONDS, Reading
from tests import waiting
from tests.interruptions import interrupted_at

PATIENCE = 30.0
LOOK = 0.02


class Source:
    """What can be read: pieces that arrive one by one; who read each is noted."""

    def __init__(self):
        self.arrived = threading.Condition()
        self.pieces = deque()
        self.told = []
        self.readers = []
        self.at_once = 0
        self.asked = 0

    def come(self, piece):
        with self.arrived:
            self.pieces.append(piece)
            self.arrived.notify_all()

    def read(self, seconds):
        with self.arrived:
            self.asked += 1
            self.at_once += 1
            assert self.at_once == 1, "two threads read at once"
            there = self.arrived.wait_for(lambda: self.pieces, seconds)
            self.at_once -= 1
            if not there:
                return False
            piece = self.pieces.popleft()
        self.readers.append(threading.current_thread())
        if piece == "beat":
            return False
        self.told.append(piece)
        return True


@contextmanager
def read_by(source, *, look=LOOK):
    reading = Reading(source.read, look)
    thread = threading.Thread(target=reading.stand_by)
    thread.start()
    try:
        yield reading, thread
    finally:
        reading.end()
        source.come("end")
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_worker_reads_what_it_waits_for_by_itself():
    source = Source()
    with read_by(source, look=PATIENCE) as (reading, _):
        for number in range(100):
            source.come(number)
            reading.wait_for(lambda: number in source.told, PATIENCE)  # noqa: B023 - called before the loop goes on
        assert source.told == list(range(100))
        assert set(source.readers) == {threading.current_thread()}


def test_a_long_wait_is_left_to_the_thread_that_stands_by_and_the_worker_reads_again_afterwards():
    source = Source()
    with read_by(source, look=PATIENCE) as (reading, thread):
        late = threading.Timer(3 * OWN_SECONDS, source.come, ["late"])
        late.start()
        reading.wait_for(lambda: source.told, PATIENCE)
        late.join()
        assert source.readers == [thread]
        source.come("next")
        reading.wait_for(lambda: "next" in source.told, PATIENCE)
        assert source.readers == [thread, threading.current_thread()]


def test_while_a_message_is_handled_for_long_somebody_reads():
    source = Source()
    with read_by(source) as (_, thread):
        for number in range(3):
            source.come("beat")
            waiting.until(lambda: len(source.readers) > number, PATIENCE)  # noqa: B023
        assert set(source.readers) == {thread}


def test_a_sign_of_life_ends_no_wait_and_frees_nobody_of_his_turn():
    source = Source()
    with read_by(source, look=PATIENCE) as (reading, thread):
        for piece in ("beat", "beat", "a frame"):
            threading.Timer(2 * OWN_SECONDS, source.come, [piece]).start()
        reading.wait_for(lambda: source.told, PATIENCE)
        assert source.told == ["a frame"]
        assert source.readers.count(thread) == len(source.readers)


@pytest.mark.parametrize("seconds", [0, 0.01, OWN_SECONDS * 2])
def test_a_wait_ends_in_time_and_has_looked_once(seconds):
    source = Source()
    with read_by(source, look=PATIENCE) as (reading, _):
        source.come("there already")
        reading.wait_for(lambda: False, seconds)
        assert source.told == ["there already"]


def test_the_end_of_the_connection_ends_every_wait():
    source = Source()
    with read_by(source, look=PATIENCE) as (reading, _):
        ended = []
        waiters = [
            threading.Thread(target=lambda: (reading.wait_for(lambda: False), ended.append(True))) for _ in range(3)
        ]
        for waiter in waiters:
            waiter.start()
        waiting.until(lambda: source.asked, PATIENCE)
        reading.end()
        source.come("end")
        for waiter in waiters:
            waiter.join(PATIENCE)
        assert ended == [True] * 3


def test_two_who_wait_for_different_frames_both_get_theirs():
    source = Source()
    with read_by(source) as (reading, _):
        waiters = [
            threading.Thread(target=reading.wait_for, args=(lambda number=number: number in source.told, PATIENCE))
            for number in range(2)
        ]
        for waiter in waiters:
            waiter.start()
        for number in (1, 0):
            source.come(number)
        for waiter in waiters:
            waiter.join(PATIENCE)
            assert not waiter.is_alive()
        assert sorted(source.told) == [0, 1]


def test_whoever_stands_by_sleeps_while_the_worker_reads():
    source = Source()
    with read_by(source, look=10 * LOOK) as (reading, thread):
        for number in range(50):
            threading.Timer(LOOK / 4, source.come, [number]).start()
            reading.wait_for(lambda: number in source.told, PATIENCE)  # noqa: B023
        # A busy machine may have kept the worker away for a look or two.
        assert source.readers.count(thread) < 25


def test_a_fault_of_the_reader_is_the_waiters_and_the_turn_is_free_again():
    reads = iter([ZeroDivisionError, None])

    def read(_seconds):
        if (fault := next(reads)) is not None:
            raise fault
        return True

    reading = Reading(read, LOOK)
    with pytest.raises(ZeroDivisionError):
        reading.wait_for(lambda: False, 0)
    reading.wait_for(lambda: False, 0)
    with pytest.raises(StopIteration):
        next(reads)


def test_a_turn_that_was_interrupted_before_it_was_ended_is_taken_again():
    source = Source()
    with read_by(source, look=PATIENCE) as (reading, _):
        with reading.lock:
            # As a signal would leave it that comes between the note and the reading.
            assert reading._take_turn()
        source.come("next")
        reading.wait_for(lambda: source.told, PATIENCE)
        assert source.told == ["next"]


def read_after_an_interruption(verb, number):
    """Where it was interrupted; None if it ended before."""
    source = Source()
    reading = Reading(source.read, LOOK)
    calls = {"wait_for": partial(reading.wait_for, lambda: source.told, PATIENCE), "look": reading.look}
    source.come("one")
    place = interrupted_at(number, calls[verb], modules=[retrykit.messaging.stomp.reading])
    assert not reading.lock._is_owned(), place
    source.come("two")
    reading.wait_for(lambda: "two" in source.told, PATIENCE)
    assert source.told == ["one", "two"], place
    return place


@pytest.mark.parametrize("verb", ["wait_for", "look"])
def test_at_no_line_an_interruption_leaves_a_session_that_hears_nothing(verb):
    interrupted = next(number for number in range(1, 1_000) if read_after_an_interruption(verb, number) is None)
    assert interrupted > 5
