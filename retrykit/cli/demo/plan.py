"""Which messages there are, and what each will do to its consumer: decided by a seed, so that a run can be repeated."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

import attrs

MAX_ATTEMPTS: Final = 4
MAX_ID: Final = 200


class PlanError(ValueError):
    """The messages given cannot be used: the text says which, and why."""


class Kind(StrEnum):
    """What a message does to its consumer."""

    FINE = "fine"
    FLAKY = "flaky"
    LATE = "commit fails at first"
    CRASH = "kills at first"
    POISON = "poison"
    UNSTORABLE = "commit always fails"
    KILLER = "always kills"

    @property
    def hopeless(self) -> bool:
        """Whether no attempt will ever succeed, so that it must be parked."""
        return self in {Kind.POISON, Kind.UNSTORABLE, Kind.KILLER}


@attrs.frozen
class Fate:
    """The first `failures` attempts go wrong in the way of the kind; all of them, if that is hopeless."""

    kind: Kind
    failures: int = 0

    def strikes(self, attempt: int) -> bool:
        """Whether this attempt (from 1) goes wrong."""
        return self.kind.hopeless or attempt <= self.failures

    def __str__(self) -> str:
        return f"{self.kind}/{self.failures}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The fate that `str` wrote."""
        kind, _, failures = text.rpartition("/")
        return cls(Kind(kind), int(failures))


@attrs.frozen
class PlannedMessage:
    """A message to be published: its id, its body as it goes out, its fate."""

    id: str
    body: bytes = attrs.field(repr=False)
    fate: Fate


def make_plan(items: Iterable[tuple[str, bytes]], seed: int) -> tuple[PlannedMessage, ...]:
    """Give each item (id, body) its fate: who meets a bad one is chance, how many do depends on how many there are."""
    known = list(items)
    chance = random.Random(f"fates {seed}")
    fates = list(_fates(len(known), chance))
    chance.shuffle(fates)
    return tuple(PlannedMessage(id_, body, fate) for (id_, body), fate in zip(known, fates, strict=True))


def _fates(count: int, chance: random.Random) -> Iterator[Fate]:
    """The bad ones first, in the order in which a small job should have them; the rest is fine."""
    left = count
    for fate in _trouble(count, chance):
        # Somebody has to be fine, whatever else there is.
        if left > 1:
            left -= 1
            yield fate
    for _ in range(left):
        yield Fate(Kind.FINE)


def _trouble(count: int, chance: random.Random) -> Iterator[Fate]:
    yield Fate(Kind.POISON)
    yield Fate(Kind.KILLER)
    for kind in (Kind.FLAKY, Kind.LATE):
        yield Fate(kind, chance.randint(1, MAX_ATTEMPTS - 1))
    yield Fate(Kind.CRASH, 2)
    yield Fate(Kind.UNSTORABLE)
    for share, kind in ((10, Kind.FLAKY), (30, Kind.LATE), (40, Kind.POISON), (100, Kind.UNSTORABLE)):
        for _ in range(count // share - 1):
            yield Fate(kind, 0 if kind.hopeless else chance.randint(1, MAX_ATTEMPTS - 1))


# -- messages of our own

_NAMES: Final = ("Zoë", "Łukasz", "Σοφία", "陈伟", "Ольга", "Jürgen", "أمل", "Nguyễn", "Ana", "😀 Bot")
_GOODS: Final = ("tea", "crème brûlée", "naïve résumé", "饺子", "борщ", "smørrebrød", "jalapeño", 'a "quoted" thing')


def generated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Orders, of a few hundred bytes, now and then of tens of kilobytes."""
    chance = random.Random(f"orders {seed}")
    for number in range(1, count + 1):
        id_ = f"order-{number:04}"
        lines = [_line(chance) for _ in range(400 if chance.random() < 0.01 else chance.randint(1, 6))]  # noqa: PLR2004 - one in a hundred
        order = {"id": id_, "customer": chance.choice(_NAMES), "lines": lines}
        yield id_, json.dumps(order, ensure_ascii=False).encode()


def _line(chance: random.Random) -> dict[str, Any]:
    return {
        "goods": chance.choice(_GOODS),
        "pieces": chance.randint(1, 99),
        "price": round(chance.uniform(0.5, 500), 2),
    }


# -- messages of the user's


def read_messages(path: Path, limit: int | None = None) -> list[tuple[str, bytes]]:
    """The first `limit` objects of a JSON-lines file, as (id, line); `PlanError` says what is wrong with it."""
    found: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if len(found) == limit:
                    break
                if line.strip():
                    _keep(found, line.strip(), f"{path}, line {number}")
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from error
    if not found or (limit is not None and len(found) < limit):
        wanted = "" if limit is None else f", {limit} are wanted"
        raise PlanError(f"{path} has {len(found) or 'no'} messages{wanted}")
    return list(found.items())


def _keep(found: dict[str, bytes], line: bytes, where: str) -> None:
    id_ = _id_of(line, where)
    if id_ in found:
        raise PlanError(f"{where}: the id {id_!r} was there before: how often it takes effect could not be told")
    found[id_] = line


def _id_of(line: bytes, where: str) -> str:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise PlanError(f"{where}: no JSON: {error}") from error
    except RecursionError as error:
        raise PlanError(f"{where}: nested too deeply") from error
    if not isinstance(item, dict) or "id" not in item:
        raise PlanError(f'{where}: must be an object with an "id"')
    id_ = item["id"]
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise PlanError(f"{where}: the id must be a text or a whole number, not {json.dumps(id_)[:80]}")
    text = str(id_)
    if not text.strip() or len(text) > MAX_ID or not text.isprintable():
        raise PlanError(f"{where}: the id must be 1 to {MAX_ID} printable characters, not {text[:80]!r}")
    return text
