"""Jobs whose processes are killed for real: nothing is lost, nothing is written twice, the counts are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.fault.batch_killed import CHUNK, engine_of, fates_of
from tests.property.batch_world import World, make_tables
from tests.servers.databases import empty_database


@pytest.mark.parametrize(("database", "seed"), [("sqlite", 1), ("postgresql", 2)])
def test_a_job_whose_processes_are_killed_at_any_statement_writes_every_good_item_once(request, database, seed):
    url = empty_database(request, database)
    engine = engine_of(url)
    try:
        world = World(engine, fates_of(seed), chunk_size=CHUNK)
        make_tables(engine)
        engine.dispose()
        command = [sys.executable, "-m", "tests.fault.batch_killed", url, str(seed)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["killed"] >= 3
        world.check()
    finally:
        engine.dispose()
