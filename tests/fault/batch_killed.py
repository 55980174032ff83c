"""A job whose processes are killed (SIGKILL) at one statement or commit after the other.

`python -m tests.fault.batch_killed URL SEED` forks a process for each run, until one comes to its end. It prints how
many were killed. What forks has no threads and no connections.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys

from sqlalchemy import create_engine, make_url

from retrykit.sql import sqlite_engine
from tests.property.batch_world import FATES, World

CHUNK = 12


def fates_of(seed):
    """Of 60 items."""
    return random.Random(seed).choices(FATES, weights=[12, 1, 1, 1, 1, 1, 1], k=60)


def engine_of(url):
    if make_url(url).get_backend_name() == "sqlite":
        return sqlite_engine(url, durability="process")
    return create_engine(url)


def run_and_die(url, fates, number):
    world = World(engine_of(url), fates, chunk_size=CHUNK)
    world.cord.end = lambda: os.kill(os.getpid(), signal.SIGKILL)
    world.cord.left = number
    world.step.run()


def main(url, seed):
    fates, chance, killed, status = fates_of(seed), random.Random(seed), 0, None
    while status != 0:
        child = os.fork()
        if child == 0:
            try:
                run_and_die(url, fates, chance.randint(5, 60) if killed < 15 else None)
            except BaseException:
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        killed += status != 0
        chance.random()
    print(json.dumps({"killed": killed}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
