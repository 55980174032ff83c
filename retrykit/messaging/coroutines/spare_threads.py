"""The threads of `asyncio.to_thread` on the loop of the handlers: like the workers, they do not keep the interpreter.

Those of a `ThreadPoolExecutor` are joined when the interpreter ends: one call that hangs, and a process that was told
twice to stop would not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, TypeVar

T = TypeVar("T")

MOST: Final = min(32, (os.cpu_count() or 1) + 4)
"""As many as asyncio would have."""


class SpareThreads(ThreadPoolExecutor):
    """An executor with up to `MOST` daemon threads, which asyncio takes for its default one (hence the base)."""

    def __init__(self) -> None:
        super().__init__(max_workers=MOST)
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._at_rest = threading.Semaphore(0)
        self._daemons: list[threading.Thread] = []
        self._submitting = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have it called in one of the threads. `RuntimeError` after `shutdown`."""
        future: Future[T] = Future()
        with self._submitting:
            if self._closed:
                raise RuntimeError("the threads of this event loop are gone: it has ended")
            self._calls.put(partial(_do, future, partial(fn, *args, **kwargs)))
            if not self._at_rest.acquire(blocking=False) and len(self._daemons) < MOST:
                number = len(self._daemons) + 1
                thread = threading.Thread(target=self._live, name=f"retrykit-spare-{number}", daemon=True)
                self._daemons.append(thread)
                thread.start()
        return future

    def _live(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call
            self._at_rest.release()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - as its base has it
        """Take no more calls; what was submitted is called, whatever `cancel_futures` says, and waited for."""
        with self._submitting:
            self._closed = True
            for _ in self._daemons:
                self._calls.put(None)
        for thread in self._daemons if wait else ():
            thread.join()


def _do(future: Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - raised to the one who waits for it
        future.set_exception(error)
    else:
        future.set_result(result)
