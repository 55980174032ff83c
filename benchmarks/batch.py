"""What does a `ChunkStep` cost next to a loop written by hand, what does its search for bad items save, and does it
need more memory for more items?
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
from report import Options, Report, Target, parse_options, publish, table
from sampling import paired_ratio
from sqlalchemy import Column, Integer, MetaData, String, Table, delete, event, func, insert, select, update

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, SkipPolicy, SqlWriter
from retrykit.sql import SqlJobStore, sqlite_engine

CHUNK = 100
THROUGHPUT = 1 / 0.9
LARGE, SMALL = 1 / 20, 1 / 6
MEMORY = 1.05

metadata = MetaData()
rows = Table("work", metadata, Column("id", Integer, primary_key=True), Column("name", String), Column("n", Integer))
position = Table("position", metadata, Column("id", Integer, primary_key=True), Column("items", Integer))


@attrs.define
class Place:
    """A fresh database; `transactions` counts those that were begun."""

    engine: Any
    transactions: int = 0

    def __attrs_post_init__(self) -> None:
        metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            connection.execute(insert(position), {"id": 1, "items": 0})

    def count_transactions(self) -> None:
        def count(_connection: Any) -> None:
            self.transactions += 1

        event.listen(self.engine, "begin", count)

    def empty(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(rows))

    def written(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(select(func.count()).select_from(rows)))


def items(number: int) -> Iterator[dict[str, Any]]:
    return ({"id": one, "name": "a name", "n": one % 7} for one in range(number))


# -- a loop written by hand


def by_hand(place: Place, number: int) -> None:
    statement = insert(rows)
    left = items(number)
    while chunk := list(islice(left, CHUNK)):
        with place.engine.begin() as connection:
            connection.execute(statement, chunk)


def by_hand_with_position(place: Place, number: int) -> None:
    statement, done = insert(rows), 0
    left = items(number)
    while chunk := list(islice(left, CHUNK)):
        done += len(chunk)
        with place.engine.begin() as connection:
            connection.execute(statement, chunk)
            connection.execute(update(position).where(position.c.id == 1).values(items=done))


# -- the step


def step(place: Place, number: int) -> None:
    ChunkStep(
        name="load", reader=items(number), writer=SqlWriter(rows), transaction=place.engine.begin, chunk_size=CHUNK
    ).run()


def step_with_jobs(place: Place, number: int) -> None:
    jobs = SqlJobStore(place.engine)
    ChunkStep(
        name="load",
        reader=items(number),
        writer=SqlWriter(rows),
        transaction=place.engine.begin,
        chunk_size=CHUNK,
        jobs=jobs,
    ).run(again=True)


LOOPS: dict[str, Callable[[Place, int], None]] = {
    "by hand": by_hand,
    "retrykit": step,
    "by hand, with a position": by_hand_with_position,
    "retrykit, with a job store": step_with_jobs,
}
EQUAL_WORK = {"retrykit": "by hand", "retrykit, with a job store": "by hand, with a position"}


def throughput(folder: Path, *, number: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds for so many items, the loops in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    places = {
        name: Place(sqlite_engine(f"sqlite:///{folder}/{index}.db", durability="process"))
        for index, name in enumerate(LOOPS)
    }
    for _ in range(rounds):
        for name, loop in LOOPS.items():
            places[name].empty()
            began = time.perf_counter()
            loop(places[name], number)
            seconds[name].append(time.perf_counter() - began)
            assert places[name].written() == number, "equal work"
    for place in places.values():
        place.engine.dispose()
    # Not of the minima: a processor that was quick for a moment, in one round of one of them, would decide.
    of_the_loop = {ours: paired_ratio(seconds[ours], seconds[theirs]) for ours, theirs in EQUAL_WORK.items()}
    return [timed(name, taken, items=number, of_the_loop=of_the_loop.get(name)) for name, taken in seconds.items()]


def timed(name: str, seconds: list[float], **others: Any) -> dict[str, Any]:
    spread = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
    return {"name": name, "missing": False, **spread, **others}


# -- the search for bad items


def one_by_one(place: Place, number: int, bad: set[int]) -> None:
    """The chunk; and after its failure each item by itself."""
    try:
        with place.engine.begin() as connection:
            write(connection, list(items(number)), bad)
    except ValueError:
        for item in items(number):
            try:
                with place.engine.begin() as connection:
                    write(connection, [item], bad)
            except ValueError:
                continue


def halved(place: Place, number: int, bad: set[int]) -> None:
    ChunkStep(
        name="load",
        reader=items(number),
        writer=lambda connection, chunk: write(connection, chunk, bad),
        transaction=place.engine.begin,
        chunk_size=number,
        template=RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(3, no_retry_for=ValueError)),
        skip=SkipPolicy(skip_for=ValueError),
    ).run()


def write(connection: Any, chunk: list[dict[str, Any]], bad: set[int]) -> None:
    connection.execute(insert(rows), chunk)
    if any(item["id"] in bad for item in chunk):
        raise ValueError


def isolation(folder: Path, number: int, culprits: int) -> list[dict[str, Any]]:
    """Transactions and seconds, for culprits that are spread over the chunk."""
    bad = {number * (2 * one + 1) // (2 * culprits) for one in range(culprits)}
    found = []
    for search in (one_by_one, halved):
        place = Place(
            sqlite_engine(f"sqlite:///{folder}/{search.__name__}-{number}-{culprits}.db", durability="process")
        )
        place.count_transactions()
        began = time.perf_counter()
        search(place, number, bad)
        seconds = time.perf_counter() - began
        transactions = place.transactions
        assert place.written() == number - culprits, "equal work"
        place.engine.dispose()
        name = "one by one" if search is one_by_one else "retrykit"
        named = f"{name}: {culprits} bad of {number:,}"
        found.append(timed(named, [seconds], transactions=transactions, items=number))
    return found


# -- memory

PEAK = """
import json, resource, sys
from retrykit.batch import ChunkStep
number = int(sys.argv[1])
counts = ChunkStep(name="load", reader=range(number), writer=lambda _, items: None).run().counts
print(json.dumps([counts.written, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def peak(number: int) -> dict[str, Any]:
    """The most memory that a process needs for so many items."""
    began = time.perf_counter()
    command = [sys.executable, "-c", PEAK, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written, kilobytes = json.loads(done.stdout)
    assert written == number
    return timed(f"memory for {number:,} items", [time.perf_counter() - began], kilobytes=kilobytes, items=number)


# -- what is said of it


def ratio(measured: list[dict[str, Any]], ours: str, theirs: str, of: str) -> float:
    by_name = {row["name"]: row.get(of) for row in measured}
    return float(by_name[ours] / by_name[theirs])


def targets(measured: list[dict[str, Any]], few: int, many: int) -> list[Target]:
    of_the_loop = {row["name"]: row.get("of_the_loop") for row in measured}
    searches = [
        Target(
            f"transactions for {bad} bad of {number:,}, of those of one by one",
            ratio(
                measured, f"retrykit: {bad} bad of {number:,}", f"one by one: {bad} bad of {number:,}", "transactions"
            ),
            bound,
        )
        for number, bad, bound in ((100, 1, SMALL), (10_000, 1, LARGE), (10_000, 10, LARGE))
    ]
    memory = ratio(measured, f"memory for {many:,} items", f"memory for {few:,} items", "kilobytes")
    return [
        Target(f"seconds, of the loop by hand, chunks of {CHUNK}", of_the_loop["retrykit"], THROUGHPUT),
        Target(
            "seconds with a job store, of the loop that keeps a position",
            of_the_loop["retrykit, with a job store"],
            THROUGHPUT,
        ),
        *searches,
        Target(f"memory for {many:,} items, of that for {few:,}", memory, MEMORY),
    ]


def tables(measured: list[dict[str, Any]]) -> Iterator[str]:
    loops = [row for row in measured if row["name"] in LOOPS]
    lines = [
        (row["name"], f"{row['items'] / row['median']:,.0f}", f"{row['items'] / row['min']:,.0f}") for row in loops
    ]
    yield table(f"{loops[0]['items']:,} rows into SQLite, chunks of {CHUNK}", ("", "items/s", "best"), lines)
    searches = [row for row in measured if "transactions" in row]
    lines = [(row["name"], f"{row['transactions']:,}", f"{row['min']:.2f}") for row in searches]
    yield table("A chunk with bad items", ("", "transactions", "seconds"), lines)
    memory = [row for row in measured if "kilobytes" in row]
    lines = [(row["name"], f"{row['kilobytes'] / 1024:.1f}", f"{row['items'] / row['min']:,.0f}") for row in memory]
    yield table("Without a database", ("", "peak MiB", "items/s"), lines)


def main() -> int:
    logging.getLogger("retrykit.batch").setLevel(logging.ERROR)
    options: Options = parse_options(__doc__ or "")
    few, many = (100_000, 1_000_000) if options.quick else (100_000, 10_000_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = throughput(folder, number=20_000, rounds=3 if options.quick else 31)
        for number, culprits in ((100, 1), (10_000, 1), (10_000, 10)):
            measured += isolation(folder, number, culprits)
    measured += [peak(few), peak(many)]
    return publish(Report(measured, targets(measured, few, many)), options, tables(measured))


if __name__ == "__main__":
    raise SystemExit(main())
