"""What a step has come to: its counts while it runs, and the report for people and programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

import attrs

from retrykit.failure import ErrorSummary, StoredError, message_of, type_name

Status = Literal["running", "finished", "stopped", "failed"]
Phase = Literal["read", "process", "write", "store", "transaction", "failed", "between"]
"""Of the time: reading; processing, writing and storing position and counts, in attempts that came so far; begin and
commit; attempts from there to their failure; roll-backs, pauses and the next begin."""

SHOWN: Final = 100
"""So many skipped items a report keeps; all are counted."""


def kind_of(error: BaseException) -> str:
    """The name of the failure's class, of a stored one too."""
    return error.type if isinstance(error, StoredError) else type_name(type(error))


@attrs.frozen(kw_only=True)
class SkippedItem:
    """One item that was put aside.

    `number` counts the items of the input from 1. `phase`: where it failed. `attempts` failed with it, `errors` are the
    last of them, oldest first; `error` is the failure that decided, in a report without its traceback.
    """

    item: Any
    number: int
    phase: str
    error: BaseException
    attempts: int
    errors: tuple[ErrorSummary, ...] = ()
    key: Any = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Without the item itself, which need not be JSON-able."""
        return {
            "number": self.number,
            "phase": self.phase,
            "type": kind_of(self.error),
            "message": message_of(self.error),
            "attempts": self.attempts,
            "reason": self.reason,
        }


class Tally(NamedTuple):  # which is made quickly: each transaction has one
    """What one committed transaction has added: items read, written and filtered out, and those skipped."""

    read: int
    written: int = 0
    filtered: int = 0
    skipped: tuple[SkippedItem, ...] = ()


@attrs.define(kw_only=True)
class Counts:
    """The counts of a job over all its runs.

    Items count when the transaction that settled them has committed, and `read` are those that count:
    `written + filtered + skipped`. `rollbacks` are attempts that failed, `retries` attempts after the first of the same
    items; both of processes that died since their last commit are not known. `seconds` by phase.
    """

    read: int = 0
    written: int = 0
    filtered: int = 0
    skipped: dict[str, int] = attrs.field(factory=dict)
    limited: dict[str, int] = attrs.field(factory=dict)
    retries: int = 0
    rollbacks: int = 0
    commits: int = 0
    seconds: dict[str, float] = attrs.field(factory=dict)

    @property
    def all_skipped(self) -> int:
        """How many items were skipped."""
        return sum(self.skipped.values())

    def add(self, tally: Tally, limited_as: Iterable[str | None]) -> None:
        """Add what a transaction has settled. `limited_as`: for each skipped item the class that limits it."""
        self.read += tally.read
        self.written += tally.written
        self.filtered += tally.filtered
        self.commits += 1
        if not tally.skipped:
            return
        for skipped, limiting in zip(tally.skipped, limited_as, strict=True):
            name = kind_of(skipped.error)
            self.skipped[name] = self.skipped.get(name, 0) + 1
            if limiting is not None:
                self.limited[limiting] = self.limited.get(limiting, 0) + 1

    def copy(self) -> Counts:
        """Another one that says the same."""
        return attrs.evolve(self, skipped=dict(self.skipped), limited=dict(self.limited), seconds=dict(self.seconds))

    def to_json(self) -> dict[str, Any]:
        """The JSON form: the fields by name, seconds rounded to microseconds."""
        rounded = {phase: round(seconds, 6) for phase, seconds in self.seconds.items()}
        return {field.name: getattr(self, field.name) for field in attrs.fields(Counts)} | {"seconds": rounded}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Counts:
        """The counts of a stored job; what a later version counts besides is left out."""
        known = {field.name for field in attrs.fields(cls)}
        return cls(**{name: value for name, value in facts.items() if name in known}).copy()


@attrs.frozen(kw_only=True)
class Report:
    """What a step has come to.

    `counts` are those of all runs of the job, `seconds` and `skipped` (the first 100 items) of this one. `status`:
    "finished"; "stopped" by somebody's veto or an interruption, "failed" by an error, with the `reason`.
    """

    name: str
    parameters: Mapping[str, Any]
    status: Status
    reason: str = ""
    counts: Counts
    skipped: tuple[SkippedItem, ...] = ()
    started_at: datetime
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "parameters": dict(self.parameters),
            "status": self.status,
            "reason": self.reason,
            "counts": self.counts.to_json(),
            "skipped": [skipped.to_json() for skipped in self.skipped],
            "started_at": self.started_at.isoformat(),
            "seconds": round(self.seconds, 6),
        }

    def table(self) -> str:
        """Lines for people: a fact and its value each."""
        rows = list(self._rows())
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _rows(self) -> Iterator[tuple[str, str]]:
        counts = self.counts
        yield "job", self.name + (f" {_shown(self.parameters)}" if self.parameters else "")
        # Of a database's own words the other lines have the statement, and rows.
        yield "status", self.status + (f": {self.reason.strip().splitlines()[0]}" if self.reason.strip() else "")
        for name in ("read", "written", "filtered"):
            yield name, f"{getattr(counts, name):,}"
        yield "skipped", f"{counts.all_skipped:,}"
        for kind, number in sorted(counts.skipped.items()):
            yield "", f"{number:,} {kind.rpartition('.')[2]}"
        for name in ("retries", "rollbacks", "commits"):
            yield name, f"{getattr(counts, name):,}"
        yield "seconds", f"{self.seconds:.3f}"
        for number, (phase, seconds) in enumerate(counts.seconds.items()):
            yield "" if number else "all runs", f"{seconds:.3f} {phase}"


def _shown(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items())
