"""The calls of a command: made here, or where they are asynchronous in one event loop for all of them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from math import inf
from types import FrameType
from typing import Any, Final

Do = Callable[[Callable[[], Any]], Any]

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """The handler of both signals: `KeyboardInterrupt`, with the signal's name.

    `window`: so many seconds after the first one others say the same, and interrupt nothing: a process that another one
    has started hears Ctrl-C from the terminal, and then from that one. Whoever hears it is about to leave.
    """

    def __init__(self, window: float = 0.0) -> None:
        self.window = window
        self.heard: str | None = None
        self._since = -inf

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Interrupt."""
        if self.is_new(number):
            raise KeyboardInterrupt(self.heard)

    def is_new(self, number: int) -> bool:
        """Whether the signal is to interrupt anything."""
        now = time.monotonic()
        if now - self._since < self.window:
            return False
        self._since, self.heard = now, signal.Signals(number).name
        return True

    def check(self) -> None:
        """Interrupt, if a signal was heard: what it had interrupted may have taken it for a failure of its own."""
        if self.heard is not None:
            raise KeyboardInterrupt(self.heard)


@contextmanager
def interruptible(window: float = 0.0) -> Iterator[Interruption]:
    """SIGTERM does what Ctrl-C does, and both say who they are; one that is ignored stays so."""
    interruption = Interruption(window)
    before = _handlers()
    for number in before:
        signal.signal(number, interruption)
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def blocked() -> Iterator[None]:
    """Ctrl-C waits until this is over; for a process that is started in it, until that lets it through: before it knows
    what to do about it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    """Hear of what was blocked."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))


def _handlers() -> dict[signal.Signals, Any]:
    """Who hears the signals, as far as they are not ignored."""
    found = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in found.items() if handler not in {signal.SIG_IGN, None}}


@contextmanager
def calls(*, asynchronous: bool) -> Iterator[Do]:
    """Something that makes a call, awaits what it gives if that is to be awaited, and gives the result.

    SIGTERM and SIGINT are `KeyboardInterrupt`, after the coroutine has been cancelled and has come to its end.
    """
    if not asynchronous:
        yield lambda call: call()
        return
    with asyncio.Runner() as runner:

        def do(call: Callable[[], Any]) -> Any:
            try:
                return runner.run(_made(call))
            except asyncio.CancelledError as cancelled:
                raise KeyboardInterrupt(*cancelled.args) from None

        yield do


async def _made(call: Callable[[], Any]) -> Any:
    with _cancelled_by_signals(asyncio.get_running_loop(), asyncio.current_task()):
        answer = call()
        return await answer if isawaitable(answer) else answer


@contextmanager
def _cancelled_by_signals(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any] | None) -> Iterator[None]:
    """A handler that raises would do so in the midst of the loop, and leave the coroutine where it is."""
    before = _handlers()
    heard = list(before)

    def put_back() -> None:
        while heard:
            number = heard.pop()
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])

    def cancel(number: signal.Signals) -> None:
        # A second one does not wait any more, unless it says the same.
        handler = before[number]
        if isinstance(handler, Interruption):
            handler.is_new(number)
        put_back()
        if task is not None:
            task.cancel(number.name)

    for number in heard:
        loop.add_signal_handler(number, cancel, number)
    try:
        yield
    finally:
        put_back()
