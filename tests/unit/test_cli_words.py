"""What people write on the command line and read from it."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime, timedelta

import pytest

click = pytest.importorskip("click")

from rich.console import Console  # noqa: E402 - comes with click

from retrykit.cli.options import item_of  # noqa: E402 - after the check for click
from retrykit.cli.screen import Screen, confirm  # noqa: E402
from retrykit.cli.words import as_duration, as_instant, as_key, duration, relative, safe, shown_body  # noqa: E402

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("15m", 900),
        ("15 min", 900),
        ("2h", 7_200),
        ("7d", 604_800),
        ("1w", 604_800),
        ("1h30m", 5_400),
        ("1.5H", 5_400),
        (" 1h 5s ", 3_605),
    ],
)
def test_duration_is_written_with_its_unit(text, seconds):
    assert as_duration(None, None, text) == seconds


@pytest.mark.parametrize("text", ["", "90", "h", "-5s", "1y", "1h-5m", "1e9d", "99999999999w"])
def test_what_is_no_duration_is_refused_with_examples(text):
    with pytest.raises(click.BadParameter, match="90s, 15m"):
        as_duration(None, None, text)


def test_a_duration_without_a_unit_or_of_nothing_is_refused_for_what_it_is():
    with pytest.raises(click.BadParameter, match=r"'5' is no duration .*: write 5s for seconds"):
        as_duration(None, None, "5")
    with pytest.raises(click.BadParameter, match="must be more than 0, not '0s'"):
        as_duration(None, None, "0s")


def test_instant_is_how_long_ago_or_a_date_or_a_time():
    before = datetime.now(UTC) - timedelta(hours=2)
    assert before <= as_instant(None, None, "2h") <= datetime.now(UTC) - timedelta(hours=2)
    assert as_instant(None, None, "2026-11-22T12:00Z") == NOON
    assert as_instant(None, None, "2026-11-22T14:00:00+02:00") == NOON
    local = as_instant(None, None, "2026-11-22T12:00")
    assert local == datetime(2026, 11, 22, 12).astimezone()
    assert as_instant(None, None, "2026-11-22") == local - timedelta(hours=12)
    assert as_instant(None, None, None) is as_duration(None, None, None) is as_key(None, None, None) is None


@pytest.mark.parametrize("text", ["yesterday", "", "2026-13-01", "9999999w", "0001-01-01T00:00+14:00"])
def test_what_is_no_instant_is_refused_with_examples(text):
    with pytest.raises(click.BadParameter, match="2h, 7d"):
        as_instant(None, None, text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("7", 7),
        ('"m-1"', "m-1"),
        ('{"bytes": "6d31"}', b"m1"),
        ('["/queue/orders", "ID:1"]', ("/queue/orders", "ID:1")),
    ],
)
def test_key_is_given_in_its_json_form(text, key):
    assert as_key(None, None, text) == key


@pytest.mark.parametrize("text", ["m-1", "1.5", "true", "null", '{"bytes": 5}', '{"a": 1}', "[" * 100_000])
def test_what_is_no_key_is_refused_with_examples(text):
    with pytest.raises(click.BadParameter, match="is no key in its JSON form"):
        as_key(None, None, text)


def test_item_is_named_in_one_of_two_ways():
    assert item_of("orders/m-1", None, None, None) == "orders/m-1"
    assert item_of(None, "orders", "m-1", None) == ("orders", "m-1")
    assert item_of(None, "orders", "", None) == ("orders", "")
    assert item_of(None, "orders", None, 0) == ("orders", 0)


@pytest.mark.parametrize(
    "given",
    [
        (None, None, None, None),
        ("o/1", "o", None, None),
        ("o/1", None, "1", None),
        (None, "o", None, None),
        (None, None, "1", None),
        (None, "o", "1", 1),
    ],
)
def test_item_that_is_named_twice_or_by_half_is_refused(given):
    with pytest.raises(click.UsageError, match="Say which"):
        item_of(*given)


def test_safe_text_commands_no_terminal():
    assert safe("a\x1b[2J\r\n\t\x9b\u202eb\ud800é😀") == "a\\x1b[2J\\r\\n\\t\\x9b\\u202eb\\ud800é😀"
    assert safe("a\x1b\n\tb", lines=True) == "a\\x1b\n\tb"


@pytest.mark.parametrize(
    ("body", "limit", "shown"),
    [
        (b'{"id": 7}', 100, '{"id": 7}'),
        ("é\r\nü\r\tx".encode(), 100, "é\nü\n\tx"),
        (b"\x1b[2J", 100, "1b 5b 32 4a"),
        (b"\xff\x00", 100, "ff 00"),
        (b"", 100, ""),
        (b"abcdef", 3, "abc\n… 6 bytes in all"),
        ("aé".encode(), 2, "a\n… 3 bytes in all"),
        (b"a\xffcdefgh", 6, "61 ff 63 64 65 66\n… 8 bytes in all"),
        ("x\u202ey".encode(), 100, "78 e2 80 ae 79"),
    ],
)
def test_body_is_shown_as_text_if_all_of_it_prints_else_in_hexadecimal(body, limit, shown):
    assert shown_body(body, limit) == shown


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7_300, "2 h"), (86_400 * 40, "40 d")]
)
def test_lengths_are_told_in_their_largest_unit(seconds, words):
    assert duration(seconds) == words
    assert relative(NOON - timedelta(seconds=seconds), NOON) == f"{words} ago"
    if seconds:
        assert relative(NOON + timedelta(seconds=seconds), NOON) == f"in {words}"


# -- the screen


def terminal():
    return Screen(Console(file=io.StringIO(), force_terminal=True, no_color=True, width=60, highlight=False), NOON)


def test_terminal_shows_local_and_relative_time_and_everything_else_gets_utc():
    screen = terminal()
    here = NOON.astimezone()
    assert screen.when(NOON - timedelta(seconds=12)).endswith(" (12 s ago)")
    assert screen.when(NOON - timedelta(days=2)) == f"{here - timedelta(days=2):%Y-%m-%d %H:%M} (2 d ago)"
    assert screen.when(datetime.max.replace(tzinfo=UTC)).startswith("9999-12-31")
    assert Screen(None, NOON).when(here) == "2026-11-22T12:00:00.000+00:00"


def test_table_on_a_terminal_has_the_words_below_their_row_and_cuts_nothing_off():
    screen = terminal()
    key = "orders/" + "k" * 100
    screen.table(("history", "failed", "error", "why"), [(key, 3, "a\x1b[2Jb", None), ("ü", 12, "E", "because")])
    lines = screen.console.file.getvalue().replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    column = " " * 39
    assert lines.splitlines() == [
        f"history{column[6:]}  failed",
        f"{key}  3",
        "    a\\x1b[2Jb",
        f"ü{column}  12",
        "    E",
        "    because",
    ]


def test_table_elsewhere_is_lines_with_tabs(capsys):
    Screen(None, NOON).table(("id", "at", "error", "why"), [(1, NOON, None, "a\tb")])
    assert capsys.readouterr().out == "id\tat\terror\twhy\n1\t2026-11-22T12:00:00.000+00:00\t\ta\\tb\n"


def test_letters_that_the_output_has_not_are_written_as_escapes(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    Screen(None, NOON).facts([("key", "é"), ("none", None), ("empty", ""), ("body", "a\nb")])
    narrow.flush()
    assert narrow.buffer.getvalue() == b"key:  \\xe9\nbody:\n    a\n    b\n"


def test_progress_is_shown_on_a_terminal_only():
    for screen in (terminal(), Screen(None, NOON)):
        with screen.progress() as say:
            say("3 forgotten")
    assert "3 forgotten" in terminal_text(screen=terminal())


def terminal_text(screen):
    with screen.progress() as say:
        say("3 forgotten")
    return screen.console.file.getvalue()


def test_nobody_is_asked_where_there_is_no_terminal(monkeypatch):
    confirm("Sure?", yes=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(click.UsageError, match=r"Sure\? There is no terminal to ask on: say --yes"):
        confirm("Sure?", yes=False)
