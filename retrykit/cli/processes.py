"""Several processes of one command: those that die are replaced, with growing pauses, and all end together.

Each process has a thread here that starts it and waits for its end. Whether another one follows, and when, is decided
by a retry template, as for connections: a process that ended soon after its start is a failed attempt.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import attrs

from retrykit.backoff import BackOffPolicy, ExponentialBackOffPolicy
from retrykit.cli.channel import LastWord, Line
from retrykit.clock import SystemClock
from retrykit.errors import BackOffInterruptedError
from retrykit.failure import type_name
from retrykit.listener import RetryListener
from retrykit.messaging.lifetime import Ending, Lifetime
from retrykit.messaging.logs import ATTRIBUTE
from retrykit.messaging.readiness import Health
from retrykit.messaging.waiting import WaitingClock
from retrykit.policy import PredicateRetryPolicy
from retrykit.template import RetryTemplate

if TYPE_CHECKING:
    from retrykit.context import RetryContext
    from retrykit.policy import RetryDecision

RESTART: Final = ExponentialBackOffPolicy(initial=0.2, multiplier=2.0, max_interval=30.0, jitter=0.1)
STEADY: Final = 10.0
"""A process that lived for so many seconds had a good start: another one follows at once."""
_ANSWER: Final = 0.8
_FRESH: Final = 0.2
_FOR_GOOD: Final = (LastWord.NOT_UNDERSTOOD, LastWord.GAVE_UP)

_log = logging.getLogger("retrykit.consume")


class ProcessEndedError(Exception):
    """A process has ended that was to go on: with `status`, negative for the number of a signal.

    `word`: what it has said of its end; without one it has died, whatever the status. `at_start`: it was the first one
    in its place, and no place has had another beginning. `undecided`: it was the first one, and it depends on the
    others whether another one follows.
    """

    def __init__(self, who: str, status: int, seconds: float, word: LastWord | None = None) -> None:
        super().__init__(f"{who} {_ended(status, word)} after {seconds:.3g} s")
        self.status = status
        self.word = word
        self.seconds = seconds
        self.at_start = False
        self.undecided = False

    @property
    def for_good(self) -> bool:
        """Whether another one would end in the same way."""
        return self.word in _FOR_GOOD or self.at_start


def _ended(status: int, word: LastWord | None) -> str:
    if word is LastWord.GAVE_UP:
        return "has given up, for a reason that each would have,"
    if word is LastWord.NOT_LOADED:
        return "could not load the application, and ended"
    return f"ended with status {status}" if status >= 0 else f"was ended by {_signal_name(-status)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _may_be_replaced(error: BaseException) -> bool:
    # OSError: the system could not start one at this moment.
    return isinstance(error, OSError) or not (isinstance(error, ProcessEndedError) and error.for_good)


class _Teller(RetryListener):
    """Says what ended, and what follows."""

    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None:
        """One line."""
        follows = f"another one follows in {decision.delay:.2g} s" if decision.retry else "no other follows"
        if decision.retry and isinstance(error, ProcessEndedError) and error.undecided:
            follows += ", unless no process can"
        facts = {"name": context.name, "error": type_name(type(error))}
        _log.error("%s; %s", error, follows, extra={ATTRIBUTE: facts})


@attrs.define(eq=False)
class _Beginning:
    """How the first process in each place began.

    An application that none of them can load is a fault of the deployment, to be told by the end of the command. Once
    any could, the trouble will pass.
    """

    places: int
    _unable: set[int] = attrs.field(factory=set, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def came_to_nothing(self, number: int) -> bool:
        """Note that the first one in this place could not load the application: whether none could."""
        with self._lock:
            self._unable.add(number)
            return len(self._unable) == self.places


@attrs.define(eq=False)
class _Place:
    """One process after the other."""

    number: int
    command: Sequence[str]
    restart: BackOffPolicy
    stopping: threading.Event
    beginning: _Beginning
    disorderly: bool = False
    _lives: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _line: Line | None = None
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)

    def run(self) -> None:
        lives = RetryTemplate(
            name=f"process {self.number}",
            retry_policy=PredicateRetryPolicy(_may_be_replaced),
            back_off_policy=self.restart,
            listeners=(_Teller(),),
            clock=WaitingClock(SystemClock(), lambda seconds: not self.stopping.wait(seconds)),
        )
        while not self.stopping.is_set():
            try:
                lives.execute(self._life)
            except BackOffInterruptedError:
                return

    def _life(self, _context: RetryContext) -> None:
        started = time.monotonic()
        self._lives += 1
        process = self._start()
        if process is None:
            return
        try:
            status = process.wait()
        finally:
            word = self._put_away()
        who = f"process {self.number} (pid {process.pid})"
        if self.stopping.is_set():
            # Before it knows the signal it has nothing in hand.
            self.disorderly = word is not LastWord.DRAINED and status != -signal.SIGTERM
            _log.info("%s %s", who, _ended(status, word))
            return
        end = ProcessEndedError(who, status, time.monotonic() - started, word)
        if word is LastWord.NOT_LOADED and self._lives == 1:
            end.at_start = self.beginning.came_to_nothing(self.number)
            end.undecided = not end.at_start
        if end.seconds < STEADY or end.for_good:
            raise end
        _log.error("%s; another one follows", end)

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self.stopping.is_set():
                return None
            line, theirs = Line.pair()
            try:
                # A group of its own: Ctrl-C is for the supervisor, which tells each process once.
                command = [sys.executable, *self.command, "--supervised", str(self.number)]
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), process_group=0)  # noqa: S603 - our own
            except BaseException:
                line.close()
                raise
            finally:
                theirs.close()
            self._line = line
        _log.info("process %d has started (pid %d)", self.number, self._process.pid)
        return self._process

    def _put_away(self) -> LastWord | None:
        with self._lock:
            line, self._line, self._process = self._line, None, None
        if line is None:
            return None
        word = line.last_word()
        line.close()
        return word

    def signal(self, number: int) -> None:
        with self._lock:
            if self._process is not None:
                self._process.send_signal(number)

    def ask(self) -> None:
        line = self._line
        if line is not None:
            line.ask()

    def health(self, deadline: float) -> Health:
        line = self._line
        if line is None:
            return Health((), (f"process {self.number} is not running",))
        told = line.answer(deadline)
        if told is None:
            return Health((), (f"process {self.number} does not answer",))
        faults = tuple(f"process {self.number} {fault}" for fault in told.faults)
        return Health(tuple(attrs.evolve(one, process=self.number) for one in told.consumers), faults)


class Processes(Lifetime):
    """`count` processes of `command` (the arguments of this interpreter), from `start` until they are told to stop.

    A process gets SIGTERM to stop in good order, and is killed when it is to stop at once.
    """

    __slots__ = ("_asked", "_asking", "_ending", "_known", "_left", "_lock", "_places", "_stopping")

    def __init__(self, command: Sequence[str], count: int, *, restart: BackOffPolicy = RESTART) -> None:
        self._stopping = threading.Event()
        beginning = _Beginning(count)
        self._places = [_Place(number, command, restart, self._stopping, beginning) for number in range(1, count + 1)]
        self._left = 0
        self._ending = Ending()
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._asked = 0.0
        self._known = Health(())

    @property
    def disorderly(self) -> bool:
        """Whether a process has not finished what it had in hand when it was told to stop."""
        return any(place.disorderly for place in self._places)

    def start(self) -> None:
        """Start them, and return."""
        with self._lock:
            if self._left:
                raise RuntimeError("these processes were started before")
            self._left = len(self._places)
        for place in self._places:
            name = f"retrykit-process-{place.number}"
            threading.Thread(target=self._run, args=(place,), name=name, daemon=True).start()

    def stop(self, *, now: bool = False) -> None:
        """Have them finish what they have in hand; kill them if it has to be `now`."""
        with self._lock:
            started = bool(self._left)
        self._stopping.set()
        for place in self._places:
            place.signal(signal.SIGKILL if now else signal.SIGTERM)
        if not started:
            self._ending.finish()

    def health(self) -> Health:
        """What all of them say, with their numbers; at most 0.8 s later. Of those that have ended nothing is known."""
        with self._asking:
            # Whoever had to wait for somebody else's question may have its answer.
            if time.monotonic() - self._asked >= _FRESH:
                for place in self._places:
                    place.ask()
                deadline = time.monotonic() + _ANSWER
                self._known = Health.of(place.health(deadline) for place in self._places)
                self._asked = time.monotonic()
            return self._known

    def _run(self, place: _Place) -> None:
        try:
            place.run()
        except BaseException as error:  # noqa: BLE001 - a thread ends here; `wait` raises it to the owner
            self._ending.fail(error)
            self.stop()
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._ending.finish()
