"""What every benchmark says and how: the options, the targets, the machine, one JSON object or tables for people."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs


@attrs.frozen
class Options:
    """How a benchmark was asked to run."""

    quick: bool
    as_json: bool
    check: bool


@attrs.frozen
class Target:
    """A ratio or a count, and the most it may be. `value` is None when it was not measured: then it does not hold."""

    name: str
    value: float | None
    bound: float

    @property
    def holds(self) -> bool:
        return self.value is not None and self.value <= self.bound

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, "bound": self.bound, "holds": self.holds}


@attrs.frozen
class Report:
    """The outcome of a benchmark: `rows` are flat JSON objects, in the order they are shown."""

    rows: Sequence[Mapping[str, Any]]
    targets: Sequence[Target]

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": list(self.rows),
            "targets": [target.as_json() for target in self.targets],
            "machine": machine(),
        }


def parse_options(question: str, arguments: Sequence[str] | None = None) -> Options:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples: well under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of tables")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target does not hold")
    given = parser.parse_args(arguments)
    return Options(quick=given.quick, as_json=given.json, check=given.check)


def publish(report: Report, options: Options, tables: Iterable[str]) -> int:
    """Print the report as asked and return the exit status."""
    if options.as_json:
        print(json.dumps(report.as_json()))
    else:
        print("\n\n".join([*tables, _targets_table(report.targets), _machine_line()]))
    missed = not all(target.holds for target in report.targets)
    return 1 if options.check and missed else 0


def version(distribution: str) -> str | None:
    """The installed version of a distribution; None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be; the first is flush left, the others flush right."""
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    return "\n".join([title, *(_aligned(line, widths) for line in [heads, *lines])])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.rjust(width) if column else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join(["", first, *others]).rstrip()


def _targets_table(targets: Sequence[Target]) -> str:
    lines = [(target.name, _number(target.value), f"{target.bound:g}", _verdict(target)) for target in targets]
    return table("Targets", ("", "value", "at most", ""), lines)


def _verdict(target: Target) -> str:
    if target.value is None:
        return "NOT MEASURED"
    return "holds" if target.holds else "MISSED"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _machine_line() -> str:
    facts = machine()
    return (
        f"{facts['implementation']} {facts['python']}, {facts['system']} {facts['architecture']}, "
        f"{facts['cores']} × {facts['processor']}, load {facts['load']}"
    )


def _processor() -> str:
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or "unknown"
