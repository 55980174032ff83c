"""What does `import retrykit` cost a program that starts, next to `import attrs`, and what does it bring in?"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from report import Options, Report, Target, parse_options, publish, table, version

CHECKOUT = Path(__file__).resolve().parent.parent
FLOOR = "bare interpreter"
# A name's module is imported when the name is first asked for: the last program pays for what most programs use.
USED = "from retrykit import retryable, RetryTemplate"
PROGRAMS = {FLOOR: "pass", "import attrs": "import attrs", "import retrykit": "import retrykit", USED: USED}
UNWANTED = ("asyncio", "sqlalchemy", "logging.handlers")
BOUND = 1.35


class ImportFailedError(Exception):
    """A program that only imports ended with an error."""


@attrs.define
class Timing:
    """Seconds from the start of a fresh interpreter to its end, one number per round."""

    seconds: list[float] = attrs.Factory(list)

    def above(self, floor: Timing) -> list[float]:
        """What is left of each round when the floor's time in that round is taken off."""
        return [own - bare for own, bare in zip(self.seconds, floor.seconds, strict=True)]


@functools.cache
def environment() -> dict[str, str]:
    """The same for all: this checkout can be imported, installed or not, and everything is imported from byte code.

    An installed package has its byte code; that of a checkout, or of an environment that forbids to write it, goes into
    a temporary folder, which the first runs fill.
    """
    byte_code = tempfile.mkdtemp(prefix="byte-code-")
    atexit.register(shutil.rmtree, byte_code, ignore_errors=True)
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PYTHONPYCACHEPREFIX": byte_code}


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter. ImportFailedError carries what it wrote to stderr."""
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise ImportFailedError(done.stderr.strip().splitlines()[-1] if done.stderr else program)
    return done


def missing_programs() -> dict[str, str]:
    """What cannot run at all, with the reason; running each once also warms the byte code and the file caches."""
    missing = {}
    for name, program in PROGRAMS.items():
        try:
            run(program)
        except ImportFailedError as error:
            missing[name] = str(error)
    return missing


def measure(names: list[str], *, rounds: int) -> dict[str, Timing]:
    """Start the programs in turn, `rounds` times each."""
    timings = {name: Timing() for name in names}
    for _ in range(rounds):
        for name, timing in timings.items():
            timing.seconds.append(_seconds(name))
    return timings


def _seconds(name: str) -> float:
    command = [sys.executable, "-c", PROGRAMS[name]]
    started = time.perf_counter()
    subprocess.run(command, env=environment(), check=True)
    return time.perf_counter() - started


def ratio(timings: Mapping[str, Timing], *, above_floor: bool) -> float | None:
    """import retrykit / import attrs: the harder one of the ratio of medians and the ratio of minima."""
    ours, theirs, floor = (timings.get(name) for name in ("import retrykit", "import attrs", FLOOR))
    if ours is None or theirs is None or floor is None:
        return None
    if not above_floor:
        return max(take(ours.seconds) / take(theirs.seconds) for take in (min, statistics.median))
    medians = statistics.median(ours.above(floor)) / statistics.median(theirs.above(floor))
    minima = (min(ours.seconds) - min(floor.seconds)) / (min(theirs.seconds) - min(floor.seconds))
    return max(medians, minima)


def unwanted_modules(program: str) -> list[str]:
    """Which of the unwanted modules the program loads and a bare interpreter does not."""
    listing = f"import sys; before = set(sys.modules); {program}; print(*(set(sys.modules) - before), sep='\\n')"
    return sorted(set(run(listing).stdout.split()) & set(UNWANTED))


def attribution(program: str) -> list[tuple[str, float, int]]:
    """Where the import's time goes by `-X importtime`: (group, milliseconds of its own, modules), dearest first."""
    bare = {module for module, _ in _import_times("pass")}
    needed = {module for module, _ in _import_times(PROGRAMS["import attrs"])}
    cost: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    for module, microseconds in _import_times(program):
        if module not in bare:
            group = _group(module, needed)
            cost[group] += microseconds
            modules[group] += 1
    return [(group, microseconds / 1000, modules[group]) for group, microseconds in cost.most_common()]


def _import_times(program: str) -> Iterator[tuple[str, int]]:
    for line in run(program, "-X", "importtime").stderr.splitlines():
        found = re.fullmatch(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line)
        if found:
            yield found[2], int(found[1])


def _group(module: str, needed: set[str]) -> str:
    """retrykit module by module, attrs as one, the standard library by who needs it."""
    top = module.partition(".")[0]
    if top == "retrykit":
        return module
    if top in {"attr", "attrs"}:
        return "attrs"
    return "standard library, needed by attrs too" if module in needed else f"standard library: {module}"


def rows(timings: Mapping[str, Timing], missing: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One flat object per program; seconds."""
    for name, program in PROGRAMS.items():
        timing = timings.get(name)
        above = timing.above(timings[FLOOR]) if timing else None
        yield {
            "name": name,
            "version": version(name.removeprefix("import ").removeprefix("from ").partition(" ")[0]),
            "missing": name in missing,
            "min": timing and min(timing.seconds),
            "median": timing and statistics.median(timing.seconds),
            "max": timing and max(timing.seconds),
            "median_above_floor": above and statistics.median(above),
            "rounds": len(timing.seconds) if timing else 0,
            "unwanted": None if name in missing else unwanted_modules(program),
        }


def tables(measured: list[dict[str, Any]], timings: Mapping[str, Timing]) -> Iterator[str]:
    heads = ("", "version", "min ms", "median ms", "max ms", "above floor ms")
    yield table("Fresh interpreter, start to end", heads, [_line(row) for row in measured])
    plain = ratio(timings, above_floor=False)
    if plain is None:
        return
    yield f"retrykit / attrs with the interpreter's own start-up in both: {plain:.2f}"
    lines = [(group, f"{cost:.2f}", str(count)) for group, cost, count in attribution(USED)]
    yield table(f"Where the time of `{USED}` goes (-X importtime)", ("", "own ms", "modules"), lines)


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["missing"]:
        return (row["name"], "missing", "–", "–", "–", "–")
    times = (row["min"], row["median"], row["max"], row["median_above_floor"])
    return (row["name"], row["version"] or "", *(f"{seconds * 1000:.2f}" for seconds in times))


def targets(timings: Mapping[str, Timing], measured: list[dict[str, Any]]) -> list[Target]:
    unwanted = next(row["unwanted"] for row in measured if row["name"] == "import retrykit")
    listed = ", ".join(UNWANTED)
    return [
        Target(
            "import retrykit / import attrs, both above the bare interpreter", ratio(timings, above_floor=True), BOUND
        ),
        Target(f"modules loaded of {listed}", None if unwanted is None else len(unwanted), 0),
    ]


def main() -> int:
    options: Options = parse_options(__doc__ or "")
    missing = missing_programs()
    present = [name for name in PROGRAMS if name not in missing]
    timings = measure(present, rounds=25 if options.quick else 101)
    measured = list(rows(timings, missing))
    return publish(Report(measured, targets(timings, measured)), options, tables(measured, timings))


if __name__ == "__main__":
    raise SystemExit(main())
