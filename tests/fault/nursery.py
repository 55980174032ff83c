"""A process that has everything loaded and does nothing but fork: children make deliveries, and are killed at any step.

`python -m tests.fault.nursery`
reads a list of orders a line, starts a child for each, all at the same time, and answers with a
line: what each child announced, how it ended and what its deliveries gave. Starting an interpreter for each of some
hundred children would take minutes; forking one that has no threads takes milliseconds.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from retrykit import FixedBackOffPolicy, RetryListener, RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.sql import SqlRetryContextCache, sqlite_engine

metadata = sa.MetaData()
effects = sa.Table("effects", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("key", sa.Text))
parked = sa.Table("parked", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("key", sa.Text))


class Announcer:
    """Says each step aloud, through a pipe; the one that is to be the last is the last."""

    def __init__(self, pipe: int, last: int | None) -> None:
        self.pipe = pipe
        self.left = last
        self.lock = threading.Lock()

    def __call__(self, step: str) -> None:
        with self.lock:
            os.write(self.pipe, f"{step}\n".encode())
            if self.left is None:
                return
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


class AnnouncedCache:
    """A store that says before and after each verb what it does."""

    def __init__(self, real: Any, announce: Announcer, kind: str = "") -> None:
        self.real = real
        self.announce = announce
        self.kind = kind

    def __getattr__(self, verb: str) -> Any:
        act = getattr(self.real, verb)

        def announced(*arguments: Any, **keywords: Any) -> Any:
            self.announce(f"{self.kind}{verb}")
            result = act(*arguments, **keywords)
            self.announce(f"{self.kind}{verb} done")
            return result

        return announced

    def load(self, key: str) -> Any:
        return self.__getattr__("load")(key)

    def save(self, key: str, snapshot: Any, expected: int | None) -> Any:
        return self.__getattr__("save")(key, snapshot, expected)

    def remove(self, key: str, expected: int | None = None) -> Any:
        return self.__getattr__("remove")(key, expected)

    def joined(self, transaction: Any) -> Any:
        joined = self.real.joined(transaction)
        return None if joined is None else AnnouncedCache(joined, self.announce, "joined ")


class AnnouncedListener(RetryListener):
    """Says each event."""

    def __init__(self, announce: Announcer) -> None:
        self.announce = announce

    def open(self, context: Any) -> None:
        self.announce("open")

    def on_success(self, context: Any, result: Any) -> None:
        self.announce("on_success")

    def on_error(self, context: Any, error: Exception, decision: Any) -> None:
        self.announce("on_error")

    def on_recover(self, context: Any, result: Any) -> None:
        self.announce("on_recover")

    def close(self, context: Any, error: BaseException | None) -> None:
        self.announce("close")


class HastyClock:
    """The machine's clock, in which pauses pass at once."""

    def __init__(self, announce: Announcer) -> None:
        self.announce = announce
        self.slept = 0.0

    def time(self) -> float:
        return time.time() + self.slept

    def monotonic(self) -> float:
        return time.monotonic() + self.slept

    def sleep(self, seconds: float) -> None:
        self.announce("pause")
        self.slept += seconds

    async def async_sleep(self, seconds: float) -> None:
        raise NotImplementedError


class Base:
    """The databases of one test: opened before there are children, so that none makes tables and compiles."""

    known: ClassVar[dict[tuple[str, str], Base]] = {}

    def __init__(self, work: str, history: str) -> None:
        self.work = sqlite_engine(work, durability="process")
        self.history = self.work if work == history else sqlite_engine(history, durability="process")
        self.cache = SqlRetryContextCache(self.history)
        metadata.create_all(self.work)

    @classmethod
    def of(cls, order: dict[str, Any]) -> Base:
        """The base of an order; the first order for it is carried out once for a key that nobody asks for."""
        place = order["work"], order["history"]
        if place not in cls.known:
            base = cls.known[place] = cls(*place)
            pipe = os.open(os.devnull, os.O_WRONLY)
            Child(order | {"key": "warm-up", "last": None, "threads": 1, "deliveries": 1}, pipe).run()
            os.close(pipe)
            # SQLite's connections must not be carried across a fork.
            base.work.dispose()
            base.history.dispose()
        return cls.known[place]


SETTLED = ("work", "substitute", "duplicate")


class Child:
    """One process of consumers, as an order describes it."""

    def __init__(self, order: dict[str, Any], pipe: int) -> None:
        self.order = order
        self.attempts = order.get("attempts", 0)
        self.announce = Announcer(pipe, order.get("last"))
        base = Base.of(order)
        self.sessions = sessionmaker(base.work)
        self.template = RetryTemplate(
            name="orders",
            retry_policy=SimpleRetryPolicy(order["max_attempts"]),
            back_off_policy=FixedBackOffPolicy(order.get("pause", 0)),
            context_cache=AnnouncedCache(base.cache, self.announce),
            listeners=(AnnouncedListener(self.announce),),
            clock=HastyClock(self.announce),
            remember_completed=order.get("remember"),
        )

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        self.announce("begin")
        with self.sessions.begin() as session:
            self.announce("began")
            yield session
            self.announce("commit")
        self.announce("committed")

    def attempt(self, context: Any) -> str:
        self.announce("attempt")
        self.attempts += 1
        if context.transaction is not None:
            context.transaction.execute(sa.insert(effects).values(key=self.order["key"]))
        self.announce("worked")
        if self.attempts <= self.order["fails"]:
            self.announce("fails")
            raise ConnectionError("the work failed")
        return "work"

    def recover(self, context: Any) -> str:
        self.announce("recovery")
        if context.transaction is not None:
            context.transaction.execute(sa.insert(parked).values(key=self.order["key"]))
        self.announce("recovered")
        return "substitute"

    def deliver(self, redelivered: bool | None) -> str:
        order = self.order
        state = RetryState(
            key=order["key"], redelivered=redelivered, recover_on_redelivery=order.get("recover_later", False)
        )
        try:
            outcome = self.template.execute(
                self.attempt,
                self.recover if order.get("recovers", True) else None,
                state=state,
                transaction=self.transaction if order.get("transactional", True) else None,
            )
        except Exception as error:
            return type(error).__name__
        return outcome or "duplicate"

    def consume(self, outcomes: list[str]) -> None:
        """Deliver as often as ordered, or until the message is settled; then, if ordered, once more."""
        order = self.order
        first, again = order["redelivered"]
        for number in range(order.get("deliveries", 20)):
            outcomes.append(self.deliver(again if number else first))
            if "deliveries" not in order and outcomes[-1] in SETTLED:
                break
        if order.get("duplicate"):
            outcomes.append(self.deliver(again))

    def run(self) -> list[str]:
        """All deliveries of all threads: what they gave."""
        outcomes: list[str] = []
        if "threads" not in self.order:
            self.consume(outcomes)
            return outcomes
        start = threading.Barrier(self.order["threads"])

        def consume() -> None:
            start.wait()
            self.consume(outcomes)

        threads = [threading.Thread(target=consume) for _ in range(start.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


def fork(order: dict[str, Any]) -> tuple[int, int]:
    """Start a child: its number, and where it can be heard."""
    Base.of(order)
    hear, speak = os.pipe()
    pid = os.fork()
    if pid:
        os.close(speak)
        return pid, hear
    status = 1
    try:
        os.close(hear)
        outcomes = Child(order, speak).run()
        os.write(speak, f"outcomes {json.dumps(outcomes)}\n".encode())
        status = 0
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
    os._exit(status)


def hear_out(pid: int, pipe: int) -> dict[str, Any]:
    """What a child has said, until it ended."""
    with open(pipe, encoding="utf-8") as said:
        steps = said.read().splitlines()
    _, status = os.waitpid(pid, 0)
    outcomes = json.loads(steps.pop().removeprefix("outcomes ")) if steps and steps[-1].startswith("outcomes") else []
    return {"steps": steps, "outcomes": outcomes, "status": os.waitstatus_to_exitcode(status)}


def main() -> None:
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        children = [fork(order) for order in json.loads(line)]
        print(json.dumps([hear_out(*child) for child in children]), flush=True)


if __name__ == "__main__":
    main()
