"""The recovery of an item: once, also when its source gives it again; and where it closes the chunk."""

from __future__ import annotations

import asyncio

import pytest

from retrykit import AsyncRetryTemplate, MapRetryContextCache, RetryTemplate, SimpleRetryPolicy
from retrykit.batch import AsyncChunkStep, ItemError, SkipLimitError, SkipPolicy, Unreadable
from tests.chunks import Table, poison, poisoned_write, skip_values, step, template


@pytest.fixture
def table():
    return Table()


# -- once


class Torn:
    """A source that loses what it is told of the items from `lost` on, and gives those again in the next run."""

    def __init__(self, items):
        self.items = list(items)
        self.lost = None

    def read_from(self, position):
        yield from ((item, None) for item in list(self.items))

    def settled(self, items):
        for item in items:
            if item == self.lost:
                self.lost = None
                raise ConnectionError("the broker is gone")
            self.items.remove(item)


def remembering(attempts=2):
    return template(attempts, remember_completed=3600)


@pytest.mark.parametrize("where", ["processor", "writer"])
@pytest.mark.parametrize("chunk_size", [1, 10])
@pytest.mark.parametrize("lost", [0, 3])
def test_an_item_that_comes_again_after_a_lost_acknowledgment_is_recovered_once(table, where, chunk_size, lost):
    source, load, parked = Torn(range(6)), remembering(), []
    failing = {"processor": poison(3)} if where == "processor" else {"writer": poisoned_write(table, 3)}
    options = {
        "template": load,
        "key": lambda item: item,
        "skip": skip_values,
        "chunk_size": chunk_size,
        "on_skip": lambda _, skipped: parked.append((skipped.item, skipped.attempts)),
        **failing,
    }
    source.lost = lost
    with pytest.raises(ConnectionError):
        step(table, source, **options).run()
    again = step(table, source, **options).run()
    assert source.items == []
    assert parked == [(3, 2)]
    assert sorted({*table.rows}) == [0, 1, 2, 4, 5]
    assert again.counts.read == again.counts.written + again.counts.filtered + again.counts.all_skipped


def test_a_single_message_that_was_written_is_not_written_again(table):
    source, load = Torn([7]), remembering()
    source.lost = 7
    options = {"template": load, "key": lambda item: item}
    with pytest.raises(ConnectionError):
        step(table, source, **options).run()
    report = step(table, source, **options).run()
    assert (table.rows, source.items) == ([7], [])
    assert (report.counts.read, report.counts.filtered) == (1, 1)


def test_without_a_rollback_none_is_recovered_twice_either(table):
    source, load, parked = Torn(range(4)), remembering(1), []
    options = {
        "template": load,
        "key": lambda item: item,
        "skip": skip_values,
        "processor": poison(2),
        "no_rollback_for": ValueError,
        "on_skip": lambda _, skipped: parked.append(skipped.item),
    }
    source.lost = 2
    with pytest.raises(ConnectionError):
        step(table, source, **options).run()
    step(table, source, **options).run()
    assert parked == [2]


@pytest.mark.parametrize("chunk_size", [1, 10])
@pytest.mark.parametrize("lost", [0, 2, 3, 5])
@pytest.mark.parametrize("why", ["vetoed", "unreadable", "vetoed, and closes its chunk"])
def test_an_item_that_nobody_tried_is_put_aside_once_too(table, why, lost, chunk_size):
    source, load, parked = Torn(range(6)), remembering(), []
    if why != "unreadable":
        load.veto(2, "closed")
        load.veto(3, "closed")
    else:
        source.items[2:4] = [Unreadable(item, ValueError("?")) for item in (2, 3)]
    options = {
        "template": load,
        "key": lambda item: item,
        "skip": skip_values,
        "chunk_size": chunk_size,
        "on_skip": lambda _, skipped: parked.append((skipped.item, skipped.key, skipped.phase)),
        "none_closes_chunk": "closes" in why,
    }
    source.lost = source.items[lost]
    with pytest.raises(ConnectionError):
        step(table, source, **options).run()
    assert source.lost is None
    again = step(table, source, **options).run()
    assert source.items == []
    phase = "read" if why == "unreadable" else "veto"
    assert parked == [(2, 2, phase), (3, 3, phase)]
    assert sorted({*table.rows}) == [0, 1, 4, 5]
    assert again.counts.read == again.counts.written + again.counts.filtered + again.counts.all_skipped
    if phase == "veto":
        assert load.history(3).vetoed, "it stays forbidden"


def test_an_unreadable_item_without_a_key_is_put_aside_all_the_same(table):
    def key(item):
        return item["id"]

    source = Torn([{"id": 1}, Unreadable(b"?", ValueError("?")), {"id": 2}])
    report = step(table, source, template=remembering(), key=key, skip=skip_values).run()
    assert (report.counts.written, report.counts.all_skipped, report.counts.commits) == (2, 1, 1)


def test_a_veto_that_comes_between_two_attempts_is_recovered_once_too(table):
    source, load, parked = Torn(range(4)), template(2, remember_completed=3600), []

    def process(item):
        if item == 3 and table.events.count("begin") == 1:
            load.veto(2, "closed")
            raise ValueError("at first")
        return item

    options = {
        "template": load,
        "key": lambda item: item,
        "skip": skip_values,
        "processor": process,
        "on_skip": lambda _, skipped: parked.append(skipped.item),
    }
    source.lost = 2
    with pytest.raises(ConnectionError):
        step(table, source, **options).run()
    step(table, source, **options).run()
    assert (parked, source.items) == ([2], [])
    assert table.rows == [0, 1, 3]


def test_what_is_settled_in_the_midst_of_a_search_is_not_written_again(table):
    written = []

    def write(transaction, items):
        for index, item in enumerate(items):
            if item in {1, 7, 8}:
                raise ValueError(f"item {item}, as nobody says")
            if item == 6:
                raise ItemError(index) from ValueError("item 6")
        table.write(transaction, items)
        written.extend(items)

    source = Torn(range(9))
    report = step(table, source, writer=write, template=remembering(1), key=lambda item: item, skip=skip_values).run()
    assert written == table.rows == [0, 2, 3, 4, 5]
    assert [skipped.item for skipped in report.skipped] == [1, 6, 7, 8]
    assert (report.counts.read, report.counts.written, source.items) == (9, 5, [])


def test_the_asynchronous_step_recovers_once_too(table):
    source, parked = Torn(range(4)), []
    load = AsyncRetryTemplate(
        name="load",
        retry_policy=SimpleRetryPolicy(1),
        remember_completed=3600,
        context_cache=MapRetryContextCache(),
    )

    def made():
        return AsyncChunkStep(
            name="load",
            reader=source,
            processor=poison(2),
            writer=table.write,
            transaction=table.async_begin,
            template=load,
            key=lambda item: item,
            skip=skip_values,
            on_skip=lambda _, skipped: parked.append(skipped.item),
        )

    source.lost = 2
    with pytest.raises(ConnectionError):
        asyncio.run(made().run())
    asyncio.run(made().run())
    assert (parked, source.items) == ([2], [])


def test_items_with_positions_leave_no_marks(table):
    load = remembering(1)
    step(table, range(3), chunk_size=1, template=load, key=lambda item: item).run()
    report = step(table, range(3), chunk_size=1, template=load, key=lambda item: item).run()
    assert report.counts.written == 3
    assert len(load.context_cache) == 0


# -- closing the chunk


def closing(table, reader, recovery=lambda *_: None, **options):
    options = {"skip": skip_values, "on_skip": recovery, "none_closes_chunk": True} | options
    return step(table, reader, **options)


def transactions(table):
    """What each committed transaction has written."""
    done = []

    def write(transaction, items):
        table.write(transaction, items)
        done.append(items)

    return done, write


@pytest.mark.parametrize("recovery", [lambda *_: None, None], ids=["None", "no recovery"])
def test_none_from_the_recovery_closes_the_chunk_behind_the_item(table, recovery):
    done, write = transactions(table)
    report = closing(table, range(8), recovery, processor=poison(2, 5), writer=write).run()
    assert done == [[0, 1], [3, 4], [6, 7]]
    assert (report.counts.commits, report.counts.all_skipped, report.counts.written) == (3, 2, 6)


def test_what_is_not_none_leaves_the_chunk_open(table):
    done, write = transactions(table)
    answers = {2: "noted", 5: None}
    asked = []

    def recover(transaction, skipped):
        assert transaction is table
        asked.append(skipped.item)
        return answers[skipped.item]

    report = closing(table, range(8), recover, processor=poison(2, 5), writer=write).run()
    assert done == [[0, 1, 3, 4], [6, 7]]
    assert report.counts.all_skipped == 2
    assert set(asked) == {2, 5}


@pytest.mark.parametrize("value", [None, 0])
def test_items_that_had_to_be_searched_for_close_it_too(table, value):
    def write(transaction, items):
        poisoned_write(table, 3)(transaction, items)

    report = closing(table, range(8), lambda *_: value, writer=write).run()
    assert table.rows == [0, 1, 2, 4, 5, 6, 7]
    assert report.counts.all_skipped == 1
    # What stands behind it is searched no further, or tested as what is left of the chunk: at once either way.
    assert table.events[-2:] == ["begin", "commit"]
    assert table.events.count("rollback") == 3


def test_the_rest_of_a_closed_chunk_has_all_the_attempts_of_a_chunk(table):
    failures = iter([OSError("no line"), OSError("no line")])

    def write(transaction, items):
        table.write(transaction, items)
        if 5 in items and (failure := next(failures, None)):
            raise failure

    closing(table, range(8), processor=poison(2), writer=write, template=template(3)).run()
    assert table.rows == [0, 1, 3, 4, 5, 6, 7]


def test_a_search_ends_with_the_chunk_and_what_is_left_is_tried_as_a_chunk(table):
    failures, written = iter([ValueError("passes")]), []

    def write(transaction, items):
        if 2 in items:
            raise ValueError("two")
        if 7 in items and (failure := next(failures, None)):
            raise failure
        table.write(transaction, items)
        written.append(items)

    report = closing(table, range(8), writer=write, template=template(2)).run()
    assert report.counts.all_skipped == 1
    assert written[-1] == [3, 4, 5, 6, 7]


def test_unreadable_records_and_vetoed_items_close_it_with_a_culprit_among_them(table):
    class Records:
        def read_from(self, position):
            for number in range(position or 0, 8):
                yield (Unreadable(number, ValueError("no line")) if number in {1, 4} else number), number + 1

    load = template()
    load.veto(6, "closed")
    done, write = transactions(table)
    options = {"key": lambda item: item, "template": load, "processor": poison(3), "writer": write}
    report = closing(table, Records(), **options).run()
    assert done == [[0], [2], [5], [7]]
    assert [skipped.item for skipped in report.skipped] == [1, 3, 4, 6]
    assert report.counts.read == 8


def test_a_single_item_left_beside_condemned_ones_keeps_to_itself(table):
    class Records:
        def read_from(self, position):
            for number in range(4):
                yield (number if number == 2 else Unreadable(number, ValueError("no line"))), number + 1

    for value, commits in ((None, 4), (0, 3)):
        table.rows.clear()
        report = closing(table, Records(), lambda *_, value=value: value, writer=poisoned_write(table, 2)).run()
        assert [skipped.number for skipped in report.skipped] == [1, 2, 3, 4]
        assert report.counts.commits == commits


def test_an_item_too_many_stops_it_behind_all_that_was_closed_before(table):
    skip = SkipPolicy(skip_for=ValueError, limit=2)
    with pytest.raises(SkipLimitError, match="stopped at item 8"):
        closing(table, range(10), processor=poison(2, 4, 7), skip=skip).run()
    assert table.rows == [0, 1, 3, 5, 6]


def test_the_asynchronous_step_closes_its_chunks_too(table):
    done, write = transactions(table)

    async def recover(transaction, skipped):
        await asyncio.sleep(0)
        return skipped.item if skipped.item == 5 else None

    report = asyncio.run(
        AsyncChunkStep(
            name="load",
            reader=range(8),
            processor=poison(2, 5),
            writer=write,
            transaction=table.async_begin,
            template=AsyncRetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
            skip=skip_values,
            on_skip=recover,
            none_closes_chunk=True,
        ).run()
    )
    assert done == [[0, 1], [3, 4, 6, 7]]
    assert report.counts.all_skipped == 2


def test_without_the_option_none_closes_nothing(table):
    done, write = transactions(table)
    step(table, range(8), processor=poison(2), writer=write, skip=skip_values, on_skip=lambda *_: None).run()
    assert done == [[0, 1, 3, 4, 5, 6, 7]]


def test_a_history_of_the_closing_item_is_settled(table):
    load = RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(2))
    options = {"key": lambda item: item, "template": load, "writer": poisoned_write(table, 3)}
    report = closing(table, range(5), **options).run()
    assert [skipped.attempts for skipped in report.skipped] == [2]
    assert load.history(3) is None
