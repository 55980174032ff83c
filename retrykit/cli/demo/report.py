"""The audit: what the database says, held against what was published. The library's own counts are not asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from retrykit.cli.demo.ledger import digest_of
from retrykit.cli.demo.plan import Kind, PlannedMessage
from retrykit.messaging.recoverers import ID
from retrykit.sql import ParkedItem


@attrs.frozen(kw_only=True)
class Facts:
    """What was found after a run: `effects` are the digests by message, `attempts` come from the file of events.

    `kills` is how many processes were killed by somebody else than a message.
    """

    plan: Sequence[PlannedMessage]
    effects: Mapping[str, Sequence[str]]
    parked: Sequence[ParkedItem]
    attempts: Mapping[str, int]
    in_doubt: Mapping[str, int]
    max_attempts: int
    kills: int = 0
    left_in_queue: int = 0

    @property
    def parked_ids(self) -> Counter[str]:
        """How often each message is parked."""
        return Counter(item.headers.get(ID, "?") for item in self.parked)

    @property
    def missing(self) -> list[str]:
        """The messages that left no trace."""
        parked = self.parked_ids
        return [message.id for message in self.plan if message.id not in self.effects and message.id not in parked]


@attrs.frozen
class Promise:
    """What was promised, and the messages (or others) by which it was broken, with words."""

    text: str
    broken_by: tuple[str, ...]


def promises(facts: Facts) -> tuple[Promise, ...]:
    """Each promise with what broke it; nothing did if all is well."""
    checks: dict[str, Callable[[Facts], list[str]]] = {
        "no message is lost": lambda facts: facts.missing,
        "every effect happens once, for the message that was sent": _wrong_effects,
        f"no message is attempted more than {facts.max_attempts} times": _too_often,
        "every poison message is parked once, with its history": _badly_parked,
        "nothing else is parked": _parked_without_need,
        "nothing is left in the queue": lambda facts: ["queue"] * facts.left_in_queue,
    }
    return tuple(Promise(text, tuple(check(facts))) for text, check in checks.items())


def _wrong_effects(facts: Facts) -> list[str]:
    sent = {message.id: digest_of(message.body) for message in facts.plan}
    parked = facts.parked_ids
    return [
        f"{id_}: {len(digests)} effects" + (", and parked" if id_ in parked else "")
        for id_, digests in facts.effects.items()
        if list(digests) != [sent.get(id_)] or id_ in parked
    ]


def _too_often(facts: Facts) -> list[str]:
    # An attempt whose commit the broker did not confirm is rolled back and not counted.
    return [
        f"{id_}: {count} attempts"
        for id_, count in facts.attempts.items()
        if count > facts.max_attempts + facts.in_doubt.get(id_, 0)
    ]


def _badly_parked(facts: Facts) -> list[str]:
    times = facts.parked_ids
    hopeless = [message for message in facts.plan if message.fate.kind.hopeless]
    wrong = [f"{message.id}: parked {times[message.id]} times" for message in hopeless if times[message.id] != 1]
    return wrong + [
        f"{item.headers.get(ID)}: {fault}" for item in facts.parked if (fault := _fault_of(item, facts)) is not None
    ]


def _fault_of(item: ParkedItem, facts: Facts) -> str | None:
    bodies = {message.id: message.body for message in facts.plan}
    if item.payload != bodies.get(item.headers.get(ID, "")):
        return "another body was parked than sent"
    if item.attempts != facts.max_attempts or len(item.errors) != item.attempts:
        return f"parked after {item.attempts} attempts with {len(item.errors)} errors"
    if not item.reason or item.first_failed_at is None or item.last_failed_at is None:
        return "parked without its history"
    return None


def _parked_without_need(facts: Facts) -> list[str]:
    """Who is not hopeless is parked only if somebody killed the attempts that could have succeeded."""
    hopeless = {message.id for message in facts.plan if message.fate.kind.hopeless}
    others = [id_ for id_ in facts.parked_ids if id_ not in hopeless]
    return others if len(others) > facts.kills else [id_ for id_ in others if facts.parked_ids[id_] > 1]


@attrs.frozen(kw_only=True)
class Row:
    """What became of the messages of one kind."""

    kind: Kind
    messages: int
    attempts: int
    effects: int
    parked: int


@attrs.frozen(kw_only=True)
class Report:
    """The outcome of a run. `recovered` counts the messages that failed at least once and took effect after all."""

    messages: int
    effects: int
    duplicate_effects: int
    lost: int
    parked: int
    recovered: int
    max_attempts_seen: int
    process_deaths: int
    seconds: float
    rows: tuple[Row, ...]
    promises: tuple[Promise, ...]

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not any(promise.broken_by for promise in self.promises)

    def to_json(self) -> dict[str, Any]:
        """The numbers, and `broken`: for each promise that was broken, by what."""
        numbers = attrs.asdict(self, filter=lambda field, _: field.name not in {"rows", "promises"})
        return numbers | {
            "broken": {promise.text: list(promise.broken_by) for promise in self.promises if promise.broken_by}
        }


def report(facts: Facts, *, process_deaths: int, seconds: float) -> Report:
    """Count."""
    effects = sum(map(len, facts.effects.values()))
    return Report(
        messages=len(facts.plan),
        effects=effects,
        duplicate_effects=effects - len(facts.effects),
        lost=len(facts.missing),
        parked=len(facts.parked),
        recovered=sum(facts.attempts.get(id_, 0) > 1 for id_ in facts.effects),
        max_attempts_seen=max(facts.attempts.values(), default=0),
        process_deaths=process_deaths,
        seconds=round(seconds, 2),
        rows=tuple(_row(kind, facts) for kind in Kind),
        promises=promises(facts),
    )


def _row(kind: Kind, facts: Facts) -> Row:
    ids = [message.id for message in facts.plan if message.fate.kind is kind]
    times = facts.parked_ids
    return Row(
        kind=kind,
        messages=len(ids),
        attempts=sum(facts.attempts.get(id_, 0) for id_ in ids),
        effects=sum(len(facts.effects.get(id_, ())) for id_ in ids),
        parked=sum(times[id_] for id_ in ids),
    )
