"""What a listener container counts for its observers."""

from __future__ import annotations

import threading
from typing import Final

import attrs


@attrs.frozen(kw_only=True)
class Counters:
    """Totals since the container started. Every delivery ends in exactly one of the fields below `recovered`."""

    generations: int = 0
    """Connections made."""
    stale_frames: int = 0
    """Deliveries dropped because their subscription was over."""
    received: int = 0
    """Deliveries handed to the template."""
    redelivered: int = 0
    """Those that the source said it delivered before; a part of `received`."""
    postponed: int = 0
    """Those that were left to the broker to wait there for the next attempt; a part of the fields below."""
    recovered: int = 0
    """Those that a recovery brought to their end, wherever it put the message; a part of the fields below."""
    acknowledged: int = 0
    """The handler succeeded, or a recovery of the user's own that does not say what it has done."""
    duplicates: int = 0
    """Completed before: acknowledged without the handler."""
    parked: int = 0
    """Put aside for a person: at the broker (`park`), in a database (`park_in_transaction`), or wherever a recovery of
    the user's own says (`Parked`)."""
    republished: int = 0
    discarded: int = 0
    rolled_back: int = 0
    """An attempt failed; the message went back to be delivered again."""
    withheld: int = 0
    """Given back without a failed attempt that counts: recovery failed or not given, the failure could not be stored,
    attempts elsewhere, or stopping."""
    in_doubt: int = 0
    """A commit was not confirmed; nothing was counted against the message."""


_NAMES: Final = tuple(field.name for field in attrs.fields(Counters))


@attrs.define(eq=False)
class Tally:
    """`Counters` that several threads add to."""

    _totals: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(_NAMES, 0), init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def add(self, **amounts: int) -> None:
        """Add to the named counters."""
        with self._lock:
            totals = self._totals
            for name, amount in amounts.items():
                totals[name] += amount

    def snapshot(self) -> Counters:
        """The totals at this moment."""
        with self._lock:
            return Counters(**self._totals)
