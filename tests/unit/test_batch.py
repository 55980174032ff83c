"""`ChunkStep`: one transaction for a chunk, what is tried again, what is put aside, and what the counts say of it."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import attrs
import pytest

from retrykit import (
    AsyncRetryTemplate,
    FixedBackOffPolicy,
    MapRetryContextCache,
    RetryTemplate,
    SimpleRetryPolicy,
    current_context,
    veto,
)
from retrykit.batch import AsyncChunkStep, ChunkStep, ItemError, SkipLimitError, SkipPolicy, Unreadable
from retrykit.errors import RecoveryFailedError
from tests.chunks import Table, poison, poisoned_write, skip_values, step, template
from tests.doubles import ManualClock


@pytest.fixture
def table():
    return Table()


def test_each_chunk_has_one_transaction_and_is_read_before_it(table):
    def read():
        for number in range(5):
            assert table.open is None
            table.events.append(number)
            yield number

    report = step(table, read(), chunk_size=2).run()
    assert table.events == [0, 1, "begin", "commit", 2, 3, "begin", "commit", 4, "begin", "commit"]
    assert table.rows == [0, 1, 2, 3, 4]
    assert (report.status, report.counts.read, report.counts.written, report.counts.commits) == ("finished", 5, 5, 3)


@pytest.mark.parametrize("again", ["x", 1, None])
def test_again_is_yes_or_no(table, again):
    with pytest.raises(TypeError, match=r"^again: must be True or False"):
        step(table, [1]).run(again=again)
    assert table.events == []


def test_no_items_are_no_transaction(table):
    report = step(table, []).run()
    assert table.events == []
    assert report.status == "finished"


def test_what_the_processor_gives_is_written_and_none_is_left_out(table):
    report = step(table, range(4), processor=lambda item: None if item % 2 else item * 10).run()
    assert table.rows == [0, 20]
    assert (report.counts.read, report.counts.written, report.counts.filtered) == (4, 2, 2)


def test_the_writer_is_never_given_nothing(table):
    report = step(table, range(4), processor=lambda _: None, writer=lambda *_: pytest.fail("called")).run()
    assert report.counts.filtered == 4


def test_processor_and_writer_see_their_transaction_in_the_context(table):
    step(table, [1], processor=lambda item: (item, current_context().transaction is table)).run()
    assert table.rows == [(1, True)]


def test_without_a_transaction_there_is_none(table):
    written = []
    step(table, range(3), transaction=None, writer=lambda _, items: written.extend(items)).run()
    assert written == [0, 1, 2]


def test_a_failed_chunk_is_rolled_back_and_tried_again_as_the_policy_says_and_no_pause_holds_a_transaction(table):
    failures = iter([TimeoutError(), TimeoutError()])
    slept = []

    class Clock(ManualClock):
        def sleep(self, seconds):
            assert table.open is None
            slept.append(seconds)
            super().sleep(seconds)

    def write(transaction, items):
        table.write(transaction, items)
        for error in failures:
            raise error

    patient = template(3, back_off_policy=FixedBackOffPolicy(7), clock=Clock())
    report = step(table, range(3), writer=write, template=patient).run()
    assert table.rows == [0, 1, 2]
    assert slept == [7, 7]
    assert (report.counts.retries, report.counts.rollbacks, report.counts.commits) == (2, 2, 1)
    assert (report.counts.read, report.counts.written) == (3, 3)


def test_a_failure_that_is_no_items_fault_stops_the_step_as_the_same_object_and_keeps_what_was_committed(table):
    error = OSError("disk full")

    def write(transaction, items):
        if 5 in items:
            raise error
        table.write(transaction, items)

    with pytest.raises(OSError, match="disk full") as caught:
        step(table, range(10), chunk_size=2, writer=write, template=template(3), skip=skip_values).run()
    assert caught.value is error
    assert table.rows == [0, 1, 2, 3]
    assert table.events.count("rollback") == 3


def _fails_at(*, in_processor=(), in_writer=(), named=False):
    def process(item):
        if item in in_processor:
            raise KeyError("color")
        return item

    def write(transaction, items):
        for index, item in enumerate(items):
            if item in in_writer:
                raise ItemError(index, KeyError("color")) if named else KeyError("color")

    return {"processor": process, "writer": write}


class _Unreadable:
    def read_from(self, position):
        yield from ((item if item != 151 else Unreadable("?", KeyError("color")), item) for item in range(1, 201))


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("item 151 (process)", _fails_at(in_processor={151})),
        ("item 151 (write)", _fails_at(in_writer={151}, named=True)),
        ("items 101 to 200 (write)", _fails_at(in_writer={151})),
        ("item 151 (write)", _fails_at(in_writer={151}) | {"chunk_size": 1}),
        ("item 151 (read)", {"reader": _Unreadable()}),
    ],
)
def test_a_failure_that_stops_the_step_says_of_which_item_it_is(table, place, options):
    ended = {}

    class Jobs:
        """Of a store no more than tells how the run has ended."""

        def claim(self, name, parameters, *, again):
            return SimpleNamespace(id=1, counts={}, position=None, crashed=False, revision=0, within=None)

        def joined(self, transaction):
            return None

        def book(self, claim, position, counts, parked):
            return claim.revision + 1

        def release(self, claim, **facts):
            ended.update(facts)

        def moved(self, claim):
            return False

        def abandon(self, claim):
            """Nobody else knows of it."""

    options = {"reader": range(1, 201), "jobs": Jobs()} | options
    with pytest.raises(KeyError, match="color") as caught:
        step(table, options.pop("reader"), **options).run()
    assert caught.value.__notes__ == [f"retrykit: step load has stopped at {place}"]
    assert (ended["status"], ended["reason"]) == ("failed", f"{place}: KeyError: 'color'")


def test_attempts_that_stopped_the_step_are_counted_too(table):
    class Store:
        """What the course asks of a job store; the last word is kept."""

        def claim(self, name, parameters, *, again):
            return SimpleNamespace(position=None, counts={}, crashed=False, revision=0)

        def joined(self, transaction):
            return None

        def moved(self, claim):
            return False

        def book(self, claim, position, counts, parked):
            return claim.revision + 1

        def release(self, claim, *, status, reason, counts):
            self.said = status, reason, counts

        def abandon(self, claim):
            raise AssertionError

    store = Store()
    one = step(table, range(4), chunk_size=2, processor=poison(3, error=OSError), template=template(3), jobs=store)
    with pytest.raises(OSError, match="item 3"):
        one.run()
    status, reason, counts = store.said
    assert (status, reason) == ("failed", "item 4 (process): OSError: item 3")
    assert (counts["rollbacks"], counts["retries"], counts["commits"], counts["written"]) == (3, 2, 1, 2)


def test_the_processors_failure_names_its_item_which_costs_one_transaction(table):
    report = step(table, range(100), processor=poison(7), skip=skip_values).run()
    assert table.rows == [item for item in range(100) if item != 7]
    assert table.events == ["begin", "rollback", "begin", "commit"]
    (skipped,) = report.skipped
    assert (skipped.item, skipped.number, skipped.phase, str(skipped.error)) == (7, 8, "process", "item 7")


def test_a_writer_that_names_the_culprit_costs_one_transaction(table):
    def write(transaction, items):
        if 40 in items:
            raise ItemError(items.index(40)) from ValueError("item 40")
        table.write(transaction, items)

    report = step(table, range(100), writer=write, skip=skip_values, processor=lambda i: i if i > 20 else None).run()
    assert table.rows == [item for item in range(21, 100) if item != 40]
    assert table.events == ["begin", "rollback", "begin", "commit"]
    (skipped,) = report.skipped
    assert (skipped.number, type(skipped.error), skipped.phase) == (41, ValueError, "write")
    assert (report.counts.read, report.counts.written, report.counts.filtered) == (100, 78, 21)


def test_policies_see_the_failure_and_not_the_name(table):
    def write(transaction, items):
        raise ItemError(0) from TimeoutError("busy")

    policy = SimpleRetryPolicy(3, retry_for=TimeoutError)
    with pytest.raises(TimeoutError, match="busy"):
        step(table, [1], writer=write, template=RetryTemplate(name="load", retry_policy=policy)).run()
    assert table.events == ["begin", "rollback"] * 3


@pytest.mark.parametrize("index", [2, -1])
def test_an_index_that_is_none_of_the_writers_items_stops_the_step_whatever_may_be_skipped(table, index):
    written = []

    def write(transaction, items):
        written.append(items)
        raise ItemError(index) from ValueError("x")

    with pytest.raises(IndexError, match=rf"ItemError\({index}\): the writer was given 2 items"):
        step(table, [1, 2], writer=write, skip=SkipPolicy(skip_for=Exception)).run()
    assert written == [[1, 2]]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_processor_may_name_the_failure_of_its_item_as_a_writer_does(table, asynchronous):
    def process(item):
        if item == 2:
            raise ItemError(0) from ValueError("two")
        return item

    options = {"name": "load", "reader": range(4), "processor": process, "skip": skip_values}
    if asynchronous:
        made = AsyncChunkStep(**options, writer=table.write, transaction=table.async_begin)
        report = asyncio.run(made.run())
    else:
        report = ChunkStep(**options, writer=table.write, transaction=table.begin).run()
    assert table.rows == [0, 1, 3]
    (skipped,) = report.skipped
    assert (skipped.number, skipped.phase, str(skipped.error)) == (3, "process", "two")


@pytest.mark.parametrize("index", ["1", True, 1.0])
def test_item_error_refuses_what_is_no_index(index):
    with pytest.raises((TypeError, ValueError), match=r"^index: "):
        ItemError(index)


def test_a_culprit_that_only_some_attempts_name_is_not_believed(table):
    named = iter([3, 4])

    def write(transaction, items):
        table.write(transaction, items)
        for index in named:
            raise ItemError(index) from ValueError(f"item {index}?")

    report = step(table, range(8), writer=write, template=template(2), skip=skip_values).run()
    assert sorted(table.rows) == list(range(8))
    assert report.skipped == ()


def test_an_unknown_culprit_is_found_by_halving_and_the_others_are_written_in_order(table):
    report = step(table, range(64), writer=poisoned_write(table, 20), skip=skip_values).run()
    assert table.rows == [item for item in range(64) if item != 20]
    assert table.events.count("begin") <= 11
    (skipped,) = report.skipped
    assert (skipped.item, skipped.phase, skipped.attempts) == (20, "write", 1)


def test_a_commit_that_fails_is_isolated_too(table):
    table.refuses = {13}
    skip = SkipPolicy(skip_for=LookupError)
    report = step(table, range(30), skip=skip).run()
    assert table.rows == [item for item in range(30) if item != 13]
    (skipped,) = report.skipped
    assert (skipped.item, skipped.phase) == (13, "commit")


def test_a_group_of_suspects_is_tried_once_and_a_single_item_as_often_as_the_policy_says(table):
    calls = []

    def write(transaction, items):
        calls.append(list(items))
        poisoned_write(table, 2)(transaction, items)

    step(table, range(4), writer=write, template=template(3), skip=skip_values).run()
    assert calls == [[0, 1, 2, 3]] * 3 + [[0, 1]] + [[2]] * 3 + [[3]]


def test_what_passes_while_suspects_are_tested_condemns_nobody(table):
    calls = []

    def write(transaction, items):
        calls.append(len(items))
        if len(calls) == 2:
            raise TimeoutError
        poisoned_write(table, 3)(transaction, items)

    policy = SimpleRetryPolicy(3, no_retry_for=ValueError)
    report = step(
        table, range(4), writer=write, template=RetryTemplate(name="load", retry_policy=policy), skip=skip_values
    ).run()
    assert calls == [4, 2, 2, 1, 1]
    assert [skipped.item for skipped in report.skipped] == [3]


def test_chunks_that_are_too_large_to_be_written_at_once_are_written_in_parts_and_nobody_is_skipped(table):
    def write(transaction, items):
        if len(items) > 10:
            raise ValueError("packet too large")
        table.write(transaction, items)

    report = step(table, range(200), writer=write, chunk_size=100, skip=skip_values).run()
    assert table.rows == list(range(200))
    assert report.skipped == ()


# -- reported defects of others


def test_a_rolled_back_chunk_is_not_counted_as_written(table):
    seen = []
    one = step(
        table, range(10), chunk_size=5, writer=poisoned_write(table, 7), skip=skip_values, on_progress=seen.append
    )
    report = one.run()
    assert report.counts.written == len(table.rows) == 9
    for progress in seen:
        assert progress.counts.written <= len(table.rows)
    assert [progress.counts.read for progress in seen] == sorted({progress.counts.read for progress in seen})


def test_a_forward_only_reader_loses_nothing_when_its_chunk_is_tried_again(table):
    given = iter(range(10))
    failures = iter([TimeoutError(), TimeoutError()])

    def write(transaction, items):
        for error in failures:
            raise error
        table.write(transaction, items)

    step(table, given, chunk_size=4, writer=write, template=template(3)).run()
    assert table.rows == list(range(10))


def test_no_transaction_is_open_while_the_reader_waits_not_even_after_a_failure(table):
    def read():
        for item in range(6):
            assert table.open is None
            yield item

    step(table, read(), chunk_size=2, writer=poisoned_write(table, 1, 4), skip=skip_values).run()
    assert table.rows == [0, 2, 3, 5]


def test_an_iterator_is_not_read_by_a_second_run_which_would_leave_out_what_it_gave(table):
    for reader in (iter(range(10)), (item for item in range(10))):
        one = step(table, reader, chunk_size=2, processor=poison(5))
        with pytest.raises(ValueError, match="item 5"):
            one.run()
        with pytest.raises(ValueError, match=r"^reader: .* \(this one was read\)"):
            one.run()
    one = step(table, range(3))
    assert [one.run().counts.read for _ in range(2)] == [3, 3]


# -- limits


def test_limit_stops_the_step_at_the_item_before_which_all_is_committed(table):
    skip = SkipPolicy(skip_for=ValueError, limit=2)
    with pytest.raises(SkipLimitError, match=r"stopped at item 7, .* limit=2 items are skipped already") as caught:
        step(table, range(10), chunk_size=10, processor=poison(1, 3, 6, 8), skip=skip).run()
    assert str(caught.value.__cause__) == "item 6"
    assert table.rows == [0, 2, 4, 5]
    table.rows.clear()
    with pytest.raises(SkipLimitError, match="item 7"):
        step(table, range(10), chunk_size=10, writer=poisoned_write(table, 1, 3, 6, 8), skip=skip).run()
    assert table.rows == [0, 2, 4, 5]


@pytest.mark.parametrize("chunk_size", [4, 5, 10])
def test_what_is_before_an_unreadable_record_that_is_too_many_is_settled(table, chunk_size):
    seen = []
    records = Records(0, 1, None, 3, 4, None, 6, None)
    with pytest.raises(SkipLimitError, match="item 6,"):
        step(
            table,
            records,
            chunk_size=chunk_size,
            writer=poisoned_write(table, 1),
            skip=SkipPolicy(skip_for=ValueError, limit=2),
            on_progress=seen.append,
        ).run()
    assert table.rows == [0, 3, 4]
    assert (seen[-1].counts.read, seen[-1].counts.all_skipped) == (5, 2)


def test_an_item_that_is_too_many_alone_has_those_before_it_recorded(table):
    seen = []
    with pytest.raises(SkipLimitError, match="item 3,"):
        step(
            table,
            range(3),
            processor=poison(0, 1),
            writer=poisoned_write(table, 2),
            skip=SkipPolicy(skip_for=ValueError, limit=2),
            on_progress=seen.append,
        ).run()
    assert (seen[-1].counts.read, seen[-1].counts.all_skipped) == (2, 2)


@pytest.mark.parametrize("chunk_size", [100, 1_000])
def test_an_item_is_not_refused_because_of_others_that_come_after_it(table, chunk_size):
    records = Records(*(None if 1_985 <= number < 2_000 else number for number in range(2_000)))
    skip = SkipPolicy(skip_for=ValueError, share=0.01)
    report = step(table, records, chunk_size=chunk_size, writer=poisoned_write(table, 1_000), skip=skip).run()
    assert report.counts.all_skipped == 16


def test_a_culprit_behind_the_item_that_is_too_many_takes_nothing_from_the_limit(table):
    def write(transaction, items):
        for one in (8, 6, 2):
            if one in items:
                raise ItemError(items.index(one), ValueError(one))
        table.write(transaction, items)

    with pytest.raises(SkipLimitError, match="item 7,"):
        step(table, range(10), writer=write, skip=SkipPolicy(skip_for=ValueError, limit=1)).run()
    assert table.rows == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("reader", [range(5), [3]])
@pytest.mark.parametrize("where", ["processor", "writer"])
def test_a_failure_that_the_policy_does_not_let_recover_stops_the_step(table, reader, where):
    policy = SimpleRetryPolicy(1, not_recoverable=(ValueError,))
    fails = {"processor": poison(3)} if where == "processor" else {"writer": poisoned_write(table, 3)}
    with pytest.raises(ValueError, match="3"):
        step(table, reader, template=RetryTemplate(name="load", retry_policy=policy), skip=skip_values, **fails).run()
    assert table.rows == []


def test_limits_of_classes_count_the_classes_below(table):
    skip = SkipPolicy(skip_for=(ValueError, LookupError), limits={LookupError: 1})

    def process(item):
        raise {0: ValueError, 1: KeyError, 2: ValueError, 3: IndexError}[item](item)

    with pytest.raises(SkipLimitError, match=r"item 4, .* limits=1 for LookupError"):
        step(table, range(4), chunk_size=1, processor=process, skip=skip).run()


@pytest.mark.parametrize(("share", "read"), [(0.29, 100), (0.07, 100), (0.1, 30), (1, 5)])
def test_a_share_is_what_it_says_in_decimals(share, read):
    skip = SkipPolicy(skip_for=ValueError, limit=None, share=share, share_from=1)
    permitted = round(share * read)
    assert skip.refusal(ValueError(), skipped=permitted - 1, limited={}, read=read) is None
    assert skip.refusal(ValueError(), skipped=permitted, limited={}, read=read) is not None


def test_share_is_looked_at_when_enough_was_read():
    skip = SkipPolicy(skip_for=ValueError, share=0.1, share_from=20)
    assert skip.refusal(ValueError(), skipped=5, limited={}, read=19) is None
    assert skip.refusal(ValueError(), skipped=1, limited={}, read=20) is None
    assert "3 of 20 items would be more than share=0.1" in skip.refusal(ValueError(), skipped=2, limited={}, read=20)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_for": int},
        {"no_skip_for": "ValueError"},
        {"limit": -1},
        {"limit": 1.5},
        {"limits": {ValueError: -1}},
        {"limits": [ValueError]},
        {"skip_for": ValueError, "limits": {KeyError: 3}},
        {"skip_for": Exception, "no_skip_for": LookupError, "limits": {ValueError: 1, KeyError: 3}},
        {"share": 1.5},
        {"share": "1"},
        {"share_from": 0},
    ],
)
def test_bad_skip_policies_are_refused(options):
    name = list(options)[-1]
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        SkipPolicy(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"skip_for": LookupError, "limits": {KeyError: 1, Exception: 3}},
        {"skip_for": (Exception, KeyError), "no_skip_for": LookupError, "limits": {KeyError: 1, LookupError: 2}},
    ],
)
def test_limits_may_be_of_classes_above_and_below_those_that_are_skipped(options):
    assert SkipPolicy(**options).limits == options["limits"]


def test_the_nearest_class_says_whether_a_failure_is_an_items_own():
    skip = SkipPolicy(skip_for=(ValueError, OSError), no_skip_for=(UnicodeError, ConnectionError))
    skipped = [
        error for error in (ValueError, UnicodeError, OSError, ConnectionResetError, KeyError) if skip.may_skip(error())
    ]
    assert skipped == [ValueError, OSError]


# -- what is never an item's fault


def test_a_transaction_that_does_not_begin_condemns_nobody(table):
    def begin():
        raise OSError("the database is gone")

    with pytest.raises(OSError, match="the database is gone"):
        step(table, range(4), transaction=begin, skip=SkipPolicy(skip_for=Exception)).run()


def test_a_record_that_cannot_be_made_stops_the_step_and_the_item_is_not_lost(table):
    def record(transaction, skipped):
        raise ValueError("cannot be recorded")

    with pytest.raises(RecoveryFailedError):
        step(table, [1, 2], writer=poisoned_write(table, 2), skip=skip_values, on_skip=record).run()
    with pytest.raises(ValueError, match="cannot be recorded"):
        step(table, [1, 2, 3], processor=poison(3), skip=skip_values, on_skip=record).run()
    assert table.rows == [1]


def test_skipped_items_are_recorded_in_the_transaction_that_settles_them(table):
    def record(transaction, skipped):
        transaction.open.append(("skipped", skipped.item))

    def process(item):
        return poison(1)(item)

    step(table, range(5), processor=process, writer=poisoned_write(table, 3), skip=skip_values, on_skip=record).run()
    assert sorted(table.rows, key=str) == [("skipped", 1), ("skipped", 3), 0, 2, 4]


# -- keys and vetoes


def test_an_item_with_a_key_has_a_history_which_is_dropped_when_it_is_settled(table):
    cache = MapRetryContextCache()
    attempts = []

    def write(transaction, items):
        if items == [2]:
            attempts.append((current_context().key, current_context().attempt))
        poisoned_write(table, 2)(transaction, items)

    report = step(
        table,
        range(4),
        writer=write,
        skip=skip_values,
        key=lambda item: f"k{item}",
        template=template(3, context_cache=cache),
    ).run()
    assert attempts == [("k2", 1), ("k2", 2), ("k2", 3)]
    assert [(skipped.key, skipped.attempts) for skipped in report.skipped] == [("k2", 3)]
    assert list(cache.items()) == []


def test_a_veto_ends_the_attempts_of_a_single_item_with_its_reason(table):
    def write(transaction, items):
        if 2 in items and len(items) == 1:
            veto("the customer has cancelled")
        poisoned_write(table, 2)(transaction, items)

    report = step(table, range(3), writer=write, skip=skip_values, template=template(5)).run()
    (skipped,) = report.skipped
    assert (skipped.attempts, skipped.reason) == (1, "vetoed: the customer has cancelled")


# -- records that cannot be read


class Records:
    """A reader with positions: `None` for a record that is unreadable."""

    def __init__(self, *records):
        self.records = records
        self.began_at = []

    def read_from(self, position):
        self.began_at.append(position)
        for number, record in enumerate(self.records[position or 0 :], (position or 0) + 1):
            yield (Unreadable(b"?", ValueError(f"record {number}")) if record is None else record), number


def test_a_record_that_cannot_be_read_is_skipped_without_any_rollback(table):
    report = step(table, Records(1, None, 3), skip=skip_values).run()
    assert table.rows == [1, 3]
    assert table.events == ["begin", "commit"]
    (skipped,) = report.skipped
    assert (skipped.item, skipped.number, skipped.phase, str(skipped.error)) == (b"?", 2, "read", "record 2")


def test_a_record_that_cannot_be_read_stops_a_step_that_may_not_skip_it(table):
    with pytest.raises(ValueError, match="record 2"):
        step(table, Records(1, None, 3)).run()


def test_a_commit_that_fails_although_no_item_is_left_to_blame_stops_the_step(table):
    class Reader:
        def read_from(self, position):
            yield Unreadable("?", ValueError("no record")), 1

    @contextmanager
    def begin():
        with table.begin():
            yield table
            raise ValueError("a constraint that is checked at the commit")

    with pytest.raises(ValueError, match="checked at the commit"):
        step(table, Reader(), transaction=begin, skip=skip_values).run()
    assert table.events == ["begin", "rollback"]


def test_several_unreadable_records_and_a_culprit_among_the_others(table):
    report = step(table, Records(1, None, 3, 4, None, 6, None), writer=poisoned_write(table, 4), skip=skip_values).run()
    assert table.rows == [1, 3, 6]
    assert [(skipped.number, skipped.phase) for skipped in report.skipped] == [
        (2, "read"),
        (4, "write"),
        (5, "read"),
        (7, "read"),
    ]
    assert (report.counts.read, report.counts.written, report.counts.all_skipped) == (7, 3, 4)


# -- the report


def test_the_report_says_the_same_to_people_and_programs(table):
    report = step(table, range(5), processor=poison(2), skip=skip_values).run({"file": "a.csv"})
    facts = json.loads(json.dumps(report.to_json()))
    assert facts["counts"]["skipped"] == {"builtins.ValueError": 1}
    assert facts["parameters"] == {"file": "a.csv"}
    assert [one["number"] for one in facts["skipped"]] == [3]
    shown = report.table().splitlines()
    assert shown[0] == "job        load file='a.csv'"
    assert "           1 ValueError" in shown
    assert set(facts["counts"]["seconds"]) >= {"read", "process", "write", "transaction"}
    failed = attrs.evolve(report, status="failed", reason="IntegrityError: no\n[SQL: INSERT …]")
    assert failed.table().splitlines()[1:3] == ["status     failed: IntegrityError: no", "read       5"]
    assert failed.to_json()["reason"] == failed.reason


def test_only_so_many_skipped_items_are_kept_and_all_are_counted(table):
    report = step(
        table, range(300), processor=poison(*range(300)), chunk_size=1, skip=SkipPolicy(skip_for=ValueError, limit=None)
    ).run()
    assert len(report.skipped) == 100
    assert report.counts.all_skipped == 300


@pytest.mark.parametrize("where", ["processor", "writer"])
def test_a_report_with_skipped_items_does_not_keep_their_chunks(table, where):
    class Item:
        def __init__(self, number):
            self.number = number

    def write(transaction, items):
        if where == "writer" and any(item.number % 50 == 7 for item in items):
            raise ValueError("one of them")

    def process(item):
        if where == "processor" and item.number % 50 == 7:
            raise ValueError("it") from LookupError("what is beneath")
        return item

    items = (Item(number) for number in range(150))
    report = step(table, items, chunk_size=50, processor=process, writer=write, skip=skip_values).run()
    gc.collect()
    assert [skipped.number for skipped in report.skipped] == [8, 58, 108]
    assert sum(isinstance(one, Item) for one in gc.get_objects()) == 3


def test_each_skipped_item_is_logged_without_its_content(table, caplog):
    with caplog.at_level(logging.WARNING, "retrykit.batch"):
        step(table, ["secret"], writer=poisoned_write(table, "secret"), skip=skip_values).run()
    assert [record.getMessage() for record in caplog.records] == [
        "step load: item 1 is skipped: write raised builtins.ValueError (once)"
    ]


def test_a_skipped_item_of_a_partition_is_logged_with_it(table, caplog):
    with caplog.at_level(logging.WARNING, "retrykit.batch"):
        one = step(table, ["secret"], writer=poisoned_write(table, "secret"), skip=skip_values)
        one.run({"partition": "3/8"})
    assert caplog.messages == ["step load 3/8: item 1 is skipped: write raised builtins.ValueError (once)"]


# -- arguments


async def _coroutine(*arguments):
    """Is not called."""


def _generator(*arguments):
    yield


async def _later(items):
    for item in items:
        await asyncio.sleep(0)
        yield item


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": 1},
        {"reader": 5},
        {"reader": "abc"},
        {"writer": None},
        {"writer": len},
        {"writer": _generator},
        {"processor": 1},
        {"processor": lambda: None},
        {"processor": _coroutine},
        {"transaction": 1},
        {"transaction": Table().begin()},
        {"transaction": Table().async_begin()},
        {"chunk_size": 0},
        {"chunk_size": True},
        {"template": AsyncRetryTemplate(name="load")},
        {"skip": ValueError},
        {"skip": SkipPolicy(skip_crashes=True)},
        {"no_rollback_for": ValueError},
        {"no_rollback_for": 1},
        {"key": "id"},
        {"key": asyncio.sleep},
        {"jobs": object()},
        {"jobs": SimpleNamespace},
        {"on_skip": 1},
        {"on_skip": len},
        {"none_closes_chunk": None},
        {"on_progress": 1},
        {"payload": 1},
        {"payload": None},
    ],
)
def test_bad_arguments_are_refused_by_name(table, options):
    (name,) = options
    for kind in (ChunkStep, AsyncChunkStep):
        if name == "template" and kind is AsyncChunkStep:
            options = {"template": RetryTemplate(name="load")}
        elif options.get(name) is _coroutine and kind is AsyncChunkStep:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: must (be|have)"):
            kind(**({"name": "load", "reader": [], "writer": table.write} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": SkipPolicy(skip_crashes=True)}, "^skip: .*no jobs"),
        ({"skip": SkipPolicy(skip_crashes=True), "jobs": True}, "^skip: .*outlives the process.*MapRetryContextCache"),
        ({"no_rollback_for": KeyError}, "^no_rollback_for: .*KeyError is none"),
        ({"no_rollback_for": ValueError, "transaction": None}, "^no_rollback_for: .*no transaction"),
        ({"no_rollback_for": ValueError, "none_closes_chunk": True}, "^none_closes_chunk: .*no_rollback_for"),
    ],
)
def test_arguments_that_make_no_sense_together_are_refused(table, options, message):
    if options.get("jobs"):
        options = options | {"jobs": SimpleNamespace(**dict.fromkeys(STORE, print))}
    with pytest.raises(ValueError, match=message):
        step(table, [], **({"skip": skip_values} | options))


STORE = ("claim", "joined", "book", "moved", "release", "abandon")


def test_a_plain_step_refuses_an_asynchronous_job_store(table):
    jobs = SimpleNamespace(**dict.fromkeys(STORE, print) | {"claim": _coroutine})
    with pytest.raises(TypeError, match=r"^jobs: .*AsyncChunkStep"):
        step(table, [], jobs=jobs)


def test_a_class_may_be_a_processor(table):
    step(table, ["1", "2"], processor=int).run()
    assert table.rows == [1, 2]


@pytest.mark.parametrize("parameters", [{1: 2}, [1], {"a": object()}, {"a": float("nan")}])
def test_parameters_are_what_json_can_say(table, parameters):
    with pytest.raises((TypeError, ValueError), match=r"^parameters: "):
        step(table, []).run(parameters)


def test_a_step_is_a_value_and_its_variant_is_made_by_evolve(table):
    one = step(table, [1])
    assert attrs.evolve(one, chunk_size=7).chunk_size == 7
    assert one == attrs.evolve(one)


def test_asynchronous_parts_are_refused_by_a_plain_step(table):
    with pytest.raises(TypeError, match=r"^reader: .*AsyncChunkStep"):
        step(table, _later([1]))

    async def write(transaction, items):
        """Never runs."""

    with pytest.raises(TypeError, match=r"^writer: must be a plain function .*AsyncChunkStep"):
        step(table, [1], writer=write)

    class Writer:
        def __call__(self, transaction, items):
            return write(transaction, items)

    with pytest.raises(TypeError, match="write is a coroutine: use AsyncChunkStep"):
        step(table, [1], writer=Writer()).run()


# -- asynchronous


def test_the_asynchronous_step_takes_the_same_course(table):
    async def process(item):
        await asyncio.sleep(0)
        return poison(3)(item)

    async def write(transaction, items):
        await asyncio.sleep(0)
        poisoned_write(table, 5)(transaction, items)

    one = AsyncChunkStep(
        name="load",
        reader=_later(range(12)),
        processor=process,
        writer=write,
        transaction=table.async_begin,
        template=AsyncRetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
        skip=skip_values,
        chunk_size=8,
    )
    report = asyncio.run(one.run())
    assert table.rows == [item for item in range(12) if item not in (3, 5)]
    assert [skipped.item for skipped in report.skipped] == [3, 5]


def test_both_steps_leave_the_same_trace():
    def trace(kind, template_kind, begin, drive):
        table = Table()
        table.refuses = {30}
        one = kind(
            name="load",
            reader=range(50),
            processor=poison(3, 17),
            writer=poisoned_write(table, 8, 9, 41),
            transaction=getattr(table, begin),
            template=template_kind(name="load", retry_policy=SimpleRetryPolicy(2)),
            skip=SkipPolicy(skip_for=(ValueError, LookupError)),
            chunk_size=20,
        )
        report = drive(one.run)
        facts = {name: value for name, value in report.counts.to_json().items() if name != "seconds"}
        return table.events, table.rows, facts

    plain = trace(ChunkStep, RetryTemplate, "begin", lambda run: run())
    later = trace(AsyncChunkStep, AsyncRetryTemplate, "async_begin", lambda run: asyncio.run(run()))
    assert plain == later


def test_a_cancelled_step_rolls_back_and_says_so(table):
    async def main():
        writing = asyncio.Event()

        async def write(transaction, items):
            writing.set()
            await asyncio.sleep(60)

        one = AsyncChunkStep(name="load", reader=[1], writer=write, transaction=table.async_begin)
        task = asyncio.create_task(one.run())
        await writing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert table.events == ["begin", "rollback"]


class Row:
    """An item that one can see the end of."""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_chunk_is_let_go_of_before_the_next_one_is_read(asynchronous):
    alive, most = weakref.WeakSet(), []

    def rows():
        for _ in range(12):
            most.append(len(alive))
            row = Row()
            alive.add(row)
            yield row
            del row

    facts = {"name": "load", "reader": rows(), "writer": lambda _transaction, _items: None, "chunk_size": 3}
    report = asyncio.run(AsyncChunkStep(**facts).run()) if asynchronous else ChunkStep(**facts).run()
    assert report.counts.written == 12
    assert max(most) < 3
