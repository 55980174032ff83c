"""What of frames is not left to stomp.py: where they begin and end, how they are written and read.

stomp.py 9 loses the frame that comes in one read with two heart-beats (after a pause of this process, say), and copies
all that it has of a large frame with each read. And what it does for one frame takes longer than all else that is done
for a message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

_EOLS: Final = b"\r\n"
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
# As brokers write it: half of all frames are such, and need no more of a look than this.
_RECEIPT: Final = re.compile(rb"RECEIPT\nreceipt-id:([A-Za-z0-9-]+)\n\n\0")
_LENGTH: Final = "content-length"
# A longer number is no length of anything.
_DIGITS: Final = 19
_MARKS: Final = re.compile(r"[\\:\r\n]")
_ESCAPES: Final = {"\\": "\\\\", ":": "\\c", "\r": "\\r", "\n": "\\n"}
_ESCAPED: Final = re.compile(r"\\[\\crn]")
_PLAIN: Final = {escape: mark for mark, escape in _ESCAPES.items()}


def escaped(text: str) -> str:
    """Text as STOMP 1.2 writes it in a header."""
    return _MARKS.sub(lambda mark: _ESCAPES[mark[0]], text)


def encoded(command: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A frame of STOMP 1.2."""
    head = "".join([f"{name}:{value}\n" for name, value in headers.items()])
    # What is to be escaped is one of these, or one of these too many.
    if "\\" in head or "\r" in head or not head.count(":") == head.count("\n") == len(headers):
        head = "".join([f"{escaped(name)}:{escaped(value)}\n" for name, value in headers.items()])
    return f"{command}\n{head}\n".encode() + body + b"\0"


class Frame(NamedTuple):
    """A frame as it was received; of a repeated header the first counts."""

    command: str
    headers: dict[str, str]
    body: bytes


HEART_BEAT: Final = Frame("", {}, b"")


class FrameReader:
    """Takes bytes as they come, gives whole frames."""

    def __init__(self) -> None:
        # Bytes as they came; a bytearray while a frame comes in several pieces, so that none is copied twice.
        self._data: bytes | bytearray = b""
        self._at = 0
        self._searched = 0
        # Of the frame at the front, once its head is there: what it says, and where its body begins.
        self._head: tuple[str, dict[str, str], int] | None = None

    def feed(self, data: bytes) -> None:
        """Take what was received."""
        if self._at == len(self._data):
            self._data, self._at, self._searched = data, 0, 0
            return
        if not isinstance(self._data, bytearray):
            self._data = bytearray(self._data)
        del self._data[: self._at]
        self._searched -= self._at
        if self._head is not None:
            command, headers, body = self._head
            self._head = command, headers, body - self._at
        self._at = 0
        self._data += data

    def next(self) -> Frame | None:
        """The next frame, `HEART_BEAT` for any number of them, or None: more has to come.

        `ValueError` where no frame can be made out; nothing that follows can be, then.
        """
        if self._at == len(self._data):
            return None
        if self._head is None:
            if self._data[self._at] in _EOLS:
                self._drop_line_ends()
                return HEART_BEAT
            if (receipt := _RECEIPT.match(self._data, self._at)) is not None:
                self._leave(receipt.end())
                return Frame("RECEIPT", {"receipt-id": receipt[1].decode()}, b"")
            self._find_head()
        end = self._find_end()
        if end is None:
            return None
        assert self._head is not None  # noqa: S101 - the end was found behind it
        command, headers, body = self._head
        frame = Frame(command, headers, self._part(body, end))
        self._head = None
        self._leave(end + 1)
        return frame

    def _leave(self, end: int) -> None:
        """The frame that ends there has been read."""
        self._at = end
        # The line end that may follow a frame is no heart-beat.
        self._drop_line_ends()
        self._searched = self._at
        if self._at == len(self._data):
            self.feed(b"")

    def _drop_line_ends(self) -> None:
        data, at = self._data, self._at
        while at < len(data) and data[at] in _EOLS:
            at += 1
        self._at = at

    def _find_head(self) -> None:
        found = _HEAD_END.search(self._data, max(self._at, self._searched - 3))
        if found is None:
            self._searched = len(self._data)
            return
        command, headers = _said(self._part(self._at, found.start()))
        self._searched = body = found.end()
        self._head = command, headers, body

    def _find_end(self) -> int | None:
        """Where the NUL is that ends the frame; None while it is not there."""
        if self._head is None:
            return None
        _, headers, body = self._head
        length = headers.get(_LENGTH)
        if length is not None and len(length) < _DIGITS and length.strip().isdecimal():
            end = body + int(length)
            if end >= len(self._data):
                return None
            if self._data[end] != 0:
                raise ValueError(f"a frame does not end where its content-length {length} says")
            return end
        end = self._data.find(0, max(body, self._searched))
        self._searched = len(self._data)
        return None if end < 0 else end

    def _part(self, start: int, end: int) -> bytes:
        if isinstance(self._data, bytes):
            return self._data[start:end]
        with memoryview(self._data) as view:
            return bytes(view[start:end])


def _said(head: bytes) -> tuple[str, dict[str, str]]:
    """Command and headers. A NUL in a header, which brokers hand on and nobody could send again, is U+FFFD in it."""
    text = head.decode("utf-8", "replace")
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    command, *lines = text.split("\n")
    pairs = [line.split(":", 1) for line in lines]
    if "\\" in text:
        pairs = [[_unescaped(part) for part in pair] for pair in pairs]
    try:
        headers = dict(pairs)
    except ValueError:
        headers = {}
    if len(headers) < len(pairs) or "" in headers:
        # Rare: of a header that is repeated the first counts, and what is none is passed over.
        headers = dict(pair for pair in reversed(pairs) if len(pair) > 1 and pair[0])
    return command, headers


def _unescaped(text: str) -> str:
    # What the protocol does not define stays as it is.
    return text if "\\" not in text else _ESCAPED.sub(lambda escape: _PLAIN[escape[0]], text)
