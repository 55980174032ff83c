"""Processes of consumers that share a store: forked when ordered, and then whatever befalls them befalls them.

`python -m tests.fault.store_consumer` reads orders (`tests.fault.forks`). The children write a ledger
(`tests.fault.ledger`), nobody asks them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from retrykit import AsyncRetryTemplate, FrontContextCache, RetryState, RetryTemplate, SimpleRetryPolicy, flight, owner
from retrykit.sql import SqlRetryContextCache, sqlite_engine
from tests.fault.forks import serve
from tests.fault.ledger import SETTLED, LoggedFaults, Pen

metadata = sa.MetaData()
effects = sa.Table(
    "effects", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("key", sa.BigInteger, index=True)
)
parked = sa.Table(
    "parked", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("key", sa.BigInteger, index=True)
)
guarded = sa.Table(
    "guarded",
    metadata,
    sa.Column("key", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("fence", sa.BigInteger),
)

MANY = 10**6
# How often the item fails: good, flaky and poison ones in turn.
FATES = (0, 1, 0, 2, MANY)


def fate(key: int) -> int:
    """How many attempts of an item fail."""
    return FATES[key % len(FATES)]


class Trouble(Exception):
    """What the work raises when it fails."""


class Present:
    """What a delivery has come to so far."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts
        self.raised: BaseException | None = None
        self.edge: BaseException | None = None


_present: ContextVar[Present] = ContextVar("present")


class SkewedClock:
    """A machine's clock that is wrong."""

    def __init__(self, skew: float) -> None:
        self.skew = skew

    def time(self) -> float:
        return time.time() + self.skew

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def async_sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def engine_for(url: str, **options: Any) -> sa.Engine:
    """An engine as a user makes it."""
    if url.startswith("sqlite"):
        return sqlite_engine(url, durability="process", **options)
    return sa.create_engine(url, **options)


class Consumer:
    """One process, as an order describes it.

    `work`, `history`, `resource`: URLs of the databases of the work (None: it has none), of the histories, and of the
    table that fences guard (None: it has none). `worker`: its number. `host`: the machine it pretends to be on, `skew`
    how wrong that one's clock is. `threads`: for each the keys that it is to bring to their end; `deliveries`: to
    deliver so often instead. `fronted`: what it stored last it remembers. `asynchronous`: tasks for threads.
    `takes`: how long the work takes.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.number = order["worker"]
        self.pen = Pen(order["ledger"], w=self.number)
        self.dies_at = order.get("dies_at", {})
        self.deliveries = 0
        self.lock = threading.Lock()
        self.gate = None if "gate" not in order else Path(order["gate"])
        logging.getLogger("retrykit").addHandler(LoggedFaults(self.pen))
        if "host" in order:
            owner._machine = functools.cache(lambda: f"{order['host']}/boot/pid")
        self.resource = None if order.get("resource") is None else engine_for(order["resource"])
        self.connect()
        cache = sabotaged(self.cache(), order.get("sabotage"))
        self.template = self.template_class(
            name="orders",
            retry_policy=SimpleRetryPolicy(order["max_attempts"]),
            context_cache=FrontContextCache(cache) if order.get("fronted") else cache,
            clock=SkewedClock(order.get("skew", 0)),
            remember_completed=order.get("remember"),
            lease=order.get("lease", 300),
        )

    template_class: type[RetryTemplate | AsyncRetryTemplate] = RetryTemplate

    def connect(self) -> None:
        """To the database of the work."""
        self.work = None if self.order.get("work") is None else engine_for(self.order["work"], **self.engine_options)
        self.sessions = None if self.work is None else sessionmaker(self.work)

    @property
    def engine_options(self) -> dict[str, Any]:
        """What the engine of the work is made with."""
        return dict(self.order.get("engine", {}))

    def cache(self) -> Any:
        """The store of the histories: on the work's own engine, if that is where it is."""
        url, options = self.order["history"], self.order.get("options", {})
        if url.startswith("redis"):
            from retrykit.redis import RedisRetryContextCache

            return RedisRetryContextCache(url, **options)
        return SqlRetryContextCache(self.work if url == self.order.get("work") else engine_for(url), **options)

    def note(self, event: str, **facts: Any) -> None:
        """Write an event of the present delivery; the last one, if it is the one to die at."""
        self.pen(event, **_present.get().facts, **facts)
        if self.dies_at.get("event") == event:
            with self.lock:
                self.dies_at["number"] -= 1
                if self.dies_at["number"] <= 0:
                    os.kill(os.getpid(), self.dies_at.get("of", signal.SIGKILL))
                    self.dies_at = {}

    # -- the work

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        assert self.sessions is not None
        worked = False
        try:
            with self.sessions.begin() as session:
                yield session
                worked = True
                self.note("commit")
        except BaseException as error:
            if worked:
                _present.get().edge = error
                self.note("not committed", error=type(error).__name__)
            raise
        self.note("committed")

    def attempt(self, context: Any) -> str:
        self.note("attempt", n=context.attempt, fence=context.fence)
        # Before the transaction has done anything: SQLite lets one write at a time.
        self.await_gate()
        time.sleep(self.order.get("takes", 0))
        return self.do(context)

    def do(self, context: Any) -> str:
        """The work itself."""
        key = self.order_key(context)
        try:
            if context.transaction is not None:
                context.transaction.execute(sa.insert(effects).values(key=key))
            if self.resource is not None:
                self.write_guarded(key, context.fence)
            if context.attempt <= self.order.get("fails", fate(key)):
                self.note("fail")
                raise Trouble(f"attempt {context.attempt} of {key} failed")
        except Trouble as error:
            _present.get().raised = error
            raise
        except Exception as error:
            _present.get().raised = error
            self.note("broken", error=repr(error)[:200])
            raise
        self.note("work")
        return "work"

    def recover(self, context: Any) -> str:
        key = self.order_key(context)
        self.note("recovery", fence=context.fence)
        try:
            if context.transaction is not None:
                context.transaction.execute(sa.insert(parked).values(key=key))
            if self.resource is not None:
                self.write_guarded(key, context.fence)
        except Exception as error:
            _present.get().edge = error
            self.note("recovery broken", error=repr(error)[:200])
            raise
        return "substitute"

    def order_key(self, context: Any) -> int:
        key = context.key
        assert isinstance(key, int)
        return key

    def await_gate(self) -> None:
        """A handler that takes as long as the test likes."""
        if self.gate is None:
            return
        deadline = time.monotonic() + 60
        while not self.gate.exists():
            assert time.monotonic() < deadline, "nobody opened the gate"
            time.sleep(0.002)

    def write_guarded(self, key: int, fence: int) -> None:
        """The write that fences are for: accepted from nobody who has been overtaken."""
        assert self.resource is not None
        later = sa.update(guarded).where(guarded.c.key == key, guarded.c.fence < fence)
        with self.resource.begin() as connection:
            accepted = connection.execute(later.values(fence=fence)).rowcount == 1
        self.note("fenced", fence=fence, accepted=accepted)

    # -- the source

    def deliver(self, key: int, redelivered: bool | None) -> str:
        state = self.begin(key, redelivered)
        error: Exception | None = None
        try:
            outcome = self.template.execute(
                self.attempt,
                self.recover if self.order.get("recovers", True) else None,
                state=state,
                transaction=None if self.sessions is None else self.transaction,
            )
        except Exception as raised:
            # Sabotage: the source is told of something else than what happened.
            hidden = self.order.get("sabotage") == "HidesErrors"
            error = LookupError("of the store") if hidden else raised
            outcome = type(error).__name__
        return self.end(outcome, error)

    def begin(self, key: int, redelivered: bool | None) -> RetryState:
        """A delivery begins: what the source says of it."""
        with self.lock:
            self.deliveries += 1
            _present.set(Present(d=self.deliveries, k=key))
        self.note("deliver")
        later = self.order.get("recover_later", False)
        return RetryState(key=key, redelivered=redelivered, recover_on_redelivery=later)

    def end(self, outcome: str | None, error: Exception | None) -> str:
        """A delivery ends: the outcome, in a word."""
        outcome = outcome or "duplicate"
        chain, present = list(_chain(error)), _present.get()
        notes = [note for link in chain for note in getattr(link, "__notes__", ())]
        self.note(
            "end",
            outcome=outcome,
            error=None if error is None else repr(error)[:300],
            same=present.raised is not None and present.raised in chain,
            # A database that gave no connection or no commit speaks for itself.
            edge=present.edge in chain if present.edge is not None else isinstance(error, sa.exc.SQLAlchemyError),
            noted=any("was not stored" in note for note in notes),
        )
        return outcome

    def source(self, number: int, keys: list[int]) -> Generator[tuple[int, bool | None, float], str, None]:
        """What is to be delivered next, after what pause; it is sent what came of that.

        Each key until it is settled, in an order of our own, what is not settled again later; or as often as ordered.
        """
        first, again = self.order.get("redelivered", [None, None])
        if "deliveries" in self.order:
            for turn in range(self.order["deliveries"]):
                for key in keys:
                    yield key, again if turn else first, 0
            return
        random.Random(self.order.get("seed", 1) * 1_000 + self.number * 100 + number).shuffle(keys)
        known = set(self.order.get("known", ()))
        queue = deque((key, again if key in known else first, 0, 0.0) for key in keys)
        deadline = time.monotonic() + self.order.get("patience", 100)
        while queue and time.monotonic() < deadline:
            key, redelivered, tries, pause = queue.popleft()
            outcome = yield key, redelivered, pause
            if outcome not in SETTLED:
                # A source takes its time before it delivers again what could not even be tried.
                pause = 0.0 if outcome == "Trouble" else min(0.002 * 2 ** min(tries, 10), 0.25)
                queue.append((key, again, tries + 1, pause))

    def consume(self, number: int, keys: list[int]) -> None:
        """What one thread does."""
        source = self.source(number, keys)
        outcome: Any = None
        with suppress(StopIteration):
            while True:
                key, redelivered, pause = source.send(outcome)
                time.sleep(pause)
                outcome = self.deliver(key, redelivered)

    def run(self) -> None:
        self.pen("began")
        if len(self.order["threads"]) == 1:
            # In the main thread, where a signal arrives.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            with suppress(SystemExit):
                self.consume(0, self.order["threads"][0])
            return
        start = threading.Barrier(len(self.order["threads"]))

        def consume(number: int, keys: list[int]) -> None:
            start.wait()
            self.consume(number, keys)

        parts = enumerate(self.order["threads"])
        threads = [threading.Thread(target=consume, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.pen("done")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        # A recovery that failed tells of the failure that it was for.
        waiting += [link.__context__, link.__cause__, getattr(link, "failure", None)]


# -- stores that lie: the checks have to notice


class Sabotage:
    """A store of which one verb does not do what it promises."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def load(self, key: str) -> Any:
        return self.real.load(key)

    def save(self, key: str, snapshot: Any, expected: int | None) -> Any:
        return self.real.save(key, snapshot, expected)

    def remove(self, key: str, expected: int | None = None) -> Any:
        return self.real.remove(key, expected)


class SavesNothing(Sabotage):
    """Every third save is confirmed and not made."""

    saves = 0

    def save(self, key: str, snapshot: Any, expected: int | None) -> Any:
        self.saves += 1
        return self.saves + MANY if self.saves % 3 == 0 else self.real.save(key, snapshot, expected)


class SavesOverOthers(Sabotage):
    """Whoever writes last wins: nothing is compared."""

    def save(self, key: str, snapshot: Any, expected: int | None) -> Any:
        while (saved := self.real.save(key, snapshot, expected)) is None:
            stored = self.real.load(key)
            expected = None if stored is None else stored.version
        return saved


class ForgetsFlights(Sabotage):
    """Attempts that run are stored without their reservation."""

    def save(self, key: str, snapshot: Any, expected: int | None) -> Any:
        return self.real.save(key, {**snapshot, "in_flight": []}, expected)


class RepeatsFences(Sabotage):
    """The fence never grows, neither with what is stored nor with time."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        flight.first_fence = lambda _: 42

    def load(self, key: str) -> Any:
        stored = self.real.load(key)
        if stored is not None and "fence" in stored.snapshot:
            stored.snapshot["fence"] = 41
        return stored


class ForgetsMarks(Sabotage):
    """A completion mark seems to be stored and is not."""

    def joined(self, transaction: Any) -> Any:
        return None

    def save(self, key: str, snapshot: Any, expected: int | None) -> Any:
        return MANY if "completed_at" in snapshot else self.real.save(key, snapshot, expected)


class ForgetsItems(Sabotage):
    """What is stored says that it is done."""

    def save(self, key: str, snapshot: Any, expected: int | None) -> Any:
        done = {"completed_at": 1.0, "expires_at": 10.0**10} if snapshot["retry_count"] else {}
        return self.real.save(key, {**snapshot, **done}, expected)


SABOTAGES = {
    kind.__name__: kind
    for kind in (SavesNothing, SavesOverOthers, ForgetsFlights, RepeatsFences, ForgetsMarks, ForgetsItems)
}


def sabotaged(cache: Any, how: str | None) -> Any:
    """The cache, or one that lies."""
    return SABOTAGES[how](cache) if how in SABOTAGES else cache


# -- the process that forks


def make_consumer(order: dict[str, Any]) -> Consumer:
    """One with threads, or with tasks."""
    if not order.get("asynchronous"):
        return Consumer(order)
    from tests.fault.store_tasks import Tasks

    return Tasks(order)


def main() -> None:
    logging.getLogger("retrykit").propagate = False
    for driver in ("psycopg", "pymysql", "redis", "asyncpg", "aiomysql", "aiosqlite", "tests.fault.store_tasks"):
        # Loaded once, for all children.
        try:
            __import__(driver)
        except ImportError:
            continue
    serve(make_consumer)


if __name__ == "__main__":
    main()
