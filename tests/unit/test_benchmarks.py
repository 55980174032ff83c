"""The benchmarks run and speak the form that all of them share. What they measure is never looked at here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def quick_run(script: str) -> dict[str, Any]:
    """The one JSON object that a quick run prints."""
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, str(CHECKOUT / "benchmarks" / script), "--quick", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


# They take a minute each, and CI runs all benchmarks by themselves (`make bench QUICK=1`).
_slow = pytest.mark.skipif("CI" in os.environ, reason="CI runs the benchmarks beside the tests")


@pytest.mark.parametrize(
    "script",
    [
        "batch.py",
        "overhead.py",
        "imports.py",
        pytest.param("stores.py", marks=_slow),
        pytest.param("stomp.py", marks=_slow),
    ],
)
def test_a_quick_run_prints_one_object_with_rows_targets_and_the_machine(script: str) -> None:
    report = quick_run(script)
    assert set(report) == {"rows", "targets", "machine"}
    assert {"python", "implementation", "processor", "cores"} <= set(report["machine"])
    assert report["rows"]
    assert report["targets"]
    for row in report["rows"]:
        check_row(row)
    for target in report["targets"]:
        check_target(target)


def check_row(row: dict[str, Any]) -> None:
    """Named, and either timed or reported as missing; retrykit itself is never missing."""
    times = [row["min"], row["median"], row["max"]]
    assert times == [None] * 3 if row["missing"] else times == sorted(times)
    assert not (row["missing"] and "retrykit" in row["name"])


def check_target(target: dict[str, Any]) -> None:
    """A value, its bound, and the verdict that follows from them."""
    assert set(target) == {"name", "value", "bound", "holds"}
    assert isinstance(target["value"], int | float)
    assert target["holds"] == (target["value"] <= target["bound"])
