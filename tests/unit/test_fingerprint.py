"""One key, two contents: reported, never merged."""

from __future__ import annotations

import logging

import pytest

from retrykit import InconsistentKeyError, MapRetryContextCache, RetryState, RetryTemplate
from tests.doubles import Fails, Transaction

KEY = "retry/m-1"
ERROR = OSError("broken")


class Joinable(MapRetryContextCache):
    def joined(self, transaction):
        return self if transaction == "session" else None


def deliver(template, work, recover=None, transaction=None, **state):
    try:
        return template.execute(work, recover, state=RetryState(key="m-1", **state), transaction=transaction)
    except Exception as error:
        return error


def test_key_that_comes_back_with_another_content_is_reported_before_anything_runs():
    template, ran = RetryTemplate(), []
    assert deliver(template, Fails(ERROR), fingerprint="a") is ERROR
    error = deliver(template, ran.append, ran.append, fingerprint="b")
    assert type(error) is InconsistentKeyError
    assert (error.name, error.key, error.stored, error.fingerprint) == ("retry", "m-1", "a", "b")
    assert "'m-1'" in str(error)
    assert ran == []
    assert template.history("m-1").retry_count == 1


@pytest.mark.parametrize("second", ["a", None])
def test_same_content_or_none_told_goes_on_with_the_history(second):
    template = RetryTemplate()
    deliver(template, Fails(ERROR), fingerprint="a")
    deliver(template, Fails(ERROR), fingerprint=second)
    assert template.history("m-1").retry_count == 2


def test_history_without_a_fingerprint_takes_the_first_one_that_comes():
    template = RetryTemplate()
    deliver(template, Fails(ERROR))
    deliver(template, Fails(ERROR), fingerprint="a")
    assert type(deliver(template, Fails(), fingerprint="b")) is InconsistentKeyError


def test_new_item_under_an_old_key_is_no_collision():
    template = RetryTemplate()
    deliver(template, Fails(ERROR), fingerprint="a")
    deliver(template, Fails(ERROR), fingerprint="b", fresh=True)
    assert template.history("m-1").retry_count == 1
    assert template.context_cache.load(KEY).snapshot["fingerprint"] == "b"


def test_completed_item_is_no_answer_for_another_content():
    template = RetryTemplate(remember_completed=60.0)
    assert deliver(template, Fails(), fingerprint="a") == "done"
    assert deliver(template, Fails(), fingerprint="a") is None
    assert type(deliver(template, Fails(), fingerprint="b")) is InconsistentKeyError


def test_work_on_another_content_that_was_done_meanwhile_is_rolled_back_not_taken_for_a_duplicate():
    log, template = [], RetryTemplate(context_cache=Joinable(), remember_completed=60.0)

    def overtaken(_):
        deliver(template, Fails(), fingerprint="b", redelivered=False)

    error = deliver(template, overtaken, transaction=Transaction(log), fingerprint="a", redelivered=False)
    assert type(error) is InconsistentKeyError
    assert log == ["begin", "roll back"]


def test_failure_is_not_added_to_another_items_history():
    template = RetryTemplate()

    def overtaken(_):
        deliver(template, Fails(OSError("theirs")), fingerprint="b", redelivered=False)
        raise ERROR

    assert deliver(template, overtaken, fingerprint="a", redelivered=False) is ERROR
    assert "InconsistentKeyError" in ERROR.__notes__[-1]
    assert template.history("m-1").retry_count == 1


def test_mark_is_not_put_over_another_items_history(caplog):
    template = RetryTemplate(remember_completed=60.0)

    def overtaken(_):
        deliver(template, Fails(OSError("theirs")), fingerprint="b", redelivered=False)
        return "done"

    with caplog.at_level(logging.ERROR):
        assert deliver(template, overtaken, fingerprint="a", redelivered=False) == "done"
    assert template.context_cache.load(KEY).snapshot["fingerprint"] == "b"
    assert "two items" in caplog.text


def test_fingerprint_is_made_only_when_it_is_needed():
    made = []

    def digest():
        made.append(1)
        return "a"

    template = RetryTemplate()
    assert deliver(template, Fails(), fingerprint=digest, redelivered=False) == "done"
    assert made == []
    deliver(template, Fails(ERROR), fingerprint=digest, redelivered=False)
    assert made == [1]


def test_fingerprint_that_cannot_be_made_is_reported_and_hides_nothing(caplog):
    template = RetryTemplate()
    assert deliver(template, Fails(ERROR), fingerprint=lambda: 1 / 0) is ERROR
    assert template.history("m-1").retry_count == 1
    assert "fingerprint" in caplog.text
