"""Interrupting code at each of its lines, as a signal handler may."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from linecache import getline
from types import FrameType, ModuleType
from typing import Any


class Signal(BaseException):
    """What a signal handler raises."""


def interrupted_at(
    number: int, call: Callable[[], object], spared: Any = (), *, modules: Iterable[ModuleType]
) -> Signal | None:
    """Call it, and raise at that line that is executed in the modules. The place, if there are as many."""
    left, files = [number], {module.__file__ for module in modules}

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in files or frame.f_code.co_name in spared:
            return None
        # Of these there is a line and no instruction: nobody is interrupted there but by a tracer.
        empty = getline(frame.f_code.co_filename, frame.f_lineno).strip() in {"try:", "while True:", "with self.lock:"}
        if event == "line" and not empty:
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise Signal(frame.f_lineno, frame.f_code.co_name)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Signal as signal:
        return signal
    finally:
        sys.settrace(before)
    return None
