"""Outages of stores: what the log says of one, from its first fault to its end."""

from __future__ import annotations

import asyncio
import logging

import pytest

from retrykit import (
    AsyncRetryTemplate,
    CodecError,
    ContextCacheError,
    MapRetryContextCache,
    RetryState,
    RetryTemplate,
)
from retrykit.outage import Outages, outages
from tests.doubles import BrokenCache, ManualClock

REFUSED = ContextCacheError("load failed: connection refused")


class Later(BrokenCache):
    """As its base, behind coroutine functions."""

    async def load(self, key):
        return super().load(key)

    async def save(self, key, snapshot, expected):
        return super().save(key, snapshot, expected)

    async def remove(self, key, expected=None):
        return super().remove(key, expected)


@pytest.fixture(params=["sync", "async"])
def store(request):
    return (BrokenCache if request.param == "sync" else Later)(load=REFUSED)


@pytest.fixture
def template(store):
    kind = AsyncRetryTemplate if isinstance(store, Later) else RetryTemplate
    return kind(name="orders", context_cache=store, clock=ManualClock())


def deliver(template, error=None, key="m-1"):
    def attempt(_context):
        if error is not None:
            raise error

    called = template.execute(attempt, state=RetryState(key=key))
    return asyncio.run(awaited(called)) if template.asynchronous else called


async def awaited(called):
    return await called


@pytest.fixture
def told(caplog):
    """The lines of the log since the last look, each with whether it has a traceback."""
    caplog.set_level(logging.INFO, "retrykit")

    def look():
        lines = [(record.levelname, record.getMessage(), record.exc_info is not None) for record in caplog.records]
        caplog.clear()
        return lines

    return look


def test_an_outage_is_told_with_one_traceback_then_with_reminders_and_its_end_with_a_line(store, template, told):
    first = "orders key='m-1': fault in load, the operation goes on: load failed: connection refused"
    deliver(template)
    assert told() == [("ERROR", first, True)]
    for seconds in (0, 5, 4):
        template.clock.sleep(seconds)
        deliver(template, key="m-2")
    assert told() == []
    template.clock.sleep(3)
    deliver(template, key="m-3")
    kind = type(store).__name__
    reminder = (
        f"orders: its store ({kind}) has failed for 12 s, with 5 faults so far, the last one in load: "
        "load failed: connection refused"
    )
    assert told() == [("ERROR", reminder, False)]
    template.clock.sleep(11)
    deliver(template)
    assert told() == []
    template.clock.sleep(1)
    deliver(template)
    assert [line[1].partition(",")[0] for line in told()] == [f"orders: its store ({kind}) has failed for 24 s"]
    store.faults.clear()
    deliver(template)
    assert told() == [("WARNING", f"orders: its store ({kind}) works again, after 24 s and 7 faults", False)]
    deliver(template)
    assert told() == []


def test_a_store_that_fails_again_is_told_at_length_again(store, template, told):
    for faults in ({"load": REFUSED}, {}, {"load": REFUSED}):
        store.faults = faults
        deliver(template)
    assert [line[2] for line in told()] == [True, False, True]


def test_a_fault_of_another_kind_is_told_in_a_line(store, template, told):
    deliver(template)
    store.faults["load"] = ContextCacheError("load failed: no such table")
    store.faults["load"].__cause__ = LookupError("no such table")
    deliver(template)
    deliver(template)
    fresh = "orders key='m-1': fault in load, the operation goes on: load failed: no such table"
    assert told()[1:] == [("ERROR", fresh, False)]


def test_a_store_that_can_only_be_read_is_not_taken_for_well(store, template, told):
    store.faults = {"save": REFUSED}
    for _ in range(3):
        with pytest.raises(OSError, match="mine"):
            deliver(template, OSError("mine"))
    assert [line[2] for line in told()] == [True]
    store.faults.clear()
    with pytest.raises(OSError, match="mine"):
        deliver(template, OSError("mine"))
    assert "works again" in told()[0][1]


def test_a_store_that_forgets_can_be_written(store, template, told):
    store.faults.clear()
    with pytest.raises(OSError, match="mine"):
        deliver(template, OSError("mine"))
    store.faults = {"save": REFUSED}
    deliver(template)
    assert [line[2] for line in told()] == [True, False]


def test_templates_that_share_a_store_tell_its_outage_once(store, template, told):
    other = type(template)(name="bills", context_cache=store, clock=ManualClock())
    deliver(template)
    deliver(other)
    assert len(told()) == 1
    store.faults.clear()
    deliver(other)
    (over,) = told()
    assert over[1].startswith("bills: its store (")


def test_what_is_amiss_with_one_item_is_no_outage(store, template, told):
    store.faults = {"load": CodecError(reason="it is damaged")}
    deliver(template)
    deliver(template, key="m-2")
    lines = told()
    assert [line[2] for line in lines] == [False, False]
    assert all(line[1].endswith("cannot be read: it is damaged") for line in lines)
    assert id(store) not in outages.known


def test_whoever_debugs_gets_every_traceback(template, told, caplog):
    caplog.set_level(logging.DEBUG, "retrykit")
    deliver(template)
    deliver(template)
    assert [line[2] for line in told() if line[0] == "ERROR"] == [True, True]


def test_outages_are_known_of_as_many_as_a_program_may_have_and_not_of_more():
    known = Outages()
    stores = [MapRetryContextCache() for _ in range(1_004)]
    for store in stores:
        assert known.add(store, "reading", REFUSED, 0.0)[0] == "all"
    assert len(known.known) == 1_000
    assert known.end(stores[0], "reading") is None
    assert known.end(stores[-1], "writing") is None
    assert known.end(stores[-1], "reading").faults == 1
    assert len(known.known) == 999


def test_the_facts_of_an_outage_are_there_for_programs(store, template, caplog):
    deliver(template)
    store.faults.clear()
    deliver(template)
    first, over = (record.retrykit for record in caplog.records)
    assert first == {"name": "orders", "key": "m-1", "error": "retrykit.errors.ContextCacheError"}
    assert over == {"name": "orders"}
