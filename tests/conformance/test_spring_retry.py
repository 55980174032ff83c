from __future__ import annotations

import gzip
import json

import pytest

from . import compare, spring_retry
from .loader import RECORDED, case, read
from .report import Report, judge, replay
from .rules import RULES, UNKNOWN, first_difference

CHUNKS = 6


@pytest.fixture(scope="module")
def cases():
    return read(RECORDED)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_recorded_calls_are_equal_with_the_short_cut_on_and_off(cases, chunk):
    report = replay(cases[chunk::CHUNKS])

    assert report.mismatches == []
    assert report.matched == report.compared > 0


def test_enough_is_compared(cases):
    differences = [first_difference(each) for each in cases]

    assert len(cases) == 1968
    assert differences.count(None) >= 950
    compared = (
        len(each.executions) if found is None else found[0] for each, found in zip(cases, differences, strict=True)
    )
    assert sum(compared) >= 3300


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_every_rule_is_used_and_explained(cases, rule):
    used = any(rule.first_call(each) is not None for each in cases)

    assert used == (rule is not UNKNOWN), "every recorded scenario is known, and every other rule is needed"
    assert rule.reason
    assert rule.kind in {"deliberate difference", "java only"}
    assert [other.name for other in RULES].count(rule.name) == 1


def test_no_recorded_scenario_trips_a_rule(cases):
    assert UNKNOWN not in {found[1] for found in map(first_difference, cases) if found is not None}


def test_every_dropped_field_and_tolerance_is_explained():
    tables = (compare.DROPPED_FIELDS, compare.DROPPED_EVENTS, compare.DROPPED_ATTRIBUTES, compare.TOLERANCES)

    assert all(reason for table in tables for reason in table.values())


def _stranger(**changes):
    scenario = {"id": "x", "tags": [], "templates": [{}], "calls": [{"outcomes": [{"ok": "done"}]}]} | changes
    return scenario, {
        "id": "x",
        "calls": [{"events": [["attempt", 0, 0, None, {}]], "result": "done", "cache": [{}], "now": 0}],
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"templates": [{"policy": {"type": "lunar", "phase": 3}}]},
        {"templates": [{"policy": {"type": "simple", "max": 3, "mood": "good"}}]},
        {"templates": [{"backoff": {"type": "fibonacci"}}]},
        {"templates": [{"builder": [["surprise"]]}]},
        {"calls": [{"outcomes": [{"throw": ["MartianException", "m1"]}]}]},
        {"calls": [{"outcomes": [{"sing": "a song"}]}]},
        {"calls": [None]},
        {"templates": None},
    ],
)
def test_a_scenario_with_an_unknown_word_is_counted_and_not_replayed(changes):
    verdict = judge(case(*_stranger(**changes)))

    assert verdict.rule is UNKNOWN
    assert (verdict.calls, verdict.mismatch) == (0, None)


def test_a_wrong_trace_is_a_mismatch():
    scenario, trace = _stranger()
    trace["calls"][0]["result"] = "not done"

    verdict = judge(case(scenario, trace))

    assert verdict.rule is None
    assert verdict.mismatch is not None
    assert verdict.mismatch.got["result"] == "done"


def test_what_breaks_the_replay_is_a_mismatch():
    scenario, trace = _stranger(calls=[{"t": 0, "outcomes": [{"set": ["only a name"], "ok": "done"}]}])

    assert judge(case(scenario, trace)).mismatch is not None


@pytest.mark.parametrize(("status", "result"), [(0, "done"), (1, "not done")])
def test_the_command_prints_one_object_and_its_status_tells_of_mismatches(tmp_path, capsys, status, result):
    scenario, trace = _stranger()
    trace["calls"][0]["result"] = result
    trace["calls"][0]["events"][0][4]["max"] = 3
    file = tmp_path / "scenarios.json.gz"
    file.write_bytes(gzip.compress(json.dumps([{"scenario": scenario, "trace": trace}]).encode()))

    assert spring_retry.main([str(file)]) == status

    printed = json.loads(capsys.readouterr().out)
    assert printed == {"scenarios": 1, "compared": 1, "matched": 1 - status, "calls": 1, "skipped": {}}


def test_the_command_tells_the_rules(capsys):
    assert spring_retry.main(["--rules"]) == 0

    printed = capsys.readouterr().out
    assert all(f"{rule.name} (" in printed for rule in RULES)


def test_an_empty_file_is_no_mismatch():
    assert replay([]) == Report()
