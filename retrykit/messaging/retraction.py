"""What becomes of the attempts that are in hand when a container stops at once, and nothing can interrupt a thread.

A process that is told to stop is no crash, and what it does not finish is no failed attempt. But "attempt n is running"
is in the histories, where the next process would take it for a crash. So whoever stops takes the entries back, while
the connections are still there: once they are gone the messages are delivered to others, who look into the histories.
From then on a handler that returns after all has been cancelled, as a coroutine would have been: its work is rolled
back, and what it raises is not counted. One that has returned before is left to come to its end by itself.

Nobody waits long for any of it. A store that hangs, or a handler that has locked the database in which its history is,
leaves an entry where it is, and that is logged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from retrykit.loops import retract
from retrykit.messaging.logs import in_a_line

if TYPE_CHECKING:
    from retrykit.messaging.delivery import Delivery

PATIENCE: Final = 1.0
"""So many seconds the stop waits for entries to be withdrawn, and once more for deliveries that end by themselves."""

_BACK: Final = "stopped at once; given back without a failed attempt: %s"
_LATE: Final = "stopped at once; given back, but not known in time to be withdrawn, so it may count as a crash: %s"
_FAILED: Final = "message %r: given back, but its attempt could not be withdrawn, so it may count as a crash: %s"

_log = logging.getLogger("retrykit.messaging")


class Retraction:
    """The deliveries that the workers of a container have in hand, and what was taken back of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._over = False
        self._in_hand: set[Delivery] = set()
        self._begun: set[Delivery] = set()
        self._looked_after: set[Delivery] = set()
        self._withdrawn: set[Delivery] = set()
        self._told: set[Delivery] = set()

    def take(self, delivery: Delivery) -> None:
        """A worker has it in hand, until `leave`. Once all is over, no handler begins."""
        self._in_hand.add(delivery)
        if self._over:
            delivery.cut()

    def leave(self, delivery: Delivery) -> None:
        """It has come to its end."""
        self._in_hand.discard(delivery)
        if self._over:
            with self._changed:
                self._changed.notify_all()

    def withdraw(self) -> None:
        """Cut off what runs, and take back what the histories say of it: when it returns, or `PATIENCE` is over.

        Each in a thread of its own: one that hangs holds up no other.
        """
        self._over = True
        with self._changed:
            fresh = self._in_hand.copy() - self._begun
            self._begun |= fresh
        for delivery in fresh:
            threading.Thread(target=self._look_after, args=(delivery,), name="retrykit-withdraws", daemon=True).start()
        self._wait(lambda: fresh <= self._looked_after)

    def _look_after(self, delivery: Delivery) -> None:
        withdrawn = False
        fault: BaseException | None = None
        try:
            if delivery.cut():
                assert delivery.context is not None  # noqa: S101 - its handler runs
                fault = retract(delivery.work.template, delivery.context)
                withdrawn = fault is None
        except BaseException as error:  # noqa: BLE001 - a thread ends here, and what it says is logged
            fault = error
        with self._changed:
            self._looked_after.add(delivery)
            if withdrawn:
                self._withdrawn.add(delivery)
            if fault is not None:
                self._told.add(delivery)
                _log.error(_FAILED, delivery.message.key, in_a_line(fault))
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait for what comes to its end by itself, for `PATIENCE` at most, and tell what has not."""
        self._wait(lambda: not self._in_hand.copy() - self._withdrawn - self._told)
        with self._changed:
            back, late = self._withdrawn - self._told, self._in_hand.copy() - self._withdrawn - self._told
            self._told |= back | late
        _tell(_BACK, back)
        _tell(_LATE, late)

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(done, PATIENCE)


def _tell(text: str, deliveries: Iterable[Delivery]) -> None:
    if keys := sorted(repr(delivery.message.key) for delivery in deliveries):
        _log.warning(text, ", ".join(keys))
