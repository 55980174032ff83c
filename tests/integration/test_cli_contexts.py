"""`retrykit contexts …` on histories in SQLite, and on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import sqlite3
import subprocess
import sys

import attrs
import pytest
from click.testing import CliRunner

from retrykit import RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.backoff import FixedBackOffPolicy
from retrykit.cli.commands import retrykit
from retrykit.cli.stores import with_driver
from retrykit.errors import ExhaustedRetryError
from retrykit.histories import Histories, Pruned
from retrykit.sql import SqlRetryContextCache
from tests.doubles import ManualClock


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/orders.db"


@pytest.fixture
def cache(url):
    with SqlRetryContextCache(url) as cache:
        yield cache


@pytest.fixture
def template(cache):
    return RetryTemplate(name="orders", context_cache=cache, retry_policy=SimpleRetryPolicy(max_attempts=3))


@pytest.fixture
def run(url, cache):
    def run(*arguments, store=url, status=0):
        found = CliRunner().invoke(retrykit, ["contexts", *arguments], env={"RETRYKIT_STORE": store})
        assert found.exit_code == status, found.output
        return found

    return run


def fail(template, key="m-1", error=None, times=1):
    def callback(context):
        context.attributes["customer"] = 7
        raise error or ConnectionResetError("hung up")

    for _ in range(times):
        with pytest.raises(type(error) if error else ConnectionResetError):
            template.execute(callback, state=RetryState(key=key))


def rows(found):
    return [line.split("\t") for line in found.stdout.splitlines()]


# -- list


def test_list_shows_state_count_error_and_why(run, template):
    fail(template, "m-1")
    fail(template, "m-2", ValueError("bad \x1b[2J"), times=3)
    fail(attrs.evolve(template, back_off_policy=FixedBackOffPolicy(600)), "m-3")
    titles, first, second, third = rows(run("list"))
    assert titles == ["history", "state", "failed", "last failure", "next attempt", "last error", "why"]
    assert first[:3] == ["orders/m-1", "due", "1"]
    assert first[-2:] == ["ConnectionResetError: hung up", "SimpleRetryPolicy: attempt 1 of 3 failed"]
    assert second[:3] == ["orders/m-2", "exhausted", "3"]
    assert second[-2:] == ["ValueError: bad \\x1b[2J", "SimpleRetryPolicy: attempt 3 of 3"]
    assert third[:3] == ["orders/m-3", "waiting", "1"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}\+00:00", third[3])
    assert third[4] > third[3]


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["--exhausted"], ["a-2"]),
        (["--not-exhausted", "--name", "orders"], ["a-1", "b-1", "b-2"]),
        (["--vetoed"], ["b-2"]),
        (["--not-vetoed", "--key-prefix", "b"], ["b-1"]),
        (["--error", "OSError"], ["a-1", "b-1"]),
        (["--name", "other"], []),
        (["--since", "1h"], ["a-1", "a-2", "b-1"]),
        (["--until", "1h"], []),
        (["--waiting"], []),
        (["--running"], []),
        (["--completed"], ["done"]),
    ],
)
def test_list_shows_those_for_which_every_filter_holds(run, template, options, keys):
    fail(template, "a-1")
    fail(template, "a-2", ValueError("bad"), times=3)
    fail(template, "b-1")
    template.veto("b-2", "no")
    attrs.evolve(template, remember_completed=60).execute(lambda _: 1, state=RetryState(key="done"))
    assert [row[0] for row in rows(run("list", *options))[1:]] == [f"orders/{key}" for key in keys]


def test_pages_follow_each_other(run, template):
    for number in range(5):
        fail(template, f"m {number}")
    first = run("list", "--limit", "2")
    assert "there may be more: --after 'orders/m 1'" in first.stderr
    second = json.loads(run("list", "--limit", "2", "--after", "orders/m 1", "--json").stdout)
    assert [found["canonical_key"] for found in second["histories"]] == ["orders/m 2", "orders/m 3"]
    assert second["next"] == "orders/m 3"
    last = run("list", "--limit", "2", "--after", second["next"])
    assert [row[0] for row in rows(last)[1:]] == ["orders/m 4"]
    assert last.stderr == ""


# -- show and export


def test_show_tells_all_that_is_known_and_json_is_its_documented_form(run, template):
    fail(attrs.evolve(template, back_off_policy=FixedBackOffPolicy(600)), ("/queue/orders", "ID:1"))
    template.veto(("/queue/orders", "ID:1"), "the customer has cancelled", lasts=60)
    found = run("show", "--name", "orders", "--key-json", '["/queue/orders", "ID:1"]').stdout
    for line in (
        "history:         orders(/13:/queue/orders,/4:ID:1)",
        'key:             ["/queue/orders", "ID:1"]',
        "state:           vetoed",
        "veto:            the customer has cancelled",
        '      "customer": 7',
        "    ConnectionResetError: hung up",
    ):
        assert line in found.splitlines(), line
    exported = json.loads(run("export", "--vetoed").stdout)
    shown = json.loads(run("show", "orders(/13:/queue/orders,/4:ID:1)", "--json").stdout)
    assert exported | {"seen_at": 0} == shown | {"seen_at": 0}
    assert shown["key"] == ["/queue/orders", "ID:1"]


def test_show_tells_who_makes_a_running_attempt(run, template):
    def peek(context):
        return run("show", "orders/m-1").stdout

    shown = template.execute(peek, state=RetryState(key="m-1", redelivered=True))
    assert re.search(r"running: +by .*\(alive\) since .*, believed until ", shown)


def test_show_says_that_a_history_was_evicted_and_list_leaves_it_out(run, template, cache):
    small = SqlRetryContextCache(cache.engine, capacity=1, on_full="evict_oldest")
    template = attrs.evolve(template, context_cache=small)
    fail(template, "m-1")
    fail(template, "m-2")
    assert [row[0] for row in rows(run("list"))[1:]] == ["orders/m-2"]
    shown = run("show", "orders/m-1").stdout
    assert re.search(r"^evicted: +\S+ \(the store was full\), with 1 failed: they count on, ", shown, re.MULTILINE)
    assert re.search(r"^failed attempts: +1$", shown, re.MULTILINE)
    assert json.loads(run("show", "--json", "orders/m-1").stdout)["evicted"]["by"] == "capacity"
    run("forget", "--yes", "orders/m-1")
    run("show", "orders/m-1", status=1)


def test_tombstones_are_listed_counted_and_exported_when_asked_for_and_their_vetoes_always(run, template, cache):
    small = SqlRetryContextCache(cache.engine, capacity=1, on_full="evict_oldest", tombstones=10)
    template = attrs.evolve(template, context_cache=small)
    for number in range(3):
        fail(template, f"m-{number}")
        run("veto", f"orders/m-{number}", "--reason", "poison") if number != 1 else None
    listed = [row[0] for row in rows(run("list", "--evicted"))[1:]]
    assert len(listed) == 2
    assert [row[0] for row in rows(run("list", "--vetoed"))[1:]] == ["orders/m-0", "orders/m-2"]
    assert re.fullmatch(
        r"vetoed: poison \(1 failure counted before its history was evicted at .*, by capacity\)",
        rows(run("list", "--vetoed"))[1][-1],
    )
    assert [row[0] for row in rows(run("list", "--vetoed", "--not-evicted"))[1:]] == ["orders/m-2"]
    assert run("list", "--evicted", "--count", "--limit", "1").stdout == "2\n"
    assert json.loads(run("list", "--vetoed", "--count", "--json").stdout) == {"count": 2}
    exported = [json.loads(line)["canonical_key"] for line in run("export", "--evicted").stdout.splitlines()]
    assert exported == listed


def test_prune_by_age_is_a_deliberate_forgetting_and_leaves_no_tombstone(run, template, cache):
    fail(template, "m-1")
    run("prune", "--older-than", "1s", "--yes", "--dry-run")
    assert cache.load("orders/m-1") is not None
    snapshot = {**cache.load("orders/m-1").snapshot, "last_failed_at": 1.0}
    cache.save("orders/m-1", snapshot, cache.load("orders/m-1").version)
    run("prune", "--older-than", "1s", "--yes")
    assert cache.load("orders/m-1") is None


def test_show_says_why_a_snapshot_cannot_be_read(run, cache):
    cache.save("orders/m-1", {"format": 99}, None)
    assert "upgrade it" in run("show", "orders/m-1").stdout
    assert rows(run("list"))[1][1] == "unreadable"


def test_export_writes_a_file_of_json_lines(run, template, tmp_path):
    for number in range(3):
        fail(template, f"m-{number}")
    run("export", "--output", str(tmp_path / "histories.jsonl"))
    lines = (tmp_path / "histories.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["m-0", "m-1", "m-2"]


# -- veto, withdraw, forget


def test_veto_takes_effect_at_the_next_delivery_and_is_withdrawn(run, template):
    fail(template)
    vetoed = run("veto", "orders/m-1", "--reason", "the customer has cancelled").stdout
    assert vetoed == "orders/m-1 is vetoed until it is withdrawn\n"
    with pytest.raises(ExhaustedRetryError, match="the customer has cancelled"):
        template.execute(lambda _: 1, state=RetryState(key="m-1"))
    assert run("withdraw", "--name", "orders", "--key", "m-1").stdout == "orders/m-1 is no longer vetoed\n"
    assert template.execute(lambda _: 1, state=RetryState(key="m-1")) == 1


def test_veto_may_end_by_itself_and_be_of_an_item_that_was_never_seen(run, template):
    assert (
        "orders#7 is vetoed until 2"
        in run("veto", "--name", "orders", "--key-json", "7", "--reason", "x", "--for", "2h").stdout
    )
    assert template.history(7).veto_until is not None
    assert "nothing else is known of it" in run("withdraw", "orders#7").stdout
    assert "nothing is stored under 'orders#8'" in run("veto", "orders#8", "--reason", "x", status=1).stderr


def test_withdraw_says_when_there_was_no_veto(run, template):
    fail(template)
    assert run("withdraw", "orders/m-1").stdout == "orders/m-1 was not vetoed\n"


def test_what_is_completed_is_not_vetoed_any_more(run, template):
    attrs.evolve(template, remember_completed=60).execute(lambda _: 1, state=RetryState(key="m-1"))
    assert "nothing is left to forbid" in run("veto", "orders/m-1", "--reason", "x", status=1).stderr


def test_forget_asks_and_forgets(run, template, cache, monkeypatch):
    fail(template)
    assert "say --yes" in run("forget", "orders/m-1", status=2).stderr
    assert cache.load("orders/m-1") is not None
    assert run("forget", "orders/m-1", "--yes").stdout == "orders/m-1 is forgotten\n"
    assert cache.load("orders/m-1") is None


@pytest.mark.parametrize("command", [["show"], ["withdraw"], ["forget", "--yes"]])
def test_what_is_not_there_is_said_to_be_not_there(run, command):
    assert "nothing is stored under orders/m-9" in run(*command, "orders/m-9", status=1).stderr


# -- prune


def test_prune_forgets_what_is_over_and_what_is_older(run, template, cache):
    fail(attrs.evolve(template, clock=ManualClock()), "old")
    attrs.evolve(template, remember_completed=0.001).execute(lambda _: 1, state=RetryState(key="done"))
    fail(template, "new")
    options = ["prune", "--older-than", "1h"]
    counted = "would be forgotten: 1 past their time, 1 older than asked\n"
    assert run(*options, "--dry-run").stdout == counted
    assert "say --yes" in run(*options, status=2).stderr
    assert run(*options, "--yes").stdout == counted.replace("would be ", "")
    assert [key for key, _ in cache.items()] == ["orders/new"]


def test_interrupted_prune_says_what_it_has_done(run, template, monkeypatch):
    def interrupted(self, progress, **options):
        progress(Pruned(older=3))
        raise KeyboardInterrupt

    monkeypatch.setattr(Histories, "prune", interrupted)
    assert "interrupted; forgotten: 0 past their time, 3 older" in run("prune", "--yes", status=130).stderr


# -- stores


@pytest.mark.parametrize(
    ("store", "told", "status"),
    [
        ("sqlite:///{}/typo.db", "there is no file", 1),
        ("sqlite:///file:{}/typo.db?uri=true", "there is no file", 1),
        ("sqlite:///{}/other.db", "there are no tables of retrykit in", 1),
        ("sqlite:///{}/text.txt", "cannot be read as a SQLite database", 1),
        ("sqlite://", "a database in memory is nobody else's", 2),
        ("orders.db", "the URL of a store is sqlite:///FILE", 2),
        ("oracle://user:secret@host/db", "the URL of a store is sqlite:///FILE", 2),
        ("postgresql://user:***@host/db", "this URL was printed without its password", 2),
    ],
)
def test_store_that_is_not_there_is_not_made(run, tmp_path, store, told, status):  # noqa: PLR0917 - parametrized
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE mine (x)").connection.close()
    (tmp_path / "text.txt").write_text("nothing but text, and enough of it to be no database")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if "orders" not in file.name}
    found = run("list", store=store.format(tmp_path), status=status)
    assert told in found.stderr
    assert "secret" not in found.output
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if "orders" not in file.name} == before


def test_histories_are_exported_to_a_new_file_only(run, template, tmp_path):
    fail(template)
    file = tmp_path / "histories.jsonl"
    run("export", "--output", str(file))
    written = file.read_text()
    assert json.loads(written)["retry_count"] == 1
    assert "File exists" in run("export", "--output", str(file), status=1).stderr
    assert file.read_text() == written


def test_urls_with_asynchronous_drivers_are_opened_with_blocking_ones(run, template, url):
    fail(template)
    found = run("list", store=url.replace("sqlite:", "sqlite+aiosqlite:"))
    assert [row[0] for row in rows(found)] == ["history", "orders/m-1"]


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        ("postgres://host/db", "postgresql+psycopg://host/db"),
        ("postgresql+asyncpg://host/db", "postgresql+psycopg://host/db"),
        ("postgresql+psycopg2://host/db", "postgresql+psycopg2://host/db"),
        ("mariadb://host/db", "mariadb+pymysql://host/db"),
        ("mysql+aiomysql://host/db", "mysql+pymysql://host/db"),
        ("sqlite+aiosqlite:///a.db", "sqlite:///a.db"),
    ],
)
def test_driver_is_one_for_blocking_calls(url, taken):
    assert with_driver(url) == taken


def test_driver_that_is_not_installed_is_named_with_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    found = run("list", store="postgresql://user:secret@localhost:1/db", status=1)
    assert 'pip install "retrykit[postgresql]"' in found.stderr
    assert "secret" not in found.output


def test_command_without_a_store_says_where_to_name_one():
    found = CliRunner().invoke(retrykit, ["contexts", "list"], env={"RETRYKIT_STORE": None})
    assert found.exit_code == 2
    assert "RETRYKIT_STORE" in found.stderr


# -- on a terminal


def on_terminal(arguments, typed=b""):
    """Run a command with a terminal for input and output; what it showed, and its status."""
    mine, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHON_COLORS": "0"}
    command = [sys.executable, "-m", "retrykit.cli", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        os.write(mine, typed)
        shown = b""
        while True:
            try:
                part = os.read(mine, 65_536)
            except OSError:  # how a terminal says that nobody writes to it any more
                break
            if not part:
                break
            shown += part
        status = process.wait(60)
    os.close(mine)
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n"), status


def test_terminal_shows_relative_times_asks_and_shows_progress(template, url, cache):
    fail(attrs.evolve(template, back_off_policy=FixedBackOffPolicy(600)), "m-1", ValueError("bad \x1b[2J"))
    store = ["--store", url]
    shown, status = on_terminal(["contexts", "list", *store])
    assert status == 0
    assert re.search(r"orders/m-1  waiting  1 +\d\d:\d\d:\d\d \(\d+ s ago\) +.*\(in (9|10) min\)\n", shown)
    assert "\n    ValueError: bad \\x1b[2J\n" in shown
    shown, status = on_terminal(["contexts", "forget", *store, "orders/m-1"], b"n\n")
    assert (status, "Forget orders/m-1 (waiting, 1 failed)?" in shown) == (1, True)
    assert cache.load("orders/m-1") is not None
    shown, status = on_terminal(["contexts", "prune", *store, "--older-than", "1s"], b"y\n")
    assert (status, "Forget what is past its time and histories that nothing has happened to for 1 s?" in shown) == (
        0,
        True,
    )
    shown, status = on_terminal(["contexts", "list", *store, "--name", "none"])
    assert (shown, status) == ("no such history\n", 0)


def test_no_command_is_loaded_that_is_not_used():
    code = "import sys, retrykit.cli.commands; print([m for m in sys.modules if m.startswith('retrykit.cli.')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "contexts" not in loaded


def test_help_of_the_command_is_worth_reading():
    found = CliRunner().invoke(retrykit, ["--help"])
    assert re.search(r"contexts +Look at histories, veto, forget, export, prune\.", found.output)
    assert "parked" in found.output
