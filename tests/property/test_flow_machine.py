"""The promises, kept by templates that a machine drives beside a short model, with faults at every step.

In threads, on asyncio and on trio. `World` is what the templates run in, `Prediction` says what must happen while the
store works, `Watcher` what may never happen.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import attrs
import pytest
from hypothesis import Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from retrykit import (
    BackOffInterruptedError,
    ExhaustedRetryError,
    ExponentialBackOffPolicy,
    FixedBackOffPolicy,
    NoBackOffPolicy,
    RecoveryFailedError,
    RetryTemplate,
    SimpleRetryPolicy,
    TerminatedRetryError,
)
from retrykit.cache import canonical_key
from retrykit.errors import AttemptsInFlightError, CommitInDoubtError
from tests.property.model import Item, Prediction, Watcher, flights_of
from tests.property.world import ELSEWHERE, Failed, Fatal, Script, World, dead_owner, renamed


@pytest.fixture(autouse=True)
def _without_logs():
    """Faults are logged, by the thousand here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


NAMES = ("orders", "orders.eu")
KEYS = ("m-1", 7)
HARMLESS = ("open", "on_success", "on_error", "on_recover", "close", "time", "monotonic")

works = st.sampled_from(
    (
        "ok",
        "fails",
        "fails",
        "fails",
        "fails fatally",
        "vetoes and fails",
        "vetoes ok",
        "is cancelled",
        "vetoes, is cancelled",
    )
)
recoveries = st.sampled_from(("ok", "fails", "is cancelled", "vetoes and fails"))
transactions = st.sampled_from(
    (
        "commits",
        "commits",
        "does not begin",
        "does not commit",
        "does not roll back",
        "in doubt, done",
        "in doubt, not done",
    )
)
harmless_faults = st.dictionaries(
    st.tuples(st.sampled_from(HARMLESS[:5]), st.integers(0, 4)), st.just("raises"), max_size=3
)
# A clock that cannot be read the first time has a test of its own: what it falls back on is not this world's time.
clock_faults = st.dictionaries(
    st.tuples(st.sampled_from(("time", "monotonic")), st.integers(1, 4)), st.just("raises"), min_size=1, max_size=2
)
store_faults = st.dictionaries(
    st.tuples(st.sampled_from(("save", "save", "remove")), st.integers(0, 4)),
    st.sampled_from(("raises", "raises", "raises when it is done", "fails", "vetoes", "settles", "completes")),
    max_size=3,
) | st.dictionaries(
    st.tuples(st.sampled_from(("load", "save", "remove")), st.integers(0, 4)), st.just("raises"), max_size=3
)
deaths = st.dictionaries(
    st.tuples(st.just("death"), st.integers(0, 14)), st.sampled_from(("here", "elsewhere")), min_size=1, max_size=1
)
listener_vetoes = st.dictionaries(
    st.tuples(st.sampled_from(("open", "on_error")), st.integers(0, 2)), st.just("vetoes"), max_size=1
)


@st.composite
def scripts(draw: Any, faults: Any) -> Script:
    return Script(
        name=draw(st.sampled_from(NAMES)),
        key=draw(st.sampled_from(KEYS)),
        runner=draw(st.sampled_from(("sync", "asyncio", "trio"))),
        redelivered=draw(st.sampled_from((None, True, False))),
        transactional=draw(st.booleans()),
        in_place=draw(st.booleans()),
        recover_now=draw(st.booleans()),
        works=tuple(draw(st.lists(works, min_size=1, max_size=4))),
        recoveries=draw(st.none() | st.lists(recoveries, min_size=1, max_size=3).map(tuple)),
        transactions=tuple(draw(st.lists(transactions, max_size=3))),
        pause=draw(st.sampled_from(("is spent", "is spent", "raises", "is cancelled"))),
        faults=draw(faults),
    )


@attrs.frozen
class Rules:
    """What all templates of one run have in common."""

    limit: int
    back_off: Any
    remember: float | None
    joins: bool
    awaits: bool
    fronted: bool

    def delay(self, failures: int) -> float:
        """The pause after so many failures, worked out here once more."""
        if isinstance(self.back_off, FixedBackOffPolicy):
            return self.back_off.interval
        return 0.0 if isinstance(self.back_off, NoBackOffPolicy) else min(8.0, 2.0 ** (failures - 1))


class Machine:
    """The world, the model, and the commands that change both. Runs of the same commands leave the same trace."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.watcher = Watcher()
        policy = SimpleRetryPolicy(rules.limit, no_retry_for=Fatal)
        rest = (rules.remember, rules.joins, rules.awaits, rules.fronted)
        self.world = World(policy, rules.back_off, self.watcher, *rest)
        self.items: dict[tuple[str, Any], Item] = {}
        self.timely = True

    def close(self) -> None:
        self.world.close()

    def now(self) -> float:
        return self.world.clock.passed + self.world.clock.offset

    def operator(self, name: str) -> RetryTemplate:
        """A template with which somebody looks at the store from outside."""
        return RetryTemplate(name=name, context_cache=self.world.store.real)

    def stored(self, name: str, key: Any) -> Any:
        return self.world.store.real.load(canonical_key(name, key))

    def deliver(self, script: Script) -> None:
        """A delivery: predicted if its faults are harmless, watched in any case."""
        item = self.items.setdefault((script.name, script.key), Item())
        if item.known and script.redelivered is False:
            script = attrs.evolve(script, redelivered=None)
        calm = all(place in HARMLESS for place, _ in script.faults)
        timely = not any(place in ("time", "monotonic") for place, _ in script.faults)
        self.timely = self.timely and timely
        self.watcher.begin(item, script, self.rules.limit, canonical_key(script.name, script.key))
        predicted = attrs.evolve(item)
        rules = self.rules
        prediction = Prediction(
            predicted,
            script,
            rules.limit,
            self.now(),
            rules.remember,
            rules.joins and script.transactional,
            rules.delay,
        )
        expected = prediction.outcome()
        outcome = self.world.deliver(script)
        stored = self.stored(script.name, script.key)
        if outcome[0] == "died":
            self.bury(next(iter(script.faults.values())))
        self.watcher.end(outcome, stored, certain=calm)
        self.check_outcome(outcome, calm=calm)
        if calm and "vetoes" not in script.faults.values():
            self.check_events(prediction.events, timely=timely)
            self.check_prediction(expected, outcome)
            predicted.ran, predicted.uncounted, predicted.fence = item.ran, item.uncounted, item.fence
            self.check_stored(predicted, stored, timely=timely)
        self.learn(item, self.stored(script.name, script.key))

    def check_events(self, expected: list[Any], *, timely: bool) -> None:
        if timely:
            assert self.watcher.events == expected
            return
        untimed = [event for event in self.watcher.events if isinstance(event, str)]
        assert untimed == [event for event in expected if isinstance(event, str)], (
            "P11: a clock's fault changed what was done"
        )
        longest = max((event[1] for event in self.watcher.events if not isinstance(event, str)), default=0.0)
        allowed = max((event[1] for event in expected if not isinstance(event, str)), default=0.0)
        assert longest <= max(8.0, allowed), "P11: a clock's fault made a pause of it"

    def check_outcome(self, outcome: tuple[str, Any], *, calm: bool) -> None:
        """Whatever else failed: the caller gets the work's outcome, or one of our errors chained to it."""
        kind, value = outcome
        world = self.world
        if kind == "cancelled":
            assert self.watcher.cancelled
            assert world.cancelled is None or value is world.cancelled, (
                "P9: another exception than the one that cancelled"
            )
        if kind == "error" and not any(value is failure for failure in world.failures):
            ours = (
                ExhaustedRetryError,
                TerminatedRetryError,
                RecoveryFailedError,
                BackOffInterruptedError,
                CommitInDoubtError,
            )
            assert type(value) in (*ours, AttemptsInFlightError), "P11: a fault became the outcome"
            if calm and world.failures and isinstance(value, ExhaustedRetryError):
                assert value.__cause__ is world.failures[-1], "P8: our error is not chained to the last failure"

    def check_prediction(self, expected: str, outcome: tuple[str, Any]) -> None:
        kind, value = outcome
        match expected:
            case "work" | "substitute":
                assert outcome == ("value", expected)
            case "duplicate":
                assert outcome == ("value", None)
            case "cancelled":
                assert kind == "cancelled"
            case "user":
                assert value is self.world.failures[-1], "P8: the user's exception is another object"
                frames = [line for line in self.frames(value) if "/retrykit/" in line]
                assert len(frames) <= 2 or "work" not in str(value), "P8: more than two frames of the library"
            case _:
                assert (kind, type(value)) == ("error", _ERRORS[expected])

    def frames(self, error: BaseException) -> list[str]:
        trace, found = error.__traceback__, []
        while trace is not None:
            found.append(trace.tb_frame.f_code.co_filename)
            trace = trace.tb_next
        return found

    def check_stored(self, item: Item, stored: Any, *, timely: bool) -> None:
        """Exactly what is to be remembered is stored."""
        if stored is None:
            assert item.failures == 0, "P2: failures were forgotten"
            assert item.veto is None, "P4: a veto was forgotten"
            assert item.done_until is None
            return
        history = stored.snapshot
        if item.done_until is not None:
            assert "completed_at" in history
            return
        assert history["retry_count"] == item.failures, "P5: the count is not exact"
        assert history.get("veto") == item.veto, "P4: the veto is another"
        assert len(history.get("in_flight", ())) == len(item.flights), "a reservation was left behind"
        if timely:
            still_due = [due for due in (history.get("not_before"), item.due) if (due or 0) > self.now()]
            assert len(set(still_due)) == len(still_due) // 2, "another pause is due"

    def learn(self, item: Item, stored: Any) -> None:
        """What is not certain after faults is read from the store; from here on it must hold."""
        if stored is None:
            item.settle(None)
            return
        history = stored.snapshot
        item.known = True
        if "completed_at" in history:
            item.settle(history["expires_at"])
            return
        item.done_until = None
        item.failures = history["retry_count"]
        item.veto = history.get("veto")
        item.due, item.delay = history.get("not_before"), history.get("last_delay")
        item.fatal = history.get("last_error", {}).get("type", "").endswith(".Fatal")
        item.flights = flights_of(history)

    def bury(self, where: str) -> None:
        """The process that died was another one than ours: on this machine, or elsewhere."""
        owner = dead_owner() if where == "here" else ELSEWHERE
        real = self.world.store.real
        for key, stored in real.items():
            real.save(key, json.loads(renamed(json.dumps(stored.snapshot), owner)), stored.version)

    # -- what else happens in the world

    def wait(self, seconds: float) -> None:
        self.world.clock.passed += seconds

    def jump(self, seconds: float) -> None:
        self.world.clock.offset += seconds

    def veto(self, name: str, key: Any) -> None:
        item = self.items.setdefault((name, key), Item())
        if item.done_until is None:
            self.operator(name).veto(key, "by an operator")
            item.veto, item.known = "by an operator", True

    def withdraw(self, name: str, key: Any) -> None:
        item = self.items.setdefault((name, key), Item())
        if item.done_until is None:
            self.operator(name).withdraw_veto(key)
            item.veto, item.known, item.recovered = None, True, False

    def forget(self, name: str, key: Any) -> None:
        self.operator(name).forget(key)
        self.items[name, key] = Item()


_ERRORS = {
    "exhausted": ExhaustedRetryError,
    "terminated": TerminatedRetryError,
    "in flight": AttemptsInFlightError,
    "recovery failed": RecoveryFailedError,
    "interrupted": BackOffInterruptedError,
    "doubt": CommitInDoubtError,
    "user": Failed,
}

names, keys = st.sampled_from(NAMES), st.sampled_from(KEYS)


class FlowMachine(RuleBasedStateMachine):
    """Random commands; at the end the same commands once more, in another world."""

    @initialize(
        limit=st.integers(1, 4),
        back_off=st.sampled_from((NoBackOffPolicy(), FixedBackOffPolicy(5.0), ExponentialBackOffPolicy(1.0, 2.0, 8.0))),
        remember=st.none() | st.just(60.0),
        joins=st.booleans(),
        awaits=st.booleans(),
        fronted=st.booleans(),
    )
    def start(self, **rules: Any) -> None:
        self.rules = Rules(**rules)
        self.machine = Machine(self.rules)
        self.commands: list[tuple[str, tuple[Any, ...]]] = []
        self.broken = False

    def command(self, name: str, *arguments: Any) -> None:
        self.commands.append((name, arguments))
        before = len(self.machine.world.trace)
        self.broken = True
        try:
            getattr(self.machine, name)(*arguments)
            self.broken = False
        finally:
            note("\n".join(self.machine.world.trace[before:]))

    @rule(script=scripts(harmless_faults))
    def deliver(self, script: Script) -> None:
        self.command("deliver", script)

    @rule(script=scripts(store_faults))
    def deliver_while_the_store_fails(self, script: Script) -> None:
        self.command("deliver", script)

    @precondition(lambda self: self.rules.limit == 3)
    @rule(script=scripts(clock_faults))
    def deliver_while_the_clock_fails(self, script: Script) -> None:
        self.command("deliver", script)

    @rule(script=scripts(deaths))
    def die_in_a_delivery(self, script: Script) -> None:
        self.command("deliver", script)

    @rule(script=scripts(listener_vetoes))
    def deliver_to_listeners_that_veto(self, script: Script) -> None:
        self.command("deliver", script)

    @rule(seconds=st.sampled_from((0.5, 3.0, 59.0, 400.0)))
    def wait(self, seconds: float) -> None:
        self.command("wait", seconds)

    @rule(seconds=st.sampled_from((-86_400.0, -2.0, 2.0, 86_400.0)))
    def jump(self, seconds: float) -> None:
        self.command("jump", seconds)

    @rule(name=names, key=keys)
    def veto(self, name: str, key: Any) -> None:
        self.command("veto", name, key)

    @rule(name=names, key=keys)
    def withdraw(self, name: str, key: Any) -> None:
        self.command("withdraw", name, key)

    @rule(name=names, key=keys)
    def forget(self, name: str, key: Any) -> None:
        self.command("forget", name, key)

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        self.machine.close()
        # An exception on its way (Hypothesis ends runs by one) would be the context of every error made here.
        # A clock that cannot be read is replaced by the machine's, which does not stand still.
        if self.broken or not self.machine.timely or sys.exc_info()[0] is not None:
            return
        again = Machine(self.rules)
        try:
            for name, arguments in self.commands:
                getattr(again, name)(*arguments)
            first = [
                pair for pair in zip(again.world.trace, self.machine.world.trace, strict=False) if len(set(pair)) > 1
            ][:1]
            note("\n".join(line for pair in first for line in pair))
            assert again.world.trace == self.machine.world.trace, "P13: the same commands left another trace"
        finally:
            again.close()


TestPromises = FlowMachine.TestCase
TestPromises.settings = settings(max_examples=60, stateful_step_count=25, phases=set(Phase) - {Phase.explain})
