"""The embedded server's data file: what a crash at any byte leaves behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.testing.stomp_server.journal import Journal
from retrykit.testing.stomp_server.queues import Message

SIGNATURE = b"retrykit stomp journal 1\n"


def message(number, *, body=b"", persistent=True):
    return Message(
        number=number,
        message_id=f"id-{number}",
        destination="/queue/a",
        headers={"k": "\n:ü"},
        body=body,
        persistent=persistent,
    )


def reopened(path):
    journal = Journal(path)
    found = journal.open()
    journal.close()
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


@pytest.fixture
def journal(path):
    journal = Journal(path)
    assert journal.open() == []
    yield journal
    journal.close()


def test_messages_come_back_as_they_were(journal, path):
    sent = message(3, body=bytes(range(256)))
    sent.due = 12.5
    journal.record([sent], [])
    journal.sync()
    (found,) = reopened(path)
    assert (found.number, found.message_id, found.destination, found.headers) == (3, "id-3", "/queue/a", {"k": "\n:ü"})
    assert (found.body, found.persistent, found.due, found.redelivered) == (bytes(range(256)), True, 12.5, False)


def test_what_was_removed_stays_away(journal, path):
    first, second = message(1), message(2)
    journal.record([first, second], [])
    journal.record([], [first])
    journal.sync()
    assert [found.number for found in reopened(path)] == [2]


def test_what_is_not_persistent_is_not_kept(journal, path):
    journal.record([message(1, persistent=False)], [message(2, persistent=False)])
    journal.sync()
    assert path.read_bytes() == SIGNATURE


def test_flags_come_back(journal, path):
    journal.record([message(1), message(2)], [])
    journal.record([], [], [message(2)])
    journal.sync()
    assert [found.redelivered for found in reopened(path)] == [False, True]


def test_what_was_not_synced_is_lost(journal, path):
    journal.record([message(1)], [])
    journal.sync()
    journal.record([message(2)], [])
    journal.close()
    assert [found.number for found in reopened(path)] == [1]


def test_opening_drops_what_is_dead_from_the_file(journal, path):
    for number in range(50):
        journal.record([message(number, body=b"x" * 100)], [])
        journal.record([], [message(number)])
    journal.sync()
    assert path.stat().st_size > 5_000
    assert reopened(path) == []
    assert path.read_bytes() == SIGNATURE


def test_a_journal_without_a_path_keeps_nothing():
    journal = Journal(None)
    assert journal.open() == []
    journal.record([message(1)], [])
    journal.sync()
    journal.close()


def test_damage_before_the_end_is_not_passed_over_in_silence(journal, path):
    for number in range(3):
        journal.record([message(number)], [])
    journal.sync()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"id-1", b"id-9")
    path.write_bytes(b"".join(lines))
    with pytest.raises(OSError, match="damaged at line 3"):
        reopened(path)
    assert path.read_bytes() == b"".join(lines)


def test_a_file_of_somebody_else_is_left_alone(path):
    path.write_text("my notes\n")
    with pytest.raises(OSError, match="no data file of this server"):
        reopened(path)
    assert path.read_text() == "my notes\n"


def test_an_empty_file_is_a_new_one(path):
    path.touch()
    assert reopened(path) == []


@given(st.integers(0, 5_000), st.booleans())
def test_a_crash_at_any_byte_leaves_whole_transactions(tmp_path_factory, cut, garbage):
    path = tmp_path_factory.mktemp("journal") / "data"
    journal = Journal(path)
    journal.open()
    # Each transaction moves a pair: message n leaves and two others arrive, all or nothing.
    journal.record([message(0)], [])
    for number in range(1, 11):
        journal.record([message(number), message(100 + number)], [message(number - 1)])
    journal.sync()
    journal.close()
    data = path.read_bytes()
    cut = len(SIGNATURE) + cut % (len(data) + 1 - len(SIGNATURE))
    path.write_bytes(data[:cut] + (b"\0\0\0garbage" if garbage else b""))
    numbers = [found.number for found in reopened(path)]
    last = max((number for number in numbers if number < 100), default=None)
    assert numbers == ([] if last is None else [last, *range(101, 101 + last)])
    assert [found.number for found in reopened(path)] == numbers
