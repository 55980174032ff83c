"""Work that a plain caller and an event loop do the same way: a generator of calls, and the two loops that make them.

What is yielded is called without arguments. Its result is sent back, an awaitable's when it has been awaited; its
exception is thrown in where the call was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from inspect import isawaitable
from types import CoroutineType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

Work = Generator[Callable[[], Any], Any, T]


def drive(work: Work[T]) -> T:
    """Do the work by calling: its result. `TypeError` for a call that gives a coroutine."""
    answer: Any = None
    fault: BaseException | None = None
    try:
        while True:
            call = work.send(answer) if fault is None else work.throw(fault)
            answer = fault = None
            try:
                answer = call()
                if answer.__class__ is CoroutineType:
                    _refuse(answer)
            except BaseException as error:  # noqa: BLE001 - thrown in where the call was asked for
                fault = error
    except StopIteration as over:
        return over.value  # type: ignore[no-any-return]
    finally:
        # Tracebacks keep this frame: it must not keep the exception.
        answer = fault = None


def _refuse(coroutine: Any) -> NoReturn:
    coroutine.close()
    msg = f"{coroutine.__qualname__} is a coroutine: use AsyncChunkStep"
    raise TypeError(msg)


async def async_drive(work: Work[T]) -> T:
    """As `drive`, awaiting what can be awaited."""
    answer: Any = None
    fault: BaseException | None = None
    try:
        while True:
            call = work.send(answer) if fault is None else work.throw(fault)
            answer = fault = None
            try:
                answer = call()
                if isawaitable(answer):
                    answer = await answer
            except GeneratorExit:
                # The coroutine is being closed: it may await nothing any more.
                work.close()
                raise
            except BaseException as error:  # noqa: BLE001 - as in `drive`
                fault = error
    except StopIteration as over:
        return over.value  # type: ignore[no-any-return]
    finally:
        answer = fault = None
