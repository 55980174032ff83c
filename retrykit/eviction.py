"""`Eviction`: what is known of an item whose history a bound of its store has dropped (see `retrykit.tombstone`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import attrs

from retrykit.tombstone import Bound
from retrykit.value import Value

_TOLD: Final = re.compile(r" \(\d+ failures? counted before its history was evicted at [^()]*\)")


@attrs.frozen(eq=False, repr=False)
class Eviction(Value):
    """That a bound of the store has dropped the history of an item: when, which bound, and how many failures it had.

    These failures still count. The descriptions of the errors and the user's attributes of that time are gone.
    """

    at: datetime
    by: Bound
    failures: int

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], failures: int) -> Eviction:
        """As a snapshot has it; `failures`: how many it has, unless that was noted. `ValueError` if it is damaged."""
        at, by, noted = fields["at"], fields["by"], fields.get("failures", failures)
        if by not in ("capacity", "time_to_live") or type(noted) is not int:
            msg = f"evicted is {dict(fields)!r:.80}"
            raise ValueError(msg)
        try:
            return cls(datetime.fromtimestamp(at, UTC), by, noted)
        except (OverflowError, OSError) as error:
            msg = f"evicted at {at!r:.80}"
            raise ValueError(msg) from error

    def to_json(self) -> dict[str, Any]:
        """The JSON form: the fields by name, `at` in seconds since the epoch."""
        return {"at": self.at.timestamp(), "by": self.by, "failures": self.failures}

    def told_in(self, reason: str) -> str:
        """The reason of a decision, with the word of this eviction in place of that of any before."""
        return f"{_TOLD.sub('', reason)} ({self})"

    def __str__(self) -> str:
        failures = "1 failure" if self.failures == 1 else f"{self.failures} failures"
        return f"{failures} counted before its history was evicted at {self.at.isoformat(' ', 'seconds')}, by {self.by}"
