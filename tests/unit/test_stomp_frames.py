"""STOMP frames on the wire: written, cut into any pieces, read."""

from __future__ import annotations

import contextlib
import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.testing.stomp_server import frames
from retrykit.testing.stomp_server.frames import Frame, FrameError, FrameParser, encode, escape, unescape
from tests.servers import wire

VERSIONS = st.sampled_from(["1.1", "1.2"])
# 1.1 has no escape for the carriage return, so only 1.2 can carry it at the end of a line.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=20)
NAMES = TEXT.filter(lambda name: name not in {"", "content-length"})
COMMANDS = st.text(string.ascii_uppercase, min_size=1, max_size=12).filter(
    lambda command: not command.startswith(("CONNECT", "STOMP"))
)


@st.composite
def any_frame(draw):
    headers = draw(st.dictionaries(NAMES, TEXT, max_size=5))
    body = draw(st.binary(max_size=300))
    if b"\0" in body or draw(st.booleans()):
        headers["content-length"] = str(len(body))
    return Frame(draw(COMMANDS), headers, body)


def in_pieces(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def parse(data, version="1.2", cuts=()):
    parser = FrameParser(version)
    return [frame for piece in in_pieces(data, cuts) for frame in parser.feed(piece)]


@given(VERSIONS, st.lists(any_frame(), max_size=4), st.lists(st.integers(0, 10_000), max_size=8))
def test_what_is_written_is_read_however_it_is_cut(version, sent, cuts):
    data = b"".join(encode(frame, version) for frame in sent)
    assert parse(data, version, cuts) == sent


@given(VERSIONS, any_frame())
def test_frames_of_an_independent_writer_are_read(version, frame):
    data = wire._encode(frame.command, frame.headers, frame.body, escape=True)
    assert parse(data, version) == [frame]


@given(st.text())
def test_escapes_of_version_1_2_lose_nothing(text):
    escaped = escape(text, "1.2")
    assert not set(escaped) & set("\r\n:")
    assert unescape(escaped, "1.2") == text


@given(st.text().filter(lambda text: "\r" not in text))
def test_escapes_of_version_1_1_lose_nothing(text):
    escaped = escape(text, "1.1")
    assert not set(escaped) & set("\n:")
    assert unescape(escaped, "1.1") == text


@pytest.mark.parametrize(
    ("version", "escaped", "text"),
    [
        ("1.2", "\\r\\n\\c\\\\", "\r\n:\\"),
        ("1.1", "\\r\\n\\c\\\\", "\\r\n:\\"),
        ("1.0", "\\n\\c\\\\", "\\n\\c\\\\"),
        ("1.2", "\\t\\", "\\t\\"),
        ("1.2", "\\\\n", "\\n"),
    ],
)
def test_an_escape_that_the_version_does_not_define_stays(version, escaped, text):
    assert unescape(escaped, version) == text


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_any_bytes_are_frames_or_a_frame_error(data, cuts):
    with contextlib.suppress(FrameError):
        assert all(frame.command is not None for frame in parse(data, cuts=cuts))


def test_of_a_repeated_header_the_first_counts():
    (frame,) = parse(b"SEND\na:1\na:2\n\n\0")
    assert frame.headers == {"a": "1"}


def test_only_version_1_0_trims_values():
    assert parse(b"SEND\na: 1 \n\n\0", "1.0")[0].headers == {"a": "1"}
    assert parse(b"SEND\na: 1 \n\n\0", "1.1")[0].headers == {"a": " 1 "}


def test_connect_is_never_escaped():
    (frame,) = parse(b"CONNECT\r\npasscode:a\\cb\r\n\r\n\0")
    assert frame.headers == {"passcode": "a\\cb"}
    assert encode(Frame("CONNECTED", {"session": "a:b"}), "1.2") == b"CONNECTED\nsession:a:b\n\n\0\n"


def test_the_version_may_change_between_two_frames_of_one_piece():
    parser = FrameParser()
    found = []
    for frame in parser.feed(b"CONNECT\n\n\0SEND\na:x\\cy\n\n\0"):
        found.append(frame.headers)
        parser.version = "1.2"
    assert found == [{}, {"a": "x:y"}]


def test_line_ends_between_frames_are_no_frames():
    assert [frame.command for frame in parse(b"\n\r\n\nA\n\n\0\n\n\r\nB\n\n\0\n")] == ["A", "B"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"SEND\ncontent-length:x\n\n\0", "not a valid integer"),
        (b"SEND\ncontent-length:-1\n\n\0", "not a valid integer"),
        (b"SEND\ncontent-length:2\n\nabc\0", "no trailing null byte"),
        (b"SEND\ncontent-length:99999999999\n\n", "maximum data length"),
        (b"SEND\na:\xff\n\n\0", "not UTF-8"),
    ],
)
def test_what_is_no_frame_is_refused_with_its_reason(data, reason):
    with pytest.raises(FrameError, match=reason):
        parse(data)


def test_endless_headers_and_bodies_are_refused_before_memory_ends(monkeypatch):
    monkeypatch.setattr(frames, "MAX_HEAD", 100)
    with pytest.raises(FrameError, match="headers exceed"):
        parse(b"SEND\n" + b"a" * 200)
    with pytest.raises(FrameError, match="maximum data length"):
        list(FrameParser("1.2", max_body=10).feed(b"SEND\n\n" + b"a" * 20))
