"""What consumes until it is told to stop: `run` obeys signals, and a `with` block ends in good order.

Containers, groups of them and processes that consume have the same lifetime; this is the one place that knows signals.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import Any, Final, Literal, Self

_log = logging.getLogger("retrykit.messaging")

Event = Literal["failed", "finished"]
Lifespan = Callable[[], AbstractAsyncContextManager[Any]]
_Heard = Literal["failed", "finished", "signal", "echo", "late"]
_LOOK: Final = 0.2
SEPARATE: Final = 1.0
"""Signals that come within so many seconds of the first are one and the same: service managers, shells and supervisors
signal a process and its group, or say SIGTERM and SIGINT in one breath."""


class Ending:
    """How a lifetime ends: what made it give up, whether all is over, and who wants to be told."""

    __slots__ = ("_finished", "_lock", "_raised", "_watchers", "error")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._raised = False
        self._finished = threading.Event()
        self._watchers: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    @property
    def finished(self) -> bool:
        """Whether all is over."""
        return self._finished.is_set()

    def fail(self, error: BaseException) -> None:
        """It gives up; the first reason is the one that counts."""
        with self._lock:
            watchers = [] if self.error is not None else list(self._watchers)
            self.error = self.error or error
        for tell in watchers:
            tell("failed")

    def finish(self) -> None:
        """All is over."""
        with self._lock:
            watchers = [] if self.finished else list(self._watchers)
            self._finished.set()
        for tell in watchers:
            tell("finished")

    def watch(self, tell: Callable[[Event], None]) -> None:
        """Tell both, once each; at once what is past."""
        with self._lock:
            self._watchers.append(tell)
            failed, finished = self.error is not None, self.finished
        if failed:
            tell("failed")
        if finished:
            tell("finished")

    def wait(self, timeout: float | None) -> bool:
        """Wait until all is over; False after `timeout` seconds. Raises what made it give up, to the first who asks."""
        if not self._finished.wait(timeout):
            return False
        with self._lock:
            error = None if self._raised else self.error
            self._raised = True
        if error is not None:
            raise error
        return True


class Lifetime(ABC):
    """Started once, stopped from anywhere, waited for."""

    __slots__ = ()
    _ending: Ending

    @abstractmethod
    def start(self) -> None:
        """Begin to consume, and return. `RuntimeError` at the second time."""

    @abstractmethod
    def stop(self, *, now: bool = False) -> None:
        """Ask for the end: in good order, or at once. Returns at once; may be called from any thread, and again."""

    @property
    def farewell(self) -> float:
        """For how many seconds `run` waits when it stops at once, for what is cancelled to be put straight."""
        return 0.0

    @property
    def error(self) -> BaseException | None:
        """What made it give up; None if nothing has."""
        return self._ending.error

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end; False after `timeout` seconds. Raises what made it give up, to the first who asks.

        Installs no signal handlers: `run` does.
        """
        return self._ending.wait(timeout)

    def watch(self, tell: Callable[[Event], None]) -> None:
        """Have `tell("failed")` called when it gives up and `tell("finished")` at the end: in any thread, at once if
        that is past. It must not raise, and not wait.
        """
        self._ending.watch(tell)

    def run(self, *, grace: float | None = None) -> bool:
        """Consume until stopped. In the main thread SIGTERM and SIGINT stop in good order; another one stops at once.

        Another one is one that comes a second or more after the first: what comes sooner is that one once more.

        `grace`: the messages in hand may take so many seconds (None: as long as they do), then it stops at once. True
        if they were finished. If not, a handler may still be running in its thread: nothing that it does will be
        committed, and it counts neither as a failed attempt nor as a crash. One that is a coroutine is cancelled, and
        has 2 seconds to come to its end.

        Raises what made it give up.
        """
        return run(self, grace=grace)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop in good order and wait for it; raises what made it give up, unless something else is raised already."""
        self.stop()
        finished = threading.Event()
        self.watch(lambda event: finished.set() if event == "finished" else None)
        finished.wait()
        if error is None:
            self.wait()


def run(one: Lifetime, *, grace: float | None = None, heed_repeated: bool = True) -> bool:
    """What `Lifetime.run` does. Without `heed_repeated` further signals change nothing: somebody else sees to the end.

    That is so for processes that may get one signal from their supervisor and the same once more from the system.
    """
    heard: SimpleQueue[_Heard] = SimpleQueue()
    one.watch(heard.put)
    with _signals(heard):
        one.start()
        finished = _obey(one, heard, grace, heed_repeated=heed_repeated)
    # What made it give up is raised here, if all have left.
    one.wait(None if finished else 0)
    return finished


def _obey(one: Lifetime, heard: SimpleQueue[_Heard], grace: float | None, *, heed_repeated: bool) -> bool:
    """Whether it came to its end in good order."""
    asked, deadline = False, None
    while (event := _next(heard, deadline)) != "finished":
        if event == "late" or (event == "signal" and asked and heed_repeated):
            _log.warning("stopping at once: what is in hand is given back")
            one.stop(now=True)
            _linger(heard, time.monotonic() + one.farewell)
            return False
        if event == "signal" and not asked:
            asked = True
            _log.info("stopping when the messages in hand are finished")
            one.stop()
        if event == "echo" and heed_repeated:
            _log.info("a signal so soon after the first is that one again; one that comes later stops at once")
        if deadline is None and grace is not None:
            deadline = time.monotonic() + grace
    return True


def _linger(heard: SimpleQueue[_Heard], deadline: float) -> None:
    """Leave a moment to what was cancelled, unless one more signal comes."""
    while _next(heard, deadline) in {"failed", "echo"}:
        pass


def _next(heard: SimpleQueue[_Heard], deadline: float | None) -> _Heard:
    while deadline is None or time.monotonic() < deadline:
        # A signal that another thread is given, or that comes just before the wait, does not end it: so none is long.
        wait = _LOOK if deadline is None else min(_LOOK, max(0.0, deadline - time.monotonic()))
        with suppress(Empty):
            return heard.get(timeout=wait)
    return "late"


@contextmanager
def _signals(heard: SimpleQueue[_Heard]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came: list[float] = []

    def note(_number: int, _frame: FrameType | None) -> None:
        # A signal comes anywhere, also while the main thread holds a lock: SimpleQueue.put is made for that.
        came.append(time.monotonic())
        if len(came) == 1 or came[-1] - came[0] >= SEPARATE:
            heard.put("signal")
        elif len(came) == 2:  # noqa: PLR2004 - said once
            heard.put("echo")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
