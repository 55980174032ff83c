"""P2, P5 and P7 with real processes and a real database: killed between any two steps, and all at one key at once."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from retrykit import RetryTemplate
from retrykit.sql import SqlRetryContextCache, sqlite_engine
from tests.fault.nursery import effects, metadata, parked

ROOT = Path(__file__).parents[2]
MAX_ATTEMPTS = 3


@pytest.fixture(scope="module")
def nursery():
    command = [sys.executable, "-m", "tests.fault.nursery"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(*orders):
            process.stdin.write(json.dumps(orders) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()
        process.wait(60)


class Place:
    """The databases of one test, and what is in them."""

    def __init__(self, tmp_path, *, apart=False):
        self.work = f"sqlite:///{tmp_path / 'work.db'}"
        self.history = f"sqlite:///{tmp_path / 'history.db'}" if apart else self.work
        self.engine = sqlite_engine(self.work, durability="process")
        metadata.create_all(self.engine)
        self.histories = sqlite_engine(self.history, durability="process")
        self.template = RetryTemplate(name="orders", context_cache=SqlRetryContextCache(self.histories))

    def count(self, table, key):
        with self.engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).where(table.c.key == key))

    def failures(self, key):
        """How many failures the store knows of: None when it knows no history."""
        found = self.template.history(key)
        return None if found is None else found.retry_count

    def close(self):
        self.engine.dispose()
        self.histories.dispose()


@pytest.fixture
def place(tmp_path, request):
    place = Place(tmp_path, apart=getattr(request, "param", False))
    yield place
    place.close()


class Item:
    """One message, and the processes that it was delivered to."""

    def __init__(self, nursery, place, key, flags, **options):
        self.nursery = nursery
        self.place = place
        self.key = key
        self.order = {"work": place.work, "history": place.history, "key": key, "max_attempts": MAX_ATTEMPTS, **options}
        self.flags = flags
        self.heard = []

    @property
    def attempts(self):
        return sum(child["steps"].count("attempt") for child in self.heard)

    @property
    def deaths(self):
        return sum(child["status"] != 0 for child in self.heard)

    @property
    def effects(self):
        return self.place.count(effects, self.key) + self.place.count(parked, self.key)

    def deliver_until_settled(self, last=None, **options):
        """To a fresh process, until it has settled the message, or was killed at its step number `last`."""
        flags = self.flags if not self.heard else self.flags[1:] * 2
        order = {**self.order, "redelivered": flags, "attempts": self.attempts, "last": last, **options}
        (child,) = self.nursery(order)
        killed = last is not None and len(child["steps"]) > last
        assert child["status"] == (-9 if killed else 0)
        self.heard.append(child)
        check_order(child["steps"])
        assert killed or child["outcomes"][-1] in ("work", "substitute", "duplicate"), child["outcomes"]
        return child

    def stored_failures(self):
        """How many failures were stored, as far as one can hear."""
        steps = [step for child in self.heard for step in child["steps"] if step in ("fails", "save done")]
        return sum(pair == ("fails", "save done") for pair in itertools.pairwise(steps))

    def unjournaled_deaths(self):
        """Attempts that died, of which the store could not know: the first, without an entry, not counted before."""
        steps = self.heard[0]["steps"]
        return int(
            self.flags[0] is False and self.heard[0]["status"] != 0 and "attempt" in steps and "save done" not in steps
        )


def check_order(steps):
    """What may never follow what, in one process."""
    is_open = stored = False
    for step in steps:
        is_open = (is_open or step == "began") and step not in ("committed", "fails")
        assert not (is_open and step == "pause"), "P7: a pause while the transaction was open"
        if step in ("attempt", "fails"):
            stored = False
        stored = stored or step == "save done"
        assert step != "on_error" or stored, "P1: the listeners heard of a failure before it was stored"
    for step in ("remove", "joined remove"):
        if step in steps:
            assert "worked" in steps or "recovered" in steps, "P2: the history was dropped without an outcome"


CASES = {
    "a good message": {"fails": 0},
    "a flaky message": {"fails": 2},
    "a poison message": {"fails": 99},
    "a poison message, recovered later": {"fails": 99, "recover_later": True},
}
FLAGS = {"first, again": [False, True], "unknown, again": [None, True], "unknown": [None, None]}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("case", CASES)
def test_p2_p5_p7_a_consumer_may_be_killed_between_any_two_steps(nursery, place, case, flags):
    options = {"remember": 3600, "pause": 5, **CASES[case]}
    plain = Item(nursery, place, "plain", FLAGS[flags], **options)
    plain.deliver_until_settled()
    for last in range(len(plain.heard[0]["steps"])):
        item = Item(nursery, place, str(last), FLAGS[flags], **options)
        item.deliver_until_settled(last)
        if not item.effects:
            assert (place.failures(item.key) or 0) >= item.stored_failures(), "P2: failures were forgotten too early"
        if last % 3 == 0:
            # Whoever gets it next dies too.
            item.deliver_until_settled(last // 2)
        child = item.deliver_until_settled(duplicate=True)
        assert item.attempts <= MAX_ATTEMPTS + item.unjournaled_deaths(), "P5: too many attempts"
        assert item.effects == 1, "the effects were not exactly once"
        assert place.count(parked, item.key) == 0 or item.attempts >= MAX_ATTEMPTS - item.deaths, (
            "it was parked too early"
        )
        assert child["outcomes"][-1] == "duplicate", "a late duplicate was not recognized"


@pytest.mark.parametrize("place", [True], indirect=True, ids=["in another database"])
def test_p2_p5_nothing_is_lost_when_the_history_is_in_another_database(nursery, place):
    plain = Item(nursery, place, "plain", [None, True], fails=1)
    plain.deliver_until_settled()
    for last in range(len(plain.heard[0]["steps"])):
        item = Item(nursery, place, str(last), [None, True], fails=1)
        item.deliver_until_settled(last)
        item.deliver_until_settled()
        assert item.attempts <= MAX_ATTEMPTS
        # A death between the commit of the work and the settling of the history does the work again.
        assert 1 <= item.effects <= 2


def crowd(place, key, redelivered, **options):
    """Four processes of eight threads each, all at one key."""
    order = {
        "work": place.work,
        "history": place.history,
        "key": key,
        "redelivered": [redelivered] * 2,
        "threads": 8,
        **options,
    }
    return [order] * 4


@pytest.mark.parametrize("redelivered", [None, True])
def test_p5_the_count_is_exact_while_four_processes_of_eight_threads_fail_on_one_key(nursery, place, redelivered):
    options = {"fails": 10**6, "recovers": False, "transactional": False, "max_attempts": 10_000, "deliveries": 2}
    children = nursery(*crowd(place, "m", redelivered, **options))
    assert all(child["status"] == 0 for child in children)
    attempts = sum(child["steps"].count("attempt") for child in children)
    assert Counter(outcome for child in children for outcome in child["outcomes"]) == {"ConnectionError": attempts}
    assert attempts == 4 * 8 * 2
    assert place.failures("m") == attempts


@pytest.mark.parametrize("redelivered", [None, True])
def test_p5_the_limit_holds_while_four_processes_of_eight_threads_are_at_one_key(nursery, place, redelivered):
    options = {"fails": 10**6, "max_attempts": 5, "deliveries": 2, "remember": 3600}
    children = nursery(*crowd(place, "m", redelivered, **options))
    assert all(child["status"] == 0 for child in children)
    attempts = sum(child["steps"].count("attempt") for child in children)
    assert attempts <= 5, "P5: too many attempts"
    item = Item(nursery, place, "m", [True, True], fails=10**6, max_attempts=5, remember=3600)
    item.deliver_until_settled()
    assert attempts + item.attempts <= 5
    assert (place.count(effects, "m"), place.count(parked, "m")) == (0, 1), "it was not parked exactly once"


@pytest.mark.parametrize("redelivered", [None, True])
def test_p5_the_work_is_done_once_while_four_processes_of_eight_threads_are_at_one_key(nursery, place, redelivered):
    options = {"fails": 0, "max_attempts": 1_000, "deliveries": 1, "remember": 3600}
    children = nursery(*crowd(place, "m", redelivered, **options))
    assert all(child["status"] == 0 for child in children)
    outcomes = Counter(outcome for child in children for outcome in child["outcomes"])
    assert outcomes["work"] == 1
    assert (place.count(effects, "m"), place.count(parked, "m")) == (1, 0)
