"""What must hold after a run of consumers, whatever befell them: what they wrote, the database and the queues say it.

Each rule gives what broke it. What a broker cannot do is a fact of the run (`atomic`, `forgets`), not an exception in a
rule: then the rule says how much more there may be, and why.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import attrs

from tests.fault.broker_consumer import MAX_ATTEMPTS, failures, is_poison
from tests.fault.ledger import Ledger


@attrs.frozen
class Copy:
    """A message that lay in a queue at the end: the number that it is about, its stable id, its count of attempts."""

    number: int
    id: str
    attempts: int = 0


@attrs.define
class Delivery:
    """One delivery to one consumer, and the events that it wrote of it."""

    again: bool
    events: Counter[str] = attrs.field(factory=Counter)

    @property
    def unfinished(self) -> bool:
        """Neither acknowledged nor given back, as far as its consumer lived to know."""
        return not (self.events["acked"] or self.events["returned"])

    @property
    def unsettled(self) -> bool:
        """Acknowledged by a process that died before it could store that."""
        return self.events["acked"] > self.events["closed"]

    @property
    def killed(self) -> bool:
        """Its attempt was never heard of again."""
        return self.unfinished and self.events["attempt"] > self.events["fail"] + self.events["doubt"]


@attrs.define(kw_only=True)
class MessageLedger:
    """A run that is over. `effects`: rows of each number. `sent`, `parked`: what lay in those queues; `left`: in the
    queue itself.

    `atomic`: the broker sends and acknowledges in one step. `forgets`: how often it may have forgotten what was
    acknowledged. `journaled`: every attempt was stored before it began.
    """

    numbers: Sequence[int]
    ledger: Ledger
    effects: Counter[int]
    sent: list[Copy]
    parked: list[Copy]
    left: int
    atomic: bool
    forgets: int = 0
    journaled: bool = True

    @functools.cached_property
    def deliveries(self) -> dict[int, list[Delivery]]:
        """The deliveries of each number, in order."""
        found: dict[tuple[int, int], Delivery] = {}
        by_number: dict[int, list[Delivery]] = defaultdict(list)
        for event in self.ledger.events:
            if "d" not in event:
                continue
            name = event["w"], event["d"]
            if event["e"] == "receive":
                found[name] = Delivery(event["again"])
                by_number[event["k"]].append(found[name])
            else:
                found[name].events[event["e"]] += 1
        return by_number

    def count(self, number: int, event: str) -> int:
        """How often this was written of a number."""
        return sum(delivery.events[event] for delivery in self.deliveries[number])

    def unfinished(self, number: int) -> int:
        """How many deliveries of a number ended with their connection or process."""
        return sum(delivery.unfinished for delivery in self.deliveries[number])

    def violations(self) -> list[str]:
        """All that does not hold."""
        once = [found for number in self.numbers for found in self._of(number)]
        return [*once, *self._ids(), *self._of_the_whole()]

    def _of(self, number: int) -> Iterator[str]:
        rules = (self._effect, self._sends, self._parking, self._attempts, self._redeliveries)
        for rule in rules:
            for what in rule(number):
                yield f"{number}: {what}; {self.deliveries[number]}"

    # -- of each message

    @functools.cached_property
    def _parked(self) -> Counter[int]:
        return Counter(copy.number for copy in self.parked)

    @functools.cached_property
    def _sent(self) -> Counter[int]:
        return Counter(copy.number for copy in self.sent)

    def _effect(self, number: int) -> Iterator[str]:
        """Nothing is lost, and every effect happens once: on every broker."""
        rows, copies = self.effects[number], self._parked[number]
        if not rows and not copies:
            yield "it is lost"
        if rows > 1 or (rows and copies):
            yield f"{rows} effects, and {copies} times parked"

    def _sends(self, number: int) -> Iterator[str]:
        """What the handler sent is there if, and only if, its effect is."""
        yield from self._copies("what it sent", self._sent[number], number, wanted=bool(self.effects[number]))

    def _parking(self, number: int) -> Iterator[str]:
        """Poison is parked; other messages only if their attempts were used up by deaths."""
        times = self._parked[number]
        yield from self._copies("the parked copy", times, number, wanted=is_poison(number) or times > 0)
        if times and not is_poison(number) and self._spent(number) < MAX_ATTEMPTS:
            yield f"parked after {self._spent(number)} of {MAX_ATTEMPTS} attempts"
        wrong = {copy.attempts for copy in self.parked if copy.number == number} - {MAX_ATTEMPTS}
        if wrong:
            yield f"its parked copy says {wrong} attempts, not {MAX_ATTEMPTS}"

    def _copies(self, what: str, times: int, number: int, *, wanted: bool) -> Iterator[str]:
        # Where sends and acknowledgement are two steps, and an acknowledgement may be forgotten, each delivery that was
        # cut short before all of it was known may have sent what the next one sends again.
        again = sum(delivery.unfinished or delivery.unsettled for delivery in self.deliveries[number])
        most = 1 if self.atomic else 1 + again
        if not wanted and times:
            yield f"{what} is there {times} times, though it was rolled back"
        if wanted and not 1 <= times <= most:
            yield f"{what} is there {times} times, not 1 to {most}"

    def _spent(self, number: int) -> int:
        """How many attempts may have been counted: those that failed, and whoever died before telling."""
        return self.count(number, "fail") + self.unfinished(number)

    def _attempts(self, number: int) -> Iterator[str]:
        """The limit holds, over all processes; what is in doubt, or was never stored, cannot count."""
        doubts = self.count(number, "doubt")
        unjournaled = 0 if self.journaled else sum(one.killed and not one.again for one in self.deliveries[number])
        attempts = self.count(number, "attempt")
        if attempts > MAX_ATTEMPTS + doubts + unjournaled:
            yield f"{attempts} attempts, though {doubts} were in doubt and {unjournaled} not journaled"
        if attempts < failures(number) - self.unfinished(number):
            yield f"only {attempts} attempts"

    def _redeliveries(self, number: int) -> Iterator[str]:
        """What was acknowledged does not come again."""
        if self.count(number, "acked") > 1 + self.forgets:
            yield f"acknowledged {self.count(number, 'acked')} times"

    # -- of all together

    def _ids(self) -> Iterator[str]:
        """One message has one id, wherever and however often it was sent; two have two."""
        for copies in (self.sent, self.parked):
            yield from _one_to_one({(copy.number, copy.id) for copy in copies})

    def _of_the_whole(self) -> Iterator[str]:
        if self.left:
            yield f"{self.left} messages are left in the queue"
        # No storm: a redelivery has a failed attempt for its reason, or a connection that ended, with what was in hand.
        connections = self.ledger.count("connected")
        cut_short = sum(one.unfinished for one in self._all)
        if max(cut_short, self.needless) > connections:
            yield f"{connections} connections, and {cut_short} deliveries cut short, {self.needless} given back untried"
        for event in self.ledger.events:
            if event["e"] == "log" and event["level"] == "CRITICAL":
                yield event["text"]

    # -- what can be read off

    @property
    def needless(self) -> int:
        """Deliveries that were given back without a failed attempt: somebody else had the message, or was to stop."""
        return sum(one.events["returned"] > one.events["fail"] for one in self._all)

    @property
    def _all(self) -> Iterator[Delivery]:
        return (one for deliveries in self.deliveries.values() for one in deliveries)

    def summary(self) -> dict[str, int]:
        """How much happened, for whoever reads the output of a run."""
        total: Counter[str] = Counter()
        for delivery in self._all:
            total.update(delivery.events)
            total["deliveries"] += 1
            total["unfinished"] += delivery.unfinished
        return {
            **total,
            "connections": self.ledger.count("connected"),
            "needless": self.needless,
            "effects": self.effects.total(),
            "sent twice": sum(self._sent.values()) - len(self._sent),
            "parked": len(self._parked),
            "parked twice": sum(self._parked.values()) - len(self._parked),
        }


def _one_to_one(pairs: Iterable[tuple[int, str]]) -> Iterator[str]:
    ids, numbers = defaultdict(set), defaultdict(set)
    for number, id_ in pairs:
        ids[number].add(id_)
        numbers[id_].add(number)
    yield from (f"{number}: sent under the ids {found}" for number, found in ids.items() if len(found) > 1)
    yield from (f"{id_}: the id of {found}" for id_, found in numbers.items() if len(found) > 1)
