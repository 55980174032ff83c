"""`retrykit batch run …`: a job as a command, in one process or several."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import attrs
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import text

from retrykit.batch import Counts, Report
from retrykit.cli.calls import Interruption, blocked, calls, interruptible, let_through
from retrykit.cli.commands import retrykit
from retrykit.cli.divided import MARK, Gathered, Increments, Options, ToTheParent, _end, _others, run_divided
from retrykit.cli.logs import through
from retrykit.cli.plot import PARTS, POINTS, Point, Series, spread, svg
from retrykit.cli.progress import progress, progress_of_parts
from retrykit.cli.steps import made_by, step_of
from retrykit.cli.target import LoadingError, TargetError
from retrykit.sql import SqlJobStore, sqlite_engine, stop_job, stored_jobs
from tests.waiting import until

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0

PROGRAM = """
import asyncio
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

from sqlalchemy import text
from sqlalchemy.orm import sessionmaker

from retrykit import AsyncRetryTemplate, RetryTemplate, SimpleRetryPolicy
from retrykit.batch import AsyncChunkStep, ChunkStep, SkipPolicy, stop
from retrykit.cli import divided
from retrykit.sql import SqlJobStore, sqlite_engine

engine = sqlite_engine("sqlite:///shop.db", durability="process")
policy = SimpleRetryPolicy(1)


def write(session, items):
    if items[0] == "hang":
        Path("hangs").touch()
        time.sleep(60)
    session.execute(text("INSERT INTO work VALUES (:item)"), [{"item": item} for item in items])


def check(item):
    return int("x") if item == 13 else item


def step_for(reader, **options):
    options = {"processor": check, "skip": SkipPolicy(skip_for=ValueError)} | options
    return ChunkStep(
        name="load", reader=reader, writer=write, transaction=sessionmaker(engine).begin, chunk_size=5,
        template=RetryTemplate(name="load", retry_policy=policy), jobs=SqlJobStore(engine), **options,
    )


step = step_for(range(40))
unskipped = step_for(range(40), skip=SkipPolicy())
hanging = step_for([1, 2, 3, 4, 5, "hang"])
number = 7


def swallow(item):
    if item == 2:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            pass
    return item


swallowing = step_for(range(10), processor=swallow)


def make_swallowing_part(part, parts):
    return step_for(range(10), processor=swallow)


def make():
    return step


def make_async():
    return AsyncChunkStep(
        name="later", reader=range(3), writer=lambda _, items: None,
        template=AsyncRetryTemplate(name="later", retry_policy=policy),
    )


def make_async_hanging(items=(1, 2, 3, 4, 5, "hang")):
    from retrykit.sql import AsyncSqlJobStore, async_sqlite_engine

    engine = async_sqlite_engine("sqlite+aiosqlite:///shop.db", durability="process")

    async def write(connection, items):
        if items[0] == "hang":
            Path("hangs").touch()
            await asyncio.sleep(60)
        await connection.execute(text("INSERT INTO work VALUES (:item)"), [{"item": item} for item in items])

    return AsyncChunkStep(
        name="load", reader=items, writer=write, transaction=engine.begin, chunk_size=5,
        template=AsyncRetryTemplate(name="load", retry_policy=policy), jobs=AsyncSqlJobStore(engine),
    )


def make_hanging_part(part, parts):
    return make_async_hanging()


def make_async_part(part, parts):
    return make_async_hanging([item for item in range(100) if item % parts == part - 1])


def make_part(part, parts):
    def kill_once(item):
        # The first that comes to this item, in whatever process but the one that was started by hand.
        if item == 33 and "--since" in __import__("sys").argv:
            try:
                Path("killed").touch(exist_ok=False)
            except FileExistsError:
                return item
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)
        return item

    return step_for([item for item in range(100) if item % parts == part - 1], processor=kill_once)


class Leaving:
    def __init__(self, part):
        self.part = part

    def __iter__(self):
        Path(f"hangs{self.part}").touch()
        try:
            time.sleep(60)
        finally:
            time.sleep(0.3)
        yield 1


def make_leaving_part(part, parts):
    return step_for(Leaving(part))


class Stubborn(Leaving):
    def __iter__(self):
        Path(f"hangs{self.part}").touch()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                if "--since" not in __import__("sys").argv:
                    raise
        yield 1


def make_stubborn_part(part, parts):
    divided.PATIENCE = 0.1
    return step_for(Stubborn(part))


class Gated:
    def __init__(self, part):
        self.part = part

    def __iter__(self):
        if self.part == 2 and "--since" in __import__("sys").argv:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while self.part == 1 and not Path("gate").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield self.part


def make_gated_part(part, parts):
    return step_for(Gated(part))


class Waiting:
    def __iter__(self):
        yield from range(1, 6)
        Path("hangs").touch()
        yield from Gated(1)


gated = step_for(Waiting())


def make_stopping_part(part, parts):
    return step_for([part], processor=lambda item: stop("wrong file") if part == 2 else item)


def make_failing_part(part, parts):
    return step_for([13] if part == 2 else [part], skip=SkipPolicy())


def make_of(first, last="40", *, unused=None):
    return step_for(range(int(first), int(last)))


def make_part_of(part, parts, last):
    return step_for([item for item in range(int(last)) if item % parts == part - 1])


def make_nothing(*_):
    return 7


def fail(*_):
    raise RuntimeError("the application cannot be loaded")
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shop.py").write_text(textwrap.dedent(PROGRAM))
    engine = sqlite_engine(f"sqlite:///{tmp_path}/shop.db")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (item INTEGER)"))
    engine.dispose()
    return tmp_path


def started(folder, *arguments, **options):
    command = [sys.executable, "-m", "retrykit.cli", "batch", "run", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run(folder, *arguments, status=0):
    process = started(folder, *arguments)
    out, err = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == status, out + err
    return out, err


def written(folder):
    engine = sqlite_engine(f"sqlite:///{folder}/shop.db")
    try:
        with engine.connect() as connection:
            return sorted(connection.scalars(text("SELECT item FROM work")))
    finally:
        engine.dispose()


def picture_of(text):
    return ET.fromstring(text)  # noqa: S314 - our own


def jobs(folder):
    engine = sqlite_engine(f"sqlite:///{folder}/shop.db")
    try:
        return list(stored_jobs(engine))
    finally:
        engine.dispose()


def test_a_step_runs_to_its_end_and_says_what_has_come_of_it(folder):
    out, err = run(folder, "shop:step", "--param", "file=a.csv", "--plot", "run.svg")
    assert written(folder) == [item for item in range(40) if item != 13]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:3] == ["job load file='a.csv'", "status finished", "read 40"]
    assert "item 14 is skipped" in err
    picture = picture_of((folder / "run.svg").read_text())
    # Eight transactions: as many steps, from the beginning on.
    assert len(picture.find("{*}polyline").get("points").split()) == 9
    # The same again is refused; asked for, it begins anew.
    _, err = run(folder, "shop:make", "--param", "file=a.csv", status=1)
    assert re.search(r"Error: the job load .* was finished at .*: say --again to run it from the beginning", err)
    out, _ = run(folder, "shop:make", "--param", "file=a.csv", "--again", "--json")
    assert json.loads(out)["counts"]["written"] == 39
    assert len(written(folder)) == 2 * 39


def test_a_job_that_fails_ends_with_status_1_its_report_and_the_traceback_in_the_log(folder):
    out, err = run(folder, "shop:unskipped", "--json", status=1)
    assert "the job has failed" in err
    assert "invalid literal for int()" in err
    told = json.loads(out)
    assert (told["status"], told["counts"]["read"], told["counts"]["rollbacks"]) == ("failed", 10, 1)
    assert told["reason"].startswith("ValueError: invalid literal for int()")
    (job,) = jobs(folder)
    assert (job.status, job.position, job.counts) == ("failed", 10, told["counts"])


def test_a_job_that_was_not_begun_has_no_report(folder):
    run(folder, "shop:step")
    out, err = run(folder, "shop:step", "--plot", "run.svg", status=1)
    assert (out, (folder / "run.svg").exists()) == ("", False)
    assert "was finished at" in err


def test_an_asynchronous_step_runs_too(folder):
    out, _ = run(folder, "shop:make_async", "--json")
    assert json.loads(out)["counts"]["written"] == 3


def terminated(folder, *arguments, by=signal.SIGTERM):
    """What a command prints that gets a signal where its writer hangs."""
    process = started(folder, *arguments)
    until((folder / "hangs").exists, PATIENCE)
    process.send_signal(by)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert "what was committed stays" in err
    return [" ".join(line.split()) for line in out.splitlines()]


def test_sigterm_stops_the_job_and_what_was_committed_stays(folder):
    lines = terminated(folder, "shop:hanging", "--plot", "run.svg")
    assert lines[1:3] == ["status stopped: KeyboardInterrupt: SIGTERM", "read 5"]
    # One transaction: a line, and what it is of.
    picture = picture_of((folder / "run.svg").read_text())
    assert len(picture.find("{*}polyline").get("points").split()) == 2
    assert "load: stopped (KeyboardInterrupt: SIGTERM)" in "".join(picture.itertext())
    assert written(folder) == [1, 2, 3, 4, 5]
    (job,) = jobs(folder)
    assert (job.status, job.reason, job.position) == ("stopped", "KeyboardInterrupt: SIGTERM", 5)


def test_a_job_says_that_it_was_stopped_by_ctrl_c(folder):
    assert terminated(folder, "shop:hanging", by=signal.SIGINT)[1] == "status stopped: KeyboardInterrupt: SIGINT"
    assert [job.reason for job in jobs(folder)] == ["KeyboardInterrupt: SIGINT"]
    (folder / "hangs").unlink()
    lines = terminated(folder, "shop:make_async_hanging", "--param", "day=2", by=signal.SIGINT)
    assert lines[1] == "status stopped: KeyboardInterrupt: SIGINT"
    assert [job.reason for job in jobs(folder)][1:] == ["CancelledError: SIGINT"]


@pytest.mark.parametrize("divided", [True, False])
def test_sigterm_stops_an_asynchronous_job_at_an_await(folder, divided):
    target = ("shop:make_hanging_part", "--partitions", "2") if divided else ("shop:make_async_hanging",)
    lines = terminated(folder, *target, "--plot", "run.svg")
    assert written(folder) == [1, 2, 3, 4, 5]
    assert {job.reason for job in jobs(folder)} == {"CancelledError: SIGTERM"}
    if divided:
        assert lines[0] == "1/2 stopped 5 read 5 written 0 skipped CancelledError: SIGTERM"
        assert lines[1] == "2/2 new 0 read 0 written 0 skipped"
    assert "stopped" in lines[0 if divided else 1]
    assert picture_of((folder / "run.svg").read_text()).find("{*}polyline").get("points")


def test_ctrl_c_of_a_terminal_reaches_all_processes_and_leaves_no_partition_running(folder):
    process = started(folder, "shop:make_leaving_part", "--partitions", "3", "--workers", "2", start_new_session=True)
    until(lambda: len(list(folder.glob("hangs*"))) == 2, PATIENCE)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert [(job.status, job.reason) for job in jobs(folder)] == [("stopped", "KeyboardInterrupt: SIGINT")] * 2
    assert "Exception ignored" not in err
    # Once, by whoever has started the others.
    assert err.count("what was committed stays") == 1


def test_a_worker_that_hears_ctrl_c_while_it_starts_says_nothing(folder):
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys
            import time
            from pathlib import Path

            if "--since" in sys.orig_argv:
                Path("starts").touch()
                deadline = time.monotonic() + 60
                while not Path("gate").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
            """
        )
    )
    process = started(folder, "shop:make_leaving_part", "--partitions", "2", "--workers", "2", start_new_session=True)
    until(lambda: (folder / "starts").exists() and (folder / "hangs1").exists(), PATIENCE)
    os.killpg(process.pid, signal.SIGINT)
    (folder / "gate").touch()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if "what was committed stays" not in line] == []


def test_what_is_blocked_is_heard_when_it_is_let_through():
    with interruptible():
        with blocked():
            signal.raise_signal(signal.SIGINT)
            assert signal.sigpending() == {signal.SIGINT}
            with pytest.raises(KeyboardInterrupt, match="SIGINT"):
                let_through()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_worker_that_is_started_in_the_moment_of_a_signal_is_ended(monkeypatch, number):
    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            signal.raise_signal(number)
            processes.append(self)

    processes = []
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    sleeps = (sys.executable, "-c", "import time; time.sleep(60)")
    asked = SimpleNamespace(workers=3, command=lambda _since: sleeps)
    with interruptible(), pytest.raises(KeyboardInterrupt, match=number.name), _others(asked, 0.0, Gathered()):
        pass
    assert [process.returncode for process in processes] == [-signal.SIGTERM]


def test_a_worker_that_does_not_leave_is_killed_by_another_ctrl_c(folder):
    process = started(folder, "shop:make_stubborn_part", "--partitions", "2", "--workers", "2")
    until(lambda: len(list(folder.glob("hangs*"))) == 2, PATIENCE)
    process.send_signal(signal.SIGINT)
    line = ""
    while "waiting for processes that have something in hand (1): Ctrl-C kills them" not in line:
        line = process.stderr.readline()
        assert line, "it has ended before"
    process.send_signal(signal.SIGINT)
    # Its pipes are closed only when the worker is gone too.
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert sorted(job.status for job in jobs(folder)) == ["running", "stopped"]
    # What it ran is free.
    assert not any(SqlJobStore(f"sqlite:///{folder}/shop.db").is_taken(job) for job in jobs(folder))


def test_all_workers_are_killed_though_more_signals_come():
    def interrupt():
        signal.raise_signal(signal.SIGINT)

    killed = []
    others = [
        SimpleNamespace(
            terminate=interrupt,
            process=SimpleNamespace(kill=lambda number=number: (interrupt(), killed.append(number))),
        )
        for number in (1, 2)
    ]
    with interruptible(), pytest.raises(KeyboardInterrupt, match="SIGINT"):
        _end(others)
    assert killed == [1, 2]


def test_that_a_worker_has_died_is_said_when_it_dies(folder):
    process = started(folder, "shop:make_gated_part", "--partitions", "2", "--workers", "2")
    line = ""
    while "has died of signal 9: others run what it ran" not in line:
        line = process.stderr.readline()
        assert line, "it has ended before"
    (folder / "gate").touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert written(folder) == [1, 2]


def test_a_signal_that_says_the_same_again_interrupts_nothing_while_a_worker_leaves():
    with interruptible(window=60) as interruption:
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        # What took the first one for a failure of its own goes on, until it is asked.
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            interruption.check()
    with interruptible() as interruption:
        interruption.check()
        for number in (signal.SIGINT, signal.SIGTERM):
            with pytest.raises(KeyboardInterrupt, match=number.name):
                signal.raise_signal(number)


def test_a_coroutine_that_is_cancelled_by_a_signal_is_left_in_peace_by_the_next_one():
    async def leave():
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0)
            left.append(True)

    left = []
    with interruptible(window=60), calls(asynchronous=True) as do, pytest.raises(KeyboardInterrupt, match="SIGINT"):
        do(leave)
    assert left == [True]


def test_a_job_that_somebody_stops_says_why(folder):
    process = started(folder, "shop:gated", "--json")
    until((folder / "hangs").exists, PATIENCE)
    (job,) = jobs(folder)
    engine = sqlite_engine(f"sqlite:///{folder}/shop.db")
    assert [one.id for one in stop_job(engine, job.id, "wrong file")] == [job.id]
    engine.dispose()
    (folder / "gate").touch()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert json.loads(out)["status"] == "stopped"
    assert "Error: The job load (number 1) was stopped: wrong file" in err
    assert "Traceback" not in err
    assert written(folder) == [1, 2, 3, 4, 5]


def test_a_signal_that_was_taken_for_a_failure_stops_the_job_after_its_transaction(folder):
    out, err = run(folder, "shop:swallowing", status=130)
    assert "stopped: KeyboardInterrupt: SIGTERM" in out
    assert "what was committed stays" in err
    assert written(folder) == [0, 1, 2, 3, 4]
    out, err = run(folder, "shop:make_swallowing_part", "--partitions", "2", "--param", "day=2", status=130)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "1/2 stopped 5 read 5 written 0 skipped KeyboardInterrupt: SIGTERM"
    assert lines[1].startswith("2/2 new")
    assert "what was committed stays" in err


def test_workers_share_the_partitions_and_one_that_is_killed_is_replaced_by_the_others(folder):
    picture = ("--plot", "run.svg", "--json")
    out, err = run(folder, "shop:make_part", "--partitions", "6", "--workers", "3", "--param", "day=1", *picture)
    # Not the one that was started by hand, if it comes to that item first.
    assert ("has died of signal 9: others run what it ran" in err) == (folder / "killed").exists()
    assert written(folder) == list(range(100))
    found = json.loads(out)
    assert [row["status"] for row in found["partitions"]] == ["finished"] * 6
    assert {row["id"]: row["partition"] for row in found["partitions"]} == {
        job.id: job.parameters["partition"] for job in jobs(folder)
    }
    assert sum(row["counts"]["written"] for row in found["partitions"]) == 100
    assert {job.parameters["day"] for job in jobs(folder)} == {"1"}
    drawn = picture_of((folder / "run.svg").read_text())
    assert "load: 6 of 6 partitions are finished" in "".join(drawn.itertext())
    assert {line.findtext("{*}title") for line in drawn.findall("{*}polyline")} >= {None, "partition 1", "partition 6"}
    # Asked for, it begins anew.
    run(folder, "shop:make_part", "--partitions", "6", "--param", "day=1", "--again")
    assert written(folder) == sorted([*range(100), *range(100)])


def test_workers_share_asynchronous_partitions_each_in_a_loop_of_its_own(folder):
    out, _ = run(folder, "shop:make_async_part", "--partitions", "4", "--workers", "2", "--plot", "run.svg", "--json")
    assert written(folder) == list(range(100))
    assert [row["status"] for row in json.loads(out)["partitions"]] == ["finished"] * 4
    run(folder, "shop:make_async_part", "--partitions", "4", "--again")
    assert written(folder) == sorted([*range(100), *range(100)])


def test_a_function_is_given_the_parameters_that_it_has_arguments_for(folder):
    run(folder, "shop:make_of", "--param", "first=35", "--param", "day=monday")
    assert written(folder) == [35, 36, 37, 38, 39]
    run(folder, "shop:make_part_of", "--param", "last=3", "--partitions", "2")
    assert written(folder) == [0, 1, 2, 35, 36, 37, 38, 39]
    _, err = run(folder, "shop:make_of", "--param", "first=39", "--param", "day=monday", "--param", "last=40")
    assert "the parameter 'day' only names the job: shop:make_of has no such argument" in err
    _, err = run(folder, "shop:make_of", status=2)
    assert "shop:make_of cannot be called: missing a required argument: 'first'" in err
    _, err = run(folder, "shop:make", "--partitions", "2", status=2)
    assert "shop:make cannot be called: too many positional arguments" in err
    _, err = run(folder, "shop:step", "--param", "a=1", "--param", "a=2", status=2)
    assert "'a' is given twice" in err


def test_a_picture_that_cannot_be_written_is_refused_before_the_job_and_of_a_failed_one_there_is_one(folder):
    _, err = run(folder, "shop:step", "--plot", "nowhere/run.svg", status=2)
    assert "there is no folder 'nowhere'" in err
    assert written(folder) == []
    run(folder, "shop:unskipped", "--plot", "run.svg", status=1)
    assert "load: failed" in "".join(picture_of((folder / "run.svg").read_text()).itertext())


def test_another_number_of_partitions_is_refused_unless_all_is_to_begin_again(folder):
    run(folder, "shop:make_failing_part", "--partitions", "1")
    _, err = run(folder, "shop:make_failing_part", "--partitions", "3", status=1)
    assert "Error: the job load was begun in 1 partitions (number 1), and is not run in 3 partitions" in err
    assert written(folder) == [1]
    run(folder, "shop:make_failing_part", "--partitions", "3", "--again", status=1)
    assert written(folder) == [1, 1, 3]
    assert [job.status for job in jobs(folder)] == ["new", "finished", "failed", "finished"]


def test_a_partition_that_failed_is_told_and_the_others_are_done(folder):
    out, _ = run(folder, "shop:make_failing_part", "--partitions", "3", status=1)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("1/3 finished 1 read 1 written 0 skipped")
    assert re.match(r"2/3 failed 0 read 0 written 0 skipped (item 1 .*)?ValueError", lines[1])
    assert lines[2].startswith("3/3 finished")


@pytest.fixture
def module(folder, monkeypatch):
    """The program under a name of its own, to be imported here."""
    name = f"shop_{folder.name.replace('-', '_')}"
    (folder / "shop.py").rename(folder / f"{name}.py")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield name
    sys.modules.pop(name).engine.dispose()


def test_what_is_no_step_is_refused(module):
    for name, words in {
        "nobody": r"has no 'nobody'; it has step, unskipped, hanging",
        "number": "is a int: wanted is a ChunkStep",
        "make_nothing": r"make_nothing\(\) gave a int",
        "Path": "is a type: wanted is a ChunkStep",
    }.items():
        with pytest.raises(TargetError, match=words):
            step_of(f"{module}:{name}", {})
    with pytest.raises(TargetError, match="wanted for partitions is a function"):
        made_by(f"{module}:step", {})
    with pytest.raises(TargetError, match=r"make_nothing\(1, 2\) gave a int: wanted is a ChunkStep"):
        made_by(f"{module}:make_nothing", {})(1, 2)
    with pytest.raises(LoadingError, match="the application cannot be loaded"):
        step_of(f"{module}:fail", {})
    assert step_of(f"{module}:make", {}).name == "load"
    assert made_by(f"{module}:make_part", {})(1, 2).name == "load"


def test_a_slip_in_the_name_of_a_parameter_does_not_run_another_job(module, caplog):
    with pytest.raises(TargetError, match=r"make_of has no argument 'lasst': --param last=… is perhaps what is meant"):
        step_of(f"{module}:make_of", {"first": "1", "lasst": "5"})
    with pytest.raises(TargetError, match="no argument 'lst'"):
        made_by(f"{module}:make_part_of", {"lst": "5"})
    # What is given may well have one of a similar name beside it; and a function without arguments wants none.
    with caplog.at_level("INFO"):
        assert step_of(f"{module}:make_of", {"first": "1", "last": "3", "last1": "5"}).reader == range(1, 3)
        assert step_of(f"{module}:make", {"last": "1"}).name == "load"
    assert caplog.messages == [f"the parameter 'last1' only names the job: {module}:make_of has no such argument"]


def test_what_is_said_of_a_target_is_said_of_steps(module):
    with pytest.raises(TargetError, match=r"such as orders:step, or shop\.orders:make_step"):
        step_of(module, {})
    with pytest.raises(TargetError, match=rf"there is no module '{module}.py': leave out the .py"):
        step_of(f"{module}.py:make", {})


def test_tables_that_are_not_as_they_should_be_are_a_line_for_people(folder):
    run(folder, "shop:step")
    engine = sqlite_engine(f"sqlite:///{folder}/shop.db")
    with engine.begin() as connection:
        connection.execute(text("UPDATE rk_schema SET value = 99 WHERE name = 'version'"))
    engine.dispose()
    for arguments in (["shop:step", "--param", "day=2"], ["shop:make_part", "--partitions", "2"]):
        _, err = run(folder, *arguments, status=1)
        assert [line for line in err.splitlines() if line.startswith("Error: ") and "99" in line]
        assert "Traceback" not in err


def test_a_target_that_is_not_there_is_a_word_for_people(folder):
    _, err = run(folder, "shop:nobody", status=2)
    assert "it has step, unskipped, hanging" in " ".join(err.split())
    _, err = run(folder, "shop:fail", status=1)
    assert "RuntimeError: the application cannot be loaded" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "2"], "--workers needs --partitions"),
        (["--again-since", "2h"], "--again-since needs --partitions"),
        (["--again-since", "2h", "--partitions", "2", "--again"], "stands in place of --again"),
        (["--again-since", "soon", "--partitions", "2"], "'soon' is neither how long ago"),
        (["--again-since", "9999-01-01", "--partitions", "2"], "is in the future"),
        (["--plot", "a.png"], "'a.png' is to be drawn as SVG"),
        (["--param", "partition=north", "--partitions", "2"], "choose another name"),
        (["--param", "partition=1/2"], "choose another name"),
        (["--param", "a"], "'a' is not NAME=VALUE"),
        (["--partitions", "0"], "0 is not in the range"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, words):
    found = CliRunner().invoke(retrykit, ["batch", "run", "shop:step", *arguments])
    assert found.exit_code == 2
    assert words in found.output


@pytest.fixture
def hurried(module, monkeypatch):
    monkeypatch.setattr("retrykit.cli.progress.EVERY", 0.0)
    return module, monkeypatch


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_in_the_log_elsewhere(hurried, capsys, caplog, terminal):
    module, monkeypatch = hurried
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    step = step_of(f"{module}:make", {})
    with caplog.at_level("INFO", "retrykit.batch"), progress(step) as show:
        attrs.evolve(step, on_progress=show).run()
    if terminal:
        assert re.search(r"load, 1 skipped.*40/40", capsys.readouterr().err, re.DOTALL)
    else:
        assert "load: 40 read, 39 written, 1 skipped, 1 rolled back" in caplog.messages
        assert capsys.readouterr().err == ""


def options(target, parts, **parameters):
    return Options(
        target=target,
        parameters=parameters,
        again=False,
        again_since=None,
        partitions=parts,
        workers=1,
        since=None,
        plot=None,
        as_json=False,
        log_level="info",
        log_format="text",
    )


def test_progress_of_partitions_is_told_while_they_run(hurried, caplog, capsys):
    module, monkeypatch = hurried
    monkeypatch.setenv("NO_COLOR", "1")
    with caplog.at_level("INFO", "retrykit.batch"):
        assert run_divided(options(f"{module}:make_part_of", 2, last="30"), 2, Interruption())
    lines = [message for message in caplog.messages if message.startswith("load: ")]
    assert lines[0] == "load: 5 read here, 0 rolled back"
    assert lines[-1] == "load: 30 read here, 1 rolled back"
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_of_parts("load") as shown:
        shown.tell(1_200, 3)
        shown.say("another process says that it " + "goes on and " * 10 + "on\n")
    found = capsys.readouterr().err
    assert re.search(r"load, 3 rolled back.*1200/\?", found, re.DOTALL)
    assert "goes on and " * 10 + "on" in found


def test_a_partition_that_was_stopped_is_told_with_its_reason(module, capsys):
    assert not run_divided(options(f"{module}:make_stopping_part", 2), 2, Interruption())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "2/2 stopped 0 read 0 written 0 skipped wrong file"


def test_what_is_logged_stands_on_lines_of_its_own_above_the_bar():
    shown = io.StringIO()
    console, handler = Console(file=shown, force_terminal=True, width=40), logging.StreamHandler()
    line = "item 14 is skipped " + "and this is a long story " * 4
    logging.getLogger().addHandler(handler)
    try:
        with through(console) as above, Progress(console=console) as bar:
            bar.add_task("load", total=2)
            bar.refresh()
            logging.getLogger("retrykit.batch").warning(line)
            # What another process says.
            above.write(f"too: {line}\n")
        assert handler.stream is sys.stderr
    finally:
        logging.getLogger().removeHandler(handler)
    # The bar's line is erased, and the whole line takes its place; the bar comes below.
    assert f"\x1b[2K{line}\n" in shown.getvalue()
    assert f"\x1b[2Ktoo: {line}\n" in shown.getvalue()


def test_what_psycopg_says_of_a_pipeline_is_no_news():
    program = """
import logging
from retrykit.cli.logs import set_up
set_up("info", "text")
log = logging.getLogger("psycopg")
log.warning("error ignored terminating %r: %s", "a pipeline", "a failure")
log.warning("what else there is")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [line.partition("psycopg: ")[2] for line in done.stderr.splitlines()] == ["what else there is"]


def test_a_series_stays_small_and_keeps_its_span():
    series = Series()
    for number in range(100_000):
        series.add(Point(float(number), number, 0))
    assert POINTS / 2 <= len(series.points) <= 2 * POINTS
    assert series.points[-1].seconds > 99_000


def test_a_picture_shows_rates_failures_and_an_escaped_title():
    points = [Point(1.0, 100, 0), Point(2.0, 300, 0), Point(3.0, 400, 2)]
    picture = picture_of(svg("a < b & c", points))
    assert len(picture.find("{*}polyline").get("points").split()) == 3
    assert len(picture.findall("{*}line")) == 1
    assert "a < b & c" in [one.text for one in picture.findall("{*}text")]
    assert "200/s" in [one.text for one in picture.findall("{*}text")]
    picture_of(svg("nothing", []))


def test_a_single_transaction_is_seen_and_so_are_failures_with_none():
    series = Series()
    series.add(Point(2.0, 150, 0))
    series.begin(Point(0.0, 50, 0))
    series.end(Point(2.1, 150, 0))
    assert series.points == [Point(0.0, 50, 0), Point(2.0, 150, 0)]
    picture = picture_of(svg("once", series.points))
    assert len(set(picture.find("{*}polyline").get("points").split())) == 2
    assert "50/s" in [one.text for one in picture.findall("{*}text")]
    failed = Series()
    failed.begin(Point(0.0, 0, 0))
    failed.end(Point(1.0, 0, 3))
    assert len(picture_of(svg("never", failed.points)).findall("{*}line")) == 1


def test_what_several_processes_commit_in_one_moment_is_one_step():
    points = [Point(0.0, 0, 0), Point(1.0, 10, 0), Point(1.001, 20, 0), Point(2.0, 30, 1), Point(2.0001, 40, 1)]
    assert spread(points) == [points[0], points[1], points[4]]
    assert spread([]) == []
    assert spread(points[:1]) == points[:1]


def test_more_partitions_than_one_can_follow_have_no_lines():
    points = [Point(1.0, 1, 0), Point(2.0, 2, 0)]
    for number, lines in ((PARTS, 1 + PARTS), (PARTS + 1, 1)):
        picture = picture_of(svg("many", points, dict.fromkeys(range(number), points)))
        assert len(picture.findall("{*}polyline")) == lines


def counted(items, failures):
    return Report(
        name="load",
        parameters={},
        status="running",
        counts=Counts(read=items, rollbacks=failures),
        started_at=datetime.now(UTC),
        seconds=1.0,
    )


def test_of_a_partition_that_was_begun_elsewhere_only_what_is_done_here_is_told():
    told = []
    tell = Increments(lambda *facts: told.append(facts))
    run, again = {"read": 40, "rollbacks": 2}, {}
    for items, failures in ((50, 2), (60, 3), (60, 3)):
        tell(7, counted(items, failures), run)
    tell(7, counted(5, 0), again)
    assert told == [(7, 10, 0), (7, 10, 1), (7, 5, 0)]


def test_what_processes_tell_is_gathered_and_what_they_print_goes_to_standard_error(tmp_path, capsys):
    told = b"".join(MARK + line for line in (b"[1, 10, 0]\n", b"[1, 5, 0]\n", b"[2, 5, 1]\n"))
    (tmp_path / "pipe").write_bytes(b"[1, 10, 0]\nhello\n" + told)
    gathered, shown = Gathered(), []
    gathered.shown = attrs.evolve(gathered.shown, tell=lambda *facts: shown.append(facts))
    with (tmp_path / "pipe").open("rb") as pipe:
        gathered.listen(pipe)
    points, parts = gathered.lines()
    assert (points[-1].items, points[-1].failures) == (20, 1)
    assert {part: line[-1].items for part, line in parts.items()} == {1: 15, 2: 5}
    assert shown == [(10, 0), (15, 0), (20, 1)]
    assert capsys.readouterr() == ("", "[1, 10, 0]\nhello\n")


def test_a_process_whose_parent_has_died_goes_on(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        tell = ToTheParent()
        tell(1, 2, 3)
        tell(1, 2, 3)
