"""What a worker process has to know, told through its standard input: arguments are for everybody to see."""

from __future__ import annotations

import json
from typing import Self

import attrs

from retrykit.cli.demo.plan import MAX_ATTEMPTS

RUN = "demo-run"
FATE = "demo-fate"


@attrs.frozen(kw_only=True)
class Job:
    """One run of the demo.

    `broker` is the URL with the queue as its path, `database` that of the database, `events` the path of the file of
    events, `run` what tells the messages of this run from all others.
    """

    broker: str = attrs.field(repr=False)
    database: str = attrs.field(repr=False)
    events: str
    run: str
    max_attempts: int = MAX_ATTEMPTS

    @property
    def name(self) -> str:
        """The template's name: histories and parked items are kept under it."""
        return f"demo-{self.run}"

    def to_json(self) -> str:
        """One line."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """What `to_json` wrote."""
        return cls(**json.loads(line))
