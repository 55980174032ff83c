"""How fast does a listener container consume from ActiveMQ and RabbitMQ, next to stomp.py by hand, tuned and not?"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# This file is called as the library that it measures: its folder comes last, or `import stomp` would find this one.
sys.path.append(sys.path.pop(0))
# The servers are started as the tests start theirs.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attrs
import stomp_databases
import stomp_memory
import stomp_ours
import stomp_peers
import stomp_raw
from report import Options, Report, Target, parse_options, publish, table, version
from sampling import paired_ratio
from stomp_brokers import KINDS, Kind, Running, running
from stomp_memory import Grown
from stomp_work import Batches, Contender, Timings, measure
from stores_sql import PostgreSqlStore, SqliteStore, SqlStore
from stores_work import percentile

OURS, FSYNC = stomp_ours.OURS, "one fdatasync of the broker's disk"
# At least 0.85 of the rate of others is at most so many times their time.
AS_FAST = round(1 / 0.85, 3)
# At least 10 times the rate.
TEN_TIMES = 0.1
FLAT = 1.05
BEGUN = time.monotonic()


@attrs.frozen
class Plan:
    """How much is measured."""

    prefetches: tuple[int, ...]
    batches: Batches
    in_memory: int
    at_brokers: int


QUICK = Plan((1, 10), Batches(rounds=3, messages=12, slow_messages=3), in_memory=20_000, at_brokers=0)
FULL = Plan((1, 10, 100), Batches(rounds=11, messages=100, slow_messages=10), in_memory=1_000_000, at_brokers=100_000)


@attrs.frozen
class Measured:
    """All about one broker; `missing` says why there is nothing."""

    kind: Kind
    missing: str | None = None
    version: str | None = None
    absent: Mapping[str, str] = attrs.field(factory=dict)
    """Contenders that could not be measured, and why."""
    packages: Mapping[str, str | None] = attrs.field(factory=dict)
    timed: Mapping[int, Mapping[str, Timings]] = attrs.field(factory=dict)
    fsyncs: Mapping[int, list[float]] = attrs.field(factory=dict)
    grown: Grown | None = None

    @property
    def same(self) -> str:
        """Who works by hand with the acknowledgement that retrykit makes here."""
        return stomp_raw.TRANSACTION if self.kind.transactional else stomp_raw.RECEIPT

    def ratio(self, prefetch: int, ours: str, reference: str) -> float | None:
        timings = self.timed[prefetch]
        if ours not in timings or reference not in timings:
            return None
        return paired_ratio(timings[ours].seconds, timings[reference].seconds)


@attrs.frozen
class Databases:
    """Those that could be started, and why the others could not."""

    stores: list[SqlStore]
    missing: Mapping[str, str]


# ---- measuring


def say(what: str) -> None:
    print(f"{time.monotonic() - BEGUN:5.0f} s  {what}", file=sys.stderr, flush=True)


def databases(stack: ExitStack) -> Databases:
    stores, missing = [], {}
    for kind in (SqliteStore, PostgreSqlStore):
        why = kind.missing()
        if why is None:
            stores.append(stack.enter_context(kind()))
        else:
            missing[kind.title] = why
    return Databases(stores, missing)


def measured(kind: Kind, plan: Plan, data: Databases) -> Measured:
    missing = kind.missing()
    if missing is not None:
        return Measured(kind, missing=missing)
    say(f"{kind.title}: starting")
    with running(kind) as server:
        return _measured(server, plan, data)


def _measured(server: Running, plan: Plan, data: Databases) -> Measured:
    title = server.kind.title
    contenders, absent = _contenders(data)
    timed, fsyncs = {}, {}
    for prefetch in plan.prefetches:
        timed[prefetch], fsyncs[prefetch] = measure(
            contenders, server, prefetch, plan.batches, say=lambda what: say(f"{title}, {what}")
        )
    return Measured(
        server.kind,
        version=server.version,
        absent=absent,
        packages={each.name: each.package for each in contenders},
        timed=timed,
        fsyncs=fsyncs,
        grown=_grown_at(server, plan.at_brokers),
    )


def _contenders(data: Databases) -> tuple[list[Contender], dict[str, str]]:
    """The floor and stomp.py first, then each of ours behind those that it is compared with, the peer last."""
    contenders = [*stomp_raw.CONTENDERS, stomp_ours.ALONE]
    absent = {f"{OURS}, {title}": why for title, why in data.missing.items()}
    for store in data.stores:
        contenders += [*stomp_databases.contenders(store), *stomp_ours.contenders(store)]
    why = stomp_peers.missing()
    if why is None:
        contenders.append(stomp_peers.CONTENDER)
    else:
        absent[stomp_peers.FASTSTREAM] = why
    return contenders, absent


def _grown_at(server: Running, messages: int) -> Grown | None:
    if not messages or stomp_memory.missing():
        return None
    say(f"{server.kind.title}: memory over {messages:,} messages")
    where = [server.kind.profile, server.host, server.port, server.url]
    return stomp_memory.measured(server.kind.title, where, messages)


def grown_in_memory(messages: int) -> Grown | None:
    if stomp_memory.missing():
        return None
    say(f"memory over {messages:,} messages of the broker in the process")
    return stomp_memory.measured("broker in the process", ["memory"], messages)


# ---- reporting


def rows(brokers: list[Measured], grown: list[Grown]) -> Iterator[dict[str, Any]]:
    """One flat object per number: seconds per message, or bytes."""
    nothing = dict.fromkeys(("min", "median", "max", "version"))
    for broker in brokers:
        if broker.missing:
            yield {
                "broker": broker.kind.title,
                "name": broker.kind.title,
                "missing": True,
                "why": broker.missing,
            } | nothing
            continue
        shared = {"broker": broker.kind.title, "server": broker.version}
        yield from ({**shared, "missing": False, **row} for row in _timed_rows(broker))
        for name, why in broker.absent.items():
            # What cannot be started is the place, not the library.
            yield {**shared, "name": name.removeprefix(f"{OURS}, "), "missing": True, "why": why} | nothing
    for each in grown:
        yield {
            "name": f"{OURS}, memory, {each.where}",
            "version": version(OURS),
            "missing": False,
            "unit": "bytes",
            "messages": each.messages,
            **_spread(each.bytes),
            "growth": each.growth,
        }


def _timed_rows(broker: Measured) -> Iterator[dict[str, Any]]:
    for prefetch, timings in broker.timed.items():
        for name, taken in timings.items():
            package = broker.packages[name]
            yield {
                "prefetch": prefetch,
                "name": name,
                "version": version(package) if package else None,
                "unit": "seconds",
                **_spread(taken.seconds),
                "processor": percentile(taken.processor, 0.5),
                "per_second": 1 / taken.median,
                "rounds": len(taken.seconds),
                "times_same_acknowledgement": broker.ratio(prefetch, name, broker.same),
            }
        fsyncs = broker.fsyncs[prefetch]
        tail = {"version": None, "unit": "seconds", **_spread(fsyncs), "per_second": 1 / percentile(fsyncs, 0.5)}
        yield {"prefetch": prefetch, "name": FSYNC, **tail, "processor": None, "times_same_acknowledgement": None}


def _spread(values: list[Any]) -> dict[str, Any]:
    return {"min": min(values), "median": percentile(values, 0.5), "max": max(values)}


def targets(brokers: list[Measured], grown: list[Grown]) -> Iterator[Target]:
    """What was promised, for what could be started."""
    for broker in brokers:
        for prefetch in broker.timed:
            where = f"{broker.kind.title}, prefetch {prefetch}"
            for ours, reference, bound in _promises(broker):
                yield Target(f"{where}: time of {ours} / {reference}", broker.ratio(prefetch, ours, reference), bound)
    for each in grown:
        name = f"memory over {each.messages:,} messages, {each.where}: the most / after a tenth of them"
        yield Target(name, each.growth, FLAT)


def _promises(broker: Measured) -> Iterator[tuple[str, str, float]]:
    yield OURS, broker.same, AS_FAST
    yield OURS, stomp_raw.UNTUNED, TEN_TIMES
    for store in (SqliteStore, PostgreSqlStore):
        for marks in stomp_databases.MARKS:
            ours = stomp_ours.with_database(store, marks=marks)
            if ours in broker.packages:
                yield ours, stomp_databases.by_hand(store, marks=marks), AS_FAST


def tables(brokers: list[Measured], grown: list[Grown]) -> Iterator[str]:
    heads = ("", "version", "per s", "min µs", "median µs", "max µs", "processor µs", "× same ack")
    for broker in brokers:
        if broker.missing:
            yield f"{broker.kind.title}: missing: {broker.missing}"
        for prefetch in broker.timed:
            lines = [_line(row) for row in _timed_rows(broker) if row["prefetch"] == prefetch]
            yield table(f"{broker.version}, prefetch {prefetch}: a message", heads, lines)
        yield from (f"{broker.kind.title}, {name}: missing: {why}" for name, why in broker.absent.items())
    lines = [_memory_line(each) for each in grown]
    yield table("Resident memory, MB", ("", "messages", "min", "median", "max", "growth"), lines)


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    columns = ("min", "median", "max", "processor")
    times = ["" if row[column] is None else f"{row[column] * 1e6:,.0f}" for column in columns]
    ratio = row["times_same_acknowledgement"]
    return (row["name"], row["version"] or "", f"{row['per_second']:,.0f}", *times, f"{ratio:.2f}" if ratio else "")


def _memory_line(each: Grown) -> tuple[str, ...]:
    spread = [f"{value / 1e6:.1f}" for value in _spread(each.bytes).values()]
    return (each.where, f"{each.messages:,}", *spread, f"{each.growth:.3f}")


def main() -> int:
    options: Options = parse_options(__doc__ or "")
    plan = QUICK if options.quick else FULL
    logging.getLogger().addHandler(logging.NullHandler())
    with ExitStack() as stack:
        data = databases(stack)
        brokers = [measured(kind, plan, data) for kind in KINDS]
    found = [grown_in_memory(plan.in_memory), *(broker.grown for broker in brokers)]
    grown = [each for each in found if each is not None]
    report = Report(list(rows(brokers, grown)), list(targets(brokers, grown)))
    return publish(report, options, tables(brokers, grown))


if __name__ == "__main__":
    raise SystemExit(main())
