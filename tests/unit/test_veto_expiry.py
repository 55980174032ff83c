"""Vetoes that end by themselves."""

from __future__ import annotations

from datetime import timedelta

import pytest

from retrykit import ExhaustedRetryError, RetryState, RetryTemplate, TerminatedRetryError, veto
from tests.doubles import Fails, ManualClock

ERROR = OSError("broken")


def deliver(template, work):
    try:
        return template.execute(work, state=RetryState(key="m-1"))
    except Exception as error:
        return error


def test_veto_holds_until_its_time_is_over():
    clock = ManualClock()
    template = RetryTemplate(clock=clock)
    template.veto("m-1", "the provider is down", lasts=timedelta(minutes=1))
    assert template.history("m-1").veto_until.timestamp() == clock.time() + 60
    assert type(deliver(template, Fails())) is TerminatedRetryError
    clock.sleep(59)
    assert type(deliver(template, Fails())) is TerminatedRetryError
    clock.sleep(1)
    assert deliver(template, Fails()) == "done"


def test_limit_still_holds_when_a_veto_is_over():
    clock = ManualClock()
    template = RetryTemplate(clock=clock)
    for _ in range(3):
        deliver(template, Fails(ERROR))
    template.veto("m-1", "wait", lasts=60)
    clock.sleep(61)
    error = deliver(template, Fails())
    assert type(error) is ExhaustedRetryError
    assert "3 of 3" in str(error)


def test_veto_from_within_may_end_by_itself():
    clock = ManualClock()
    template = RetryTemplate(clock=clock)

    def give_up(context):
        veto("quota used up", lasts=60)
        assert context.veto_until.timestamp() == clock.time() + 60
        raise ERROR

    assert deliver(template, give_up) is ERROR
    assert type(deliver(template, Fails())) is ExhaustedRetryError
    clock.sleep(61)
    assert deliver(template, Fails()) == "done"


def test_veto_without_an_end_replaces_one_that_has_one():
    clock = ManualClock()
    template = RetryTemplate(clock=clock)
    template.veto("m-1", "wait", lasts=60)
    template.veto("m-1", "for good")
    clock.sleep(1e9)
    assert type(deliver(template, Fails())) is TerminatedRetryError


@pytest.mark.parametrize("lasts", [0, -1, "1h", float("nan"), True])
def test_length_that_is_none_is_refused_and_nothing_is_vetoed(lasts):
    template = RetryTemplate()
    with pytest.raises((ValueError, TypeError), match="lasts"):
        template.veto("m-1", "wait", lasts=lasts)
    assert template.history("m-1") is None
