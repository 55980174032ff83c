"""The parts of the demo: its plan, and above all its audit, which must not be fooled."""

from __future__ import annotations

import io
from collections import Counter
from datetime import UTC, datetime

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from retrykit.cli.demo.display import Lines, Live, show_report
from retrykit.cli.demo.events import EventReader, EventWriter
from retrykit.cli.demo.ledger import digest_of
from retrykit.cli.demo.plan import Fate, Kind, PlannedMessage, generated, make_plan
from retrykit.cli.demo.progress import Progress
from retrykit.cli.demo.report import Facts, promises, report
from retrykit.cli.demo.supervisor import Death
from retrykit.sql import ParkedItem

NOW = datetime(2024, 5, 1, tzinfo=UTC)


# -- the plan


@given(st.integers(1, 2_000), st.integers())
def test_the_same_seed_makes_the_same_plan_and_somebody_is_fine(count, seed):
    items = [(str(number), b"") for number in range(count)]
    plan = make_plan(items, seed)
    assert plan == make_plan(items, seed)
    assert [message.id for message in plan] == [id_ for id_, _ in items]
    kinds = Counter(message.fate.kind for message in plan)
    assert kinds[Kind.FINE] >= 1
    assert kinds[Kind.KILLER] <= 1
    assert all(kinds[kind] for kind in Kind) or count < len(Kind)


def test_another_seed_makes_another_plan():
    assert make_plan(generated(200, 1), 1) != make_plan(generated(200, 1), 2)
    assert list(generated(20, 1)) == list(generated(20, 1)) != list(generated(20, 2))


@pytest.mark.parametrize("fate", [Fate(Kind.FLAKY, 3), Fate(Kind.KILLER)])
def test_a_fate_can_travel_as_text(fate):
    assert Fate.parse(str(fate)) == fate


# -- the audit


def parked(id_, **changes):
    item = ParkedItem(
        id=1,
        name="demo",
        key="k",
        message_id="ID:1",
        destination="/queue/demo",
        payload=id_.encode(),
        content_type=None,
        headers={"retrykit-id": id_},
        reason="SimpleRetryPolicy: attempt 4 of 4",
        attempts=4,
        errors=({"type": "E", "message": "m"},) * 4,
        first_failed_at=NOW,
        last_failed_at=NOW,
        parked_at=NOW,
    )
    return attrs.evolve(item, **changes)


PLAN = tuple(
    PlannedMessage(id_, id_.encode(), fate)
    for id_, fate in (("fine", Fate(Kind.FINE)), ("flaky", Fate(Kind.FLAKY, 2)), ("poison", Fate(Kind.POISON)))
)
GOOD = Facts(
    plan=PLAN,
    effects={"fine": [digest_of(b"fine")], "flaky": [digest_of(b"flaky")]},
    parked=(parked("poison"),),
    attempts={"fine": 1, "flaky": 3, "poison": 4},
    in_doubt={},
    max_attempts=4,
)
LOST, ONCE, OFTEN, PARKED, ELSE, LEFT = (promise.text for promise in promises(GOOD))


def broken(**changes):
    return [promise.text for promise in promises(attrs.evolve(GOOD, **changes)) if promise.broken_by]


def test_a_good_run_breaks_no_promise_and_is_counted_right():
    found = report(GOOD, process_deaths=2, seconds=1.234)
    assert found.kept
    assert found.to_json() == {
        "messages": 3,
        "effects": 2,
        "duplicate_effects": 0,
        "lost": 0,
        "parked": 1,
        "recovered": 1,
        "max_attempts_seen": 4,
        "process_deaths": 2,
        "seconds": 1.23,
        "broken": {},
    }


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"effects": {"fine": GOOD.effects["fine"]}}, [LOST]),
        ({"parked": ()}, [LOST, PARKED]),
        ({"effects": GOOD.effects | {"fine": GOOD.effects["fine"] * 2}}, [ONCE]),
        ({"effects": GOOD.effects | {"fine": [digest_of(b"else")]}}, [ONCE]),
        ({"effects": GOOD.effects | {"stranger": [digest_of(b"x")]}}, [ONCE]),
        ({"effects": GOOD.effects | {"poison": [digest_of(b"poison")]}}, [ONCE]),
        ({"attempts": GOOD.attempts | {"poison": 5}}, [OFTEN]),
        ({"attempts": GOOD.attempts | {"poison": 5}, "in_doubt": {"poison": 1}}, []),
        ({"parked": GOOD.parked * 2}, [PARKED]),
        ({"parked": (parked("poison", attempts=3, errors=()),)}, [PARKED]),
        ({"parked": (parked("poison", errors=()),)}, [PARKED]),
        ({"parked": (parked("poison", reason=""),)}, [PARKED]),
        ({"parked": (parked("poison", first_failed_at=None),)}, [PARKED]),
        ({"parked": (parked("poison", payload=b"else"),)}, [PARKED]),
        ({"parked": (*GOOD.parked, parked("fine"))}, [ONCE, ELSE]),
        ({"parked": (*GOOD.parked, parked("flaky")), "effects": {"fine": GOOD.effects["fine"]}}, [ELSE]),
        ({"parked": (*GOOD.parked, parked("flaky")), "effects": {"fine": GOOD.effects["fine"]}, "kills": 1}, []),
        ({"left_in_queue": 2}, [LEFT]),
    ],
)
def test_what_goes_wrong_breaks_its_promise(changes, texts):
    assert broken(**changes) == texts


# -- events and progress


def test_an_event_is_read_once_and_only_when_it_is_complete(tmp_path):
    path = tmp_path / "events"
    reader = EventReader(path)
    assert list(reader.new()) == []
    EventWriter.open(str(path)).write("attempt", id="ü")
    with path.open("ab") as file:
        file.write(b'{"event": "do')
    (event,) = reader.new()
    assert (event["event"], event["id"]) == ("attempt", "ü")
    with path.open("ab") as file:
        file.write(b'ne"}\n')
    assert list(reader.new()) == [{"event": "done"}]


STORY = (
    {"event": "attempt", "pid": 1, "key": "k", "id": "a[b]", "attempt": 1},
    {"event": "failed", "pid": 1, "key": "k", "attempt": 1, "error": "E: m", "decision": "retry at once (why)"},
    {"event": "done", "pid": 1, "key": "stranger", "attempt": 1},
    {"event": "attempt", "pid": 2, "key": "k", "id": "a[b]", "attempt": 2},
    {"event": "in doubt", "pid": 2, "key": "k", "attempt": 2},
    {"event": "attempt", "pid": 1, "key": "k", "id": "a[b]", "attempt": 2},
)


def test_progress_tells_what_happened_to_whom():
    progress = Progress(1)
    lines = [progress.take(event) for event in STORY]
    assert lines[1] == "a[b]: attempt 1 rolled back: E: m: retry at once (why)"
    assert lines[2] is None
    assert progress.bury(Death(1, "SIGKILL")) == ("process 1 ended by SIGKILL in attempt 2 of a[b]: another one starts")
    assert progress.bury(Death(2, "SIGKILL")) == ("process 2 ended by SIGKILL between two messages: another one starts")
    assert not progress.finished
    parked_line = progress.take({"event": "parked", "pid": 1, "key": "k", "attempt": 3, "decision": "limit"})
    assert parked_line == "a[b]: parked: limit"
    assert (progress.rollbacks, progress.parked, progress.deaths) == (1, 1, 2)
    assert progress.attempts == {"a[b]": 3}
    assert progress.in_doubt == {"a[b]": 1}
    assert progress.finished == {"a[b]"}


@pytest.mark.parametrize("terminal", [True, False])
def test_what_happens_is_shown_as_it_is_on_a_terminal_and_elsewhere(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200)
    progress = Progress(1)
    if terminal:
        with Live(console, 1) as display:
            show(display, progress)
    else:
        show(Lines(console), progress)
    show_report(console, report(GOOD, process_deaths=2, seconds=1.0))
    assert "a[b]: attempt 1 rolled back" in out.getvalue()
    assert "3 attempts, 1 rolled back, 0 parked, 0 dead processes" in out.getvalue()
    assert "every promise was kept: 3 messages" in out.getvalue()


def test_an_id_that_the_terminal_has_no_letters_for_is_shown_escaped():
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    display = Lines(Console(file=out, width=200))
    display.line("Zoë: attempt 1")
    out.flush()
    assert out.buffer.getvalue() == b"Zo\\xeb: attempt 1\n"


def show(display, progress):
    for event in (*STORY, {"event": "done", "pid": 1, "key": "k", "attempt": 2}):
        line = progress.take(event)
        if line is not None:
            display.line(line)
        display.update(progress)
