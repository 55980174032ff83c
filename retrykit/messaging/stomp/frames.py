"""What of frames is not left to stomp.py: where they begin and end, how they are written and read.

stomp.py 9 loses the frame that comes in one read with two heart-beats (after a pause of this process, say), and copies
all that it has of a large frame with each read. And what it does for one frame takes longer than all else that is done
for a message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

HEART_BEAT: Final = b"\n"
_EOLS: Final = b"\r\n"
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_LENGTH: Final = re.compile(rb"\ncontent-length:[ \t]*([0-9]+)")
_MARKS: Final = re.compile(r"[\\:\r\n]")
_ESCAPES: Final = {"\\": "\\\\", ":": "\\c", "\r": "\\r", "\n": "\\n"}
_ESCAPED: Final = re.compile(r"\\[\\crn]")
_PLAIN: Final = {escape: mark for mark, escape in _ESCAPES.items()}


def escaped(text: str) -> str:
    """Text as STOMP 1.2 writes it in a header."""
    return _MARKS.sub(lambda mark: _ESCAPES[mark[0]], text)


def encoded(command: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A frame of STOMP 1.2."""
    head = "".join([f"{escaped(name)}:{escaped(value)}\n" for name, value in headers.items()])
    return f"{command}\n{head}\n".encode() + body + b"\0"


def decoded(frame: bytes) -> tuple[str, dict[str, str], bytes]:
    """Command, headers and body of a frame as `FrameCutter` gives it; of a repeated header the first counts.

    A NUL in a header, which brokers hand on and nobody could send again, is U+FFFD in it.
    """
    end = _HEAD_END.search(frame)
    assert end is not None  # noqa: S101 - or the end of the frame would not have been found
    head = frame[: end.start()].decode("utf-8", "replace").replace("\0", "\ufffd")
    command, *lines = head.replace("\r\n", "\n").split("\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if "\\" in line:
            name, value = _unescaped(name), _unescaped(value)
        if name and colon and name not in headers:
            headers[name] = value
    return command, headers, frame[end.end() : -1]


def _unescaped(text: str) -> str:
    # What the protocol does not define stays as it is.
    return _ESCAPED.sub(lambda escape: _PLAIN[escape[0]], text)


class FrameCutter:
    """Takes bytes as they come, gives whole frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0
        # Where the frame at the front ends, its NUL included; where its body begins, while the end is not known.
        self._end: int | None = None
        self._body: int | None = None

    def feed(self, data: bytes) -> None:
        """Take what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The next frame with its NUL, `HEART_BEAT` for any number of them, or None: more has to come."""
        if self._body is None and self._buffer.startswith((b"\n", b"\r")):
            self._drop_line_ends()
            return HEART_BEAT
        end = self._find_end()
        if end is None or end > len(self._buffer):
            return None
        with memoryview(self._buffer) as view:
            frame = bytes(view[:end])
        del self._buffer[:end]
        self._searched, self._end, self._body = 0, None, None
        # The line end that may follow a frame is no heart-beat.
        self._drop_line_ends()
        return frame

    def _drop_line_ends(self) -> None:
        buffer = self._buffer
        ends = 0
        while ends < len(buffer) and buffer[ends] in _EOLS:
            ends += 1
        del buffer[:ends]

    def _find_end(self) -> int | None:
        if self._end is None:
            self._body = self._body or self._find_body()
            if self._body is not None and self._end is None:
                self._end = self._find_nul(self._body)
        return self._end

    def _find_body(self) -> int | None:
        """Where the body begins, once the whole head is there; sets the end, where the head says it."""
        found = _HEAD_END.search(self._buffer, max(0, self._searched - 2))
        if found is None:
            self._searched = len(self._buffer)
            return None
        self._searched = found.end()
        length = _LENGTH.search(self._buffer, 0, found.end())
        if length is not None:
            self._end = found.end() + int(length[1]) + 1
        return found.end()

    def _find_nul(self, body: int) -> int | None:
        found = self._buffer.find(0, max(body, self._searched))
        self._searched = len(self._buffer)
        return None if found < 0 else found + 1
