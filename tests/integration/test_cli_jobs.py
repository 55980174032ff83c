"""`retrykit jobs …`: what batch jobs have come to, and beginning anew."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, SkipPolicy
from retrykit.cli.commands import retrykit
from retrykit.errors import JobLostError
from retrykit.sql import SqlJobStore, sqlite_engine, stop_job, stored_job


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/orders.db"


@pytest.fixture
def engine(url):
    engine = sqlite_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def jobs(engine):
    return SqlJobStore(engine)


@pytest.fixture
def run(url, jobs):
    # The tables are there: commands make none.
    jobs.abandon(jobs.claim("somebody's", {}))

    def run(*arguments, status=0):
        found = CliRunner().invoke(retrykit, ["jobs", *arguments], env={"RETRYKIT_STORE": url})
        assert found.exit_code == status, found.output
        return found.output

    return run


def load(jobs, file, *, last=10):
    def read():
        yield from range(last)
        if last < 10:
            raise OSError("no line")

    def process(item):
        return int("x") if item == 3 else item

    ChunkStep(
        name="load",
        reader=read(),
        processor=process,
        writer=lambda *_: None,
        chunk_size=2,
        template=RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
        skip=SkipPolicy(skip_for=ValueError),
        jobs=jobs,
    ).run({"file": file})


def test_list_shows_state_counts_and_reason(run, jobs):
    load(jobs, "a.csv")
    with pytest.raises(OSError, match="no line"):
        load(jobs, "b.csv", last=5)
    lines = [line.split("\t") for line in run("list").splitlines()]
    assert lines[0] == ["id", "name", "status", "runs", "read", "written", "skipped", "changed", "parameters", "reason"]
    assert lines[1][1:7] == ["somebody's", "running", "1", "0", "0", "0"]
    assert lines[2][1:7] == ["load", "finished", "1", "10", "9", "1"]
    assert lines[3][1:7] == ["load", "failed", "1", "4", "3", "1"]
    assert lines[3][8:] == ["file='b.csv'", "OSError: no line"]
    found = json.loads(run("list", "--name", "load", "--limit", "1", "--json"))
    assert [job["parameters"] for job in found["jobs"]] == [{"file": "a.csv"}]
    rest = json.loads(run("list", "--name", "load", "--after", str(found["next"]), "--json"))
    assert [job["status"] for job in rest["jobs"]] == ["failed"]
    assert rest["next"] is None
    assert json.loads(run("list", "--status", "stopped", "--json")) == {"jobs": [], "next": None}
    assert "is no number of a job" in run("list", "--after", "x", status=2)


def test_show_tells_what_is_known_of_one(run, jobs):
    load(jobs, "a.csv")
    shown = run("show", "2")
    for line in (
        "status: finished",
        "written: 9",
        "skipped: 1",
        "ValueError: 1",
        "position: 10",
        "parameters: file='a.csv'",
    ):
        assert line in [" ".join(one.split()) for one in shown.splitlines()]
    job = json.loads(run("show", "2", "--json"))
    assert (job["format"], job["position"], job["counts"]["skipped"]) == (1, 10, {"builtins.ValueError": 1})
    assert "run by:" in run("show", "1")
    assert "there is no job 9" in run("show", "9", status=1)


def test_restart_lets_a_finished_job_begin_anew(run, engine, jobs):
    load(jobs, "a.csv")
    assert "say --yes" in run("restart", "2", status=2)
    assert run("restart", "2", "--yes") == "job 2 begins anew when it is started next\n"
    job = stored_job(engine, 2)
    assert (job.status, job.position, dict(job.counts), job.finished_at) == ("new", None, {}, None)
    load(jobs, "a.csv")
    job = stored_job(engine, 2)
    assert (job.status, job.counts["read"], job.runs) == ("finished", 10, 2)
    assert "there is no job 9" in run("restart", "9", "--yes", status=1)


def test_stop_ends_a_run_at_its_next_commit_and_it_goes_on_from_there(run, engine, jobs):
    found = []

    def hear(report):
        if not found:
            found.append(run("stop", "2", "--reason", "the customer\x1b[2J has cancelled"))

    step = ChunkStep(name="load", reader=range(6), writer=lambda *_: None, chunk_size=2, jobs=jobs, on_progress=hear)
    with pytest.raises(JobLostError, match="was stopped: the customer"):
        step.run({"file": "a.csv"})
    assert found == ["job 2, load file='a.csv', is stopped\n"]
    job = stored_job(engine, 2)
    assert (job.status, job.position, job.counts["read"]) == ("stopped", 2, 2)
    assert "there is nothing to stop: job 2 is stopped" in run("stop", "2", "--reason", "why", status=1)
    assert step.run({"file": "a.csv"}).counts.read == 6


def test_stop_reaches_all_partitions_also_what_was_not_begun(run, engine, jobs):
    claim = jobs.claim("load", {"partition": "1/3"})
    lines = run("stop", "2", "--reason", "wrong file", "--partitions").splitlines()
    assert lines == [f"job {1 + part}, load partition='{part}/3', is stopped" for part in (1, 2, 3)]
    assert {stored_job(engine, 1 + part).reason for part in (1, 2, 3)} == {"wrong file"}
    jobs.abandon(claim)


def test_stop_wants_a_reason_and_a_job(run):
    assert "--reason" in run("stop", "1", status=2)
    assert "say why" in run("stop", "1", "--reason", " ", status=2)
    assert "there is no job 9" in run("stop", "9", "--reason", "why", status=1)


def test_when_a_stopped_job_goes_on_is_shown(run, jobs):
    claim = jobs.claim("load", {})
    jobs.release(claim, status="stopped", reason="running elsewhere", counts={}, pause=60)
    shown = run("show", "2")
    assert run("stop", "2", "--reason", "why") == "job 2, load, is stopped\n"
    assert "goes on:" in shown
    assert "believed until:" not in shown


@pytest.mark.parametrize("reason", ["", 1, None])
def test_a_reason_that_is_none_stops_nothing(engine, jobs, reason):
    with pytest.raises((TypeError, ValueError), match=r"^reason: "):
        stop_job(engine, 1, reason)


@pytest.mark.parametrize("command", [["show"], ["restart", "--yes"], ["stop", "--reason", "why"]])
def test_a_number_that_no_database_can_hold_is_refused(run, command):
    assert "is not in the range" in run(*command, "99999999999999999999", status=2)
    assert "there is no job" in run(*command, str((1 << 63) - 1), status=1)


def test_a_job_that_somebody_runs_is_left_alone(run, engine, jobs):
    claim = jobs.claim("busy", {})
    try:
        assert "is run by" in run("restart", str(claim.id), "--yes", status=1)
        assert stored_job(engine, claim.id).status == "running"
    finally:
        jobs.abandon(claim)
    assert "begins anew" in run("restart", str(claim.id), "--yes")


def test_a_database_that_changes_nothing_is_a_line_for_people(run, engine, jobs):
    load(jobs, "a.csv")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER frozen BEFORE UPDATE ON rk_job BEGIN SELECT raise(ABORT, 'it is read-only'); END"
        )
    assert run("restart", "2", "--yes", status=1) == "Error: job 2 is not changed: it is read-only\n"
    assert run("stop", "1", "--reason", "why", status=1) == "Error: job 1 is not changed: it is read-only\n"
    assert stored_job(engine, 2).status == "finished"


def test_a_list_has_the_first_line_of_a_long_reason_and_show_has_all(run, jobs):
    def fail(item):
        raise OSError("no line\n[SQL: INSERT]\n" + "rows " * 100)

    step = ChunkStep(name="load", reader=[1], processor=fail, writer=lambda *_: None, jobs=jobs)
    with pytest.raises(OSError, match="no line"):
        step.run()
    assert run("list", "--name", "load").splitlines()[-1].endswith("OSError: no line")
    assert "rows rows" in run("show", "2")
