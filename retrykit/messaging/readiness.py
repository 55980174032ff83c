"""How consumers are, as values: for health pages, and for whoever asks many processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, Self

import attrs

from retrykit.messaging.counters import Counters

State = Literal["new", "running", "stopping", "finished", "failed"]

_WORDS: Mapping[str, str] = {
    "new": "has not been started",
    "stopping": "is stopping",
    "finished": "has ended",
}


@attrs.frozen(kw_only=True)
class ConsumerHealth:
    """One container at one moment: its template's name, its destination, its workers and how many are connected.

    `error` is the class of what made it give up, "" if it has not. `failure` is the class of what ended a connection
    last, or kept it from being made; "" when every worker is connected. `process` is its number, where there are
    several.
    """

    name: str
    destination: str
    state: State
    workers: int
    connected: int
    counters: Counters
    error: str = ""
    failure: str = ""
    process: int | None = None

    @property
    def reason(self) -> str:
        """Why it is not ready; "" when it is."""
        if self.state == "failed":
            return self._said(f"has given up: {self.error}")
        if self.state != "running":
            return self._said(_WORDS[self.state])
        if self.connected < self.workers:
            why = f" ({self.failure})" if self.failure else ""
            return self._said(f"has {self.connected} of {self.workers} workers connected{why}")
        return ""

    def _said(self, words: str) -> str:
        where = "" if self.process is None else f"process {self.process}: "
        return f"{where}{self.name} {words}"

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return attrs.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**{**facts, "counters": Counters(**facts["counters"])})


@attrs.frozen
class Health:
    """Consumers at one moment. `faults` are reasons besides theirs for not being ready."""

    consumers: tuple[ConsumerHealth, ...]
    faults: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether every worker of every consumer is connected."""
        return bool(self.consumers) and not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not ready."""
        return (*self.faults, *(one.reason for one in self.consumers if one.reason))

    @property
    def total(self) -> Counters:
        """The counters of all consumers together."""
        return total_of(one.counters for one in self.consumers)

    @classmethod
    def of(cls, parts: Iterable[Health]) -> Self:
        """All of them as one."""
        each = tuple(parts)
        consumers = [one for part in each for one in part.consumers]
        return cls(tuple(consumers), tuple(fault for part in each for fault in part.faults))


class Observed(Protocol):
    """What can be asked how it is: a container, a group, processes."""

    def health(self) -> Health:
        """How it is at this moment. From any thread; holds nobody up."""


def total_of(counters: Iterable[Counters]) -> Counters:
    """The sum, field by field."""
    each = tuple(counters)
    names = [field.name for field in attrs.fields(Counters)]
    return Counters(**{name: sum(getattr(one, name) for one in each) for name in names})
