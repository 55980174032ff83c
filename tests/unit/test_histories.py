"""What operators see of histories, and do to them: blocking and asynchronous, in memory and in SQLite."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import attrs
import pytest

from retrykit import CodecError, MapRetryContextCache, RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.backoff import FixedBackOffPolicy
from retrykit.clock import StoreClock, SystemClock
from retrykit.errors import ExhaustedRetryError, RetryError, TerminatedRetryError
from retrykit.histories import AsyncHistories, Histories, HistoryFilter, Pruned
from retrykit.owner import begin, end
from retrykit.summary import HistorySummary
from tests.doubles import EPOCH, ManualClock

EPOCH_UTC = datetime.fromtimestamp(EPOCH, UTC)
ELSEWHERE = "elsewhere/boot/namespace/1/2/3"


class AsyncMap:
    """An in-memory cache behind coroutine functions."""

    def __init__(self, inner):
        self.inner = inner

    async def load(self, key):
        return self.inner.load(key)

    async def save(self, key, snapshot, expected):
        return self.inner.save(key, snapshot, expected)

    async def remove(self, key, expected=None):
        return self.inner.remove(key, expected)

    async def expire(self, now=None, limit=None):
        return self.inner.expire(now, limit)

    async def items(self, prefix="", after=None):
        for item in self.inner.items(prefix, after):
            yield item

    async def evicted(self, prefix="", after=None):
        for item in self.inner.evicted(prefix, after):
            yield item


class Blocking:
    """`AsyncHistories` behind blocking verbs."""

    def __init__(self, cache, clock):
        self.face = AsyncHistories(AsyncMap(cache), clock)

    def __getattr__(self, verb):
        method = getattr(self.face, verb)
        return lambda *args, **options: asyncio.run(method(*args, **options))

    def __iter__(self):
        return iter(asyncio.run(collected(self.face)))

    def find(self, *args, **options):
        return iter(asyncio.run(collected(self.face.find(*args, **options))))

    def export(self, *args, **options):
        return iter(asyncio.run(collected(self.face.export(*args, **options))))


async def collected(found):
    return [one async for one in found]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture(params=["memory", "sqlite"])
def cache(request, tmp_path, clock):
    if request.param == "memory":
        yield MapRetryContextCache()
        return
    sql = pytest.importorskip("retrykit.sql")
    with sql.SqlRetryContextCache(f"sqlite:///{tmp_path}/histories.db", clock=clock) as cache:
        yield cache


@pytest.fixture(params=["blocking", "asynchronous"])
def histories(request, cache, clock):
    return Histories(cache, clock) if request.param == "blocking" else Blocking(cache, clock)


@pytest.fixture
def template(cache, clock):
    return RetryTemplate(
        name="orders", context_cache=cache, clock=clock, retry_policy=SimpleRetryPolicy(max_attempts=3)
    )


def fail(template, key="m-1", error=None, times=1):
    def callback(context):
        raise error or ConnectionResetError("hung up")

    for _ in range(times):
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it is
            template.execute(callback, state=RetryState(key=key))


def texts(found):
    return [summary.canonical_key for summary in found]


# -- looking


def test_every_history_is_found_in_the_order_of_its_canonical_key_and_circuits_are_none(histories, template, cache):
    for key in ("m-2", "m-1", 7, b"\x01", ("/queue/orders", "ID:1")):
        fail(template, key)
    cache.save("orders@breaker", {"breaker": {}}, None)
    found = ["orders#7", "orders(/13:/queue/orders,/4:ID:1)", "orders/m-1", "orders/m-2", "orders=01"]
    assert texts(histories) == texts(histories.find(HistoryFilter(name="orders"))) == found


def test_one_history_is_seen_with_all_its_facts(histories, template, clock):
    waiting = attrs.evolve(template, back_off_policy=FixedBackOffPolicy(60))

    def callback(context):
        context.attributes["customer"] = 7
        raise ConnectionResetError("hung up") from OSError("cable")

    with pytest.raises(ConnectionResetError):
        waiting.execute(callback, state=RetryState(key="m-1"))
    clock.elapsed += 10
    found = histories.get(("orders", "m-1"))
    assert found == histories.get("orders/m-1")
    assert (found.name, found.key, found.shown_key, found.canonical_key) == ("orders", "m-1", "m-1", "orders/m-1")
    assert (found.retry_count, found.crashes, found.exhausted, found.fault) == (1, 0, False, None)
    assert found.why == "SimpleRetryPolicy: attempt 1 of 3 failed"
    assert found.first_failed_at == found.last_failed_at == found.started_at == found.touched_at == EPOCH_UTC
    assert found.next_attempt_at == EPOCH_UTC + timedelta(seconds=60)
    assert (found.state, found.waiting, found.is_running, found.vetoed) == ("waiting", True, False, False)
    assert [(error.attempt, error.message) for error in found.errors] == [(1, "hung up")]
    assert "test_histories" in found.last_error.traceback
    assert found.last_error.__cause__.type == "builtins.OSError"
    assert found.attributes == {"customer": 7}
    clock.elapsed += 50
    assert histories.get("orders/m-1").state == "due"
    assert histories.get("orders/m-2") is None


def test_json_form_has_every_field_and_instants_in_utc(histories, template):
    fail(template, ("/queue/orders", "ID:1"))
    fields = histories.get(("orders", ("/queue/orders", "ID:1"))).to_json()
    assert json.loads(json.dumps(fields)) == fields
    assert set(fields) == {"format", "state"} | {field.name for field in attrs.fields(HistorySummary)}
    assert (fields["format"], fields["key"], fields["last_failed_at"]) == (
        1,
        ["/queue/orders", "ID:1"],
        EPOCH_UTC.isoformat(),
    )
    assert fields["errors"] == [
        {"attempt": 1, "type": "builtins.ConnectionResetError", "message": "hung up", "at": EPOCH_UTC.isoformat()}
    ]
    assert fields["last_error"]["type"] == "builtins.ConnectionResetError"


def test_export_is_one_line_of_json_for_each(histories, template):
    fail(template, "m-1")
    fail(template, "m\n2")
    lines = list(histories.export())
    assert [json.loads(line)["key"] for line in lines] == ["m\n2", "m-1"]
    assert not any("\n" in line for line in lines)
    assert [json.loads(line)["key"] for line in histories.export(after="orders!/m%0A2")] == ["m-1"]


def test_snapshot_that_cannot_be_read_is_shown_with_its_fault_and_can_be_forgotten(histories, cache):
    cache.save("orders/m-1", {"format": 99, "name": "orders", "key": "m-1", "retry_count": 1}, None)
    cache.save("orders/m-2", {"format": 1, "name": "orders", "key": {"bytes": "no"}, "retry_count": 1}, None)
    first, second = histories.find()
    assert "upgrade it" in first.fault
    assert second.fault is not None
    assert (first.state, first.key, first.retry_count) == ("unreadable", None, 0)
    with pytest.raises(CodecError):
        histories.veto("orders/m-1", "no")
    assert histories.forget("orders/m-1")


def test_running_attempts_are_shown_with_owner_and_lease_and_dead_ones_are_not_believed(histories, template, clock):
    def peek(context):
        return histories.get("orders/m-1")

    seen = attrs.evolve(template, lease=60).execute(peek, state=RetryState(key="m-1", redelivered=True))
    (attempt,) = seen.running
    assert (attempt.alive, attempt.believed, attempt.recovery) == (True, True, False)
    assert (attempt.since, attempt.until) == (EPOCH_UTC, EPOCH_UTC + timedelta(seconds=60))
    assert seen.state == "running"
    assert seen.to_json()["running"][0]["until"] == attempt.until.isoformat()


@pytest.mark.parametrize(
    ("owner", "later", "seen"),
    [
        ("elsewhere/x/y/1/2/3", 0, (None, True)),
        ("elsewhere/x/y/1/2/3", 61, (None, False)),
        ("ended", 0, (False, False)),
    ],
)
def test_attempt_is_believed_while_its_lease_lasts_unless_it_is_known_to_be_over(  # noqa: PLR0917
    histories, cache, clock, owner, later, seen
):
    if owner == "ended":
        owner = begin()
        end(owner)
    flight = {"fence": 1, "owner": owner, "since": EPOCH, "until": EPOCH + 60}
    facts = {"format": 1, "name": "orders", "key": "m-1", "retry_count": 0, "started_at": EPOCH, "in_flight": [flight]}
    cache.save("orders/m-1", facts, None)
    clock.elapsed += later
    found = histories.get("orders/m-1")
    assert [(one.alive, one.believed) for one in found.running] == [seen]
    assert found.is_running is seen[1]
    assert texts(histories.find(HistoryFilter(running=True))) == (["orders/m-1"] if seen[1] else [])


def test_completion_marks_are_left_out_unless_they_are_asked_for(histories, template):
    fail(template, "m-1")
    remembering = attrs.evolve(template, remember_completed=60)
    remembering.execute(lambda _: 1, state=RetryState(key="m-2"))
    assert texts(histories) == ["orders/m-1"]
    (mark,) = histories.find(HistoryFilter(completed=True))
    assert (mark.state, mark.completed_at, mark.expires_at) == (
        "completed",
        EPOCH_UTC,
        EPOCH_UTC + timedelta(seconds=60),
    )
    assert texts(histories.find(HistoryFilter(completed=None))) == ["orders/m-1", "orders/m-2"]


# -- filters


def test_filters_take_those_for_which_everything_given_holds(histories, template, clock):
    fail(template, "a-1")
    fail(template, "a-2", ValueError("bad"), times=3)
    clock.elapsed += 100
    fail(attrs.evolve(template, back_off_policy=FixedBackOffPolicy(60)), "b-1", TimeoutError())
    histories.veto(("orders", "b-2"), "no")
    fail(attrs.evolve(template, name="other"), "a-1")

    def found(**where):
        return texts(histories.find(HistoryFilter(**where)))

    ours = ["orders/a-1", "orders/a-2", "orders/b-1", "orders/b-2"]
    middle = EPOCH_UTC + timedelta(seconds=50)
    assert found() == [*ours, "other/a-1"]
    assert found(name="orders") == ours
    assert found(name="order") == found(name="orders/a-1") == []
    assert found(name="orders", key_prefix="a-") == ours[:2]
    assert found(key_prefix="a-") == [*ours[:2], "other/a-1"]
    assert found(vetoed=True) == ["orders/b-2"]
    assert found(vetoed=False, name="orders") == ours[:3]
    assert found(exhausted=True) == ["orders/a-2"]
    assert found(waiting=True) == ["orders/b-1"]
    assert found(running=True) == []
    assert found(error_type="ValueError") == ["orders/a-2"]
    assert found(error_type="builtins.OSError", name="orders") == ["orders/a-1", "orders/b-1"]
    assert found(failed_before=middle) == ours[:2]
    assert found(failed_since=middle) == ["orders/b-1", "other/a-1"]
    assert found(failed_since=middle, name="orders", failed_before=middle) == []


def test_keys_with_a_prefix_are_found_however_they_are_written_in_the_store(histories, template):
    keys = ["a", "a\nb", "a" * 600, "b", 7, ("a",)]
    for key in keys:
        fail(template, key)
    found = histories.find(HistoryFilter(name="orders", key_prefix="a"))
    assert {summary.key for summary in found} == {"a", "a\nb", "a" * 600}


@pytest.mark.parametrize(
    ("where", "error", "text"),
    [
        ({"failed_since": datetime(2026, 1, 1)}, ValueError, "failed_since: must be an aware datetime"),  # noqa: DTZ001
        ({"failed_before": 5}, TypeError, "failed_before: must be an aware datetime or None"),
    ],
)
def test_filter_refuses_what_names_no_instant(where, error, text):
    with pytest.raises(error, match=text):
        HistoryFilter(**where)


# -- pages


def test_pages_follow_each_other_until_the_last_one(histories, template):
    for number in range(7):
        fail(template, f"m-{number}")
        fail(attrs.evolve(template, name="other"), number)
    seen, after = [], None
    while True:
        page = histories.page(HistoryFilter(name="orders"), limit=3, after=after)
        seen += texts(page.histories)
        assert page.next in (seen[-1], None)
        if page.next is None:
            break
        after = page.next
    assert seen == [f"orders/m-{number}" for number in range(7)]
    assert texts(histories.page(limit=2, after="orders/m-5").histories) == ["orders/m-6", "other#0"]
    assert texts(histories.find(HistoryFilter(name="orders"), after="other#0")) == []


@pytest.mark.parametrize(("limit", "error"), [(0, ValueError), (True, TypeError), ("5", TypeError)])
def test_page_refuses_a_limit_that_is_no_number_of_histories(histories, limit, error):
    with pytest.raises(error, match="limit"):
        histories.page(limit=limit)


class Counting(MapRetryContextCache):
    """A cache that counts what is read."""

    def __init__(self):
        super().__init__()
        self.read = 0

    def items(self, prefix="", after=None):
        for item in super().items(prefix, after):
            self.read += 1
            yield item


@pytest.mark.parametrize("face", [Histories, AsyncHistories])
def test_page_reads_no_more_than_it_shows(face, clock):
    cache = Counting()
    template = RetryTemplate(name="orders", context_cache=cache, clock=clock)
    for number in range(20):
        fail(template, f"m-{number:02}")
    page = face(cache).page(limit=2, after="orders/m-16")
    page = asyncio.run(page) if face is AsyncHistories else page
    assert texts(page.histories) == ["orders/m-17", "orders/m-18"]
    assert cache.read == 2


# -- veto


def test_veto_takes_effect_at_the_next_delivery_and_can_be_withdrawn(histories, template):
    fail(template)
    vetoed = histories.veto(("orders", "m-1"), "the customer has cancelled")
    assert (vetoed.state, vetoed.veto.reason, vetoed.veto.until) == ("vetoed", "the customer has cancelled", None)
    assert vetoed == histories.get("orders/m-1")
    with pytest.raises(ExhaustedRetryError, match="the customer has cancelled"):
        template.execute(lambda _: 1, state=RetryState(key="m-1"))
    withdrawn = histories.withdraw_veto("orders/m-1")
    assert (withdrawn.veto, withdrawn.exhausted, withdrawn.retry_count) == (None, False, 1)
    assert template.execute(lambda _: 1, state=RetryState(key="m-1")) == 1


def test_veto_with_an_end_is_over_by_itself(histories, template, clock):
    fail(template)
    vetoed = histories.veto("orders/m-1", "maintenance", lasts=timedelta(minutes=1))
    assert vetoed.veto.until == EPOCH_UTC + timedelta(minutes=1)
    assert vetoed.to_json()["veto"] == {"reason": "maintenance", "until": vetoed.veto.until.isoformat()}
    clock.elapsed += 60
    assert histories.get("orders/m-1").veto is None
    assert texts(histories.find(HistoryFilter(vetoed=True))) == []
    assert template.execute(lambda _: 1, state=RetryState(key="m-1")) == 1


def test_item_that_was_never_seen_can_be_vetoed_by_name_and_key_only(histories, template):
    assert histories.veto(("orders", ("q", 1)), "no").key == ("q", 1)
    with pytest.raises(TerminatedRetryError):
        template.execute(lambda _: 1, state=RetryState(key=("q", 1)))
    with pytest.raises(LookupError, match="nothing is stored under 'orders/m-9'"):
        histories.veto("orders/m-9", "no")


def test_withdrawing_leaves_nothing_behind_where_nothing_else_is_known(histories, cache, template):
    histories.veto(("orders", "m-1"), "no")
    assert histories.withdraw_veto(("orders", "m-1")) is None
    assert cache.load("orders/m-1") is None
    assert histories.withdraw_veto(("orders", "m-1")) is None
    fail(template)
    before = cache.load("orders/m-1").version
    assert histories.withdraw_veto(("orders", "m-1")).retry_count == 1
    assert cache.load("orders/m-1").version == before


def test_item_that_is_done_with_is_not_vetoed_until_its_mark_is_over(histories, template, clock):
    remembering = attrs.evolve(template, remember_completed=60)
    remembering.execute(lambda _: 1, state=RetryState(key="m-1"))
    assert histories.veto(("orders", "m-1"), "too late").state == "completed"
    assert histories.get("orders/m-1").veto is None
    clock.elapsed += 60
    fence = histories.get("orders/m-1").fence
    vetoed = histories.veto(("orders", "m-1"), "again")
    assert (vetoed.state, vetoed.completed_at, vetoed.fence) == ("vetoed", None, fence)
    with pytest.raises(TerminatedRetryError, match="again"):
        remembering.execute(lambda _: 1, state=RetryState(key="m-1"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"reason": ""}, ValueError),
        ({"reason": None}, TypeError),
        ({"lasts": 0}, ValueError),
        ({"lasts": "1h"}, TypeError),
        ({"item": ("orders",)}, TypeError),
        ({"item": 7}, TypeError),
        ({"item": ("orders", 1.5)}, TypeError),
        ({"item": ("", "m-1")}, ValueError),
    ],
)
def test_veto_refuses_bad_values_and_changes_nothing(histories, template, cache, changes, error):  # noqa: PLR0917
    fail(template)
    before = cache.load("orders/m-1").version
    with pytest.raises(error):
        histories.veto(**{"item": "orders/m-1", "reason": "no"} | changes)
    assert cache.load("orders/m-1").version == before


class Racing(MapRetryContextCache):
    """A cache in which somebody else is faster once, after a load."""

    def __init__(self):
        super().__init__()
        self.others = []

    def load(self, key):
        stored = super().load(key)
        if self.others:
            self.others.pop()()
        return stored


@pytest.mark.parametrize("way", [Histories, Blocking])
def test_no_failure_that_is_counted_meanwhile_is_lost(way, clock):
    cache = Racing()
    histories = way(cache, clock)
    template = RetryTemplate(name="orders", context_cache=cache, clock=clock, retry_policy=SimpleRetryPolicy(9))
    fail(template)
    cache.others = [lambda: fail(template)]
    assert histories.veto("orders/m-1", "no").retry_count == 2
    # A veto that somebody stores first, and one who fails while the emptied history is dropped.
    histories.forget("orders/m-1")
    histories.veto(("orders", "m-1"), "no")
    cache.others = [lambda: template.veto("m-1", "yes")]
    assert histories.withdraw_veto("orders/m-1") is None
    assert cache.load("orders/m-1") is None


@pytest.mark.parametrize("way", [Histories, Blocking])
def test_vetoes_and_failures_of_many_threads_are_all_counted(way, cache):
    template = RetryTemplate(name="orders", context_cache=cache, retry_policy=SimpleRetryPolicy(max_attempts=10_000))
    histories, ran = way(cache, SystemClock()), []

    def callback(context):
        ran.append(context.attempt)
        raise ConnectionResetError("hung up")

    def deliver():
        for _ in range(20):
            with pytest.raises((ConnectionResetError, RetryError)):
                template.execute(callback, state=RetryState(key="m-1", redelivered=True))

    def operate():
        for _ in range(20):
            histories.veto(("orders", "m-1"), "no")
            histories.withdraw_veto(("orders", "m-1"))

    with ThreadPoolExecutor(6) as threads:
        for work in [threads.submit(run) for run in (deliver, deliver, deliver, deliver, operate, operate)]:
            work.result(120)
    deliver()
    found = histories.get("orders/m-1")
    assert (found.retry_count, found.veto, found.running) == (len(ran), None, ())


def test_what_a_handler_has_sent_is_counted_until_it_is_known_to_be_sent(histories, cache):
    facts = {"format": 1, "name": "orders", "key": "m-1", "retry_count": 0, "completed_at": EPOCH}
    cache.save("orders/m-1", facts | {"outbox": [{}, {}]}, None)
    assert histories.get("orders/m-1").unsent == 2
    histories.sent("orders/m-1")
    assert (histories.get("orders/m-1").unsent, histories.get("orders/m-1").state) == (0, "completed")
    version = cache.load("orders/m-1").version
    histories.sent("orders/m-1")
    assert cache.load("orders/m-1").version == version


# -- forgetting


def test_forgotten_item_begins_anew(histories, template, cache):
    fail(template, times=2)
    assert histories.forget(("orders", "m-1")) is True
    assert histories.forget("orders/m-1") is False
    assert cache.load("orders/m-1") is None


@pytest.fixture
def prepared(histories, template, cache, clock):
    """An old history, an old vetoed one, an old running one, a mark that is over, a mark, a new history, and others."""
    fail(template, "old")
    fail(template, "vetoed")
    histories.veto("orders/vetoed", "keep")
    attrs.evolve(template, remember_completed=50).execute(lambda _: 1, state=RetryState(key="over"))
    attrs.evolve(template, remember_completed=500).execute(lambda _: 1, state=RetryState(key="mark"))
    fail(attrs.evolve(template, name="other"), "old")
    cache.save("orders/damaged", {"format": 99}, None)
    cache.save("orders@breaker", {"breaker": {}}, None)
    flight = {"fence": 1, "owner": ELSEWHERE, "since": EPOCH, "until": EPOCH + 1000}
    facts = {"format": 1, "name": "orders", "key": "run", "retry_count": 0, "started_at": EPOCH, "in_flight": [flight]}
    cache.save("orders/run", facts, None)
    clock.elapsed += 100
    fail(template, "new")
    return histories


def keys_in(cache):
    return [key for key, _ in cache.items()]


EVERYTHING = [
    "orders/damaged",
    "orders/mark",
    "orders/new",
    "orders/old",
    "orders/over",
    "orders/run",
    "orders/vetoed",
    "orders@breaker",
    "other/old",
]


def without(*keys):
    return [key for key in EVERYTHING if key not in keys]


@pytest.mark.parametrize(
    ("options", "gone", "counts"),
    [
        ({}, ["orders/over"], (1, 0)),
        ({"older_than": 100}, ["orders/over", "orders/old", "other/old"], (1, 2)),
        ({"older_than": timedelta(seconds=101)}, ["orders/over"], (1, 0)),
        ({"older_than": 100, "name": "orders"}, ["orders/over", "orders/old"], (1, 1)),
        ({"name": "other"}, [], (0, 0)),
    ],
)
def test_prune_drops_what_is_over_and_what_is_older_than_asked(prepared, cache, options, gone, counts):  # noqa: PLR0917
    seen = []
    would = prepared.prune(dry_run=True, **options)
    assert keys_in(cache) == EVERYTHING
    done = prepared.prune(progress=seen.append, **options)
    assert keys_in(cache) == without(*gone)
    assert (done.expired, done.older) == (would.expired, would.older) == counts
    assert done.total == sum(counts)
    assert not seen or seen[-1] == done


def test_prune_goes_by_the_time_to_live_of_the_cache(clock):
    cache = MapRetryContextCache(time_to_live=60)
    fail(RetryTemplate(name="orders", context_cache=cache, clock=clock))
    clock.elapsed += 61
    assert Histories(cache, clock).prune() == Pruned(expired=1)


def test_prune_lets_alone_what_somebody_changed_meanwhile(clock):
    cache = MapRetryContextCache()
    template = RetryTemplate(name="orders", context_cache=cache, clock=clock)
    fail(template)
    clock.elapsed += 100
    plain = cache.remove
    cache.remove = lambda key, expected=None: fail(template) or plain(key, expected)
    assert Histories(cache, clock).prune(older_than=50).older == 0
    assert Histories(cache, clock).get("orders/m-1").retry_count == 2


def test_prune_asks_the_store_for_one_bounded_piece_after_the_other(clock):
    class Bounded(MapRetryContextCache):
        def expire(self, now=None, limit=None):
            self.asked.append(limit)
            return left.pop(0)

    cache, left = Bounded(), [500, 500, 3]
    cache.asked, seen = [], []
    assert Histories(cache).prune(progress=seen.append) == Pruned(expired=1003)
    assert cache.asked == [500] * 3
    assert [done.expired for done in seen] == [500, 1000, 1003]


@pytest.mark.parametrize("older_than", [0, -1, "7d"])
def test_prune_refuses_what_is_no_duration(histories, older_than):
    with pytest.raises((ValueError, TypeError), match="older_than"):
        histories.prune(older_than=older_than)


# -- tombstones


@pytest.fixture(params=["memory", "sqlite"])
def small(request, tmp_path, clock):
    """A cache with room for two."""
    bounds = {"capacity": 2, "on_full": "evict_oldest", "tombstones": 10}
    if request.param == "memory":
        yield MapRetryContextCache(**bounds)
        return
    sql = pytest.importorskip("retrykit.sql")
    with sql.SqlRetryContextCache(f"sqlite:///{tmp_path}/small.db", clock=clock, **bounds) as cache:
        yield cache


@pytest.fixture(params=[Histories, Blocking])
def buried(request, small, clock):
    """Five histories of which three were evicted; one of these and one of the others are vetoed."""
    histories = request.param(small, clock)
    template = RetryTemplate(name="orders", context_cache=small, clock=clock)
    for number in range(4):
        fail(template, f"m-{number}")
        clock.elapsed += 60
        if number % 3 == 0:
            histories.veto(f"orders/m-{number}", "poison")
    histories.veto(("orders", "m-4"), "poison")
    return histories


def test_tombstones_are_found_when_they_are_asked_for(buried, small):
    evicted = HistoryFilter(evicted=True)
    assert texts(buried.find(evicted)) == [key for key, _ in small.evicted()]
    assert len(texts(buried.find(evicted))) == 3
    assert texts(buried.find()) == texts(buried.find(HistoryFilter(evicted=False))) == keys_in(small)
    assert texts(buried.find(HistoryFilter(evicted=True, vetoed=False))) == ["orders/m-1", "orders/m-2"]
    assert all(summary.evicted.by == "capacity" for summary in buried.find(evicted))


def test_vetoes_of_tombstones_are_among_the_vetoes_on_every_page(buried):
    vetoed, after, seen = HistoryFilter(vetoed=True, name="orders"), None, []
    assert texts(buried.find(vetoed)) == ["orders/m-0", "orders/m-3", "orders/m-4"]
    while (page := buried.page(vetoed, limit=1, after=after)).histories:
        seen += texts(page.histories)
        after = page.next
    assert seen == ["orders/m-0", "orders/m-3", "orders/m-4"]
    assert len(texts(buried.find(HistoryFilter(vetoed=True, evicted=False)))) == 2


def test_prune_by_age_forgets_tombstones_as_it_does_histories(buried, small, clock):
    assert buried.prune(older_than=150, dry_run=True) == Pruned(looked_at=5, older=1)
    assert buried.prune(older_than=150, name="orders").older == 1
    assert [key for key, _ in small.evicted() if key == "orders/m-1"] == []
    assert len(list(small.evicted())) == 2


def test_cache_that_leaves_no_tombstones_has_none_to_show(clock):
    class Plain:
        def __init__(self, inner):
            self.load, self.save, self.remove, self.items = inner.load, inner.save, inner.remove, inner.items

    histories = Histories(Plain(MapRetryContextCache()), clock)
    histories.veto(("orders", "m-1"), "poison")
    assert texts(histories.find(HistoryFilter(vetoed=True))) == ["orders/m-1"]
    assert texts(histories.find(HistoryFilter(evicted=True))) == []


# -- time


def test_time_is_the_stores_where_it_has_a_clock_that_is_known():
    cache = MapRetryContextCache()
    cache.store_clock = StoreClock()
    clock = ManualClock()
    assert Histories(cache, clock).now() == EPOCH
    cache.store_clock.observe(0.0, 1.0, 0.0)
    assert Histories(cache, clock).now() == pytest.approx(cache.store_clock.time(), abs=1)


def test_histories_refuse_what_is_no_cache():
    with pytest.raises(TypeError, match="cache: must be an object with"):
        Histories({})
