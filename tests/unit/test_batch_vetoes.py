"""Vetoes and a batch step: from outside, which stop an item, and by a processor, which stop its own and no other."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import attrs
import pytest

from retrykit import AsyncRetryTemplate, MapRetryContextCache, RetryTemplate, SimpleRetryPolicy, veto
from retrykit.batch import AsyncChunkStep, ChunkStep, SkipLimitError, SkipPolicy, Unreadable, VetoedError
from retrykit.errors import ContextCacheError
from tests.chunks import Table, poison, poisoned_write, skip_values, step, template
from tests.doubles import ManualClock


@pytest.fixture
def table():
    return Table()


class Shared(MapRetryContextCache):
    """A cache that other processes may write to. `asked`: what it was asked, in order."""

    shared = True

    def __init__(self):
        super().__init__()
        self.asked = []

    def vetoed(self, keys):
        self.asked.append(len(keys))
        return super().vetoed(keys)

    def load(self, key):
        self.asked.append(key)
        return super().load(key)


def whole(item):
    return item


@pytest.mark.parametrize("chunk_size", [1, 4, 10])
@pytest.mark.parametrize("limit", [0, 100])
def test_a_vetoed_item_is_put_aside_with_the_reason_and_no_policy_need_allow_it(table, chunk_size, limit):
    load = template()
    load.veto(3, "the customer is closed")
    kept = []
    skip = SkipPolicy(limit=limit)
    options = {"template": load, "skip": skip, "chunk_size": chunk_size}
    report = step(table, range(10), key=whole, on_skip=lambda _, skipped: kept.append(skipped), **options).run()
    assert table.rows == [number for number in range(10) if number != 3]
    (skipped,) = report.skipped
    assert kept == [skipped]
    assert (skipped.item, skipped.number, skipped.phase, skipped.attempts, skipped.key) == (3, 4, "veto", 0, 3)
    assert skipped.reason == "The item 3 of load is vetoed: the customer is closed"
    assert isinstance(skipped.error, VetoedError)
    assert report.counts.skipped == {"retrykit.batch.errors.VetoedError": 1}
    assert (report.counts.rollbacks, report.counts.commits) == (0, -(-10 // chunk_size))


def test_the_asynchronous_step_heeds_vetoes_too(table):
    class Later(MapRetryContextCache):
        shared = True

        async def vetoed(self, keys):
            await asyncio.sleep(0)
            return super().vetoed(keys)

    load = AsyncRetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1), context_cache=Later())

    async def run():
        await load.veto(3, "closed")
        options = {"transaction": table.async_begin, "template": load, "key": whole, "chunk_size": 4}
        return await AsyncChunkStep(name="load", reader=range(10), writer=table.write, **options).run()

    report = asyncio.run(run())
    assert table.rows == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert [skipped.number for skipped in report.skipped] == [4]


def test_a_shared_cache_is_asked_once_a_chunk_and_outside_of_its_transaction(table):
    class Outside(Shared):
        def vetoed(self, keys):
            assert table.open is None
            return super().vetoed(keys)

    cache = Outside()
    step(table, range(10), key=whole, template=template(context_cache=cache), chunk_size=4).run()
    assert cache.asked == [4, 4, 2]
    step(table, range(10), template=template(context_cache=cache), chunk_size=4).run()
    assert cache.asked == [4, 4, 2], "items without keys are nobody's to forbid"


def test_an_empty_cache_of_this_process_alone_is_not_asked_for_keys(table):
    keys = []
    step(table, range(10), key=keys.append).run()
    assert keys == []


def test_a_cache_that_cannot_answer_for_many_is_asked_for_each_key(table):
    cache = Shared()
    load = template(context_cache=cache)
    load.veto(3, "closed")
    cache.vetoed = None
    cache.asked.clear()
    report = step(table, [1, 2, 3, 3], key=whole, template=load).run()
    assert table.rows == [1, 2]
    assert (cache.asked, report.counts.all_skipped) == ([load.key_of(key) for key in (1, 2, 3)], 2)


@pytest.mark.parametrize("fault", [ContextCacheError("no server"), OSError("no line")])
def test_a_cache_that_cannot_be_read_forbids_nothing_and_that_is_logged(table, caplog, fault):
    class Gone(Shared):
        def vetoed(self, keys):
            raise fault

    step(table, range(3), key=whole, template=template(context_cache=Gone())).run()
    assert table.rows == [0, 1, 2]
    assert "whether items are vetoed could not be read" in caplog.text


def test_a_veto_that_is_over_or_withdrawn_or_of_something_done_forbids_nothing(table):
    clock = ManualClock()
    load = template(clock=clock, remember_completed=60)
    load.veto(1, "for a minute", lasts=60)
    load.veto(2, "a mistake")
    load.withdraw_veto(2)
    load.veto(3, "for good")
    clock.elapsed += 61
    step(table, range(5), key=whole, template=load).run()
    assert table.rows == [0, 1, 2, 4]


def test_one_veto_of_a_later_version_hides_no_other(table, caplog):
    load = template()
    load.veto(3, "closed")
    load.context_cache.save(load.key_of(4), {"format": 99, "veto": "closed"}, None)
    report = step(table, range(6), key=whole, template=load, skip=SkipPolicy(limit=0)).run()
    assert [skipped.item for skipped in report.skipped] == [3]
    assert table.rows == [0, 1, 2, 4, 5]
    assert "the veto of 'load#4' cannot be read, and forbids nothing" in caplog.text


def test_veto_of_which_only_a_tombstone_is_left_is_heeded(table):
    cache = MapRetryContextCache(1, on_full="evict_oldest")
    load = attrs.evolve(template(), context_cache=cache)
    load.veto(3, "closed")
    cache.save("others/1", {"retry_count": 1, "veto": "too"}, None)
    cache.remove("others/1")
    report = step(table, range(6), key=whole, template=load, skip=SkipPolicy(limit=0)).run()
    assert [skipped.item for skipped in report.skipped] == [3]


def test_vetoed_items_are_no_failures_that_a_limit_counts(table):
    load = template()
    for number in range(4):
        load.veto(number, "closed")
    skip = SkipPolicy(skip_for=ValueError, limit=1, limits={Exception: 1}, share=0.1, share_from=10)
    report = step(table, range(20), processor=poison(17), key=whole, template=load, skip=skip, chunk_size=10).run()
    assert report.counts.all_skipped == 5
    assert report.counts.limited == {"builtins.Exception": 1}
    with pytest.raises(SkipLimitError, match="stopped at item 19"):
        step(table, range(20), processor=poison(17, 18), key=whole, template=load, skip=skip, chunk_size=10).run()


def test_a_chunk_of_vetoed_items_writes_nothing_and_one_among_unreadable_ones_is_found(table):
    load = template()
    for number in (1, 2):
        load.veto(number, "closed")
    report = step(table, [1, 2], key=whole, template=load).run()
    assert (table.rows, report.counts.all_skipped, report.counts.commits) == ([], 2, 1)

    class Records:
        def read_from(self, position):
            yield Unreadable("?", ValueError("no number")), 1
            yield 2, 2
            yield 3, 3

    report = step(table, Records(), key=whole, template=load, skip=skip_values).run()
    assert table.rows == [3]
    assert [(skipped.item, skipped.phase) for skipped in report.skipped] == [("?", "read"), (2, "veto")]


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_veto_that_comes_while_its_chunk_is_searched_holds_and_is_not_forgotten(table, max_attempts):
    load = template(max_attempts)
    others = poisoned_write(table, 5, error=ValueError)

    def write(transaction, items):
        if len(items) == 8 and load.history(5) is None:
            load.veto(5, "closed meanwhile")
        others(transaction, items)

    report = step(table, range(8), writer=write, key=whole, template=load, skip=skip_values).run()
    assert table.rows == [0, 1, 2, 3, 4, 6, 7]
    (skipped,) = report.skipped
    assert (skipped.phase, skipped.attempts) == ("veto", 0)
    assert load.history(5).veto_reason == "closed meanwhile"


@pytest.mark.parametrize("transactional", [True, False])
@pytest.mark.parametrize("kind", [ChunkStep, AsyncChunkStep])
def test_a_veto_that_comes_while_a_chunk_waits_to_be_tried_again_holds_at_the_next_attempt(table, kind, transactional):
    cache, tries = Shared(), []
    operator = template(context_cache=cache)

    def write(transaction, items):
        tries.append(items)
        if 3 in items:
            operator.veto(3, "nobody answers for it")
            raise ConnectionError("no answer for 3")
        table.rows += items

    plain = kind is ChunkStep
    load = (RetryTemplate if plain else AsyncRetryTemplate)(
        name="load", retry_policy=SimpleRetryPolicy(5), context_cache=cache
    )
    begin = table.begin if plain else table.async_begin
    one = kind(
        name="load",
        reader=range(6),
        writer=write,
        transaction=begin if transactional else None,
        template=load,
        key=whole,
    )
    report = one.run() if plain else asyncio.run(one.run())
    assert tries == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 4, 5]]
    assert table.rows == [0, 1, 2, 4, 5]
    assert cache.asked.count(6) == 2
    assert [skipped.phase for skipped in report.skipped] == ["veto"]
    assert table.events == (["begin", "rollback", "begin", "commit"] if transactional else [])


def test_a_veto_that_comes_between_the_attempts_of_a_single_item_ends_them(table):
    load = template(max_attempts=5)
    tried = []

    def process(item):
        tried.append(item)
        load.veto(item, "give it up")
        raise ValueError("no")

    report = step(table, [7], processor=process, key=whole, template=load, skip=skip_values).run()
    (skipped,) = report.skipped
    assert (tried, skipped.attempts, skipped.reason) == ([7], 1, "vetoed: give it up")


def test_vetoes_are_logged_without_the_item(table, caplog):
    load = template()
    load.veto("k", "closed")
    item = SimpleNamespace(id="k", secret="s3cret")
    with caplog.at_level(logging.WARNING, "retrykit.batch"):
        step(table, [item], key=lambda one: one.id, template=load).run()
    assert caplog.messages == ["step load: item 1 is skipped: The item 'k' of load is vetoed: closed"]


# -- keys that cannot be made


@pytest.mark.parametrize("key", [lambda item: {}[item], lambda _: 1.5], ids=["raises", "no key"])
def test_an_item_without_a_key_is_written_if_it_is_good(table, caplog, key):
    cache = Shared()
    report = step(table, range(3), key=key, template=template(context_cache=cache)).run()
    assert table.rows == [0, 1, 2]
    assert report.counts.all_skipped == 0
    (told,) = [message for message in caplog.messages if "no key" in message]
    assert told.startswith("step load: item 1 has no key that could be vetoed (nor have 2 others of its chunk): ")


@pytest.mark.parametrize("where", ["processor", "writer"])
def test_an_item_for_which_no_key_can_be_made_is_at_fault_itself(table, where):
    def key(item):
        if item == 3:
            raise KeyError("id")
        return item

    failing = {"processor": poison(3)} if where == "processor" else {"writer": poisoned_write(table, 3)}
    skip = SkipPolicy(skip_for=(ValueError, KeyError))
    report = step(table, range(8), key=key, skip=skip, **failing).run()
    assert table.rows == [0, 1, 2, 4, 5, 6, 7]
    (skipped,) = report.skipped
    assert (skipped.number, skipped.key, skipped.attempts) == (4, None, 1)


def test_a_key_that_cannot_be_made_stops_a_step_that_may_not_skip_the_failure(table):
    with pytest.raises(KeyError):
        step(table, [3], key=lambda item: {}[item], skip=skip_values).run()


# -- vetoes of processors


def test_an_item_is_not_parked_with_the_veto_of_another(table):
    tried = []

    def process(item):
        tried.append(item)
        if item == 3:
            veto("three is closed")
        if item == 7:
            raise ValueError("seven is wrong")
        return item

    load = RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(3))
    report = ChunkStep(
        name="load",
        reader=range(10),
        processor=process,
        writer=table.write,
        transaction=table.begin,
        template=load,
        skip=skip_values,
    ).run()
    assert table.rows == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    (skipped,) = report.skipped
    assert (skipped.item, skipped.attempts, skipped.reason) == (7, 3, "SimpleRetryPolicy: attempt 3 of 3")


def test_an_item_that_vetoes_and_fails_is_parked_with_its_own_veto(table):
    def process(item):
        if item == 7:
            veto("seven is closed")
            raise ValueError("so it is wrong")
        return item

    report = step(table, range(10), processor=process, template=template(3), skip=skip_values).run()
    (skipped,) = report.skipped
    assert (skipped.item, skipped.attempts, skipped.reason) == (7, 1, "vetoed: seven is closed")
    assert report.counts.rollbacks == 1
