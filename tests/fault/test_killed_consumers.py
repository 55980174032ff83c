"""A consumer killed between any two steps loses nothing, repeats no effect, and parks poison once."""

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
from sqlalchemy import select

from retrykit.messaging.stomp import StompBroker
from retrykit.testing import StompServer
from tests.fault.consumer import MAX_ATTEMPTS, STEPS, effects, open_database

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0
NUMBERS = range(1, 15)
GOOD = {number for number in NUMBERS if number % 7}


@pytest.fixture(scope="module")
def embedded():
    with StompServer(profile="activemq") as server:
        yield server


@pytest.fixture(params=["embedded", "activemq"])
def server(request):
    return request.getfixturevalue(request.param)


def publish(server, queue):
    session = StompBroker(server.url).connect(consume=False)
    for number in NUMBERS:
        session.send(queue, str(number).encode(), {"content-type": "text/plain"})
    session.commit()
    session.close()


def consume(server, queue, directory, *, step, number, journal):
    """Run a consumer process, and another when it has killed itself, to the end: the effects, and what is parked."""
    script = Path(__file__).with_name("consumer.py")
    command = [sys.executable, str(script), server.url, queue, str(directory), step, str(number), journal]
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
        parked = take(server, f"{queue}.parked", 2)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        return found(engine), parked
    finally:
        process.kill()
        process.wait()
        engine.dispose()


def found(engine):
    with engine.connect() as connection:
        return Counter(int(body) for (body,) in connection.execute(select(effects.c.body)))


def take(server, destination, expected):
    session = StompBroker(server.url, destination=destination).connect()
    parked = []
    while (message := session.receive(PATIENCE if len(parked) < expected else 0.5)) is not None:
        parked.append(message)
        session.commit(message)
    session.close()
    return parked


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
    publish(server, queue)
    effects_found, parked = consume(server, queue, directory, step=step, number=number, journal=journal)
    assert effects_found == dict.fromkeys(GOOD, 1)
    assert sorted(int(message.text) for message in parked) == [7, 14]
    assert {message.headers["retrykit-attempts"] for message in parked} == {str(MAX_ATTEMPTS)}
    return max(Counter((directory / "attempts").read_text().split()).values())
