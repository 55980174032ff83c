"""What is in hand when a container stops at once: given back, and counted neither as a failure nor as a crash."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from functools import partial

import pytest

from retrykit import RetryTemplate, SimpleRetryPolicy, lease
from retrykit.cache import MapRetryContextCache
from retrykit.messaging import ContainerGroup, ListenerContainer, Park, retraction
from retrykit.messaging.memory import MemoryBroker
from tests import waiting

ORDERS = "/queue/orders"
PATIENCE = 20.0
wait_for = partial(waiting.until, seconds=PATIENCE, look=0.002)


class Slow:
    """A handler that does not return before it is told to."""

    def __init__(self, outcome=None, *, quick=0):
        self.running, self.go_on = threading.Event(), threading.Event()
        self.outcome = outcome
        self.quick = quick
        self.calls = 0

    def handle(self, message, context=None):
        self.calls += 1
        if self.calls <= self.quick:
            raise ValueError("no")
        self.running.set()
        assert self.go_on.wait(PATIENCE)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def broker():
    made = MemoryBroker(ORDERS)
    made.publish("x")
    return made


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.go_on.set()


MADE = []


@pytest.fixture(autouse=True)
def made_and_left(caplog):
    """No container of one test is heard in the next."""
    caplog.set_level(logging.INFO, "retrykit.messaging")
    yield
    while MADE:
        assert MADE.pop().wait(PATIENCE)


def container(broker, handler, cache, *, max_attempts=3, lease=300.0, **options):
    policy = SimpleRetryPolicy(max_attempts=max_attempts)
    template = RetryTemplate(name="orders", retry_policy=policy, context_cache=cache, lease=lease)
    MADE.append(ListenerContainer(broker, handler, template=template, journal="always", **options))
    return MADE[-1]


def running(made, slow):
    made.start()
    assert slow.running.wait(PATIENCE)


def flights(cache):
    return [flight for _, stored in cache.items() for flight in stored.snapshot.get("in_flight", ())]


def test_an_attempt_that_is_not_waited_for_is_no_crash(broker, slow, caplog):
    cache = MapRetryContextCache()
    made = container(broker, slow.handle, cache)
    running(made, slow)
    assert len(flights(cache)) == 1
    made.stop(now=True)
    assert list(cache.items()) == []
    assert len(broker.messages()) == 1
    assert made.counters.withheld == 1
    key = broker.messages()[0].key
    (line,) = [record.getMessage() for record in caplog.records if "stopped at once" in record.getMessage()]
    assert line == f"stopped at once; given back without a failed attempt: {key!r}"
    made.stop(now=True)
    assert caplog.text.count("stopped at once") == 1


def test_failures_before_it_still_count(broker, slow):
    cache = MapRetryContextCache()
    slow.quick = 2
    running(made := container(broker, slow.handle, cache), slow)
    made.stop(now=True)
    ((_, stored),) = cache.items()
    assert (stored.snapshot["retry_count"], flights(cache)) == (2, [])


def test_any_number_of_stops_parks_nothing(broker):
    cache, parked = MapRetryContextCache(), []
    for _ in range(4):
        slow = Slow()
        recover = lambda message, _context: parked.append(message)  # noqa: E731
        running(made := container(broker, slow.handle, cache, max_attempts=2, recover=recover), slow)
        made.stop(now=True)
        slow.go_on.set()
        assert made.wait(PATIENCE)
    assert (parked, len(broker.messages()), list(cache.items())) == ([], 1, [])


@pytest.mark.parametrize("outcome", [None, ValueError("late"), Park("/queue/elsewhere"), SystemExit(3)], ids=repr)
def test_what_comes_of_it_afterwards_changes_nothing(broker, slow, outcome, caplog):
    cache, log = MapRetryContextCache(), []

    @contextmanager
    def transaction():
        try:
            yield
        except BaseException:
            log.append("rollback")
            raise
        log.append("commit")

    slow.outcome = outcome
    running(made := container(broker, slow.handle, cache, transaction=transaction), slow)
    made.stop(now=True)
    slow.go_on.set()
    assert made.wait(PATIENCE)
    assert (log, list(cache.items()), len(broker.messages())) == (["rollback"], [], 1)
    assert made.counters.withheld == made.counters.received == 1
    assert broker.at("/queue/elsewhere").messages() == ()
    assert ("what was cut off has ended with" in caplog.text) is isinstance(outcome, BaseException)
    assert made.error is None


def test_it_is_withdrawn_before_others_are_given_the_message(slow):
    class Watched(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            close = session.close

            def watched(*, wait=True):
                seen.append(flights(cache))
                close(wait=wait)

            session.close = watched
            return session

    cache, seen = MapRetryContextCache(), []
    broker = Watched(ORDERS)
    broker.publish("x")
    running(made := container(broker, slow.handle, cache), slow)
    made.stop(now=True)
    assert seen == [[]]


def test_a_recovery_that_is_not_waited_for_is_made_again(broker, slow):
    cache, done = MapRetryContextCache(), []

    def fail(message):
        raise ValueError("no")

    running(made := container(broker, fail, cache, max_attempts=1, recover=slow.handle), slow)
    made.stop(now=True)
    ((_, stored),) = cache.items()
    assert (stored.snapshot["retry_count"], flights(cache)) == (1, [])
    assert "recovery_failures" not in stored.snapshot or not stored.snapshot["recovery_failures"]
    again = container(broker, fail, cache, max_attempts=1, recover=lambda message, _context: done.append(message.text))
    with again:
        assert broker.wait_until_empty(PATIENCE)
    assert done == ["x"]


def test_what_others_have_stored_meanwhile_is_kept(broker, slow):
    cache = MapRetryContextCache()
    running(made := container(broker, slow.handle, cache), slow)
    made.template.veto(broker.messages()[0].key, "a person said so")
    made.stop(now=True)
    ((_, stored),) = cache.items()
    assert (stored.snapshot["veto"], flights(cache)) == ("a person said so", [])


def test_its_lease_is_renewed_no_longer_and_nobody_is_told_that_it_was_lost(broker, slow, caplog):
    class Shared(MapRetryContextCache):
        shared = True

    cache = Shared()
    made = container(broker, slow.handle, cache, lease=0.03)
    running(made, slow)
    mine = {number for number, (_, _, call, _) in lease._keeper._held.items() if call.template.context_cache is cache}
    assert len(mine) == 1
    made.stop(now=True)
    wait_for(lambda: not mine & lease._keeper._held.keys())
    assert "lease" not in caplog.text


class Troubled(MapRetryContextCache):
    """Its trouble begins with the stop."""

    trouble = None

    def load(self, key):
        if self.trouble is not None:
            self.trouble()
        return super().load(key)


def test_a_store_that_fails_is_told_and_holds_nothing_up(broker, slow, caplog):
    def fail():
        raise ConnectionError("the store is gone")

    cache = Troubled()
    running(made := container(broker, slow.handle, cache), slow)
    cache.trouble = fail
    made.stop(now=True)
    assert "may count as a crash: ConnectionError: the store is gone" in caplog.text
    assert "given back without" not in caplog.text
    assert len(flights(cache)) == 1


def test_a_store_that_hangs_holds_nothing_up(broker, slow, caplog, monkeypatch):
    monkeypatch.setattr(retraction, "PATIENCE", 0.02)
    cache, answers = Troubled(), threading.Event()
    running(made := container(broker, slow.handle, cache), slow)
    cache.trouble = lambda: answers.wait(PATIENCE)
    made.stop(now=True)
    assert "not known in time to be withdrawn" in caplog.text
    assert len(broker.messages()) == 1
    # It answers after all.
    answers.set()
    wait_for(lambda: flights(cache) == [])


def test_a_delivery_whose_handler_has_returned_comes_to_its_end_by_itself(broker, slow, caplog):
    leaving, go_on = threading.Event(), threading.Event()
    cache = MapRetryContextCache()

    @contextmanager
    def transaction():
        yield
        leaving.set()
        assert go_on.wait(PATIENCE)

    made = container(broker, lambda _message: None, cache, transaction=transaction)
    made.start()
    assert leaving.wait(PATIENCE)
    (session,) = made._sessions
    stopping = threading.Thread(target=made.stop, kwargs={"now": True})
    stopping.start()
    wait_for(lambda: session._lost)
    go_on.set()
    stopping.join(PATIENCE)
    assert made.wait(PATIENCE)
    # Committed in the database, in doubt at the broker: the entry is withdrawn by the delivery itself.
    assert made.counters.in_doubt == 1
    assert (list(cache.items()), "stopped at once" in caplog.text) == ([], False)


def test_no_handler_begins_once_all_is_over(broker, slow):
    pausing = threading.Event()

    class Opening:
        def __enter__(self):
            pausing.set()
            assert slow.go_on.wait(PATIENCE)

        def __exit__(self, *_facts):
            pass

    cache = MapRetryContextCache()
    made = container(broker, slow.handle, cache, transaction=Opening)
    made.start()
    assert pausing.wait(PATIENCE)
    stopping = threading.Thread(target=made.stop, kwargs={"now": True})
    stopping.start()
    wait_for(lambda: made._retraction._looked_after)
    slow.go_on.set()
    stopping.join(PATIENCE)
    assert made.wait(PATIENCE)
    assert (slow.calls, list(cache.items()), len(broker.messages())) == (0, [], 1)
    assert made.counters.withheld == 1


def test_a_handler_may_stop_its_own_container_at_once(broker):
    cache = MapRetryContextCache()
    made = container(broker, lambda _message: made.stop(now=True), cache)
    made.start()
    assert made.wait(PATIENCE)
    assert (list(cache.items()), len(broker.messages())) == ([], 1)


def test_containers_of_a_group_are_stopped_beside_each_other(caplog, monkeypatch):
    monkeypatch.setattr(retraction, "PATIENCE", 0.2)
    cache, slows = Troubled(), [Slow() for _ in range(3)]
    brokers = [MemoryBroker(f"/queue/{number}") for number in range(3)]
    for one in brokers:
        one.publish("x")
    group = ContainerGroup([container(one, slow.handle, cache) for one, slow in zip(brokers, slows, strict=True)])
    group.start()
    for slow in slows:
        assert slow.running.wait(PATIENCE)
    together = threading.Barrier(3)
    cache.trouble = lambda: together.wait(PATIENCE)
    group.stop(now=True)
    assert caplog.text.count("given back without a failed attempt") == 3
    for slow in slows:
        slow.go_on.set()
    assert group.wait(PATIENCE)
