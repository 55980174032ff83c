"""Replays recorded scenarios of spring-retry: `python -m tests.conformance.spring_retry FILE`.

Prints one JSON object: `scenarios` read, `compared` whole, `matched` of these, `calls` compared in all, and how many
scenarios were `skipped` (from some call on) by which rule. FILE may end in .json, .json.xz or .json.gz.
Exit status 1 on any mismatch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .compare import DROPPED_ATTRIBUTES, DROPPED_EVENTS, DROPPED_FIELDS, TOLERANCES
from .loader import read
from .report import Mismatch, replay
from .rules import RULES


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    options = _parser().parse_args(arguments)
    if options.rules:
        print(_rules())
        return 0
    if options.file is None:
        _parser().error("FILE is needed")
    report = replay(read(options.file))
    for mismatch in report.mismatches[: options.show]:
        print(_shown(mismatch), file=sys.stderr)
    print(json.dumps(report.to_json()))
    return 1 if report.mismatches else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.spring_retry", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the recorded scenarios")
    parser.add_argument(
        "--show", type=int, default=10, metavar="N", help="show up to N mismatches on stderr (default 10)"
    )
    parser.add_argument("--rules", action="store_true", help="print what is not compared, and why, instead")
    return parser


def _rules() -> str:
    rules = [f"{rule.name} ({rule.kind}): {rule.reason}" for rule in RULES]
    dropped = {**DROPPED_FIELDS, **DROPPED_EVENTS, **DROPPED_ATTRIBUTES}
    fields = [f"{name} (not compared): {reason}" for name, reason in dropped.items()]
    return "\n".join([*rules, *fields, *(f"{name} (tolerance): {reason}" for name, reason in TOLERANCES.items())])


def _shown(mismatch: Mismatch) -> str:
    """The mismatch with the first event that differs."""
    way = "with" if mismatch.short_cut else "without"
    lines = [f"{mismatch.scenario}, call {mismatch.call}, {way} the short cut:"]
    expected, got = dict(mismatch.expected), dict(mismatch.got)
    pairs = list(zip(expected.get("events", []), got.get("events", []), strict=False))
    same = next((n for n, (left, right) in enumerate(pairs) if left != right), len(pairs))
    for side, record in (("spring-retry", expected), ("retrykit", got)):
        events = record.pop("events", [])
        lines.append(f"  {side}: event {same} {json.dumps(events[same : same + 2])} … {json.dumps(record)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
