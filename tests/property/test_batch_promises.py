"""Random poison, random crashes: every good item is written once, every bad one recorded with its own error."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from math import log2

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from retrykit.sql import sqlite_engine
from tests.property.batch_world import FATES, World, make_tables
from tests.servers.databases import empty_database
from tests.servers.fixtures import postgresql

__all__ = ["postgresql"]

SERIAL = itertools.count()
fates = st.lists(st.sampled_from(("good",) * 6 + FATES), min_size=1, max_size=40)
skipping = st.sampled_from(("between", "in place", "closing"))
numbers = st.sets(st.integers(1, 30), max_size=4)


@contextmanager
def fresh_sqlite(folder):
    engine = sqlite_engine(f"sqlite:///{folder}/{next(SERIAL)}.db", durability="process")
    try:
        make_tables(engine)
        yield engine
    finally:
        engine.dispose()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("batch")


@settings(max_examples=40)
@given(
    fates=st.lists(st.sampled_from(("good",) * 6 + FATES + ("vetoed",)), min_size=1, max_size=40),
    chunk_size=st.integers(1, 25),
    max_attempts=st.integers(1, 3),
    skipping=skipping,
)
def test_good_items_are_written_once_and_bad_ones_recorded_with_their_own_error(folder, fates, chunk_size, **options):
    with fresh_sqlite(folder) as engine:
        world = World(engine, fates, chunk_size=chunk_size, **options)
        assert world.run()
        world.check()


# What befalls a job: the statements at which its process is gone, transactions that fail for no item's fault, commits
# that are made and not confirmed.
troubles = st.fixed_dictionaries(
    {
        "pulls": st.lists(st.integers(0, 80), max_size=6),
        "hiccups": numbers,
        "doubts": numbers,
        "skipping": skipping,
    },
)


def run_to_the_end(world, pulls):
    """Start it again until it is finished: a hiccup at each attempt of a chunk stops the step."""
    assert any(world.run(pull) for pull in pulls) or any(world.run() for _ in range(20))


@settings(max_examples=80)
@given(fates=fates, chunk_size=st.integers(1, 25), troubles=troubles)
@example(
    fates=["good", "writer", "good", "writer", "processor"],
    chunk_size=2,
    troubles={"pulls": [], "hiccups": {2}, "doubts": {17, 18}, "skipping": "between"},
)
def test_the_same_after_crashes_at_any_statement_and_commits_that_were_not_confirmed(
    folder, fates, chunk_size, troubles
):
    with fresh_sqlite(folder) as engine:
        pulls = troubles.pop("pulls")
        world = World(engine, fates, chunk_size=chunk_size, **troubles)
        run_to_the_end(world, pulls)
        world.check()


@pytest.mark.parametrize("fate", ["named", "commit"])
def test_a_crash_at_each_single_statement_in_turn(tmp_path, fate):
    fates = ["good", fate, "filtered"]
    for number in itertools.count():
        with fresh_sqlite(tmp_path) as engine:
            world = World(engine, fates, chunk_size=3)
            ended = world.run(number)
            if not ended:
                assert world.run()
            world.check()
        if ended:
            break
    assert number > 10


@settings(max_examples=25)
@given(
    size=st.integers(2, 300),
    culprits=st.sets(st.integers(0, 299), min_size=1, max_size=8),
    fate=st.sampled_from(["writer", "check", "commit"]),
)
def test_k_culprits_of_n_items_cost_no_more_transactions_than_the_bound(folder, size, culprits, fate):
    culprits = {one % size for one in culprits}
    fates = [fate if item in culprits else "good" for item in range(size)]
    with fresh_sqlite(folder) as engine:
        world = World(engine, fates, chunk_size=size, max_attempts=1)
        assert world.run()
        world.check()
        k = len(culprits)
        # The failure of the whole, the search, and for each culprit the transaction that records it.
        assert world.cord.transactions <= 2 * k * log2(size / k) + 3 * k + 3


@settings(max_examples=25)
@given(size=st.integers(2, 100), culprits=st.sets(st.integers(0, 99), min_size=1, max_size=8))
def test_a_named_culprit_costs_one_transaction(folder, size, culprits):
    culprits = {one % size for one in culprits}
    with fresh_sqlite(folder) as engine:
        fates = ["named" if item in culprits else "good" for item in range(size)]
        world = World(engine, fates, chunk_size=size, max_attempts=1)
        assert world.run()
        world.check()
        assert world.cord.transactions == 1 + len(culprits)


@settings(max_examples=20)
@given(
    size=st.integers(2, 150),
    culprits=st.dictionaries(
        st.integers(0, 149), st.sampled_from(["writer", "check", "named", "processor"]), min_size=1, max_size=8
    ),
)
def test_what_is_found_between_savepoints_costs_no_transaction(folder, size, culprits):
    fates = [culprits.get(item, "good") for item in range(size)]
    with fresh_sqlite(folder) as engine:
        world = World(engine, fates, chunk_size=size, skipping="in place")
        assert world.run()
        world.check()
        assert world.cord.transactions == 1


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fates=fates, chunk_size=st.integers(1, 25), troubles=troubles)
def test_the_same_on_postgresql(request, fates, chunk_size, troubles):
    engine = create_engine(empty_database(request, "postgresql"))
    try:
        make_tables(engine)
        pulls = troubles.pop("pulls")
        world = World(engine, fates, chunk_size=chunk_size, **troubles)
        run_to_the_end(world, pulls)
        world.check()
    finally:
        engine.dispose()
