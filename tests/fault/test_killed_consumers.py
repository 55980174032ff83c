"""A consumer killed between any two steps loses nothing, repeats no effect, and parks poison once."""

from __future__ import annotations

import uuid
from collections import Counter

import pytest

from tests.fault.consumer import MAX_ATTEMPTS, STEPS
from tests.fault.killed import consume, publish

NUMBERS = range(1, 15)
GOOD = {number for number in NUMBERS if number % 7}


@pytest.fixture(params=["embedded", "activemq"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("number", [3, 7], ids=["good", "poison"])
@pytest.mark.parametrize("step", STEPS)
def test_a_consumer_killed_before_a_step_costs_nothing_but_time(tmp_path, server, step, number):
    assert most_attempts(tmp_path, server, step=step, number=number, journal="always") <= MAX_ATTEMPTS


def test_a_first_attempt_that_kills_its_process_is_not_counted_unless_it_is_journaled(tmp_path, server):
    attempts = most_attempts(tmp_path, server, step="handler", number=7, journal="redelivered")
    assert attempts == MAX_ATTEMPTS + 1


def most_attempts(directory, server, *, step, number, journal):
    """What a message was attempted at most, after everything else about the run was seen to be right."""
    queue = f"/queue/killed.{uuid.uuid4().hex[:12]}"
    publish(server, queue, NUMBERS)
    arguments = (step, str(number), journal)
    effects_found, parked = consume("consumer.py", server, queue, directory, *arguments, good=GOOD, parked=2)
    assert effects_found == dict.fromkeys(GOOD, 1)
    assert sorted(int(message.text) for message in parked) == [7, 14]
    assert {message.headers["retrykit-attempts"] for message in parked} == {str(MAX_ATTEMPTS)}
    return max(Counter((directory / "attempts").read_text().split()).values())
