"""A consumer killed around the copy that is to come later loses nothing and repeats no effect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from retrykit.messaging.stomp import StompBroker
from retrykit.testing import StompServer
from tests.fault.consumer import open_database
from tests.fault.delaying_consumer import MAX_ATTEMPTS, MOMENTS
from tests.fault.test_killed_consumers import found, take

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0
NUMBERS = range(1, 11)
GOOD = {number for number in NUMBERS if number % 7}


@pytest.fixture(scope="module")
def embedded():
    with StompServer(profile="activemq") as server:
        yield server


@pytest.fixture(scope="module")
def embedded_rabbit():
    with StompServer(profile="rabbitmq") as server:
        yield server


@pytest.fixture(params=["embedded", "embedded_rabbit"])
def double(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["activemq", "rabbitmq"])
def real(request):
    return request.getfixturevalue(request.param)


def consume(server, directory, moment):
    """Run a consumer process, and another when it has killed itself, to the end: the effects, and what is parked."""
    queue = f"/queue/late.{uuid.uuid4().hex[:12]}"
    session = StompBroker(server.url).connect(consume=False)
    for number in NUMBERS:
        session.send(queue, str(number).encode(), {"content-type": "text/plain"})
    session.commit()
    session.close()
    script = Path(__file__).with_name("delaying_consumer.py")
    command = [sys.executable, str(script), server.url, queue, str(directory), moment]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    engine = open_database(directory)
    process = subprocess.Popen(command, env=environment)
    try:
        assert process.wait(PATIENCE) == -signal.SIGKILL
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + PATIENCE
        while set(found(engine)) != GOOD:
            assert time.monotonic() < deadline, sorted(found(engine).items())
            threading.Event().wait(0.05)
        parked = take(server, f"{queue}.parked", 1)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        return found(engine), parked
    finally:
        process.kill()
        process.wait()
        engine.dispose()


def check(server, directory, moment):
    effects, parked = consume(server, directory, moment)
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
