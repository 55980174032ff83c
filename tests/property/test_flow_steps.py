"""The flow itself, stepped by hand with any answers: it ends, and what it asks for comes in the right order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrykit import (
    CircuitBreakerRetryPolicy,
    FixedBackOffPolicy,
    NoBackOffPolicy,
    RetryListener,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
)
from retrykit.cache import StoredContext
from retrykit.errors import CommitInDoubtError
from retrykit.flow import abort, run
from retrykit.steps import (
    ANSWER_NOTHING,
    ATTEMPT,
    BEGIN,
    COMMIT,
    JOIN,
    NOW,
    RECOVER,
    RETURN,
    Died,
    Load,
    Notify,
    Pause,
    Probe,
    Raise,
    Remove,
    Report,
    RollBack,
    Save,
    Take,
)
from tests.property.model import is_noted

LIMIT = 3
PATIENCE = 400
"""More steps than any call takes whose store does not lose every compare-and-set."""


class Failed(Exception):
    pass


class StoreFault(Exception):
    pass


class Clock:
    """Read by contexts only: the flow asks for the time in steps."""

    def time(self) -> float:
        return 1e9

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        raise AssertionError

    async def async_sleep(self, seconds: float) -> None:
        raise AssertionError


class Interpreter:
    """Answers each step as Hypothesis likes, and holds what the flow asks for against the order that was promised."""

    def __init__(self, draw: Any, call: Any) -> None:
        self.draw = draw
        self.call = call
        self.stored: dict[str, StoredContext] = {}
        self.version = 0
        self.now = 1e9
        self.is_open = False
        self.paused = False
        self.confirmed = False
        self.told_close = self.told_open = 0
        self.unstored: Exception | None = None
        self.attempts = self.recoveries = 0
        self.lost = 0
        self.steps: list[Any] = []

    def answer(self, step: Any) -> Any:
        self.steps.append(step)
        assert len(self.steps) < PATIENCE, "the flow does not end"
        name = step.name if hasattr(step, "name") else type(step).__name__
        return getattr(self, "on_" + name.lower())(step)

    def choose(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    # -- the attempt

    def on_begin(self, step: Any) -> Any:
        assert not self.is_open
        assert self.call.transactional
        self.paused = False
        if self.choose(False, False, False, True):
            return self.failed()
        self.is_open = True
        return None

    def on_attempt(self, step: Any) -> Any:
        assert self.is_open == self.call.transactional
        assert self.recoveries == 0, "P3: an attempt after a recovery"
        self.attempts += 1
        self.confirmed = False
        if self.choose(True, True, False):
            return self.failed()
        self.confirmed = not self.call.transactional
        return None

    def failed(self) -> tuple[Exception, float]:
        self.unstored = Failed(len(self.steps)) if self.recoveries == 0 else None
        return (self.unstored or Failed("recovery"), 0.0)

    def on_recover(self, step: Any) -> Any:
        assert self.is_open == self.call.transactional
        self.recoveries += 1
        self.confirmed = False
        if self.choose(True, False):
            return (Failed("recovery"), 0.0)
        self.confirmed = not self.call.transactional
        return None

    def on_commit(self, step: Any) -> Any:
        assert self.is_open
        self.is_open = False
        match self.choose("commits", "commits", "fails", "in doubt"):
            case "fails":
                return self.failed()
            case "in doubt":
                return (CommitInDoubtError(), 0.0)
        self.confirmed = True
        return None

    def on_rollback(self, step: Any) -> Any:
        assert self.is_open
        self.is_open = False
        # A conflict says nothing of the failure: it is stored outside of the transaction.
        return None

    def on_join(self, step: Any) -> bool:
        assert self.is_open
        return self.choose(True, False)

    def on_pause(self, step: Any) -> Any:
        assert step.seconds > 0
        assert not self.is_open, "P7: a pause while a transaction was open"
        self.check_stored()
        if self.choose(False, False, True):
            return StoreFault("interrupted")
        self.now += step.seconds
        return None

    # -- the store

    def on_load(self, step: Any) -> Any:
        assert not step.joined or self.is_open
        found = self.stored.get(step.key)
        return self.choose(found, found, found, StoreFault("load"))

    def on_save(self, step: Any) -> Any:
        is_mark = "completed_at" in step.snapshot
        if "breaker" not in step.snapshot:
            assert not is_mark or self.confirmed or step.joined, "P2: a completion mark without an outcome"
            assert step.joined or not self.is_open, (
                "the failure was stored inside of the transaction that is rolled back"
            )
        return self.change(step, lambda: StoredContext(step.snapshot, self.version))

    def on_remove(self, step: Any) -> Any:
        found = self.stored.get(step.key)
        known = found is not None and (found.snapshot.get("retry_count") or found.snapshot.get("veto"))
        assert not known or self.confirmed or step.joined, "P2: the history was dropped without an outcome"
        answer = self.change(step, lambda: None)
        return answer if isinstance(answer, Exception) else answer is not None

    def change(self, step: Any, act: Any) -> Any:
        found = self.stored.get(step.key)
        fate = (
            self.choose("done", "done", "done", "fault")
            if self.lost > 5
            else self.choose("done", "done", "lost", "fault")
        )
        if fate == "fault":
            return StoreFault("save")
        self.version += 1
        if fate == "lost":
            self.lost += 1
            # Somebody else was first: he wrote the same again, or dropped it.
            self.stored.pop(step.key, None)
            if found is not None and self.choose(True, False):
                self.stored[step.key] = StoredContext(found.snapshot, self.version)
            return None
        if step.expected != (None if found is None else found.version):
            return None
        changed = act()
        if step.joined:
            return self.version
        self.stored.pop(step.key, None)
        if changed is not None:
            self.stored[step.key] = changed
        if step.key == self.call.key:
            self.unstored = None
        return self.version

    def check_stored(self) -> None:
        keyless = self.call.key is None
        assert keyless or self.unstored is None or is_noted(self.unstored), (
            "P1: somebody heard of a failure before it was stored"
        )

    # -- the others

    def on_now(self, step: Any) -> float:
        self.now += self.choose(0.0, 0.0, 1.0, -3600.0, 3600.0)
        return self.now

    def on_probe(self, step: Any) -> bool:
        return self.choose(True, False)

    def on_notify(self, step: Any) -> None:
        assert not self.is_open
        self.told_open += step.event == "open"
        self.told_close += step.event == "close"
        if step.event == "on_error":
            self.check_stored()
        if step.event != "close" and self.choose(False, False, False, True):
            self.call.context.veto("by a listener")

    def on_take(self, step: Any) -> bool:
        return self.choose(True, False)

    def on_give(self, step: Any) -> None:
        return None

    def on_report(self, step: Any) -> None:
        return None

    def on_died(self, step: Any) -> None:
        assert not self.is_open
        assert step.what == "recovery" or step.attempt <= self.call.context.retry_count


@st.composite
def calls(draw: Any) -> Any:
    policy = SimpleRetryPolicy(LIMIT)
    template = RetryTemplate(
        name="stepped",
        retry_policy=draw(st.sampled_from((policy, CircuitBreakerRetryPolicy(policy, failure_threshold=2)))),
        back_off_policy=draw(st.sampled_from((NoBackOffPolicy(), FixedBackOffPolicy(5)))),
        listeners=draw(st.sampled_from(((), (RetryListener(),), (RetryListener(), RetryListener())))),
        remember_completed=draw(st.sampled_from((None, 60))),
        clock=Clock(),
    )
    in_place = draw(st.booleans())
    state = draw(
        st.none()
        | st.builds(
            RetryState,
            key=st.sampled_from(("m", None)),
            redelivered=st.sampled_from((None, True, False)),
            fresh=st.booleans(),
            rollback_for=st.just(lambda _: not in_place),
            recover_on_redelivery=st.booleans(),
            journal=st.sampled_from(("redelivered", "always", "never")),
        )
    )
    recover = draw(st.sampled_from((None, lambda _: None)))
    transaction = draw(st.sampled_from((None, lambda: None)))
    context = template.context(state)
    driver = template.driver(context, None, (), {}, recover, transaction)
    return template, getattr(driver, "call", driver)


def stepped(interpreter: Any, flow: Any, stop_after: int | None = None) -> Any:
    """Answer every step, up to the outcome, or so many; the last step."""
    answer, step = None, None
    while stop_after is None or len(interpreter.steps) < stop_after:
        try:
            step = flow.send(answer)
        except StopIteration:
            return step
        if step in (RETURN, ANSWER_NOTHING) or isinstance(step, Raise):
            return step
        answer = interpreter.answer(step)
    flow.close()
    return None


@given(st.data(), calls())
@settings(max_examples=150)
def test_the_flow_ends_and_keeps_the_order_of_effects_whatever_it_is_answered(data, made):
    template, call = made
    interpreter = Interpreter(data.draw, call)
    outcome = stepped(interpreter, run(call))
    assert not interpreter.is_open, "a transaction was left open"
    assert interpreter.told_open == interpreter.told_close == len(template.listeners)
    assert interpreter.attempts <= LIMIT or interpreter.lost, "P5: the callback ran too often"
    assert interpreter.recoveries <= 3
    assert outcome is RETURN or outcome is ANSWER_NOTHING or isinstance(outcome, Raise)
    assert outcome is not RETURN or interpreter.confirmed
    if isinstance(outcome, Raise) and isinstance(outcome.error, Failed):
        interpreter.check_stored()


@given(st.data(), calls(), st.integers(0, 40))
@settings(max_examples=150)
def test_p9_a_flow_that_is_cancelled_anywhere_is_put_straight(data, made, stop):
    template, call = made
    interpreter = Interpreter(data.draw, call)
    if stepped(interpreter, run(call), stop) is not None:
        return
    before, told = (interpreter.attempts, interpreter.recoveries), interpreter.told_close
    stepped(interpreter, abort(call, KeyboardInterrupt(), opened=interpreter.is_open))
    assert not interpreter.is_open
    assert (interpreter.attempts, interpreter.recoveries) == before, "P9: something was called after the cancellation"
    # Who was told before the cancellation may hear it again.
    assert len(template.listeners) <= interpreter.told_close <= told + len(template.listeners)


def test_every_step_is_named_in_the_table_of_steps():
    import retrykit.steps

    for step in (ATTEMPT, RECOVER, BEGIN, COMMIT, JOIN, NOW):
        assert f"`{step.name}`" in retrykit.steps.__doc__
    for kind in (Load, Save, Remove, Probe, Pause, Notify, Take, Report, Died, RollBack):
        assert f"`{kind.__name__}(" in retrykit.steps.__doc__


if __name__ == "__main__":
    pytest.main([__file__])
