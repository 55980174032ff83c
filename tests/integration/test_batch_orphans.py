"""Workers whose command was killed: they go on, and whoever says the same command takes part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from retrykit.sql import create_tables, stored_jobs
from tests.servers.databases import empty_database
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
PARTS = 3
ITEMS = range(30)

PROGRAM = """
import os
import time
from pathlib import Path

from sqlalchemy import create_engine, text

from retrykit.batch import ChunkStep
from retrykit.sql import SqlJobStore

engine = create_engine(os.environ["SHOP"])


class Items:
    def __init__(self, part):
        self.part = part

    def __iter__(self):
        Path(f"begun-{self.part}-{os.getpid()}").touch()
        for number in range(10):
            # When the first half is written; no transaction is open while a reader waits.
            deadline = time.monotonic() + 60
            while number == 5 and not Path("gate").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield 10 * self.part - 10 + number


def write(connection, found):
    connection.execute(text("INSERT INTO work VALUES (:item)"), [{"item": item} for item in found])


def make(part, parts):
    return ChunkStep(name="load", reader=Items(part), writer=write, transaction=engine.begin, chunk_size=5,
                     jobs=SqlJobStore(engine))
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def shop(request, tmp_path):
    url = empty_database(request, request.param)
    (tmp_path / "shop.py").write_text(textwrap.dedent(PROGRAM))
    engine = create_engine(url)
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (item INTEGER)"))
    yield tmp_path, url, engine
    engine.dispose()


@contextmanager
def command(folder, url, *options):
    """The command, in a session of its own; whatever is left of that is killed."""
    divided = ("shop:make", "--partitions", str(PARTS), *options)
    arguments = [sys.executable, "-m", "retrykit.cli", "batch", "run", *divided]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SHOP": url}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def begun(folder):
    """Who has begun which partitions, by process."""
    found = {}
    for path in folder.glob("begun-*"):
        _, part, process = path.name.split("-")
        found.setdefault(int(process), set()).add(int(part))
    return found


def written(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(text("SELECT item FROM work")))


def has_ended(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only there is it seen at once who has died")
def test_workers_finish_what_they_have_when_their_command_is_killed_and_another_one_takes_part(shop):
    folder, url, engine = shop
    with command(folder, url, "--workers", "2") as first:
        until(lambda: len(begun(folder)) == 2 and len(written(engine)) == 10, PATIENCE)
        (worker,) = begun(folder).keys() - {first.pid}
        (killed,) = begun(folder)[first.pid]
        first.kill()
        first.wait()
        with command(folder, url) as second:
            # What has died is taken over at once; what the worker runs is left to it.
            until(lambda: killed in begun(folder).get(second.pid, ()), PATIENCE)
            assert not has_ended(worker)
            (folder / "gate").touch()
            assert second.wait(PATIENCE) == 0, (folder / "log").read_text()
        until(lambda: has_ended(worker), PATIENCE)
    assert written(engine) == list(ITEMS)
    runs = {job.parameters["partition"]: (job.status, job.runs) for job in stored_jobs(engine)}
    assert runs == {f"{part}/{PARTS}": ("finished", 1 + (part == killed)) for part in range(1, PARTS + 1)}
    shown = (folder / "log").read_text()
    assert "Traceback" not in shown
    assert shown.count(" finished ") == PARTS
