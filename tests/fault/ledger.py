"""What consumers did, as they wrote it down themselves, event by event: what a store says is held against this.

Each event is one line, written with one `write` to a file that is open for appending: the lines of all processes stand
in the order in which they were written, and a process that is killed leaves all that it wrote before. A line begins
with its line feed, so that half a line is the end of its writer and of nobody else's.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SETTLED = ("work", "substitute", "duplicate")
# What a delivery may say for itself: try me again. Nothing was hidden by it.
AGAIN = ("AttemptsInFlightError", "CommitInDoubtError", "TerminatedRetryError", "BackOffInterruptedError")
# Deadlines, not durations: a busy machine may need a while.
PATIENCE = 120.0


class Pen:
    """The writing end: `pen("attempt", k=1)` writes a line; whom `dies_at` names is killed by writing it."""

    def __init__(self, path: str, **always: Any) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._always = always

    def __call__(self, event: str, **facts: Any) -> None:
        """Write one event."""
        line = json.dumps({"e": event, "at": time.monotonic(), **self._always, **facts}, default=repr)
        os.write(self._file, f"\n{line}".encode())


class LoggedFaults(logging.Handler):
    """What the library says of faults goes into the ledger."""

    def __init__(self, pen: Pen) -> None:
        super().__init__(logging.WARNING)
        self.pen = pen

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        text = f"{record.getMessage()}: {type(error).__name__}: {error}" if error else record.getMessage()
        self.pen("log", level=record.levelname, text=text[:500])


class Delivery:
    """All that a worker wrote about one delivery."""

    def __init__(self, worker: int, key: int, begun: int) -> None:
        self.worker, self.key, self.begun = worker, key, begun
        self.events: list[dict[str, Any]] = []
        self.end: dict[str, Any] | None = None

    def of(self, event: str) -> list[dict[str, Any]]:
        """Its events of one kind."""
        return [each for each in self.events if each["e"] == event]

    @property
    def outcome(self) -> str | None:
        """What came of it; None when its process did not live to say."""
        return None if self.end is None else self.end["outcome"]

    @property
    def reached_the_store(self) -> bool:
        """Whether its failures were stored, as far as the failure itself tells."""
        return self.end is None or not self.end["noted"]

    def __repr__(self) -> str:
        steps = " ".join(f"{each['e']}{each.get('n', '')}" for each in self.events)
        return f"<{self.key} by {self.worker}: {steps} -> {self.end and (self.outcome, self.end['error'])}>"


class Ledger:
    """The reading end, while it is written and after."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()
        self.events: list[dict[str, Any]] = []
        self.torn: list[str] = []
        self._read = 0
        self._counts: Counter[str] = Counter()

    def count(self, event: str) -> int:
        """How many events of this kind there are by now."""
        self._catch_up(finished=False)
        return self._counts[event]

    def wait(self, event: str, number: int, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait until there are so many events of this kind; False when `unless` came first."""
        deadline = time.monotonic() + PATIENCE
        while self.count(event) < number:
            if unless():
                return False
            assert time.monotonic() < deadline, f"{self.count(event)} × {event} within {PATIENCE} s, not {number}"
            threading.Event().wait(0.003)
        return True

    def wait_until(self, instant: float, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait until something is written after this instant (monotonic); False when `unless` came first."""
        deadline = time.monotonic() + PATIENCE
        while self.count("end") == 0 or self.events[-1]["at"] < instant:
            if unless():
                return False
            assert time.monotonic() < deadline, f"nothing was written within {PATIENCE} s"
            threading.Event().wait(0.003)
        return True

    def close(self) -> None:
        """Nobody writes any more: read the rest."""
        self._catch_up(finished=True)

    def _catch_up(self, *, finished: bool) -> None:
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        *lines, last = text.split(b"\n")
        # The last one may still be on its way.
        if finished or _parsed(last) is not None:
            lines.append(last)
        else:
            text = text[: len(text) - len(last)]
        self._read += len(text)
        for line in filter(None, lines):
            event = _parsed(line)
            if event is None:
                self.torn.append(line.decode(errors="replace"))
            else:
                self.events.append(event)
                self._counts[event["e"]] += 1

    # -- what happened

    @functools.cached_property
    def deliveries(self) -> list[Delivery]:
        """All deliveries in the order of their beginnings; asked when nobody writes any more."""
        found: dict[tuple[int, int], Delivery] = {}
        for place, event in enumerate(self.events):
            if "d" not in event:
                continue
            name = event["w"], event["d"]
            if event["e"] == "deliver":
                found[name] = Delivery(event["w"], event["k"], place)
            elif event["e"] == "end":
                found[name].end = event | {"place": place}
            else:
                found[name].events.append(event | {"place": place})
        return list(found.values())

    @functools.cached_property
    def by_key(self) -> dict[int, list[Delivery]]:
        """The deliveries of each key; asked when nobody writes any more."""
        found: dict[int, list[Delivery]] = defaultdict(list)
        for delivery in self.deliveries:
            found[delivery.key].append(delivery)
        return found

    def faults(self) -> list[str]:
        """What the library logged as faults that it went on in spite of."""
        return [event["text"] for event in self.events if event["e"] == "log" and event["level"] == "ERROR"]

    # -- what must hold: each gives what does not

    def violations(self, keys: Iterable[int], *, limit_of: Callable[[int], int]) -> list[str]:
        """What holds whatever the fault was: nothing is lost, the limit, the business errors, the fences."""
        by_key = self.by_key
        found = [(key, f"it was lost: {by_key[key]}") for key in keys if not _settled(by_key[key])]
        for key, deliveries in by_key.items():
            what = [*_beyond(limit_of(key), deliveries), *_overcounted(deliveries)]
            what += [*_hidden(deliveries), *_fences(deliveries)]
            found += [(key, each) for each in what]
        return [f"{key}: {what}" for key, what in found]

    def counted(self, key: int) -> tuple[int, int]:
        """How many failed attempts a store has to know of, at least and at most.

        An attempt that was never heard of again has failed. Whoever died before writing that an attempt had begun may
        have journaled it.
        """
        least = most = 0
        for delivery in self.by_key[key]:
            attempts = len(delivery.of("attempt")) - len(delivery.of("work"))
            least += attempts if delivery.reached_the_store else 0
            most += attempts
            most += delivery.end is None and not attempts
        return least, most


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line)) if line else None
    except ValueError:
        return None


def _settled(deliveries: list[Delivery]) -> bool:
    return any(delivery.outcome in SETTLED for delivery in deliveries)


def _beyond(limit: int, deliveries: list[Delivery]) -> list[str]:
    attempts = sum(len(delivery.of("attempt")) for delivery in deliveries)
    # What could not be stored could not be counted either, and said so.
    loud = sum(not delivery.reached_the_store for delivery in deliveries)
    if attempts <= limit + loud:
        return []
    return [f"{attempts} attempts, {limit} allowed, {loud} not stored: {deliveries}"]


def _overcounted(deliveries: list[Delivery]) -> list[str]:
    """No attempt has a higher number than there were attempts that may have been reserved before it.

    A process that hangs after it has reserved one says so late, and one that dies there never does.
    """
    found = []
    for delivery in deliveries:
        for earlier, attempt in enumerate(delivery.of("attempt")):
            others = (other for other in deliveries if other is not delivery and other.begun < attempt["place"])
            before = earlier + sum(_reserved(other, attempt["place"]) for other in others)
            if attempt["n"] > 1 + before:
                found.append(f"attempt {attempt['n']} came after {before} others: {deliveries}")
    return found


def _reserved(delivery: Delivery, place: int) -> int:
    """How many attempts a delivery may have reserved by then."""
    told = len(delivery.of("attempt"))
    return told or int(delivery.end is None or delivery.end["place"] > place)


def _hidden(deliveries: list[Delivery]) -> list[str]:
    found = []
    for delivery in deliveries:
        if delivery.end is None or delivery.outcome in (*SETTLED, *AGAIN):
            continue
        failed = delivery.of("fail") or delivery.of("broken")
        if failed and not delivery.end["same"]:
            found.append(f"a business error was hidden: {delivery}")
        if not failed and not delivery.end["edge"]:
            found.append(f"an error that is nobody's: {delivery}")
    return found


def _fences(deliveries: list[Delivery]) -> list[str]:
    """Each attempt has a fence of its own, higher than those of all that had begun when its delivery began."""
    attempts = [(each["place"], each["fence"]) for delivery in deliveries for each in delivery.of("attempt")]
    found = [f"the fence {fence} was given {times} times: {deliveries}" for fence, times in _repeated(attempts)]
    for delivery in deliveries:
        before = max((fence for place, fence in attempts if place < delivery.begun), default=0)
        late = [each["fence"] for each in delivery.of("attempt") if each["fence"] <= before]
        found += [f"the fence {fence} came after {before}: {deliveries}" for fence in late]
    accepted = [(0, each["fence"]) for each_ in deliveries for each in each_.of("fenced") if each["accepted"]]
    found += [
        f"{times} writes with the fence {fence} were accepted: {deliveries}" for fence, times in _repeated(accepted)
    ]
    return found


def _repeated(places_and_fences: list[tuple[int, int]]) -> list[tuple[int, int]]:
    counts = Counter(fence for _, fence in places_and_fences)
    return [(fence, times) for fence, times in counts.items() if times > 1]
