"""Work that a plain caller and an event loop do the same way: a generator of calls, and the two loops that make them.

What is yielded is called without arguments. Its result is sent back, an awaitable's when it has been awaited; its
exception is thrown in where the call was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from inspect import GEN_CLOSED, getgeneratorstate, isawaitable
from types import CoroutineType
from typing import Any, TypeVar

T = TypeVar("T")

Work = Generator[Callable[[], Any], Any, T]


def drive(work: Work[T]) -> T:
    """Do the work by calling: its result. `TypeError` for a call that gives a coroutine."""
    fault: BaseException | None = None
    call: Any = None
    answer: Any = None
    try:
        while True:
            try:
                call = next(work) if fault is None else work.throw(fault)
                fault = None
                while True:
                    answer = call()
                    # It may know a whole chunk, which is not to be kept while the next one is read.
                    call = None
                    call = work.send(called(answer))
            except BaseException as error:
                if work.gi_frame is None:  # type: ignore[attr-defined] # it is one of `Work`'s, which are generators
                    if isinstance(error, StopIteration):
                        return error.value  # type: ignore[no-any-return]
                    raise
                # Of a call, or an interruption beside it: the work hears of both.
                fault = error
    finally:
        # Tracebacks keep this frame: it must not keep the exception.
        fault = call = answer = None


def called(answer: Any) -> Any:
    """What a plain call gave. `TypeError` for a coroutine."""
    if answer.__class__ is CoroutineType:
        answer.close()
        msg = f"{answer.__qualname__} is a coroutine: use AsyncChunkStep"
        raise TypeError(msg)
    return answer


async def async_drive(work: Work[T]) -> T:
    """As `drive`, awaiting what can be awaited."""
    fault: BaseException | None = None
    try:
        while True:
            try:
                return await _awaited(work, fault)
            except GeneratorExit:
                # The coroutine is being closed: it may await nothing any more.
                work.close()
                raise
            except BaseException as error:
                if getgeneratorstate(work) == GEN_CLOSED:
                    raise
                fault = error
    finally:
        fault = None


async def _awaited(work: Work[T], fault: BaseException | None) -> T:
    answer: Any = None
    try:
        call: Any = next(work) if fault is None else work.throw(fault)
        while True:
            answer = call()
            # As in `drive`.
            call = None
            if isawaitable(answer):
                answer = await answer
            call = work.send(answer)
    except StopIteration as over:
        if getgeneratorstate(work) != GEN_CLOSED:
            raise
        return over.value  # type: ignore[no-any-return]
    finally:
        answer = fault = None
