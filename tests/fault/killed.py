"""Consumers that kill themselves once: started, started again, and watched to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from sqlalchemy import select

from retrykit.messaging.stomp import StompBroker
from tests.fault.consumer import effects, open_database
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PATIENCE = 90.0


def publish(server, queue, numbers):
    session = StompBroker(server.url).connect(consume=False)
    for number in numbers:
        session.send(queue, str(number).encode(), {"content-type": "text/plain"})
    session.commit()
    session.close()


def consume(script, server, queue, directory, *arguments, good, parked):
    """Run a consumer process, and another when it has killed itself, to the end: the effects, and what is parked."""
    path = str(Path(__file__).with_name(script))
    command = [sys.executable, path, server.url, queue, str(directory), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    engine = open_database(directory)
    process = subprocess.Popen(command, env=environment)
    try:
        assert process.wait(PATIENCE) == -signal.SIGKILL
        process = subprocess.Popen(command, env=environment)
        until(lambda: set(found(engine)) == good, PATIENCE, lambda: sorted(found(engine).items()))
        messages = take(server, f"{queue}.parked", parked)
        process.terminate()
        assert process.wait(PATIENCE) == 0
        return found(engine), messages
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
