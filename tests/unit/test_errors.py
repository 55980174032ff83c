"""The few errors of our own."""

from __future__ import annotations

import pytest

import retrykit
from retrykit.errors import (
    AttemptsInFlightError,
    CommitInDoubtError,
    ExhaustedRetryError,
    RecoveryFailedError,
    RetryError,
    TerminatedRetryError,
)

OWN = [getattr(retrykit, name) for name in retrykit.__all__ if name.endswith("Error")]


@pytest.mark.parametrize("error_type", [*OWN, AttemptsInFlightError, CommitInDoubtError])
def test_every_error_of_ours_is_a_retry_error_and_words_itself(error_type):
    assert issubclass(error_type, RetryError)
    message = str(error_type())
    assert message
    assert "\n" not in message


def test_facts_fill_in_the_message_and_are_attributes():
    error = ExhaustedRetryError(name="orders", key="m-1", attempts=3, reason="SimpleRetryPolicy: attempt 3 of 3")
    assert str(error) == (
        "No further attempt is allowed for orders 'm-1' after 3 failed: SimpleRetryPolicy: attempt 3 of 3"
    )
    assert (error.name, error.key, error.attempts) == ("orders", "m-1", 3)


def test_a_fact_that_is_not_known_reads_as_a_question_mark():
    assert str(RecoveryFailedError(name="orders", attempts=3)).startswith("The recovery of orders '?' failed 3 times")


def test_a_message_of_its_own_comes_before_the_docstring():
    assert str(RetryError("enough")) == "enough"


def test_attempts_in_flight_are_a_kind_of_termination():
    assert issubclass(AttemptsInFlightError, TerminatedRetryError)


def test_an_error_without_a_docstring_has_an_empty_message():
    class Undocumented(RetryError):
        pass

    Undocumented.__doc__ = None
    assert str(Undocumented()) == ""
