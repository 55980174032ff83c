"""Tables in the documentation say what the code does: defaults, promises, the command line, rules of conformance."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

import retrykit
from retrykit import BackOffPolicy, RetryPolicy

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROTOCOLS = (RetryPolicy, BackOffPolicy)
KINDS = ("RetryPolicy", "BackOffPolicy", "RetryBudget")
PARTS = [name for name in retrykit.__all__ if name.endswith(KINDS) and getattr(retrykit, name) not in PROTOCOLS]
PROMISES = [f"P{number}" for number in range(1, 14)]


def text_of(page):
    return (DOCS / page).read_text(encoding="utf-8")


def rows_of(page):
    """The cells of every line of a table, without the rulers."""
    lines = re.findall(r"^\|(.*)\|$", text_of(page), re.MULTILINE)
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [row for row in rows if set(row[0]) - set("-|")]


def worded(value):
    if isinstance(value, tuple):
        return f"({', '.join(map(worded, value))}{',' if len(value) == 1 else ''})"
    if attrs.has(type(value)):
        return f"{type(value).__name__}()" if value == type(value)() else repr(value)
    if isinstance(value, type) or callable(value):
        return value.__name__
    return f"{value:g}" if isinstance(value, float) else repr(value)


def default_of(field):
    if field.default is attrs.NOTHING:
        return field.alias
    value = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default
    return f"{field.alias}={worded(value)}"


@pytest.mark.parametrize("name", PARTS)
def test_the_table_of_defaults_is_what_the_code_has(name):
    rows = {row[0]: row[-1] for row in rows_of("howto/policies.md")}
    fields = [field for field in attrs.fields(getattr(retrykit, name)) if field.init]
    assert rows[f"`{name}`"] == (f"`{', '.join(map(default_of, fields))}`" if fields else "none")


def test_every_promise_has_a_row_and_tests_that_are_there():
    rows = {row[0]: row for row in rows_of("explanation/promises.md")}
    assert set(PROMISES) <= set(rows)
    for promise in PROMISES:
        files = [ROOT / file for file in re.findall(r"`(tests/\S+\.py)`", rows[promise][-1])]
        assert files, promise
        assert all(file.is_file() for file in files), promise
        mentioned = re.compile(rf"\b(def test_.*)?_?{promise}(?!\d)", re.IGNORECASE)
        assert any(mentioned.search(file.read_text(encoding="utf-8")) for file in files), promise


def test_the_page_of_the_command_line_shows_what_the_command_says(monkeypatch):
    testing = pytest.importorskip("click.testing")
    from retrykit.cli.commands import retrykit as command

    monkeypatch.setenv("COLUMNS", "110")
    said = testing.CliRunner().invoke(command, ["demo", "--help"], prog_name="retrykit", terminal_width=110).output
    assert said.rstrip() in text_of("reference/cli.md")


def test_every_rule_of_the_conformance_adapter_is_on_the_page_of_differences():
    from tests.conformance.rules import RULES

    page = text_of("explanation/spring.md")
    assert [rule.name for rule in RULES if f"`{rule.name}`" not in page] == []
