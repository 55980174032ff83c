"""A job in partitions runs again: one begins, who comes meanwhile takes part, and nothing is run twice."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, func, select, text, update

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, run_partitions
from retrykit.errors import JobError, JobRunningError
from retrykit.sql import SqlJobStore, create_tables, rk_job, stored_jobs
from tests.servers.databases import empty_database
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
PARTS = 3
ITEMS = range(30)


@pytest.fixture
def engine(url):
    engine = create_engine(url)
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS work"))
        connection.execute(text("CREATE TABLE work (item INTEGER)"))
    yield engine
    engine.dispose()


def times(engine):
    """How often each item was written."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT item, COUNT(*) FROM work GROUP BY item")).all()
    assert {item for item, _ in rows} == set(ITEMS)
    return {number for _, number in rows}


def steps(engine, fails=()):
    def make(part, parts):
        def write(connection, items):
            if part in fails:
                raise OSError("no line")
            connection.execute(text("INSERT INTO work VALUES (:item)"), [{"item": item} for item in items])

        return ChunkStep(
            name="load",
            reader=[item for item in ITEMS if item % parts == part - 1],
            writer=write,
            transaction=engine.begin,
            chunk_size=5,
            template=RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
            jobs=SqlJobStore(engine),
        )

    return make


def test_all_begin_anew_when_each_is_finished_and_what_is_not_finished_is_run_first(engine):
    assert run_partitions(steps(engine), PARTS, again=True).finished
    assert not run_partitions(steps(engine, fails={2}), PARTS, again=True).finished
    begun = [job.started_at for job in stored_jobs(engine)]
    # The second run is not at its end: whoever comes finishes it.
    assert sorted(run_partitions(steps(engine), PARTS, again=True).reports) == [2]
    assert times(engine) == {2}
    assert [job.started_at for job in stored_jobs(engine)] == begun
    # Now it is: the next one begins the third.
    assert sorted(run_partitions(steps(engine), PARTS, again=True).reports) == [1, 2, 3]
    assert times(engine) == {3}
    assert all(job.started_at > before for job, before in zip(stored_jobs(engine), begun, strict=True))


def test_of_several_that_come_at_once_one_begins_and_the_others_take_part(engine):
    run_partitions(steps(engine), PARTS)
    start, answers = threading.Barrier(4), []

    def ask():
        jobs = SqlJobStore(engine)
        start.wait(PATIENCE)
        answers.append(jobs.begin_again("load", {}, PARTS))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(answers) == ["begun", "joined", "joined", "joined"]
    assert [(job.status, job.position, job.counts) for job in stored_jobs(engine)] == [("new", None, {})] * PARTS


def test_with_an_instant_each_run_happens_once_however_late_somebody_comes(engine):
    since = datetime.now(UTC) - timedelta(days=1)
    for _ in range(2):
        assert run_partitions(steps(engine), PARTS, again=since).finished
    assert times(engine) == {1}
    since = datetime.fromtimestamp(SqlJobStore(engine).now(), UTC)
    for _ in range(3):
        assert run_partitions(steps(engine), PARTS, again=since).finished
        assert times(engine) == {2}


def test_with_an_instant_a_run_that_was_begun_before_it_has_to_be_finished_first(engine):
    run_partitions(steps(engine, fails={2}), PARTS)
    later = datetime.fromtimestamp(SqlJobStore(engine).now(), UTC)
    with pytest.raises(
        JobError, match=r"the run of load that was begun at .* is not finished \(2 of 3 partitions are\)"
    ):
        run_partitions(steps(engine), PARTS, again=later)
    assert run_partitions(steps(engine), PARTS).finished
    assert run_partitions(steps(engine), PARTS, again=later).finished
    assert times(engine) == {2}


def test_another_number_of_partitions_begins_once_too(engine):
    run_partitions(steps(engine), 2)
    since = datetime.fromtimestamp(SqlJobStore(engine).now(), UTC)
    assert not run_partitions(steps(engine, fails={3}), PARTS, again=True).finished
    assert sorted(run_partitions(steps(engine), PARTS, again=True).reports) == [3]
    assert times(engine) == {2}
    with pytest.raises(JobError, match=r"the job load was begun in 3 partitions at .* \(number \d+\)"):
        run_partitions(steps(engine), 2, again=since)
    with engine.begin() as connection:
        elsewhere = {"status": "running", "owner": "elsewhere/boot/pid:[1]/7/7/1", "lease_until": 9e9}
        connection.execute(update(rk_job).where(rk_job.c.parameters.contains("3/3")).values(elsewhere))
    with pytest.raises(JobRunningError):
        run_partitions(steps(engine), 2, again=True)
    assert times(engine) == {2}


def test_another_number_of_partitions_does_not_begin_before_the_run_is_at_its_end(engine):
    run_partitions(steps(engine, fails={2}), PARTS)
    before = list(stored_jobs(engine))
    refused = r"the job load was begun in 3 partitions \(number \d+\), and is not finished \(2 of 3 partitions are\)"
    for run in (
        lambda: run_partitions(steps(engine), 2, again=True),
        lambda: run_partitions(steps(engine), 2, again=datetime.fromtimestamp(SqlJobStore(engine).now(), UTC)),
        lambda: steps(engine)(1, 1).run(again=True),
    ):
        with pytest.raises(JobError, match=refused):
            run()
    assert list(stored_jobs(engine)) == before
    assert run_partitions(steps(engine), PARTS).finished
    assert times(engine) == {1}
    # At its end it may begin anew in whatever number, undivided too; but in one.
    assert steps(engine)(1, 1).run(again=True).status == "finished"
    assert times(engine) == {2}
    with pytest.raises(JobError, match="begun without partitions"):
        run_partitions(steps(engine), PARTS)
    assert run_partitions(steps(engine), 2, again=True).finished
    assert times(engine) == {3}


def test_a_job_that_has_failed_undivided_is_brought_to_its_end_undivided(engine):
    with pytest.raises(OSError, match="no line"):
        steps(engine, fails={1})(1, 1).run()
    with pytest.raises(
        JobError, match=r"begun without partitions \(number \d+\), and is not finished: bring it to its end"
    ):
        run_partitions(steps(engine), PARTS, again=True)
    assert steps(engine)(1, 1).run().status == "finished"
    assert times(engine) == {1}


def test_an_instant_in_the_future_is_refused_before_anything_begins(engine):
    run_partitions(steps(engine), PARTS)
    later = datetime.fromtimestamp(SqlJobStore(engine).now(), UTC) + timedelta(minutes=1)
    with pytest.raises(JobError, match=r"before: .* is in the future"):
        run_partitions(steps(engine), PARTS, again=later)
    assert times(engine) == {1}


@pytest.mark.parametrize("again", ["yes", 1, datetime(2026, 11, 22)])  # noqa: DTZ001 - that is refused
def test_what_says_neither_whether_nor_since_when_is_refused(again):
    with pytest.raises((TypeError, ValueError), match=r"^again: "):
        run_partitions(lambda *_: None, 2, again=again)


# -- hosts: the command in processes of their own

PROGRAM = """
import os
import time
from pathlib import Path

from sqlalchemy import create_engine, text

from retrykit.batch import ChunkStep
from retrykit.sql import SqlJobStore

engine = create_engine(os.environ["SHOP"])


def items(part, parts):
    for item in range(part - 1, 30, parts):
        if item == 29 and os.environ.get("GATE"):
            # No transaction is open while a reader waits.
            deadline = time.monotonic() + 60
            while not Path(os.environ["GATE"]).exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        yield item


class Items:
    def __init__(self, part, parts):
        self.of = part, parts

    def __iter__(self):
        return items(*self.of)


def write(connection, found):
    connection.execute(text("INSERT INTO work VALUES (:item)"), [{"item": item} for item in found])


def make(part, parts):
    return ChunkStep(name="load", reader=Items(part, parts), writer=write, transaction=engine.begin, chunk_size=5,
                     jobs=SqlJobStore(engine))
"""


@contextmanager
def host(folder, url, *options, gate=""):
    """A host that runs the command, to be waited for."""
    command = [sys.executable, "-m", "retrykit.cli", "batch", "run", "shop:make", "--partitions", str(PARTS), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SHOP": url, "GATE": str(gate)}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=log)
    try:
        yield process
        assert process.wait(PATIENCE) == 0, (folder / "log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def written(engine):
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(text("work")))


@pytest.fixture(params=["sqlite", "postgresql"])
def shop(request, tmp_path):
    url = empty_database(request, request.param)
    (tmp_path / "shop.py").write_text(textwrap.dedent(PROGRAM))
    engine = create_engine(url)
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS work"))
        connection.execute(text("CREATE TABLE work (item INTEGER)"))
    run_partitions(steps(engine), PARTS)
    yield tmp_path, url, engine
    engine.dispose()


def test_a_host_that_comes_while_another_one_runs_again_takes_part_and_runs_nothing_twice(shop):
    folder, url, engine = shop
    with host(folder, url, "--again", gate=folder / "gate"):
        # Two partitions are finished again, of the third not all is read.
        until(lambda: written(engine) >= len(ITEMS) + 25, PATIENCE)
        with host(folder, url, "--again"):
            until(lambda: "what is left is run, and nothing begins anew" in (folder / "log").read_text(), PATIENCE)
            (folder / "gate").touch()
    assert times(engine) == {2}
    # It is said: who comes when all is finished begins once more.
    with host(folder, url, "--again"):
        pass
    assert times(engine) == {3}


def test_hosts_that_say_since_when_run_it_once_however_they_come(shop):
    folder, url, engine = shop
    since = datetime.fromtimestamp(SqlJobStore(engine).now(), UTC).isoformat()
    with host(folder, url, "--again-since", since), host(folder, url, "--again-since", since):
        pass
    with host(folder, url, "--again-since", since):
        pass
    assert times(engine) == {2}
    assert "the partitions of load have been run again already (3)" in (folder / "log").read_text()
