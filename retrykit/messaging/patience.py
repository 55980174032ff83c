"""Pauses for messages that the next delivery would not bring any further: longer from one to the next."""

from __future__ import annotations

import threading
from typing import Final

import attrs

from retrykit.backoff import BackOffPolicy
from retrykit.clock import Clock
from retrykit.context import RetryContext

_KEPT: Final = 10_000


@attrs.define
class _Debt:
    """How often a message was withheld without a break, and the pause that nobody has taken for it yet."""

    times: int = 0
    pause: float = 0.0
    last: float | None = None


@attrs.define(eq=False)
class Patience:
    """What all workers of a container know of the messages that were withheld.

    The pause is taken with the delivery in hand, so that the source gives the message to nobody else: one message holds
    up one consumer. When the connection is lost in the meantime, it is still due at the message's next delivery.
    """

    back_off: BackOffPolicy
    _debts: dict[object, _Debt] = attrs.field(factory=dict, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def withhold(self, name: str, key: object, at_least: float) -> float:
        """Note that a message was withheld once more; the pause that is due for it."""
        with self._lock:
            debt = self._debts.pop(key, None) or _Debt()
            # As the last one: the first is the one that was seen longest ago.
            self._debts[key] = debt
            while len(self._debts) > _KEPT:
                del self._debts[next(iter(self._debts))]
            debt.times += 1
            facts = {"format": 1, "name": name, "retry_count": debt.times, "last_delay": debt.last}
            debt.last = self.back_off.delay(RetryContext.from_snapshot(facts))
            debt.pause = max(debt.last, at_least)
            return debt.pause

    def times(self, key: object) -> int:
        """How often a message was withheld without a break."""
        with self._lock:
            debt = self._debts.get(key)
            return 0 if debt is None else debt.times

    def wait(self, key: object, clock: Clock) -> bool:
        """Take the pause that is due for a message; False when it was cut short, and so stays due."""
        # Most messages owe nothing, and most of the time none does.
        debt = self._debts.get(key) if self._debts else None
        if debt is None or not debt.pause:
            return True
        try:
            clock.sleep(debt.pause)
        except InterruptedError:
            return False
        debt.pause = 0.0
        return True

    def forgive(self, key: object) -> None:
        """The message came to an end, or to a failed attempt that counts."""
        if self._debts:
            with self._lock:
                self._debts.pop(key, None)
