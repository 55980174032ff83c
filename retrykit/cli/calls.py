"""The calls of a command: made here, or where they are asynchronous in one event loop for all of them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any

Do = Callable[[Callable[[], Any]], Any]


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
    # A signal handler that raises would raise in the midst of the loop, and leave the coroutine where it is.
    loop, task, before = asyncio.get_running_loop(), asyncio.current_task(), signal.getsignal(signal.SIGTERM)

    def cancel() -> None:
        if task is not None and not task.cancelling():
            task.cancel(signal.SIGTERM.name)

    loop.add_signal_handler(signal.SIGTERM, cancel)
    try:
        answer = call()
        return await answer if isawaitable(answer) else answer
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
