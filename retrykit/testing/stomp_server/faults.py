"""Faults that a test orders in advance."""

from __future__ import annotations

from collections import Counter
from typing import Literal

Moment = Literal["before_commit", "before_receipt", "after_receipt"]


class DroppedError(Exception):
    """The connection ends here and now, without a word to the client."""


class Faults:
    """What goes wrong next.

    A moment is one of: `before_commit` (COMMIT came, nothing is done), `before_receipt` (COMMIT is done and durable,
    but the client never hears of it), `after_receipt` (the receipt is sent, then the connection ends).
    """

    def __init__(self) -> None:
        """Order nothing."""
        self.receipt_delay = 0.0
        self._ordered: Counter[Moment] = Counter()

    def order(self, moment: Moment, times: int) -> None:
        """Drop the connection at this moment of the next `times` COMMITs, whoever sends them."""
        self._ordered[moment] += times

    def strikes(self, moment: Moment) -> bool:
        """Whether the connection ends at this moment; uses up one order."""
        if not self._ordered[moment]:
            return False
        self._ordered[moment] -= 1
        return True

    def clear(self) -> None:
        """Take back everything ordered."""
        self.receipt_delay = 0.0
        self._ordered.clear()
