"""Replays cases with the short cut on and off, compares, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import attrs

from .compare import recorded, replayed
from .errors import Scripted
from .loader import Case
from .rules import Rule, first_difference
from .run import Replay


@attrs.frozen
class Mismatch:
    """One call that is not equal, or could not be replayed."""

    scenario: str
    call: int
    short_cut: bool
    expected: dict[str, Any]
    got: dict[str, Any]


@attrs.frozen
class Verdict:
    """What came of one case: how many calls were compared, by which rule it was cut short, and its first mismatch."""

    calls: int
    rule: Rule | None
    mismatch: Mismatch | None


@attrs.define
class Report:
    """`compared` and `matched` count the scenarios that are compared whole, `calls` all calls that are compared."""

    scenarios: int = 0
    compared: int = 0
    matched: int = 0
    calls: int = 0
    skipped: Counter[str] = attrs.Factory(Counter)
    mismatches: list[Mismatch] = attrs.Factory(list)

    def add(self, verdict: Verdict) -> None:
        """Count one more case."""
        self.scenarios += 1
        self.calls += verdict.calls
        if verdict.rule is None:
            self.compared += 1
            self.matched += verdict.mismatch is None
        else:
            self.skipped[verdict.rule.name] += 1
        if verdict.mismatch is not None:
            self.mismatches.append(verdict.mismatch)

    def to_json(self) -> dict[str, Any]:
        """The one object that the command prints."""
        counts = {name: getattr(self, name) for name in ("scenarios", "compared", "matched", "calls")}
        return {**counts, "skipped": dict(sorted(self.skipped.items()))}


def replay(cases: Iterable[Case]) -> Report:
    """Replay every case."""
    report = Report()
    for case in cases:
        report.add(judge(case))
    return report


def judge(case: Case) -> Verdict:
    """Replay one case, both ways, up to the first call that is not compared."""
    found = first_difference(case)
    calls, rule = found or (len(case.executions), None)
    mismatches = (_first_mismatch(case, calls, short_cut=short_cut) for short_cut in (True, False))
    return Verdict(calls, rule, next((mismatch for mismatch in mismatches if mismatch is not None), None))


def _first_mismatch(case: Case, calls: int, *, short_cut: bool) -> Mismatch | None:
    replay = Replay(case.scenario, short_cut=short_cut) if calls else None
    for index in range(calls):
        expected, got = _pair(case, index, replay, short_cut=short_cut)
        if got != expected:
            return Mismatch(str(case.scenario.get("id")), index, short_cut, expected, got)
    return None


def _pair(case: Case, index: int, replay: Any, *, short_cut: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call as recorded and as replayed; what breaks the replay itself is a mismatch like any other."""
    expected: dict[str, Any] = {}
    try:
        expected = recorded(case, index, short_cut=short_cut)
        return expected, replayed(case, index, replay.call(case.scenario["calls"][index]))
    except (Exception, Scripted) as error:
        return expected, {"broken": f"{type(error).__name__}: {error}"}
