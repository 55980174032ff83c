"""The search for the culprits of a failed chunk, with numbers alone: what it finds, and what that costs."""

from __future__ import annotations

import random
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.batch.isolation import Verdict, isolate, tread_carefully


def search(size, fails, method=isolate):
    """Let a search test groups, of which `fails(start, end)` says what comes of them: the tests, and the condemned."""
    tests, condemned, done = [], [], 0
    groups = method(size)
    group = next(groups, None)
    while group is not None:
        start, end = group
        assert start == done, "a group begins with the first item that is not done"
        assert start < end <= size
        tests.append(group)
        verdict = Verdict.DONE
        if fails(start, end):
            verdict = Verdict.FAILED if end - start > 1 else Verdict.FOUND
        if verdict is Verdict.FOUND:
            condemned.append(start)
        if verdict is not Verdict.FAILED:
            done = end
        assert len(tests) <= 4 * size + 4, "it must come to an end"
        try:
            group = groups.send(verdict)
        except StopIteration:
            group = None
    assert done == size
    return tests, condemned


def poisoned(*culprits):
    return lambda start, end: any(start <= one < end for one in culprits)


sizes_and_culprits = st.integers(2, 300).flatmap(
    lambda size: st.tuples(st.just(size), st.sets(st.integers(0, size - 1), min_size=1, max_size=size))
)


@given(sizes_and_culprits)
def test_exactly_the_culprits_are_condemned_within_the_bound(example):
    size, culprits = example
    tests, condemned = search(size, poisoned(*culprits))
    assert condemned == sorted(culprits)
    k = len(culprits)
    assert len(tests) <= 2 * k * log2(size / k) + 2 * k + 2


@pytest.mark.parametrize("size", [100, 1_000, 10_000])
@pytest.mark.parametrize("k", [1, 2, 10, 50])
def test_large_chunks_stay_near_what_information_theory_asks_for(size, k):
    chance = random.Random(size + k)
    worst = 0
    for culprits in [range(k), range(size - k, size), *(chance.sample(range(size), k) for _ in range(20))]:
        tests, condemned = search(size, poisoned(*culprits))
        assert condemned == sorted(culprits)
        worst = max(worst, len(tests))
    assert worst <= k * log2(size / k) + 4.5 * k
    assert worst <= 2 * k * log2(size / k) + 2 * k + 2


def test_a_single_culprit_costs_one_test_for_each_halving_its_own_and_one_for_the_rest():
    for culprit in range(64):
        tests, condemned = search(64, poisoned(culprit))
        assert condemned == [culprit]
        assert len(tests) <= 8


def test_of_a_failure_that_is_no_items_nobody_is_condemned():
    # Too many at once: what is larger than a packet fails.
    tests, condemned = search(1_000, lambda start, end: end - start > 60)
    assert condemned == []
    assert len(tests) < 150


@given(st.integers(2, 200), st.sets(st.tuples(st.integers(0, 199), st.integers(0, 199)), max_size=20))
def test_items_that_fail_only_together_are_all_written(size, pairs):
    fails = lambda start, end: any(start <= min(pair) < max(pair) < end for pair in pairs)  # noqa: E731 - a table of facts
    tests, condemned = search(size, fails)
    assert condemned == []
    assert len(tests) <= 4 * size


@given(sizes_and_culprits, st.randoms(use_true_random=False))
def test_whatever_fails_by_chance_besides_only_those_are_condemned_that_failed_alone(example, chance):
    size, culprits = example
    failed_alone = set()

    def fails(start, end):
        failed = poisoned(*culprits)(start, end) or chance.random() < 0.3
        if failed and end - start == 1:
            failed_alone.add(start)
        return failed

    _, condemned = search(size, fails)
    assert set(condemned) == failed_alone
    assert culprits <= failed_alone


def test_halving_is_not_believed_any_more_once_it_was_contradicted():
    calls = iter([False, False, False, *[False] * 20])
    tests, _ = search(16, lambda *_: next(calls))
    # 8, 4, 2 and 1 of the second halves commit, then the last, which had to be the culprit.
    assert tests[:5] == [(0, 8), (8, 12), (12, 14), (14, 15), (15, 16)]


def test_a_named_culprit_ends_the_suspicion_against_the_rest_of_its_group():
    groups = isolate(16)
    assert next(groups) == (0, 8)
    assert groups.send(Verdict.FOUND) == (8, 16)
    with pytest.raises(StopIteration):
        groups.send(Verdict.DONE)


def test_a_careful_search_begins_with_one_item_and_doubles():
    groups = tread_carefully(20)
    found = [next(groups)]
    for _ in range(4):
        found.append(groups.send(Verdict.DONE))
    assert found == [(0, 1), (1, 3), (3, 7), (7, 15), (15, 20)]


@given(sizes_and_culprits)
def test_a_careful_search_finds_the_culprits_too(example):
    size, culprits = example
    tests, condemned = search(size, poisoned(*culprits), tread_carefully)
    assert condemned == sorted(culprits)
    assert len(tests) <= 2 * size


@given(st.integers(1, 200), st.data())
def test_each_death_in_a_careful_search_comes_twice_as_near(size, data):
    killer = data.draw(st.integers(0, size - 1))
    position = deaths = 0
    while True:
        groups = tread_carefully(size - position)
        start, end = next(groups)
        while not start <= killer - position < end:
            start, end = groups.send(Verdict.DONE)
        if end - start == 1:
            break
        position, deaths = position + start, deaths + 1
    assert position + start == killer
    assert deaths <= log2(size) + 1
