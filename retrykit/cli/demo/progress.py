"""What is known of a run while it goes on: counted from the workers' events and from the deaths of their processes."""

from __future__ import annotations

from collections import Counter

import attrs

from retrykit.cli.demo import events
from retrykit.cli.demo.events import Event
from retrykit.cli.demo.supervisor import Death


@attrs.define
class Progress:
    """Totals so far. `attempts` and `in_doubt` count per message, `finished` has those known to be done or parked.

    `in_hand`: the message that a process is working on, and the number of the attempt.
    """

    total: int
    attempts: Counter[str] = attrs.field(factory=Counter)
    in_doubt: Counter[str] = attrs.field(factory=Counter)
    finished: set[str] = attrs.field(factory=set)
    rollbacks: int = 0
    parked: int = 0
    deaths: int = 0
    in_hand: dict[int, tuple[str, int]] = attrs.field(factory=dict)
    _ids: dict[str, str] = attrs.field(factory=dict)

    def take(self, event: Event) -> str | None:
        """Count an event; the line that tells of it, if it is worth one."""
        if event["event"] == events.ATTEMPT:
            self._ids[event["key"]] = event["id"]
            self.attempts[event["id"]] += 1
            self.in_hand[event["pid"]] = (event["id"], event["attempt"])
            return None
        self.in_hand.pop(event["pid"], None)
        id_ = self._ids.get(event["key"])
        # Without an attempt it is a message that is none of this run's.
        return None if id_ is None else self._ended(id_, event)

    def _ended(self, id_: str, event: Event) -> str | None:
        attempt, words = event["attempt"], None
        match event["event"]:
            case events.FAILED:
                self.rollbacks += 1
                return f"{id_}: attempt {attempt} rolled back: {event['error']}: {event['decision']}"
            case events.IN_DOUBT:
                self.in_doubt[id_] += 1
                return f"{id_}: the broker did not confirm; the message will come again, nothing is counted"
            case events.PARKED:
                self.parked += 1
                words = f"{id_}: parked: {event['decision']}"
            case events.DUPLICATE:
                words = f"{id_}: delivered again although it is done: acknowledged without the handler"
            case events.DONE if attempt > 1:
                words = f"{id_}: attempt {attempt} succeeded"
        self.finished.add(id_)
        return words

    def bury(self, death: Death) -> str:
        """Count a death; the line that tells of it."""
        self.deaths += 1
        in_hand = self.in_hand.pop(death.pid, None)
        what = "between two messages" if in_hand is None else f"in attempt {in_hand[1]} of {in_hand[0]}"
        return f"process {death.pid} ended by {death.signal} {what}: another one starts"

    @property
    def runaway(self) -> str | None:
        """A message that was attempted so often that waiting for the end is pointless."""
        return next((id_ for id_, count in self.attempts.most_common(1) if count > self._far_too_many), None)

    @property
    def _far_too_many(self) -> int:
        return 20 + 2 * sum(self.in_doubt.values())
