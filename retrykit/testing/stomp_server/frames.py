"""STOMP frames: bytes to frames and back, for protocol versions 1.0, 1.1 and 1.2.

Follows the STOMP 1.2 specification ("STOMP Frames", "Value Encoding") with the tolerance that ActiveMQ 5.17 shows: an
undefined escape and a header line without a colon are not errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_HEAD = 1 << 20
MAX_BODY = 1 << 26

_ESCAPES = {"1.0": "", "1.1": "\\\n:", "1.2": "\\\n:\r"}
_LETTERS = {"\\": "\\\\", "\n": "\\n", ":": "\\c", "\r": "\\r"}
_TO_ESCAPE = {version: re.compile(f"[{re.escape(chars)}]") for version, chars in _ESCAPES.items() if chars}
_TO_UNESCAPE = re.compile(r"\\[\\ncr]")
_BLANK = (bytearray(b"\r"), bytearray(b"\n"))
_PLAIN = {escape: plain for plain, escape in _LETTERS.items()}


@dataclass(slots=True)
class Frame:
    """One frame; `headers` holds unescaped text, of repeated headers the first."""

    command: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class FrameError(ValueError):
    """The bytes are no STOMP frame, so nothing after them can be read."""


def escape(text: str, version: str) -> str:
    """Encode a header name or value for the wire; 1.0 has no encoding, so there text must hold no line feed."""
    pattern = _TO_ESCAPE.get(version)
    return text if pattern is None else pattern.sub(lambda match: _LETTERS[match.group()], text)


def unescape(text: str, version: str) -> str:
    r"""Decode a header name or value; an escape that the version does not define (`\t`) stays as it is."""
    if version == "1.0" or "\\" not in text:
        return text
    defined = _ESCAPES[version]

    def plain(match: re.Match[str]) -> str:
        character = _PLAIN[match.group()]
        return character if character in defined else match.group()

    return _TO_UNESCAPE.sub(plain, text)


def encode(frame: Frame, version: str) -> bytes:
    """Write a frame; `content-length` is written only where the headers hold it."""
    # CONNECTED is never escaped: the specification keeps it readable for 1.0 clients.
    rules = "1.0" if frame.command == "CONNECTED" else version
    lines = [frame.command]
    lines += [f"{escape(name, rules)}:{escape(value, rules)}" for name, value in frame.headers.items()]
    return "\n".join(lines).encode() + b"\n\n" + frame.body + b"\x00\n"


class FrameParser:
    """Turns chunks of bytes into frames; `version` may change between two frames (CONNECT decides it)."""

    def __init__(self, version: str = "1.0", max_body: int = MAX_BODY, longest_header: int | None = None) -> None:
        """Start with an empty buffer. `longest_header`: bytes that the line of a header may have."""
        self.version = version
        self._longest_header = longest_header
        self._max_body = max_body
        self._buffer = bytearray()
        self._searched = 0
        self._head: Frame | None = None
        self._length: int | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that `data` completes, one at a time so that the caller may change `version` in between.

        Raises FrameError; the parser is then of no more use. Line ends between frames (heart-beats) yield nothing.
        """
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Frame | None:
        if self._head is None:
            self._head = self._read_head()
        return None if self._head is None else self._read_body(self._head)

    def _read_head(self) -> Frame | None:
        buffer = self._buffer
        if buffer[:1] in _BLANK:
            # Heart-beats, or the line end that may follow a frame.
            del buffer[: len(buffer) - len(buffer.lstrip(b"\r\n"))]
            self._searched = 0
        # 1.2 allows CRLF line ends; searching from where the last search stopped keeps slow senders linear.
        end = re.compile(rb"\n\r?\n").search(buffer, max(self._searched - 2, 0))
        if end is None:
            self._searched = len(buffer)
            if len(buffer) > MAX_HEAD:
                raise FrameError(f"the headers exceed {MAX_HEAD} bytes")
            return None
        lines = bytes(buffer[: end.start()])
        if self._longest_header is not None and any(len(line) > self._longest_header for line in lines.split(b"\n")):
            raise FrameError("The maximum header length was exceeded")
        head = _parse_head(lines, self.version)
        self._length = _content_length(head)
        del buffer[: end.end()]
        self._searched = 0
        return head

    def _read_body(self, frame: Frame) -> Frame | None:
        length = self._length if self._length is not None else self._find_nul()
        if max(length, len(self._buffer) if length < 0 else 0) > self._max_body:
            raise FrameError(f"The maximum data length was exceeded: {self._max_body} bytes")
        if length < 0 or len(self._buffer) <= length:
            return None
        if self._buffer[length]:
            raise FrameError("content-length bytes were read and there was no trailing null byte")
        frame.body = bytes(self._buffer[:length])
        del self._buffer[: length + 1]
        self._head, self._length, self._searched = None, None, 0
        return frame

    def _find_nul(self) -> int:
        found = self._buffer.find(0, self._searched)
        if found < 0:
            self._searched = len(self._buffer)
        return found


def _parse_head(head: bytes, version: str) -> Frame:
    try:
        lines = head.decode().split("\n")
    except UnicodeDecodeError as error:
        raise FrameError(f"the headers are not UTF-8: {error}") from error
    if version == "1.2" or lines[0].startswith(("CONNECT", "STOMP")):
        lines = [line.removesuffix("\r") for line in lines]
    # CONNECT is never escaped: client and server have not agreed on a version yet.
    rules = "1.0" if lines[0] in {"CONNECT", "STOMP"} else version
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        if version == "1.0":
            value = value.strip()
        headers.setdefault(unescape(name, rules), unescape(value, rules))
    return Frame(lines[0], headers)


def _content_length(frame: Frame) -> int | None:
    text = frame.headers.get("content-length")
    if text is None:
        return None
    if not (text.strip().isascii() and text.strip().isdigit()):
        raise FrameError("Specified content-length is not a valid integer")
    return int(text)
