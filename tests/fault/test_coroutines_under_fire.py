"""Handlers that are coroutines, while their processes die: nothing is lost, no effect is repeated."""

from __future__ import annotations

import pytest

from tests.fault import fire
from tests.fault.fire import run_of
from tests.fault.stores import SCALE, Nursery

MESSAGES = round(200 * SCALE)
FAULTS = (
    *[fire.kill_a_consumer] * 2,
    *[fire.let_a_consumer_die_between_two_steps] * 3,
    fire.cut_all_connections,
    fire.lose_the_answers_to_commits,
    fire.kill_the_broker,
)


@pytest.fixture(scope="module")
def nursery():
    nursery = Nursery("tests.fault.async_broker_consumer")
    yield nursery
    nursery.close()


@pytest.mark.parametrize(("kind", "database"), [("activemq", "sqlite"), ("rabbitmq", "postgresql")])
def test_every_effect_of_coroutines_happens_once_whatever_dies(request, kind, database, nursery, tmp_path, seed):  # noqa: PLR0917
    broker = request.getfixturevalue(kind)
    url = f"sqlite:///{tmp_path}/work.db"
    if database == "postgresql":
        url = request.getfixturevalue("postgresql").fresh_database()
    with run_of(broker, url, nursery, tmp_path, messages=MESSAGES, seed=seed, concurrency=2) as run:
        run.publish()
        for _ in range(3):
            run.start()
        moments = sorted(run.chance.uniform(0.02, 0.8) for _ in FAULTS)
        for fault, moment in zip(run.chance.sample(FAULTS, len(FAULTS)), moments, strict=True):
            run.reach(moment)
            print(f"{fault.__name__} at {run.ledger.count('acked')}")
            fault(run)
        run.reach_the_end()
        # A classic queue of RabbitMQ forgets in a crash what was acknowledged a moment before.
        found = run.finish(forgets=1 if kind == "rabbitmq" else 0)
    print(found.summary())
    assert found.violations() == []
    assert run.kills >= 2
