"""Messages through real brokers into a database, while all fails that can: nothing is lost, no effect is repeated."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.fault import fire
from tests.fault.broker_consumer import MAX_ATTEMPTS, failures
from tests.fault.fire import BY_BROKER, run_of
from tests.fault.stores import SCALE, Nursery
from tests.servers import RabbitMq

MESSAGES = round(2_000 * SCALE)
FEWER = round(200 * SCALE)
YOUNG = 9.0


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery("tests.fault.broker_consumer")
    yield nursery
    nursery.close()


@pytest.fixture(params=["activemq", "rabbitmq"])
def kind(request):
    return request.param


@pytest.fixture
def broker(request, kind):
    return request.getfixturevalue(kind)


def befall(run, faults):
    """Let the faults happen, one after the other, at random points of the work."""
    moments = sorted(run.chance.uniform(0.02, 0.8) for _ in faults)
    for fault, moment in zip(run.chance.sample(faults, len(faults)), moments, strict=True):
        run.reach(moment)
        print(f"{fault.__name__} at {run.ledger.count('acked')}")
        fault(run)


def check(run, **facts):
    """All that must hold when everything has come to its end."""
    run.reach_the_end()
    found = run.finish(**facts)
    print(found.summary())
    assert found.violations() == []
    return found


def test_whatever_fails_nothing_is_lost_and_every_effect_happens_once(request, broker, kind, nursery, tmp_path, seed):  # noqa: PLR0917
    database = f"sqlite:///{tmp_path}/work.db"
    if kind == "rabbitmq":
        database = request.getfixturevalue("postgresql").fresh_database()
    with run_of(broker, database, nursery, tmp_path, messages=MESSAGES, seed=seed, concurrency=2) as run:
        run.publish()
        # The server is not there at first.
        run.proxy.refuse()
        for _ in range(4):
            run.start()
        run.ledger.wait("began", 4)
        run.proxy.accept()
        befall(run, BY_BROKER[kind])
        # A classic queue forgets in a crash what was acknowledged a moment before.
        check(run, forgets=BY_BROKER[kind].count(fire.kill_the_broker) if isinstance(broker, RabbitMq) else 0)
        assert run.kills >= 6


# From a delivery to its settlement a message that is handled takes seven steps, one that fails three.
STEPS = 8


@pytest.mark.parametrize("first", [0, 3, 7], ids=["good", "flaky", "poison"])
def test_a_consumer_may_die_after_any_step(broker, nursery, tmp_path, seed, first):  # noqa: PLR0917
    database = f"sqlite:///{tmp_path}/work.db"
    options = {"numbers": (first, 1, 13, 57), "seed": seed, "journal": "always"}
    with run_of(broker, database, nursery, tmp_path, **options) as run:
        run.publish()
        for steps in range(1, STEPS + 1):
            run.start_and_await_its_death(steps)
        run.start()
        check(run)


AT_CONSUMERS = (
    *[fire.kill_a_consumer] * 3,
    *[fire.let_a_consumer_die_between_two_steps] * 4,
    fire.cut_all_connections,
    fire.lose_the_answers_to_commits,
)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_however_many_processes_die_no_message_is_attempted_too_often(broker, nursery, tmp_path, seed, processes):  # noqa: PLR0917
    database = f"sqlite:///{tmp_path}/work.db"
    options = {"messages": FEWER, "seed": seed, "journal": "always"}
    with run_of(broker, database, nursery, tmp_path, **options) as run:
        run.publish()
        for _ in range(processes):
            run.start_mortal()
        befall(run, AT_CONSUMERS)
        check(run)


def test_a_quorum_queue_forgets_nothing_that_was_acknowledged(rabbitmq, nursery, tmp_path, seed):
    database = f"sqlite:///{tmp_path}/work.db"
    options = {"messages": FEWER, "seed": seed, "declare": {"x-queue-type": "quorum"}}
    with run_of(rabbitmq, database, nursery, tmp_path, **options) as run:
        run.publish()
        made = time.monotonic()
        run.start()
        run.start()
        befall(run, (fire.kill_a_consumer, fire.let_a_consumer_die_between_two_steps, fire.hang_a_consumer))
        # RabbitMQ 3.10 does not know the leader of a queue again that it has made a few seconds before.
        run.await_that(lambda: time.monotonic() - made > YOUNG)
        fire.kill_the_broker(run)
        check(run, forgets=0)


LEAVING = (0.1, 0.3, 0.5, 0.7)


def test_a_clean_end_loses_and_repeats_nothing(broker, nursery, tmp_path, seed):
    database = f"sqlite:///{tmp_path}/work.db"
    # With time enough for every answer: a connection that is lost is no clean end.
    options = {"messages": FEWER, "seed": seed, "concurrency": 2, "patience": {"receipt_timeout": 60.0}}
    with run_of(broker, database, nursery, tmp_path, **options) as run:
        run.publish()
        run.start()
        for moment in LEAVING:
            run.start()
            run.reach(moment)
            fire.drain_a_consumer(run)
        found = check(run)
    expected = sum(min(failures(number) + 1, MAX_ATTEMPTS) for number in run.numbers)
    happened = Counter(found.summary())
    assert happened["attempt"] == expected
    assert (happened["unfinished"], happened["doubt"], run.kills) == (0, 0, 0)
    # A redelivery for each failed attempt, and for each pause that an end cut short: one a worker at most.
    again = happened["deliveries"] - len(run.numbers) - (happened["fail"] - happened["recovered"])
    assert again == happened["needless"] <= 2 * len(LEAVING)
