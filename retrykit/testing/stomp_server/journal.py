"""The data file: one line per atomic change, so that a transaction is there as a whole or not at all.

After a first line that names the format, a line is a CRC-32 in hex, a space, and JSON:
`{"add": [message, …], "remove": [number, …], "flag": [number, …]}`, or `{"queue": name, "arguments": {…}}`, or
`{"gone": queue}`, or, as the last of all, `{"end": true}`: the server ended in good order. A torn end (the process was
killed while writing) fails its check and is cut off when the file is opened; what is dead is dropped at the same time
by writing the file anew. One server at a time may use a file.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from retrykit.testing.stomp_server.queues import Message

_SIGNATURE = b"retrykit stomp journal 1\n"


class Journal:
    """Keeps persistent messages; without a path it keeps nothing and costs nothing."""

    def __init__(self, path: Path | None, queues: dict[str, dict[str, str]] | None = None) -> None:
        """Remember the path; nothing is read or written before `open`.

        `queues` are the arguments of each queue that was declared, where no file keeps them.
        """
        self.queues = {} if queues is None else queues
        self.crashed = False
        self._path = path
        self._file: BinaryIO | None = None
        self._pending: list[bytes] = []

    def open(self) -> list[Message]:
        """Read what survived, in order of arrival, and make the file ready for more. Raises OSError."""
        if self._path is None:
            return []
        messages = self._replay(self._path)
        fresh = self._path.with_name(self._path.name + ".new")
        with fresh.open("wb") as file:
            queues = [_line({"queue": name, "arguments": given}) for name, given in self.queues.items()]
            file.write(_SIGNATURE + b"".join(queues))
            file.write(b"".join(_line({"add": [_to_json(message)]}) for message in messages))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        _sync_folder(self._path.parent)
        self._file = self._path.open("ab", buffering=0)
        return messages

    def _replay(self, path: Path) -> list[Message]:
        alive: dict[int, Message] = {}
        for change in _changes(path):
            self.crashed = "end" not in change
            if "queue" in change:
                self.queues[change["queue"]] = change["arguments"]
            self.queues.pop(change.get("gone", ""), None)
            for number in change.get("remove", ()):
                alive.pop(number, None)
            for number in change.get("flag", ()):
                if number in alive:
                    alive[number].redelivered = True
            alive |= {stored["number"]: _from_json(stored) for stored in change.get("add", ())}
        return sorted(alive.values(), key=lambda message: message.number)

    def record(self, added: Iterable[Message], removed: Iterable[Message], flagged: Iterable[Message] = ()) -> None:
        """Note one atomic change, durable after the next `sync`. Messages that are not persistent are left out."""
        if self._file is None:
            return
        change = {
            "add": [_to_json(message) for message in added if message.persistent],
            "remove": [message.number for message in removed if message.persistent],
            "flag": [message.number for message in flagged if message.persistent],
        }
        if any(change.values()):
            self._note({name: value for name, value in change.items() if value})

    def record_queue(self, name: str, arguments: dict[str, str]) -> None:
        """Note that a queue was made."""
        self.queues[name] = arguments
        self._note({"queue": name, "arguments": arguments})

    def forget_queue(self, name: str) -> None:
        """Note that a queue is gone."""
        self.queues.pop(name, None)
        self._note({"gone": name})

    def record_end(self) -> None:
        """Note that the server ends in good order."""
        self._note({"end": True})

    def _note(self, change: dict[str, Any]) -> None:
        if self._file is not None:
            self._pending.append(_line(change))

    def sync(self) -> None:
        """Make everything noted so far survive a crash. Raises OSError; what was noted is then in doubt."""
        if self._file is None or not self._pending:
            return
        data = memoryview(b"".join(self._pending))
        self._pending.clear()
        while data:
            data = data[self._file.write(data) or 0 :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; what was not synced is lost, as in a crash."""
        self._pending.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


def _line(change: dict[str, Any]) -> bytes:
    text = json.dumps(change, separators=(",", ":")).encode()
    return b"%08x " % zlib.crc32(text) + text + b"\n"


def _to_json(message: Message) -> dict[str, Any]:
    return {
        "number": message.number,
        "id": message.message_id,
        "destination": message.destination,
        "headers": message.headers,
        # Latin-1 maps bytes to characters one to one, which is smaller than base64 for text.
        "body": message.body.decode("latin-1"),
        "due": message.due,
        "redelivered": message.redelivered,
    }


def _from_json(stored: dict[str, Any]) -> Message:
    return Message(
        number=stored["number"],
        message_id=stored["id"],
        destination=stored["destination"],
        headers=stored["headers"],
        body=stored["body"].encode("latin-1"),
        persistent=True,
        due=stored["due"],
        redelivered=stored["redelivered"],
    )


def _changes(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if file.readline() != _SIGNATURE:
            raise OSError(f"{path} is no data file of this server, so it stays as it is")
        torn = 0
        for number, line in enumerate(file, 2):
            text = _checked(line)
            if text is None:
                torn = torn or number
            elif torn:
                # A crash tears the end only; dropping what follows would lose confirmed messages in silence.
                raise OSError(f"{path} is damaged at line {torn}, and what follows is not")
            else:
                yield json.loads(text)


def _checked(line: bytes) -> bytes | None:
    check, _, text = line.rstrip(b"\n").partition(b" ")
    return text if line.endswith(b"\n") and check == b"%08x" % zlib.crc32(text) else None


def _sync_folder(folder: Path) -> None:
    # Without this the new name itself may be lost in a power failure. Windows cannot open folders, nor needs it.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
