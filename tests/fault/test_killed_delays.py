"""A consumer killed around the copy that is to come later loses nothing and repeats no effect."""

from __future__ import annotations

import uuid
from collections import Counter

import pytest

from tests.fault.delaying_consumer import MAX_ATTEMPTS, MOMENTS
from tests.fault.killed import consume, publish

NUMBERS = range(1, 11)
GOOD = {number for number in NUMBERS if number % 7}


@pytest.fixture(params=["embedded", "embedded_rabbit"])
def double(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["activemq", "rabbitmq"])
def real(request):
    return request.getfixturevalue(request.param)


def check(server, directory, moment):
    queue = f"/queue/late.{uuid.uuid4().hex[:12]}"
    publish(server, queue, NUMBERS)
    effects, parked = consume("delaying_consumer.py", server, queue, directory, moment, good=GOOD, parked=1)
    assert effects == dict.fromkeys(GOOD, 1)
    # On RabbitMQ a parked copy may come twice, under one id.
    assert {(message.id, message.body) for message in parked} == {(parked[0].id, b"7")}
    assert {message.headers["retrykit-attempts"] for message in parked} == {str(MAX_ATTEMPTS)}
    attempts = Counter((directory / "attempts").read_text().split())
    assert attempts["5"] == attempts["10"] == 2
    assert attempts["7"] == MAX_ATTEMPTS


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_consumer_killed_around_a_copy_costs_nothing_but_time(tmp_path, double, moment):
    check(double, tmp_path, moment)


def test_the_real_brokers_have_the_copy_or_the_original_or_both(tmp_path, real):
    check(real, tmp_path, "before the acknowledgement")
