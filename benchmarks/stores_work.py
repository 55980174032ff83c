"""What all subjects of `stores.py` do: one message that fails, and fails again, then succeeds; and how that is timed.

A message goes through four operations. Each is timed for a batch of messages at a time, by one thread or several:

- first failure: the first delivery fails; the history is stored.
- second failure: the next one fails too, not journaled; the history is loaded and stored.
- redelivery fails: journaled; the history is loaded, stored for the attempt, stored for its failure.
- redelivery succeeds: journaled; the history is loaded, stored for the attempt, settled: nothing is left.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import statistics
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from typing import Any, Protocol

import attrs

from retrykit import NoBackOffPolicy, RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.cache import canonical_key

FIRST, SECOND, FAILS, SUCCEEDS = "first failure", "second failure", "redelivery fails", "redelivery succeeds"
OPERATIONS = (FIRST, SECOND, FAILS, SUCCEEDS)
# What is stored while the attempt of a redelivery runs.
FAILS_JOURNAL, SUCCEEDS_JOURNAL = "journal of a failure", "journal of a success"
# The count of failures that an operation leaves behind, and how often the history was stored: None when it is gone.
LEFT = {FIRST: (1, 1), SECOND: (2, 2), FAILS: (3, 4), SUCCEEDS: None}

NAME = "orders"
OWNER = f"{socket.gethostname()}:{os.getpid()}"
FAILURE = ConnectionError

Action = Callable[[str], Any]


class Subject(Protocol):
    """Who does the work: for each operation a function of the message's key."""

    @property
    def actions(self) -> Mapping[str, Action]: ...


@attrs.frozen
class Contender:
    """A subject by name. `worker` makes what one thread works with, and says on the stack how it is closed."""

    name: str
    worker: Callable[[ExitStack], Subject]
    package: str
    by_hand: bool = False
    """Then it is told the key as it stands in the store: making that is part of what retrykit does."""


# ---- retrykit


class Ours:
    """retrykit's template with a cache."""

    def __init__(self, cache: Any, **fields: Any) -> None:
        policy = SimpleRetryPolicy(max_attempts=10, retry_for=FAILURE)
        self.template = RetryTemplate(
            name=NAME, retry_policy=policy, back_off_policy=NoBackOffPolicy(), context_cache=cache, **fields
        )

    @property
    def actions(self) -> dict[str, Action]:
        return {FIRST: self.first, SECOND: self.second, FAILS: self.fails, SUCCEEDS: self.succeeds}

    def first(self, key: str, call: Action | None = None) -> None:
        self._failing(RetryState(key=key, redelivered=False), call)

    def second(self, key: str) -> None:
        self._failing(RetryState(key=key, redelivered=True, journal="never"))

    def fails(self, key: str, call: Action | None = None) -> None:
        self._failing(RetryState(key=key, redelivered=True), call)

    def succeeds(self, key: str, call: Action | None = None) -> None:
        self.template.execute(call or _succeed, state=RetryState(key=key, redelivered=True))

    def _failing(self, state: RetryState, call: Action | None = None) -> None:
        try:
            self.template.execute(call or _fail, state=state)
        except FAILURE:
            return
        raise AssertionError


def _fail(_context: Any) -> None:
    raise FAILURE("the payment gateway at 10.20.30.40:8443 refused the connection")


def _succeed(_context: Any) -> str:
    return "paid"


def recorded(cache: Any, look: Callable[[str], Any]) -> dict[str, Any]:
    """What retrykit stores of a message, by operation; `look` reads what is stored under a key."""
    ours, stored = Ours(cache), {}
    place = canonical_key(NAME, "model")

    def failing(_context: Any) -> None:
        stored[FAILS_JOURNAL] = look(place)
        raise FAILURE("the payment gateway at 10.20.30.40:8443 refused the connection")  # not by _fail: a frame more

    def succeeding(_context: Any) -> None:
        stored[SUCCEEDS_JOURNAL] = look(place)

    ours.first("model")
    stored[FIRST] = look(place)
    ours.second("model")
    stored[SECOND] = look(place)
    ours.fails("model", failing)
    stored[FAILS] = look(place)
    ours.succeeds("model", succeeding)
    return stored


# ---- by hand


class Floor(ABC):
    """The same by hand: four verbs, and what is stored was made beforehand. A version is what the verbs say it is."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.stored = stored

    @property
    def actions(self) -> dict[str, Action]:
        return {FIRST: self.first, SECOND: self.second, FAILS: self.fails, SUCCEEDS: self.succeeds}

    def first(self, key: str) -> None:
        self.insert(key, self.stored[FIRST])

    def second(self, key: str) -> None:
        self.update(key, self.load(key), self.stored[SECOND])

    def fails(self, key: str) -> None:
        version = self.update(key, self.load(key), self.stored[FAILS_JOURNAL])
        self.update(key, version, self.stored[FAILS])

    def succeeds(self, key: str) -> None:
        version = self.update(key, self.load(key), self.stored[SUCCEEDS_JOURNAL])
        self.delete(key, version)

    @abstractmethod
    def insert(self, key: str, row: Any) -> None: ...

    @abstractmethod
    def load(self, key: str) -> Any: ...

    @abstractmethod
    def update(self, key: str, version: Any, row: Any) -> Any: ...

    @abstractmethod
    def delete(self, key: str, version: Any) -> None: ...


class Loop(ABC):
    """What a person writes who keeps the same history: the attempt and its failure in words, around the verbs of a
    floor. Generous to it: it decides nothing, logs nothing, and nobody else is ever first.
    """

    def __init__(self, floor: Floor) -> None:
        self.floor = floor

    @property
    def actions(self) -> dict[str, Action]:
        return {FIRST: self.first, SECOND: self.second, FAILS: self.fails, SUCCEEDS: self.succeeds}

    def first(self, key: str) -> None:
        facts = {"format": 1, "name": NAME, "key": key, "retry_count": 0, "fence": time.time_ns(), "errors": []}
        self.floor.insert(key, self._failed(key, facts, FIRST))

    def second(self, key: str) -> None:
        found = self.floor.load(key)
        self.floor.update(key, found, self._failed(key, self._facts(found), SECOND))

    def fails(self, key: str) -> None:
        version, facts = self._begun(key, FAILS_JOURNAL)
        self.floor.update(key, version, self._failed(key, facts, FAILS))

    def succeeds(self, key: str) -> None:
        version, _ = self._begun(key, SUCCEEDS_JOURNAL)
        _succeed(key)
        self.floor.delete(key, version)

    def _begun(self, key: str, operation: str) -> tuple[Any, dict[str, Any]]:
        found = self.floor.load(key)
        facts = self._facts(found)
        flight = {"fence": time.time_ns(), "owner": OWNER, "since": time.time(), "until": time.time() + 300}
        journal = self.row(operation, facts | {"in_flight": [flight]}, time.time())
        return self.floor.update(key, found, journal), facts

    def _failed(self, key: str, facts: dict[str, Any], operation: str) -> Any:
        try:
            _fail(key)
        except FAILURE as error:
            return self._counted(facts, error, operation)
        raise AssertionError

    def _counted(self, facts: dict[str, Any], error: Exception, operation: str) -> Any:
        now, kind, trace = time.time(), type(error), error.__traceback__
        text = "".join(traceback.format_exception(kind, error, trace and trace.tb_next))
        facts["retry_count"] += 1
        facts.setdefault("started_at", now)
        facts.setdefault("first_failed_at", now)
        facts["last_failed_at"] = now
        facts["reason"] = f"attempt {facts['retry_count']} of 10"
        facts["last_error"] = {
            "type": f"{kind.__module__}.{kind.__qualname__}",
            "message": str(error),
            "classes": [f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__[:-1]],
            "traceback": text,
        }
        summary = {
            "attempt": facts["retry_count"],
            "type": facts["last_error"]["type"],
            "message": str(error),
            "at": now,
        }
        facts["errors"] = [*facts["errors"], summary][-10:]
        return self.row(operation, facts, now)

    def _facts(self, found: Any) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.told(found))
        return facts

    @abstractmethod
    def told(self, found: Any) -> Any:
        """The JSON text in what `load` gave."""

    @abstractmethod
    def row(self, operation: str, facts: Mapping[str, Any], now: float) -> Any:
        """What is stored of the facts."""


# ---- equal work


class UnequalWorkError(Exception):
    """A subject did not do what the others do, so its time would mean nothing."""


def check_equal_work(left: Mapping[str, list[tuple[Any, ...]]], operation: str, messages: int) -> None:
    """`left`: by subject, of each of its histories the failures, the writes (None: untold) and the size."""
    expected, sizes = LEFT[operation], set()
    for name, histories in left.items():
        found = {(failures, writes) for failures, writes, _ in histories}
        wanted = set() if expected is None else {expected, (expected[0], None)}
        if len(histories) != (0 if expected is None else messages) or not found <= wanted:
            raise UnequalWorkError(f"{name}, {operation}: {len(histories)} of {messages} histories are {found}")
        sizes |= {size for _, _, size in histories}
    if sizes and max(sizes) > 1.1 * min(sizes):
        raise UnequalWorkError(f"{operation}: histories have {min(sizes)} to {max(sizes)} characters")


# ---- timing


@attrs.define
class Timings:
    """Of one subject and operation: seconds per message of each batch, and what each message took."""

    seconds: list[float] = attrs.Factory(list)
    each: list[float] = attrs.Factory(list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Crew:
    """Threads that begin a batch together."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._start = threading.Barrier(threads)
        self._pool = ThreadPoolExecutor(threads)

    def close(self) -> None:
        self._pool.shutdown()

    def time(self, actions: Sequence[Action], keys: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        """One action and one list of keys for each thread: the seconds for all, and those for each message."""
        futures = [self._pool.submit(self._run, *each) for each in zip(actions, keys, strict=True)]
        runs = [future.result() for future in futures]
        begun, ended = min(run[0] for run in runs), max(run[1] for run in runs)
        return ended - begun, [seconds for run in runs for seconds in run[2]]

    def _run(self, action: Action, keys: Sequence[str]) -> tuple[float, float, list[float]]:
        clock, each = time.perf_counter, []
        self._start.wait()
        begun = clock()
        for key in keys:
            before = clock()
            action(key)
            each.append(clock() - before)
        return begun, clock(), each


@attrs.frozen
class Batches:
    """How much is timed."""

    threads: int
    rounds: int
    messages: int
    """For each thread, in a batch."""

    @property
    def all(self) -> int:
        return self.threads * self.messages


Result = dict[str, dict[str, Timings]]
"""By subject and operation."""
Look = Callable[[str], list[tuple[Any, ...]]]
"""Tells, of each history under keys that begin so, what `check_equal_work` wants to know."""


def measure(contenders: Sequence[Contender], batches: Batches, look: Look, say: Callable[[str], None]) -> Result:
    """Each operation by each subject in turn, A B C A B C …"""
    result: Result = {each.name: {operation: Timings() for operation in OPERATIONS} for each in contenders}
    with ExitStack() as stack:
        crew = Crew(batches.threads)
        stack.callback(crew.close)
        teams = [(each, [each.worker(stack) for _ in range(batches.threads)]) for each in contenders]
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        # The first round warms up: connections, plans, caches.
        for number in range(batches.rounds + 1):
            if number % 5 == 0:
                say(f"{batches.threads} thread(s), round {number} of {batches.rounds}")
            for name, operation, seconds, each in _round(teams, crew, batches, look):
                if number:
                    result[name][operation].seconds.append(seconds / batches.all)
                    result[name][operation].each.extend(each)
    return result


_numbers = count()


def _round(
    teams: Sequence[tuple[Contender, Sequence[Subject]]], crew: Crew, batches: Batches, look: Look
) -> Iterator[tuple[str, str, float, list[float]]]:
    """New messages for each subject go through all operations."""
    keys = [_keys(f"{next(_numbers)}", contender, batches) for contender, _ in teams]
    for operation in OPERATIONS:
        left = {}
        for (contender, subjects), theirs in zip(teams, keys, strict=True):
            actions = [subject.actions[operation] for subject in subjects]
            yield contender.name, operation, *crew.time(actions, theirs.spelled)
            left[contender.name] = look(theirs.prefix)
        check_equal_work(left, operation, batches.all)


@attrs.frozen
class _Keys:
    """The messages of one batch: as the subject is told them, for each thread; and how they begin in the store."""

    spelled: list[list[str]]
    prefix: str


def _keys(mark: str, contender: Contender, batches: Batches) -> _Keys:
    spell = (lambda key: canonical_key(NAME, key)) if contender.by_hand else str
    messages = [[spell(f"{mark}.{thread}.{n}") for n in range(batches.messages)] for thread in range(batches.threads)]
    return _Keys(messages, canonical_key(NAME, f"{mark}."))
