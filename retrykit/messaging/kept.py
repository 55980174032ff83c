"""Deliveries that stay in hand until they are due again, while others of the same session go on."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

import attrs

from retrykit.message import Message


@attrs.define(eq=False)
class Kept:
    """What one session keeps, by when it is due."""

    _heap: list[tuple[float, int, Message]] = attrs.field(factory=list, init=False)
    _numbers: itertools.count[int] = attrs.field(factory=itertools.count, init=False)

    def keep(self, message: Message, delay: float) -> None:
        """Have a delivery again after `delay` seconds."""
        again = attrs.evolve(message, redelivered=True)
        heapq.heappush(self._heap, (time.monotonic() + delay, next(self._numbers), again))

    def due(self, is_in_hand: Callable[[Message], bool]) -> Message | None:
        """The first that is due; what is in hand no more, because its subscription was left, comes from the broker."""
        while self._heap and self._heap[0][0] <= time.monotonic():
            message = heapq.heappop(self._heap)[2]
            if is_in_hand(message):
                return message
        return None

    def wait(self, limit: float | None) -> float | None:
        """Seconds until something is due, or until `limit` on the monotonic clock; None: there is neither."""
        if not self._heap and limit is None:
            return None
        first = self._heap[0][0] if self._heap else None
        ends = [end for end in (first, limit) if end is not None]
        # The longest wait that there is: longer ones are an error.
        return min(max(0.0, min(ends) - time.monotonic()), threading.TIMEOUT_MAX) if ends else None
