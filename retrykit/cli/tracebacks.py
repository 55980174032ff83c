"""Tracebacks of the user's own code: without the frames that lead to it, and those in which its values are checked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from types import TracebackType
from typing import Final

import attr

_OURS: Final = str(Path(__file__).parents[1])
_ATTRS: Final = str(Path(attr.__file__).parent)
_PASSED: Final = (_OURS, _ATTRS, "<attrs generated")
_IMPORTING: Final = (str(Path(importlib.__file__).parent), "<frozen importlib")


def of_the_user(error: BaseException) -> TracebackType | None:
    """The traceback from the first frame of the user's on; up to the last one, where a value was refused by us.

    All of it, where none is the user's.
    """
    frames = list(dropwhile(_is_passed, _frames(error.__traceback__)))
    if isinstance(error, TypeError | ValueError) and frames and _is_passed(frames[-1]):
        frames = list(dropwhile(_is_passed, reversed(frames)))[::-1]
    return _chained(frames) if frames else error.__traceback__


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_IMPORTING):
            yield trace
        trace = trace.tb_next


def _is_passed(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename.startswith(_PASSED)


def _chained(frames: list[TracebackType]) -> TracebackType | None:
    trace = None
    for one in reversed(frames):
        trace = TracebackType(trace, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return trace
