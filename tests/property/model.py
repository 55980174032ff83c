"""What the contract says of deliveries, in few words.

`Prediction` tells what must happen while the store works, `Watcher` what may never happen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from tests.property.world import ELSEWHERE, Script

RECOVERIES = 3


@attrs.define
class Item:
    """What must be remembered of a key of a template; `flights`: what never ended, (whose, until when, recovery?)."""

    failures: int = 0
    fatal: bool = False
    veto: str | None = None
    due: float | None = None
    delay: float | None = None
    done_until: float | None = None
    flights: tuple[tuple[str, float, bool], ...] = ()
    known: bool = False
    ran: int = 0
    uncounted: int = 0
    recovered: bool = False
    fence: int = 0

    def settle(self, done_until: float | None) -> None:
        """The item has come to its end; fences go on only from what is kept."""
        fence = self.fence if done_until is not None else 0
        self.__init__(done_until=done_until, known=done_until is not None, fence=fence)  # type: ignore[misc]


@attrs.define
class Prediction:
    """What must happen: pauses, attempts and recoveries in order, and the outcome."""

    item: Item
    script: Script
    limit: int
    now: float
    remember: float | None
    joins: bool
    delay: Callable[[int], float]
    events: list[Any] = attrs.field(factory=list)
    words: dict[str, int] = attrs.field(factory=dict)
    tried: bool = False

    def outcome(self) -> str:  # noqa: C901, PLR0911 - the order in which things happen, at one glance
        """Follow the delivery to its end."""
        item, stored = self.item, attrs.evolve(self.item)
        if item.done_until is not None:
            if item.done_until > self.now:
                return "duplicate"
            item.settle(None)
        self._count_crashes()
        while True:
            refused = self._refused()
            if item.flights and (refused or item.failures + len(item.flights) >= self.limit):
                return self._as_before(stored, "in flight")
            if refused:
                return self._recover(stored)
            # A clock that was set back makes no pause longer than it was meant to be.
            if (item.due or 0) > self.now and (ending := self._pause(min(item.due - self.now, item.delay or item.due))):
                return self._as_before(stored, ending)
            item.known = self.tried = True
            result = self._one("attempt", "works")
            if result != "failed":
                return self._settled("work") if result == "done" else result
            item.failures += 1
            retry = not self._refused()
            seconds = self.delay(item.failures)
            item.due = self.now + seconds if retry and seconds else None
            item.delay = seconds if retry and seconds else item.delay
            if not self.script.in_place and (retry or not self.script.recover_now):
                return "user"
            if not retry:
                return self._recover(stored)
            if seconds and (ending := self._pause(seconds)):
                return ending
            item.due = None

    def _as_before(self, stored: Item, outcome: str) -> str:
        """What was found out while loading is not kept when nothing came of it; a veto of the meantime is."""
        if self.tried:
            return outcome
        veto = self.item.veto
        for field in attrs.fields(Item):
            setattr(self.item, field.name, getattr(stored, field.name))
        self.item.veto = veto
        self.item.known = self.item.known or veto is not None
        return outcome

    def _count_crashes(self) -> None:
        item, alive = self.item, []
        for whose, until, recovery in item.flights:
            if not (self.script.redelivered or until <= self.now or whose == "dead"):
                alive.append((whose, until, recovery))
            elif not recovery:
                item.failures += 1
                item.fatal = False
        item.flights = tuple(alive)

    def _refused(self) -> bool:
        item = self.item
        return item.veto is not None or item.failures >= self.limit or item.fatal

    def _pause(self, seconds: float) -> str | None:
        self.events.append(("pause", round(seconds, 6)))
        if self.script.pause == "is spent":
            self.now += seconds
            return None
        return "interrupted" if self.script.pause == "raises" else "cancelled"

    def _next(self, place: str, words: tuple[str, ...]) -> str:
        turn = self.words.get(place, 0)
        self.words[place] = turn + 1
        return words[min(turn, len(words) - 1)]

    def _one(self, event: str, what: str) -> str:
        """One attempt or recovery in its transaction: done, failed, cancelled or doubt."""
        item, script = self.item, self.script
        fate = self._next("transaction", (*script.transactions, "commits")) if script.transactional else "commits"
        if fate == "does not begin":
            item.fatal = item.fatal and event == "recovery"
            return "failed"
        self.events.append(event)
        word = self._next(what, getattr(script, what))
        item.veto = "by the work" if "vetoes" in word else item.veto
        if word.endswith("cancelled"):
            return "cancelled"
        failed = word.endswith(("fails", "fatally"))
        if event == "attempt" and (failed or fate == "does not commit"):
            item.fatal = word.endswith("fatally")
        if failed or fate == "does not commit":
            return "failed"
        stored = script.redelivered is not False or item.failures or self.remember is not None
        if fate == "in doubt, done" and self.joins and stored:
            item.settle(self._until())
        return "doubt" if "doubt" in fate else "done"

    def _until(self) -> float | None:
        return None if self.remember is None else self.now + self.remember

    def _settled(self, outcome: str) -> str:
        self.item.settle(self._until())
        return outcome

    def _recover(self, stored: Item) -> str:
        item = self.item
        if self.script.recoveries is None:
            outcome = "exhausted" if item.failures else "terminated"
            return self._as_before(stored, outcome)
        item.known = item.recovered = True
        for _ in range(RECOVERIES):
            result = self._one("recovery", "recoveries")
            if result != "failed":
                return self._settled("substitute") if result == "done" else result
        return "recovery failed"


class Watcher:
    """Sees each event of a delivery as it happens, and knows which ones may never follow which."""

    def __init__(self) -> None:
        self.item = Item()
        self.script = Script()
        self.limit = 1
        self.begin(self.item, self.script, 1, "")

    def begin(self, item: Item, script: Script, limit: int, canonical: str) -> None:
        """A delivery of the item begins."""
        self.item, self.script, self.limit, self.canonical = item, script, limit, canonical
        self.pending: list[Exception] = []
        self.low = item.failures
        self.high = item.failures + sum(not recovery for _, _, recovery in item.flights)
        self.open = 0
        self.opened = self.closed = 0
        self.confirmed = False
        self.recovering = self.cancelled = self.blind = self.completed = False
        self.ran = 0
        self.failed: list[Exception] = []
        self.vetoes: set[str] = set()
        self.events: list[Any] = []

    def __call__(self, event: str, *facts: Any) -> None:
        """An event."""
        handler = getattr(self, "on_" + event.replace(" ", "_"), None)
        if handler is not None:
            handler(*facts)

    # -- the transaction

    def on_begin(self) -> None:
        assert self.open == 0, "two transactions of one call were open"
        self.open += 1

    def on_committed(self) -> None:
        self.open -= 1
        self.confirmed = True

    def on_rolled_back(self) -> None:
        self.open -= 1

    def on_in_doubt(self) -> None:
        self.open = 0

    def on_pause(self, seconds: float) -> None:
        self.events.append(("pause", round(seconds, 6)))
        assert seconds > 0
        assert self.open == 0, "P7: a pause while the template's transaction was open"

    # -- attempts

    def on_attempt(self, attempt: int, retry_count: int, fence: int) -> None:
        self.events.append("attempt")
        self._called()
        assert attempt == retry_count + 1
        assert not self.recovering, "P3: the callback ran after a recovery in the same call"
        assert self.blind or not self.item.recovered, "P3: the callback ran after a recovery had failed"
        self.item.ran += 1
        self.ran += 1
        allowed = self.limit + self.item.uncounted + sum(map(is_noted, self.failed))
        assert self.blind or self.item.ran <= allowed, "P5: the callback ran too often"
        # An attempt that could not be reserved has no fence of its own.
        assert self.blind or fence >= self.item.fence, "the fence went back"
        self.item.fence = max(fence, self.item.fence)

    def on_recovery(self, retry_count: int) -> None:
        self.events.append("recovery")
        self._called()
        self.recovering = True
        # What could neither be read nor stored is not known at the next delivery.
        self.item.recovered = self.item.recovered or not (self.blind or self.pending)

    def _called(self) -> None:
        assert self.blind or not self.completed, "something was called after somebody else had completed the item"
        assert not self.cancelled, "P9: something was called after the cancellation"
        assert self.open == self.script.transactional
        self.confirmed = False

    def on_returned(self, value: str) -> None:
        self.confirmed = self.confirmed or not self.script.transactional

    def on_failed(self, error: Exception) -> None:
        self.pending.append(error)
        self.failed.append(error)

    def on_cancelled(self) -> None:
        self.cancelled = True

    def on_vetoed(self, reason: str) -> None:
        self.vetoes.add(reason)

    def on_told(self, error: Exception, decision: Any, retry_count: int) -> None:
        assert self.open == 0, "on_error was told inside of the transaction"
        assert error not in self.pending or self.completed or is_noted(error), (
            "P1: on_error was told before the failure was stored"
        )

    def on_listener(self, event: str) -> None:
        self.opened += event == "open"
        self.closed += event == "close"

    # -- the store

    def on_faulted(self, verb: str) -> None:
        self.blind = self.blind or verb == "load"

    def on_saved(self, key: str, snapshot: dict[str, Any], before: Any, in_doubt: bool) -> None:
        assert key == self.canonical, "P12: another template's history was written"
        assert snapshot["name"] == self.script.name
        old = {} if before is None else before.snapshot
        if "completed_at" in snapshot:
            assert self.confirmed, "P2: a completion mark before the outcome was sure"
            return
        if "completed_at" in old:
            assert not self.completed, "a completion mark was overwritten"
        else:
            assert snapshot["retry_count"] >= old.get("retry_count", 0), "a stored failure was forgotten"
            assert old.get("veto") is None or snapshot.get("veto") is not None, "P4: a veto was erased"
        assert snapshot.get("fence", 0) >= old.get("fence", 0), "the fence went back"
        self.low += 0 if in_doubt else sum(not is_noted(error) for error in self.pending)
        self.high += len(self.pending)
        self.pending.clear()

    def on_removed(self, key: str, before: Any) -> None:
        assert key == self.canonical, "P12: another template's history was removed"
        history = before.snapshot
        kept = history["retry_count"] or history.get("veto")
        assert not kept or self.confirmed, "P2: the history was dropped before the outcome was sure"

    def on_others(self, what: str) -> None:
        if what == "fails":
            self.low += 1
            self.high += 1
            self.item.uncounted += 1
        elif what == "vetoes":
            self.vetoes.add("theirs")
        elif what == "completes":
            self.completed = True
        else:
            self.low = self.item.fence = 0
            # What the call itself has seen fail it may still count.
            self.high = len(self.failed)
            self.item.uncounted += self.item.ran
            self.item.recovered = False
            self.item.veto = None
            self.vetoes.clear()

    # -- the end

    def end(self, outcome: tuple[str, Any], stored: Any, *, certain: bool) -> None:
        """The delivery is over: hold what is stored against what happened."""
        if outcome[0] != "died":
            assert self.open == 0, "a transaction was left open"
            assert self.opened == self.closed == 1, "open and close were not told once each"
            for error in self.pending:
                assert self.completed or is_noted(error), (
                    "P1: a failure was neither stored nor does its exception say so"
                )
        self.item.uncounted += max(0, self.ran - max(0, self.low - self.item.failures))
        if stored is None or "completed_at" in stored.snapshot:
            return
        if certain and self.vetoes:
            assert stored.snapshot.get("veto") in self.vetoes, "P4: a veto was not stored"
        assert self.low <= stored.snapshot["retry_count"] <= self.high, "the count is not what happened"


def is_noted(error: Exception) -> bool:
    """Whether the exception itself says that it could not be stored."""
    return any("was not stored" in note for note in getattr(error, "__notes__", ()))


def flights_of(snapshot: Any) -> tuple[tuple[str, float, bool], ...]:
    """The attempts that the store believes to be running; those of calls that are over can be known to be so."""
    return tuple(
        ("elsewhere" if flight["owner"] == ELSEWHERE else "dead", flight["until"], flight.get("recovery", False))
        for flight in snapshot.get("in_flight", ())
    )
