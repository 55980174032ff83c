"""The reference of the command line says what the commands say, and what their JSON has in it."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

testing = pytest.importorskip("click.testing")

from retrykit.cli.commands import retrykit  # noqa: E402 - after the check for click
from retrykit.summary import HistorySummary  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs/reference/cli.md").read_text(encoding="utf-8")
COMMANDS = [
    ["batch"],
    ["batch", "run"],
    ["consume"],
    ["contexts"],
    *(["contexts", name] for name in ("list", "show", "veto", "withdraw", "forget", "export", "prune")),
    ["jobs"],
    *(["jobs", name] for name in ("list", "show", "stop", "restart")),
    ["parked"],
    *(["parked", name] for name in ("list", "show", "requeue", "discard")),
]


def documented(heading):
    """The keys that the first column of the table below a line names."""
    table = PAGE.partition(heading)[2].partition("\n\n")[2].partition("\n\n")[0]
    return {key for row in table.splitlines()[2:] for key in re.findall(r"`([a-z_]+)`", row.split(" | ")[0])}


@pytest.mark.parametrize("command", COMMANDS, ids="-".join)
def test_page_shows_the_help_of_the_command(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.delenv("RETRYKIT_STORE", raising=False)
    arguments = [*command, "--help"]
    said = testing.CliRunner().invoke(retrykit, arguments, prog_name="retrykit", terminal_width=110).output
    assert f"```text\n{said.rstrip()}\n```" in PAGE


def test_page_names_every_key_of_the_json_form_of_a_history():
    fields = {field.name for field in attrs.fields(HistorySummary)}
    assert documented("A history (`show --json`") == fields | {"format", "state"}


def test_page_names_every_key_of_the_json_form_of_a_parked_item():
    sql = pytest.importorskip("retrykit.sql")
    kinds = (sql.ParkedItem, pytest.importorskip("retrykit.messaging.parked").ParkedMessage)
    fields = {field.name for kind in kinds for field in attrs.fields(kind)} - {"payload"}
    assert documented("A parked item (`parked show --json`") == fields | {"format", "bytes", "body"}


def test_page_names_every_key_of_the_json_form_of_a_job():
    sql = pytest.importorskip("retrykit.sql")
    assert documented("A job (`jobs show --json`") == {field.name for field in attrs.fields(sql.Job)} | {"format"}
