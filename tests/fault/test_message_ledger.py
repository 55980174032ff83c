"""The rules of the fault suite notice what they are there for: each wrong thing that a run could do is found by one."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.fault.broker_consumer import MAX_ATTEMPTS
from tests.fault.ledger import Ledger
from tests.fault.message_ledger import Copy, MessageLedger

POISON = 7
FLAKY = 3
GOOD = 1
SETTLED = ("receive", "attempt", "closed", "acked")
FAILED = ("receive", "attempt", "fail", "closed", "returned")
PARKED = ("receive", "attempt", "fail", "recovered", "closed", "acked")
KILLED = ("receive", "attempt")


@pytest.fixture
def run(tmp_path):
    """A run in which all went well, but for what the test says; and what is wrong with it."""

    def run(number, *deliveries, effects=None, sent=None, parked=None, left=0, connections=1, again=True, **facts):
        path = tmp_path / "ledger"
        lines = [{"e": "connected", "w": 1, "at": 0}] * connections
        for place, events in enumerate(deliveries):
            ours = {"w": 1, "d": place, "k": number, "at": 0, "again": again if place == 0 else True, "n": place + 1}
            lines += [{"e": event, **ours} for event in events]
        lines += [{"e": "log", "level": level, "text": text, "at": 0} for level, text in facts.pop("logs", ())]
        path.write_text("".join(f"\n{json.dumps(line)}" for line in lines))
        ledger = Ledger(path)
        ledger.close()
        done = number != POISON
        found = MessageLedger(
            numbers=range(number, number + 1),
            ledger=ledger,
            effects=Counter({number: int(done)} if effects is None else effects),
            sent=([Copy(number, "s")] if done else []) if sent is None else sent,
            parked=([] if done else [Copy(number, "p", MAX_ATTEMPTS)]) if parked is None else parked,
            left=left,
            **{"atomic": True, "journaled": True, **facts},
        )
        return found.violations()

    return run


def exhausted(*, killed=0):
    """The deliveries of a poison message, some of which were cut short."""
    return [KILLED] * killed + [FAILED] * (MAX_ATTEMPTS - 1 - killed) + [PARKED]


def test_nothing_is_said_of_a_run_in_which_all_went_well(run):
    assert run(GOOD, SETTLED) == []
    assert run(FLAKY, FAILED, SETTLED) == []
    assert run(POISON, *exhausted()) == []
    assert run(POISON, *exhausted(killed=1)) == []


def test_an_interruption_excuses_what_follows_from_it_and_no_more(run):
    assert run(GOOD, KILLED, SETTLED) == []
    assert run(GOOD, ("receive", "attempt", "doubt"), ("receive", "closed", "acked")) == []
    twice = [Copy(GOOD, "s")] * 2
    assert run(GOOD, KILLED, SETTLED, sent=twice, atomic=False) == []
    assert run(GOOD, SETTLED, ("receive", "closed", "acked"), forgets=1) == []
    assert (
        run(FLAKY, *[KILLED] * 3, PARKED, effects={}, sent=[], parked=[Copy(FLAKY, "p", MAX_ATTEMPTS)], connections=3)
        == []
    )
    assert run(POISON, KILLED, *exhausted(), again=False, journaled=False) == []


@pytest.mark.parametrize(
    ("number", "deliveries", "facts", "said"),
    [
        (GOOD, [SETTLED], {"effects": {}, "sent": []}, "it is lost"),
        (GOOD, [SETTLED], {"effects": {GOOD: 2}}, "2 effects"),
        (GOOD, [SETTLED], {"parked": [Copy(GOOD, "p", MAX_ATTEMPTS)]}, "1 effects, and 1 times parked"),
        (GOOD, [SETTLED], {"sent": []}, "what it sent is there 0 times"),
        (GOOD, [KILLED, SETTLED], {"sent": [Copy(GOOD, "s")] * 2}, "what it sent is there 2 times, not 1 to 1"),
        (GOOD, [SETTLED], {"sent": [Copy(GOOD, "s")] * 2, "atomic": False}, "there 2 times, not 1 to 1"),
        (GOOD, [KILLED, SETTLED], {"sent": [Copy(GOOD, "a"), Copy(GOOD, "b")], "atomic": False}, "sent under the ids"),
        (POISON, exhausted(), {"sent": [Copy(POISON, "s")]}, "though it was rolled back"),
        (POISON, exhausted(), {"parked": []}, "the parked copy is there 0 times"),
        (POISON, exhausted(), {"parked": [Copy(POISON, "p", MAX_ATTEMPTS)] * 2}, "the parked copy is there 2 times"),
        (POISON, exhausted(), {"parked": [Copy(POISON, "p", 3)]}, "says {3} attempts"),
        (POISON, [FAILED, *exhausted()], {}, "5 attempts"),
        (POISON, [KILLED, *exhausted()], {}, "5 attempts"),
        (FLAKY, [PARKED], {"effects": {}, "sent": [], "parked": [Copy(FLAKY, "p", 4)]}, "parked after 1 of 4"),
        (GOOD, [SETTLED, SETTLED], {}, "acknowledged 2 times"),
        (GOOD, [("receive", "returned")] * 2 + [SETTLED], {}, "2 given back untried"),
        (GOOD, [("receive",)] * 2 + [SETTLED], {}, "2 deliveries cut short"),
        (GOOD, [SETTLED], {"left": 1}, "1 messages are left"),
        (GOOD, [SETTLED], {"logs": [("CRITICAL", "the container gives up")]}, "gives up"),
    ],
)
def test_each_wrong_thing_is_found(run, number, deliveries, facts, said):  # noqa: PLR0917
    found = run(number, *deliveries, **facts)
    assert any(said in each for each in found), found
