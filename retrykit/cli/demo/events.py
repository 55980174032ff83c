"""What the workers report: lines of one file, appended outside of all transactions: no roll-back undoes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import attrs

ATTEMPT: Final = "attempt"
FAILED: Final = "failed"
DONE: Final = "done"
PARKED: Final = "parked"
DUPLICATE: Final = "duplicate"
IN_DOUBT: Final = "in doubt"

Event = dict[str, Any]


@attrs.frozen
class EventWriter:
    """Appends events; each is one write, which processes do not mix up, and which survives a SIGKILL right after it."""

    _file: int

    @classmethod
    def open(cls, path: str) -> Self:
        """Append to the file at `path`."""
        return cls(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))

    def write(self, kind: str, **facts: Any) -> None:
        """Append one event."""
        line = json.dumps({"event": kind, "pid": os.getpid(), **facts})
        os.write(self._file, line.encode() + b"\n")


@attrs.define
class EventReader:
    """Reads what was appended since the last time."""

    path: Path
    _position: int = 0
    _rest: bytes = b""

    def new(self) -> Iterator[Event]:
        """The events that are complete by now."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from map(json.loads, lines)
