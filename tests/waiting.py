"""Waiting for what other threads and processes bring about."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def until(
    condition: Callable[[], object],
    seconds: float,
    told: Callable[[], object] = lambda: "it did not happen in time",
    *,
    look: float = 0.01,
) -> None:
    """Wait for the condition, looking every `look` seconds; after so many `seconds` fail with what `told` says."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, told()
        pause.wait(look)
