"""The line between a supervisor and a process of its own: the process's standard input, and a way to ask it.

It is a pair of sockets. The supervisor asks, the process answers with its health in one line of JSON. At its end the
process says what that means, if it means anything: a status says nothing for certain, since any handler or library can
end the process with any. When the supervisor is gone, however that came about, the process finds that its line has
ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Final, Self

import attrs

from retrykit.messaging.readiness import ConsumerHealth, Health, Observed

_QUESTION: Final = b"?\n"
_CHUNK: Final = 65_536
_PATIENCE: Final = 1.0


class LastWord(Enum):
    """What the end of a process means, in its own words. One that ends without any has died."""

    DRAINED = "drained"
    """It was told to stop, and everything in hand was finished."""
    GAVE_UP = "gave up"
    """It has said what somebody has to change: any other would come to the same."""
    NOT_LOADED = "not loaded"
    """Its application could not be loaded; it has said why. Another one may be luckier."""
    NOT_UNDERSTOOD = "not understood"
    """It could not understand its command: no other would."""

    @property
    def line(self) -> bytes:
        """As it is sent; no line of JSON looks like that."""
        return f"!{self.value}".encode()


_LAST_WORDS: Final = {word.line: word for word in LastWord}


@attrs.define(eq=False)
class Line:
    """The supervisor's end. Of an ended process nothing can be had, and nothing is raised."""

    _socket: socket.socket
    _rest: bytes = b""
    _asked: bool = False
    _word: LastWord | None = None
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """A new line: our end, and the one that a process gets for its standard input."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    def ask(self) -> None:
        """Ask for the health of this moment; a question is open until it is answered."""
        with self._lock, contextlib.suppress(OSError):
            # What came too late for somebody else is out of date.
            for _ in self._answers(time.monotonic()):
                self._asked = False
            if not self._asked:
                self._socket.sendall(_QUESTION)
                self._asked = True

    def answer(self, deadline: float) -> Health | None:
        """The answer, if it comes before `deadline` (monotonic seconds)."""
        with self._lock, contextlib.suppress(OSError):
            for line in self._answers(deadline):
                self._asked = False
                return health_from_json(json.loads(line))
        return None

    def last_word(self) -> LastWord | None:
        """What the process has said of its end, now that it has ended; None: nothing."""
        with self._lock, contextlib.suppress(OSError):
            for _ in self._answers(time.monotonic()):
                self._asked = False
        return self._word

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            self._socket.close()

    def _answers(self, deadline: float) -> Iterator[bytes]:
        while True:
            line, end, rest = self._rest.partition(b"\n")
            if end:
                self._rest = rest
                self._word = _LAST_WORDS.get(line, self._word)
                if line not in _LAST_WORDS:
                    yield line
                continue
            data = self._received(deadline)
            if not data:
                return
            self._rest += data

    def _received(self, deadline: float) -> bytes:
        """What there is to read before `deadline`: nothing, also when there will never be anything."""
        self._socket.settimeout(max(0.0, deadline - time.monotonic()))
        try:
            return self._socket.recv(_CHUNK)
        except (TimeoutError, BlockingIOError):
            return b""


class Answers:
    """The process's end: takes the line from standard input, and answers in a thread of its own.

    `observed` is who is asked; `ended` is called there when the supervisor is gone.
    """

    def __init__(self, observed: Observed, ended: Callable[[], None]) -> None:
        self._observed = observed
        self._ended = ended
        self._lock = threading.Lock()
        self._socket = socket.socket(fileno=os.dup(0))
        # Whoever reads standard input must not read questions.
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)

    def start(self) -> None:
        """Listen until the supervisor is gone."""
        threading.Thread(target=self._run, name="retrykit-supervised", daemon=True).start()

    def say(self, word: LastWord) -> None:
        """Say what the end means that follows now. Where it cannot be said, the process has died."""
        # Not in the midst of an answer, and without waiting for a supervisor that does not listen.
        if not self._lock.acquire(timeout=_PATIENCE):
            return
        with contextlib.suppress(OSError):
            self._socket.send(word.line + b"\n", socket.MSG_DONTWAIT)
        self._lock.release()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(_CHUNK):
                for _ in range(data.count(b"\n")):
                    answer = self._health()
                    with self._lock:
                        self._socket.sendall(answer)
        self._ended()

    def _health(self) -> bytes:
        return json.dumps(health_to_json(self._observed.health())).encode() + b"\n"


def health_to_json(health: Health) -> dict[str, Any]:
    """The JSON form."""
    return {"consumers": [one.to_json() for one in health.consumers], "faults": list(health.faults)}


def health_from_json(facts: dict[str, Any]) -> Health:
    """What `health_to_json` gave."""
    return Health(tuple(map(ConsumerHealth.from_json, facts["consumers"])), tuple(facts["faults"]))
