"""Replays a scenario through retrykit's public API and writes down what happens, in the words of a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from math import isclose
from typing import Any

import attrs

from retrykit import (
    Clock,
    MapRetryContextCache,
    NoBackOffPolicy,
    RetryContext,
    RetryTemplate,
    SystemClock,
    TimeoutRetryPolicy,
    current_context,
)
from retrykit.cache import canonical_key
from retrykit.policy import every
from retrykit.template import short_cut

from . import build, errors
from .clock import SECOND, START, ScenarioClock, Timeline
from .listeners import Event, RecordingListener, attributes_of, set_attribute
from .loader import Json
from .series import whole_milliseconds

Callback = Callable[[RetryContext], Any]
NEGLIGIBLE = 1e-5
"""Seconds: instants are floats and whole microseconds, so a pause that was spent exactly may have so much left."""


@attrs.define(eq=False)
class Pauses:
    """Spends the pauses of one template: records them, moves the time, and fails where the scenario says so."""

    template: int
    spec: Json
    timeline: Timeline
    events: list[Event]
    failures: int = 0
    spent: int = 0

    def wait(self, due: float) -> None:
        """Spend a pause from outside, until `due` (seconds from the scenario's beginning)."""
        left = due - self.timeline.now / SECOND
        if left > NEGLIGIBLE:
            self.record(left)
            self.timeline.waited.append(due)

    def spend(self, seconds: float) -> None:
        """Spend a pause of the template."""
        due = self.timeline.now / SECOND + seconds
        # What was waited for from outside may have a rest, the fraction of a millisecond that spring-retry cuts off.
        if not any(isclose(due, waited, abs_tol=NEGLIGIBLE) for waited in self.timeline.waited):
            self.record(seconds)

    def record(self, seconds: float) -> None:
        """Write a pause down and move the time; `failures` says which member of the series it is."""
        milliseconds = whole_milliseconds(build.series_of(self.spec), seconds, self.failures)
        self.events.append(["sleep", self.template, milliseconds])
        fault = (self.spec.get("backoff") or {}).get("faults", {}).get(str(self.spent))
        self.spent += 1
        if fault is not None:
            raise errors.make(["InterruptedException", "interrupted"] if fault == "interrupt" else fault)
        self.timeline.now += milliseconds


def has_listeners(template: Json, *, short_cut: bool) -> bool:
    """Whether a template is given its listeners: those that only record would keep a driver from its short cut."""
    acts = any(script.get(kind) for script in template.get("listeners", ()) for kind in script)
    return acts or not short_cut


def keeps_time(policies: build.Policies, template: Json) -> bool:
    """Whether a template has pauses or deadlines, and so needs the scenario's clock."""
    pauses = not isinstance(build.back_off_of(template), NoBackOffPolicy)
    return pauses or any(isinstance(policy, TimeoutRetryPolicy) for policy in every(policies.of_template(template)))


class Replay:
    """A scenario's templates and clock. `call(spec)` makes the next call and gives its record.

    With `short_cut`, templates are made so that a driver may take it: idle listeners are left out, and the machine's
    own clock is used where the time does not matter.
    """

    def __init__(self, scenario: Json, *, short_cut: bool) -> None:
        self._short_cut = short_cut
        self._timeline = Timeline()
        self._events: list[Event] = []
        self._specs: list[Json] = scenario["templates"]
        self._pauses = [Pauses(index, spec, self._timeline, self._events) for index, spec in enumerate(self._specs)]
        self._policies = build.Policies(scenario.get("shared", {}))
        self._built: dict[int, RetryTemplate] = {}

    @cached_property
    def _caches(self) -> list[MapRetryContextCache]:
        return build.caches_of(self._specs)

    def call(self, spec: Json) -> dict[str, Any]:
        """The record of one call: events, result or what was raised, the caches after it, and the time."""
        with short_cut(self._short_cut):
            return self._recorded(spec)

    def _recorded(self, spec: Json) -> dict[str, Any]:
        self._events.clear()
        record: dict[str, Any] = {"events": []}
        if "external" in spec:
            self._act_from_outside(spec.get("t", 0), spec["external"])
        else:
            value, error = self._execute(spec)
            outcome = {"result": value} if error is None else {"raised": errors.describe(error)}
            record = {"events": [*self._events], **outcome}
        record |= {"cache": [build.entries_of(cache) for cache in self._caches], "now": self._timeline.now}
        return record if current_context() is None else {**record, "leak": True}

    def _act_from_outside(self, index: int, act: Json) -> None:
        self._timeline.now += act.get("advance", 0)
        if act.get("evict") is not None:
            self._caches[index].remove(canonical_key(build.name_of(self._specs, index), act["evict"]))

    def _execute(self, spec: Json) -> tuple[Any, Exception | None]:
        """Makes a call, nested or not: its value, or what it raised."""
        self._timeline.now += spec.get("advance", 0)
        index = spec.get("t", 0)
        attempts: list[RetryContext] = []
        callback = self._callback(index, iter(spec["outcomes"]), attempts)
        recover = self._recovery(index, spec["recovery"]) if "recovery" in spec else None
        state = build.state_of(spec.get("state"))
        try:
            return self._template(index).execute(callback, recover, state=state), None
        except Exception as error:
            raised = error
        if state is not None and attempts:
            self._wait_until_due(index, attempts[-1])
        return None, raised

    def _wait_until_due(self, index: int, context: RetryContext) -> None:
        """What the source of a failed item does: deliver it again no sooner than its due time.

        Without a key there is no history that could keep one: then the decision says how long.
        """
        pauses = self._pauses[index]
        pauses.failures = context.retry_count
        if context.not_before is not None:
            pauses.wait(context.not_before.timestamp() - START)
        elif context.key is None and context.decision is not None and context.decision.retry:
            pauses.wait(self._timeline.now / SECOND + context.decision.delay)

    def _template(self, index: int) -> RetryTemplate:
        """Built at its first use: a scenario may never use one that retrykit refuses to build."""
        if index not in self._built:
            self._built[index] = self._new_template(index)
        return self._built[index]

    def _new_template(self, index: int) -> RetryTemplate:
        spec = self._specs[index]
        told = spec.get("listeners", ()) if has_listeners(spec, short_cut=self._short_cut) else ()
        return RetryTemplate(
            name=build.name_of(self._specs, index),
            retry_policy=self._policies.of_template(spec),
            back_off_policy=build.back_off_of(spec),
            context_cache=self._caches[index],
            listeners=[RecordingListener(self._events, index, place, script) for place, script in enumerate(told)],
            clock=self._clock(index),
            throw_last=spec.get("throw_last", False),
        )

    def _clock(self, index: int) -> Clock:
        if self._short_cut and not keeps_time(self._policies, self._specs[index]):
            return SystemClock()
        return ScenarioClock(self._timeline, self._pauses[index].spend)

    def _callback(self, index: int, actions: Iterator[Json], attempts: list[RetryContext]) -> Callback:
        def callback(context: RetryContext) -> Any:
            attempts.append(context)
            self._note("attempt", index, context)
            return self._perform(index, context, next(actions, {"ok": "END"}))

        return callback

    def _recovery(self, index: int, action: Json) -> Callback:
        def recovery(context: RetryContext) -> Any:
            self._note("recover", index, context)
            return self._perform(index, context, action)

        return recovery

    def _note(self, kind: str, index: int, context: RetryContext) -> None:
        bound = {} if current_context() is context else {"ns": True}
        shown = {**attributes_of(context), **bound}
        self._events.append([kind, index, context.retry_count, errors.describe(context.last_error), shown])

    def _perform(self, index: int, context: RetryContext, action: Json) -> Any:
        """Does what the scenario's callback or recovery does, in the schema's order."""
        self._timeline.now += action.get("advance", 0)
        if "set" in action:
            set_attribute(context, action["set"])
        if action.get("exhaust"):
            context.veto()
        if action.get("exhaust_parent") and context.parent is not None:
            context.parent.veto()
        value = self._nested(index, context, action) if "call" in action else None
        # If this attempt fails, the next pause of the template is the one after that failure.
        self._pauses[index].failures = context.retry_count + 1
        if "throw" in action:
            raise errors.make(action["throw"])
        return action.get("ok", value)

    def _nested(self, index: int, context: RetryContext, action: Json) -> Any:
        """Makes the call inside an action; what it raised propagates unless it is swallowed."""
        value, error = self._execute(action["call"])
        outcome = ["ok", value] if error is None else ["raised", errors.describe(error)]
        self._events.append(["ret", index, *outcome, current_context() is context])
        if error is not None and not action.get("swallow", False):
            raise error
        return value if error is None else "swallowed"
