from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.messaging.headers import check_headers
from retrykit.messaging.stomp.frames import HEART_BEAT, FrameReader, encoded, escaped
from retrykit.testing.stomp_server.frames import Frame, FrameParser, encode

FRAMES = {
    b"CONNECTED\nversion:1.2\n\n\x00": ("CONNECTED", {"version": "1.2"}, b""),
    b"MESSAGE\nmessage-id:1\n\nplain text\x00": ("MESSAGE", {"message-id": "1"}, b"plain text"),
    b"MESSAGE\ncontent-length:5\nmessage-id:2\n\na\x00\n\nb\x00": (
        "MESSAGE",
        {"content-length": "5", "message-id": "2"},
        b"a\0\n\nb",
    ),
    b"MESSAGE\ncontent-length:0\n\n\x00": ("MESSAGE", {"content-length": "0"}, b""),
    b"MESSAGE\r\nmessage-id:3\r\ncontent-length:2\r\n\r\n\x00\x00\x00": (
        "MESSAGE",
        {"message-id": "3", "content-length": "2"},
        b"\0\0",
    ),
    b"RECEIPT\nreceipt-id:r-1\n\n\x00": ("RECEIPT", {"receipt-id": "r-1"}, b""),
}
PLAIN, WITH_NULS, RECEIPT = list(FRAMES)[1], list(FRAMES)[2], list(FRAMES)[5]


def read(chunks):
    reader, found = FrameReader(), []
    for chunk in chunks:
        reader.feed(chunk)
        while (frame := reader.next()) is not None:
            found.append(frame)
    return found


def chunked(data, places):
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(
    st.lists(
        st.tuples(st.sampled_from(list(FRAMES)), st.sampled_from([b"", b"\n", b"\r\n", b"\n\n", b"\n\n\n"])), max_size=8
    ),
    st.lists(st.integers(0, 1_000), max_size=20),
)
def test_frames_come_whole_however_they_are_received(sent, places):
    data = b"".join(frame + ends for frame, ends in sent)
    frames = [frame for frame in read(chunked(data, places)) if frame is not HEART_BEAT]
    assert frames == [FRAMES[frame] for frame, _ in sent]


@pytest.mark.parametrize("beats", [b"\n", b"\n\n", b"\n" * 100, b"\r\n\r\n"])
def test_a_frame_behind_heart_beats_is_not_lost(beats):
    assert read([beats + PLAIN]) == [HEART_BEAT, FRAMES[PLAIN]]


def test_a_line_end_behind_a_frame_is_no_heart_beat_if_it_comes_with_it():
    assert read([PLAIN + b"\n", RECEIPT]) == [FRAMES[PLAIN], FRAMES[RECEIPT]]


def test_a_frame_waits_for_its_end():
    assert read([WITH_NULS[:-1]]) == []
    assert read([b"MESSAGE\ncontent-length:9\n\n12345678"]) == []


def test_the_first_content_length_counts():
    frame = b"MESSAGE\ncontent-length:2\ncontent-length:9\n\n\x00\x00\x00"
    assert read([frame]) == [("MESSAGE", {"content-length": "2"}, b"\0\0")]


@pytest.mark.parametrize("length", ["", "five", "-1", "9" * 5_000, "\u00b2"])
def test_a_length_that_is_none_is_no_length(length):
    assert read([f"MESSAGE\ncontent-length:{length}\n\nbody\0".encode(), RECEIPT]) == [
        ("MESSAGE", {"content-length": length}, b"body"),
        FRAMES[RECEIPT],
    ]


def test_a_frame_that_does_not_end_where_it_says_is_no_frame():
    with pytest.raises(ValueError, match="content-length 3"):
        read([b"MESSAGE\ncontent-length:3\n\nabcdef\0"])


def test_a_large_frame_in_small_pieces_is_copied_once_a_piece():
    body, reader = b"x" * 4_000_000, FrameReader()
    data = b"MESSAGE\ncontent-length:%d\n\n%b\0" % (len(body), body)
    for start in range(0, len(data), 65_536):
        assert reader.next() is None
        reader.feed(data[start : start + 65_536])
    assert reader.next() == ("MESSAGE", {"content-length": "4000000"}, body)
    assert reader.next() is None


def test_a_nul_in_a_header_ends_no_frame_and_is_replaced():
    frame = b"MESSAGE\na\0:bin\0RECEIPT\nreceipt-id:r-1\ncontent-length:3\n\n\0x\0\0"
    headers = {"a\ufffd": "bin\ufffdRECEIPT", "receipt-id": "r-1", "content-length": "3"}
    assert read([frame, PLAIN]) == [("MESSAGE", headers, b"\0x\0"), FRAMES[PLAIN]]


def test_names_and_values_are_escaped_as_1_2_wants_it():
    assert escaped("a:b\\c\r\nd") == "a\\cb\\\\c\\r\\nd"
    assert escaped("plain") == "plain"


@pytest.mark.parametrize("headers", [{"": "x"}, {"a\0": "x"}, {"a": "x\0"}, {"a": "\ud800"}])
def test_a_header_that_no_frame_can_carry_is_refused(headers):
    with pytest.raises(ValueError, match="headers"):
        check_headers(headers)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(texts.filter(bool), texts, max_size=5), st.binary(max_size=50))
def test_a_frame_is_written_as_others_read_it(headers, body):
    full = {**headers, "content-length": str(len(body))}
    (frame,) = FrameParser("1.2").feed(encoded("SEND", full, body))
    assert (frame.command, dict(frame.headers), frame.body) == ("SEND", full, body)


@given(st.dictionaries(texts.filter(bool), texts, max_size=5), st.binary(max_size=50))
def test_a_frame_is_read_as_others_write_it(headers, body):
    full = {**headers, "content-length": str(len(body))}
    assert read([encode(Frame("MESSAGE", full, body), "1.2")]) == [("MESSAGE", full, body)]


@pytest.mark.parametrize(
    ("frame", "headers", "body"),
    [
        (b"MESSAGE\na:1\na:2\n\n\0", {"a": "1"}, b""),
        (b"MESSAGE\na:x:y\nb\n:c\nd:\n\n\0", {"a": "x:y", "d": ""}, b""),
        (rb"MESSAGE" + b"\n" + rb"a:\x\\c\n" + b"\n\n\0", {"a": "\\x\\c\n"}, b""),
        (b"MESSAGE\na:\xff\n\n\0", {"a": "\ufffd"}, b""),
    ],
)
def test_what_a_frame_says(frame, headers, body):
    assert read([frame]) == [("MESSAGE", headers, body)]
