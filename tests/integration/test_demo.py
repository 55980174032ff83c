"""`retrykit demo` as a user runs it, and what it does about options that cannot be used."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from retrykit.cli.commands import retrykit
from retrykit.cli.demo.display import Silence
from retrykit.cli.demo.plan import generated, make_plan
from retrykit.cli.demo.report import Facts, report
from retrykit.cli.demo.run import Settings, Watch, run_demo
from retrykit.messaging.stomp import StompBroker
from retrykit.testing import StompServer

ROOT = Path(__file__).parents[2]
NUMBERS = {
    "messages",
    "effects",
    "duplicate_effects",
    "lost",
    "parked",
    "recovered",
    "max_attempts_seen",
    "process_deaths",
    "seconds",
}


@pytest.fixture
def environment(tmp_path):
    """The temporary files of the demo have a place of their own, so that those that are left are seen."""
    (tmp_path / "tmp").mkdir()
    return os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp"), "COLUMNS": "200"}


def command(*options):
    return [sys.executable, "-m", "retrykit.cli", "demo", *options]


def run(environment, *options):
    return subprocess.run(command(*options), env=environment, capture_output=True, text=True, timeout=200, check=False)


def assert_all_is_well(outcome, messages):
    told = json.loads(outcome.stdout)
    assert outcome.returncode == 0, outcome
    assert told["broken"] == {}
    assert set(told) >= NUMBERS
    assert told["messages"] == messages
    assert told["effects"] + told["parked"] == messages
    assert told["duplicate_effects"] == told["lost"] == 0
    return told


@pytest.mark.parametrize(("workers", "seed"), [(1, 7), (2, 8), (4, 9)])
def test_the_report_is_one_object_and_every_promise_is_kept(environment, workers, seed):
    outcome = run(environment, "--json", "--messages", "60", "--workers", str(workers), "--seed", str(seed))
    told = assert_all_is_well(outcome, 60)
    assert told["process_deaths"] == 6
    assert told["max_attempts_seen"] == 4
    assert told["parked"] == 3
    assert told["recovered"] > 0
    assert list(Path(environment["TMPDIR"]).iterdir()) == []


def test_every_decision_is_shown_with_its_reason_then_a_table_and_a_verdict(environment):
    outcome = run(environment, "--messages", "30")
    assert outcome.returncode == 0, outcome
    assert "PoisonError: this can never work: give up (SimpleRetryPolicy: attempt 4 of 4)" in outcome.stdout
    assert "IntegrityError" in outcome.stdout
    assert "ended by SIGKILL in attempt 4 of order-" in outcome.stdout
    assert "always kills" in outcome.stdout
    assert outcome.stdout.splitlines()[-1].startswith("every promise was kept: 30 messages")
    assert outcome.stderr == ""


def test_one_message_is_a_job_too(environment):
    assert_all_is_well(run(environment, "--json", "--messages", "1", "--workers", "1"), 1)


def test_messages_broker_and_database_may_be_the_users_own(environment, tmp_path):
    items = [{"id": 1, "text": "ü"}, {"id": "zwei", "text": "x" * 50_000}, {"id": "3 [red]", "text": "\u0001"}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n\n")
    with StompServer() as server:
        options = ("--broker", f"{server.url}/queue/mine", "--db", f"sqlite:///{tmp_path}/own.db", "--json")
        # Twice: what the first run left in the database is none of the second one's business.
        for _ in range(2):
            assert_all_is_well(run(environment, "--input", str(tmp_path / "own.jsonl"), *options), 3)
        assert server.depth("/queue/mine") == 0
    with closing(sqlite3.connect(tmp_path / "own.db")) as database:
        assert database.execute("SELECT count(*) FROM demo_effect").fetchone() == (2,)
        assert database.execute("SELECT count(*) FROM rk_parked").fetchone() == (4,)


def test_a_queue_with_messages_of_others_is_left_alone(environment, tmp_path):
    with StompServer() as server:
        server.publish("/queue/theirs", b"theirs")
        outcome = run(environment, "--broker", f"{server.url}/queue/theirs")
        assert outcome.returncode == 2
        assert "/queue/theirs is not empty" in outcome.stderr
        assert [message.body for message in server.messages("/queue/theirs")] == [b"theirs"]


def test_messages_of_others_that_come_meanwhile_are_moved_out_of_the_way(environment, tmp_path):
    with StompServer() as server:
        demo = subprocess.Popen(
            command("--broker", f"{server.url}/queue/shared", "--messages", "20", "--json"),
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        stranger = threading.Thread(target=publish_once_it_is_used, args=(server, "/queue/shared", b"theirs"))
        stranger.start()
        output, _ = demo.communicate(timeout=200)
        stranger.join()
        assert demo.returncode == 0
        assert json.loads(output)["messages"] == 20
        assert [message.body for message in server.messages("/queue/shared.not-of-the-demo")] == [b"theirs"]


def publish_once_it_is_used(server, queue, body):
    """Wait for the first message of the demo, as a consumer of the same queue, and publish then."""
    with closing(StompBroker(server.url + "/queue/watch").connect()) as session:
        while server.depth(queue) == 0:
            session.receive(timeout=0.01)
    server.publish(queue, body, {"colour": "blue"})


def test_a_message_that_somebody_takes_away_is_reported_as_lost():
    with StompServer() as server:
        url = f"{server.url}/queue/robbed"
        settings = Settings(plan=make_plan(generated(30, 1), 1), workers=1, broker=url, patience=3.0)
        thief = threading.Thread(target=steal_one, args=(server, url))
        thief.start()
        found = run_demo(settings, Silence())
        thief.join()
    assert found.lost == 1
    assert not found.kept
    assert [promise.text for promise in found.promises if promise.broken_by] == ["no message is lost"]


def test_a_message_that_is_left_in_the_users_own_queue_is_reported(monkeypatch):
    with StompServer() as server:
        url = f"{server.url}/queue/mine"
        done = Watch.until_done

        def leave_one(watch, supervisor):
            done(watch, supervisor)
            supervisor.stop()
            server.publish("/queue/mine", b"left")

        monkeypatch.setattr(Watch, "until_done", leave_one)
        found = run_demo(Settings(plan=make_plan(generated(3, 1), 1), workers=1, broker=url), Silence())
        assert [promise.text for promise in found.promises if promise.broken_by] == ["nothing is left in the queue"]
        assert [message.body for message in server.messages("/queue/mine")] == [b"left"]


def steal_one(server, url):
    with closing(StompBroker(f"{server.url}/queue/watch").connect()) as session:
        while server.depth("/queue/robbed") < 5:
            session.receive(timeout=0.01)
    with closing(StompBroker(url).connect()) as session:
        session.commit(session.receive(timeout=30))


@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_and_removes_the_files(environment, number, send):
    demo = subprocess.Popen(
        command(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while "attempt" not in demo.stdout.readline():
        assert demo.poll() is None
    children = children_of(demo.pid)
    assert len(children) >= 2
    send(demo.pid, number)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert errors == "interrupted\n"
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []
    assert list(Path(environment["TMPDIR"]).iterdir()) == []


def test_an_interrupt_while_it_starts_leaves_nothing_behind_either(environment):
    demo = subprocess.Popen(command(), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any("stomp_server" in Path(f"/proc/{pid}/cmdline").read_text() for pid in children_of(demo.pid)):
        assert demo.poll() is None
    children = children_of(demo.pid)
    demo.send_signal(signal.SIGINT)
    output, errors = demo.communicate(timeout=60)
    assert (demo.returncode, output, errors) == (130, "", "interrupted\n")
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []
    assert list(Path(environment["TMPDIR"]).iterdir()) == []


def children_of(pid):
    if not Path("/proc").exists():
        pytest.skip("children are found in /proc")
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def bad_files(folder):
    texts = {
        "duplicate": '{"id": 1}\n{"id": "1"}\n',
        "nameless": '{"id": "a"}\n{"name": "b"}\n',
        "broken": '{"id": "a"}\n{"id": \n',
        "array": "[1]\n",
        "empty": "\n\n",
        "boolean": '{"id": true}\n',
        "control": '{"id": "a\\nb"}\n',
        "long": json.dumps({"id": "x" * 201}) + "\n",
        "one": '{"id": 1}\n',
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--messages", "0"], ["--messages", "0"]),
        (["--messages", "many"], ["--messages", "many"]),
        (["--workers", "0"], ["--workers", "0"]),
        (["--workers", "1000"], ["--workers", "1000"]),
        (["--seed", "x"], ["--seed"]),
        (["--input", "nowhere"], ["--input", "nowhere", "does not exist"]),
        (["--input", "."], ["--input", "directory"]),
        (["--input", "duplicate"], ["--input", "line 2", "'1'"]),
        (["--input", "nameless"], ["line 2", '"id"']),
        (["--input", "broken"], ["line 2", "JSON"]),
        (["--input", "array"], ["line 1", '"id"']),
        (["--input", "empty"], ["no messages"]),
        (["--input", "boolean"], ["line 1", "true"]),
        (["--input", "control"], ["line 1", "printable"]),
        (["--input", "long"], ["line 1", "200"]),
        (["--input", "one", "--messages", "2"], ["1", "2 are wanted"]),
        (["--broker", "http://localhost/queue/a"], ["--broker", "stomp://"]),
        (["--broker", "stomp://u:secret@localhost:port/queue/a"], ["--broker", "port"]),
        (["--broker", "stomp://u:secret@localhost"], ["--broker", "queue"]),
        (["--broker", "stomp://localhost/topic/a"], ["--broker", "/queue/"]),
        (["--broker", "stomp://u:secret@127.0.0.1:1/queue/a"], ["127.0.0.1:1"]),
        (["--db", "nonsense"], ["--db", "nonsense"]),
        (["--db", "postgresql://u:secret@h/x"], ["--db", "sqlite"]),
        (["--db", "sqlite://"], ["--db", "file"]),
        (["--db", "sqlite:///file:x?mode=memory&uri=true"], ["--db", "file"]),
        (["--db", "postgresql//u:secret@h/x"], ["--db", "sqlite"]),
        (["--db", "sqlite:////nowhere/x.db"], ["/nowhere/x.db"]),
        (["--surprise"], ["--surprise"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_used_is_said_before_anything_starts(tmp_path, monkeypatch, options, words):
    bad_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(retrykit, ["demo", "--json", *options])
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert [word for word in words if word not in outcome.stderr] == []
    assert "secret" not in outcome.stderr


def test_a_broken_promise_is_exit_status_1(monkeypatch):
    monkeypatch.setattr("retrykit.cli.demo.options.run_demo", robbed)
    outcome = CliRunner().invoke(retrykit, ["demo", "--json"])
    assert outcome.exit_code == 1
    assert json.loads(outcome.stdout)["lost"] == 200
    outcome = CliRunner().invoke(retrykit, ["demo"])
    assert outcome.exit_code == 1
    assert "PROMISES WERE BROKEN" in outcome.stdout
    assert "and 195 more" in outcome.stdout


def robbed(settings, _display):
    facts = Facts(plan=settings.plan, effects={}, parked=(), attempts={}, in_doubt={}, max_attempts=4)
    return report(facts, process_deaths=0, seconds=1.0)


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("click", [], "cli"),
        ("rich", [], "cli"),
        ("stomp", ["demo"], "cli,sql,stomp"),
        ("sqlalchemy", ["demo"], "cli,sql,stomp"),
    ],
)
def test_a_missing_extra_is_one_clear_error(environment, module, options, extra):
    hidden = (
        f"import sys; sys.modules[{module!r}] = None; from retrykit.cli import main; sys.argv[1:] = {options!r}; main()"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", hidden], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 1
    assert "Traceback" not in outcome.stderr
    assert f"retrykit[{extra}" in outcome.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_the_help_says_what_it_is_for(arguments):
    outcome = CliRunner().invoke(retrykit, arguments)
    assert outcome.exit_code == 0
    assert "roll" in outcome.stdout
