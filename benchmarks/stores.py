"""What does it cost to keep histories in SQLite, PostgreSQL, MariaDB or Redis, next to the same work by hand?"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import attrs
from report import Options, Report, Target, parse_options, publish, table, version
from sampling import paired_ratio

# The servers are started as the tests start theirs.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stores_counted import Counted, check_same_statements, counted
from stores_places import BARE, BARE_LOOP, BY_HAND, LOOP, OURS, Store
from stores_sizes import ADD, VERBS, Filled, filled
from stores_work import OPERATIONS, Batches, Result, measure, percentile

STORES = {
    "SQLite": "stores_sql.SqliteStore",
    "PostgreSQL": "stores_sql.PostgreSqlStore",
    "MariaDB": "stores_sql.MariaDbStore",
    "Redis": "stores_redis.RedisStore",
}
OTHERS = (LOOP, BARE_LOOP, BY_HAND, BARE)
# At least 0.85 of the rate of a loop by hand, and 0.5 of one on the bare driver, is at most so many times their time.
BOUNDS = {LOOP: round(1 / 0.85, 3), BARE_LOOP: round(1 / 0.5, 3)}
FLAT = 1.3
BEGUN = time.monotonic()


@attrs.frozen
class Plan:
    """How much is measured."""

    batches: tuple[Batches, ...]
    sizes: tuple[int, ...]
    samples: int


QUICK = Plan((Batches(1, rounds=3, messages=6), Batches(8, rounds=3, messages=2)), (1_000, 10_000), 40)
FULL = Plan((Batches(1, rounds=21, messages=20), Batches(8, rounds=15, messages=10)), (1_000, 100_000, 1_000_000), 500)


@attrs.frozen
class Measured:
    """All about one store; `missing` says why there is nothing."""

    title: str
    missing: str | None = None
    version: str | None = None
    packages: Mapping[str, str] = attrs.field(factory=dict)
    timed: Mapping[int, Result] = attrs.field(factory=dict)
    counted: list[Counted] = attrs.field(factory=list)
    filled: list[Filled] = attrs.field(factory=list)


# ---- measuring


def measured(title: str, plan: Plan) -> Measured:
    module, _, name = STORES[title].partition(".")
    try:
        kind: type[Store] = getattr(import_module(module), name)
    except ImportError as error:
        return Measured(title, missing=f"{error.name} is not installed")
    missing = kind.missing()
    return Measured(title, missing=missing) if missing else _measured(kind, plan)


def _measured(kind: type[Store], plan: Plan) -> Measured:
    def say(what: str) -> None:
        print(f"{time.monotonic() - BEGUN:5.0f} s  {kind.title}: {what}", file=sys.stderr, flush=True)

    say("starting")
    with kind() as store:
        place = store.place()
        contenders = store.contenders(place)
        check_same_statements(store, contenders)
        return Measured(
            kind.title,
            version=store.version,
            packages={each.name: each.package for each in contenders},
            counted=counted(store),
            timed={each.threads: measure(contenders, each, store.look(place), say) for each in plan.batches},
            filled=filled(store, plan.sizes, plan.samples, say),
        )


# ---- reporting


def rows(stores: list[Measured]) -> Iterator[dict[str, Any]]:
    """One flat object per number: seconds per message or call, statements per message, or bytes per history."""
    for store in stores:
        if store.missing:
            nothing = dict.fromkeys(("min", "median", "max", "version"))
            yield {"store": store.title, "name": store.title, "missing": True, "why": store.missing, **nothing}
            continue
        for row in [*_timed_rows(store), *_counted_rows(store), *_size_rows(store)]:
            yield {"store": store.title, "server": store.version, "missing": False, **row}


def _timed_rows(store: Measured) -> Iterator[dict[str, Any]]:
    for threads, result in store.timed.items():
        for operation in OPERATIONS:
            for name, timings in _of(result, operation).items():
                yield {
                    "operation": operation,
                    "threads": threads,
                    "name": name,
                    "version": version(store.packages[name]),
                    "unit": "seconds",
                    **_spread(timings.seconds),
                    "p50": percentile(timings.each, 0.5),
                    "p99": percentile(timings.each, 0.99),
                    "per_second": 1 / timings.median,
                    "rounds": len(timings.seconds),
                    **{f"times {other}": _ratio(result, operation, name, other) for other in OTHERS},
                }


def _of(result: Result, operation: str) -> dict[str, Any]:
    return {name: operations[operation] for name, operations in result.items()}


def _ratio(result: Result, operation: str, ours: str, reference: str) -> float:
    return paired_ratio(result[ours][operation].seconds, result[reference][operation].seconds)


def _counted_rows(store: Measured) -> Iterator[dict[str, Any]]:
    for each in store.counted:
        shared = {"operation": each.message.name, "name": OURS, "version": version("retrykit"), "unit": "statements"}
        yield {**shared, **_spread(each.counts), "outside_of_the_users_transaction": each.outside}


def _size_rows(store: Measured) -> Iterator[dict[str, Any]]:
    shared = {"name": OURS, "version": version("retrykit")}
    for each in store.filled:
        shared["histories"] = each.histories
        yield {**shared, "operation": "one history", "unit": "bytes", **_spread([each.bytes_each])}
        for verb in VERBS:
            seconds = each.seconds[verb]
            tail = {"p50": percentile(seconds, 0.5), "p99": percentile(seconds, 0.99)}
            yield {**shared, "operation": verb, "unit": "seconds", **_spread(seconds), **tail}


def _spread(values: list[Any]) -> dict[str, Any]:
    return {"min": min(values), "median": percentile(values, 0.5), "max": max(values)}


def targets(stores: list[Measured]) -> Iterator[Target]:
    """What was promised, for the stores that could be started."""
    for store in stores:
        for find in (_rate_targets, _counted_targets, _size_targets):
            yield from find(store)


def _rate_targets(store: Measured) -> Iterator[Target]:
    for threads, result in store.timed.items():
        where = f"{store.title}, {threads} thread{'s' if threads > 1 else ''}"
        for operation in OPERATIONS:
            for other, bound in BOUNDS.items():
                value = _ratio(result, operation, OURS, other)
                yield Target(f"{where}, {operation}: time / {other}", value, bound)


def _counted_targets(store: Measured) -> Iterator[Target]:
    for each in store.counted:
        if each.message.at_most is None:
            continue
        name = f"{store.title}, {each.message.name}: statements"
        yield Target(name, max(each.counts), each.message.at_most)
        if each.joins:
            yield Target(f"{name} outside of the user's transaction", each.outside, 0)


def _size_targets(store: Measured) -> Iterator[Target]:
    if not store.filled:
        return
    few, many = store.filled[0], store.filled[-1]
    for verb in VERBS:
        if verb != ADD:
            value = percentile(many.seconds[verb], 0.5) / percentile(few.seconds[verb], 0.5)
            yield Target(f"{store.title}, {verb}: p50 at {many.histories:,} / {few.histories:,} histories", value, FLAT)


def tables(stores: list[Measured]) -> Iterator[str]:
    for store in stores:
        if store.missing:
            yield f"{store.title}: missing: {store.missing}"
            continue
        for draw in (_rate_tables, _counted_tables, _size_tables):
            yield from draw(store)


def _rate_tables(store: Measured) -> Iterator[str]:
    heads = (
        "",
        "version",
        "per s",
        "min µs",
        "median µs",
        "max µs",
        "p50 µs",
        "p99 µs",
        "× loop",
        "× bare loop",
        "× statements",
        "× bare statements",
    )
    for threads in store.timed:
        for operation in OPERATIONS:
            found = [row for row in _timed_rows(store) if (row["threads"], row["operation"]) == (threads, operation)]
            title = f"{store.title} {store.version}, {threads} thread(s): {operation}"
            yield table(title, heads, [_rate_line(row) for row in found])


def _rate_line(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = [_micro(row[column]) for column in ("min", "median", "max", "p50", "p99")]
    ratios = [f"{row[f'times {other}']:.2f}" for other in OTHERS]
    return (row["name"], row["version"] or "", f"{row['per_second']:,.0f}", *times, *ratios)


def _counted_tables(store: Measured) -> Iterator[str]:
    lines = [
        (row["operation"], str(row["min"]), str(row["max"]), str(row["outside_of_the_users_transaction"]))
        for row in _counted_rows(store)
    ]
    yield table(f"{store.title}: statements per message", ("", "min", "max", "outside of the user's"), lines)


def _size_tables(store: Measured) -> Iterator[str]:
    heads = ("p50 / p99 µs", *(f"{each.histories:,} histories" for each in store.filled))
    lines = [(verb, *(_tail(each.seconds[verb]) for each in store.filled)) for verb in VERBS]
    lines.append(("bytes for one history", *(f"{each.bytes_each:,.0f}" for each in store.filled)))
    yield table(f"{store.title}: the verbs among few histories and many", heads, lines)


def _tail(seconds: list[float]) -> str:
    return f"{_micro(percentile(seconds, 0.5))} / {_micro(percentile(seconds, 0.99))}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def main() -> int:
    options: Options = parse_options(__doc__ or "")
    logging.getLogger().addHandler(logging.NullHandler())
    stores = [measured(title, QUICK if options.quick else FULL) for title in STORES]
    report = Report(list(rows(stores)), list(targets(stores)))
    return publish(report, options, tables(stores))


if __name__ == "__main__":
    raise SystemExit(main())
