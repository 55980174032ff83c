"""A raw STOMP client for tests: it writes what it is told and hides nothing.

It shares no code with the embedded server, so that one misreading of the protocol cannot hide in both.
"""

from __future__ import annotations

import re
import socket
import time
import uuid
from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

_ESCAPE = {"\\": "\\\\", "\n": "\\n", ":": "\\c", "\r": "\\r"}
_PLAIN = {escape: plain for plain, escape in _ESCAPE.items()}


class Frame(NamedTuple):
    """What came over the wire; of repeated headers the first counts."""

    command: str
    headers: dict[str, str]
    body: bytes

    def __getitem__(self, name: str) -> str:  # type: ignore[override]
        """Read a header."""
        return self.headers[name]


class StompErrorFrame(Exception):
    """The server answered with ERROR."""

    def __init__(self, frame: Frame) -> None:
        """Keep the frame."""
        super().__init__(f"{frame.headers} {frame.body[:500]!r}")
        self.frame = frame


class Wire:
    """One connection; it connects at once unless `connect=False`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        version: str = "1.2",
        heart_beat: str = "0,0",
        login: tuple[str, str] | None = None,
        connect: bool = True,
        virtual_host: str | None = "localhost",
    ) -> None:
        """Open the socket and, usually, the session."""
        self.socket = socket.create_connection((host, port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.version = version
        self.virtual_host = virtual_host
        self.heart_beats = 0
        self.connected: Frame | None = None
        self._buffer = bytearray()
        self._waiting: deque[Frame] = deque()
        if connect:
            try:
                self.connected = self.connect(heart_beat, login)
            except BaseException:
                self.close()
                raise

    def connect(self, heart_beat: str = "0,0", login: tuple[str, str] | None = None) -> Frame:
        """Open the session; the CONNECTED frame."""
        headers = {"accept-version": self.version, "heart-beat": heart_beat}
        if self.virtual_host is not None:
            headers["host"] = self.virtual_host
        if login is not None:
            headers |= {"login": login[0], "passcode": login[1]}
        self.raw(_encode("CONNECT", headers, b"", escape=False))
        frame = self.next(10)
        assert frame is not None, "no answer to CONNECT"
        if frame.command != "CONNECTED":
            raise StompErrorFrame(frame)
        return frame

    def raw(self, data: bytes) -> None:
        """Write bytes as they are."""
        self.socket.sendall(data)

    def send(self, command: str, body: bytes = b"", /, **headers: object) -> None:
        """Write a frame; `_` in a keyword stands for `-`."""
        self.frame(command, {name.replace("_", "-"): str(value) for name, value in headers.items()}, body)

    def frame(self, command: str, headers: dict[str, str], body: bytes = b"") -> None:
        """Write a frame with headers named exactly."""
        self.raw(_encode(command, headers, body, escape=self.version != "1.0"))

    def ask(self, command: str, body: bytes = b"", /, **headers: object) -> None:
        """Write a frame with a receipt and wait for it; MESSAGE frames that come meanwhile are kept for later."""
        receipt = uuid.uuid4().hex
        self.send(command, body, receipt=receipt, **headers)
        self.await_receipt(receipt)

    def await_receipt(self, receipt: str, timeout: float = 10) -> None:
        """Wait for a receipt; an ERROR raises."""
        self._take(lambda frame: frame.headers.get("receipt-id") == receipt, timeout, f"receipt {receipt}")

    def publish(self, destination: str, body: bytes = b"", /, **headers: object) -> None:
        """SEND a persistent message and wait for its receipt."""
        self.ask("SEND", body, **{"destination": destination, "persistent": "true", **headers})

    def subscribe(
        self,
        destination: str,
        id: str = "1",  # noqa: A002
        *,
        prefetch: int = 1,
        ack: str = "client-individual",
        **others: str,
    ) -> None:
        """Subscribe and wait for the receipt."""
        headers = {"destination": destination, "id": id, "ack": ack, "receipt": uuid.uuid4().hex}
        # One for each kind of broker; the others take no notice.
        headers["activemq.prefetchSize"] = headers["prefetch-count"] = str(prefetch)
        self.frame("SUBSCRIBE", headers | {name.replace("_", "-"): value for name, value in others.items()})
        self.await_receipt(headers["receipt"])

    def message(self, timeout: float = 10) -> Frame:
        """The next MESSAGE frame."""
        return self._take(lambda frame: frame.command == "MESSAGE", timeout, "a message")

    def messages(self, seconds: float = 0.5) -> list[Frame]:
        """The MESSAGE frames that come until none comes for a while."""
        found = [frame for frame in self._waiting if frame.command == "MESSAGE"]
        self._waiting.clear()
        while (frame_ := self.next(seconds)) is not None:
            assert frame_.command == "MESSAGE", frame_
            found.append(frame_)
        return found

    def error(self, timeout: float = 10) -> Frame:
        """The next frame, which must be an ERROR."""
        frame = self.next(timeout)
        assert frame is not None, "no answer"
        assert frame.command == "ERROR", frame
        return frame

    def nothing(self, seconds: float = 0.3) -> None:
        """Assert that nothing comes for a while: all that can be asked of a broker that dispatches when it likes."""
        frame = self._waiting.popleft() if self._waiting else self.next(seconds)
        assert frame is None, frame

    def closed(self, timeout: float = 10) -> bool:
        """Whether the server ends the connection within the time."""
        deadline = time.monotonic() + timeout
        try:
            while time.monotonic() < deadline:
                if self._read(deadline) is None:
                    return False
        except ConnectionError:
            return True
        return False

    def _take(self, wanted: object, timeout: float, what: str) -> Frame:
        assert callable(wanted)
        for frame in self._waiting:
            if wanted(frame):
                self._waiting.remove(frame)
                return frame
        deadline = time.monotonic() + timeout
        while (frame_ := self.next(deadline - time.monotonic())) is not None:
            if frame_.command == "ERROR":
                raise StompErrorFrame(frame_)
            if wanted(frame_):
                return frame_
            self._waiting.append(frame_)
        raise AssertionError(f"{what} did not come within {timeout} s; waiting: {list(self._waiting)}")

    def next(self, timeout: float) -> Frame | None:
        """The next frame of any kind off the wire, None when none comes in time; ConnectionError at its end."""
        deadline = time.monotonic() + timeout
        while (frame := self._parse()) is None:
            if self._read(deadline) is None:
                return None
        return frame

    def _read(self, deadline: float) -> bytes | None:
        self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return None
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data
        return data

    def _parse(self) -> Frame | None:
        while bytes(self._buffer[:1]) in (b"\n", b"\r"):
            self.heart_beats += self._buffer[:1] == b"\n"
            del self._buffer[:1]
        head, separator, rest = bytes(self._buffer).partition(b"\n\n")
        if not separator:
            return None
        command, *lines = head.decode().split("\n")
        headers = self._headers(command, lines)
        length = int(headers["content-length"]) if "content-length" in headers else rest.find(b"\x00")
        if length < 0 or len(rest) <= length:
            return None
        assert rest[length] == 0, "the frame does not end where it says"
        del self._buffer[: len(head) + 2 + length + 1]
        return Frame(command, headers, rest[:length])

    def _headers(self, command: str, lines: list[str]) -> dict[str, str]:
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            if command != "CONNECTED" and self.version != "1.0":
                name, value = _unescape(name), _unescape(value)
            headers.setdefault(name, value)
        return headers

    def close(self) -> None:
        """Drop the socket without a word, as a dying process does."""
        self.socket.close()

    def __enter__(self) -> Self:
        """As it is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop the socket."""
        self.close()


def _encode(command: str, headers: dict[str, str], body: bytes, *, escape: bool) -> bytes:
    lines = [command]
    for name, value in headers.items():
        lines.append(f"{_escape(name)}:{_escape(value)}" if escape else f"{name}:{value}")
    return "\n".join(lines).encode() + b"\n\n" + body + b"\x00"


def _escape(text: str) -> str:
    return "".join(_ESCAPE.get(character, character) for character in text)


def _unescape(text: str) -> str:
    return re.sub(r"\\.", lambda match: _PLAIN[match.group()], text)
