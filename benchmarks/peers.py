"""The other libraries and the hand-written code, each configured for the same work.

The work: up to three attempts in all, retry on `ConnectionError`, no waiting, no deadline. Logging and instrumentation
stay as the library ships them; whoever runs this keeps their output quiet with a null handler on the root logger.
Nobody sleeps: see `without_waiting`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import attrs

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

ATTEMPTS = 3
RETRIED = ConnectionError

_current: ContextVar[object | None] = ContextVar("current", default=None)


@attrs.frozen
class Peer:
    """`decorator` imports the library when it is called: ImportError means that it is missing."""

    name: str
    decorator: Callable[[], Decorator]


def forwarding_closure(function: Function) -> Function:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def async_forwarding_closure(function: Function) -> Function:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


def context_variable_closure(function: Function) -> Function:
    """The least that makes something findable from the depth of the function: set, call, always reset."""
    enter, leave = _current.set, _current.reset

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        token = enter(None)
        try:
            return function(*args, **kwargs)
        finally:
            leave(token)

    return wrapper


def async_context_variable_closure(function: Function) -> Function:
    enter, leave = _current.set, _current.reset

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        token = enter(None)
        try:
            return await function(*args, **kwargs)
        finally:
            leave(token)

    return wrapper


def hand_written_loop(function: Function) -> Function:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function(*args, **kwargs)
            except RETRIED:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError

    return wrapper


def async_hand_written_loop(function: Function) -> Function:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await function(*args, **kwargs)
            except RETRIED:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError

    return wrapper


def nopanic() -> Decorator:
    import nopanic

    return nopanic.retry(attempts=ATTEMPTS, on=RETRIED, backoff=0.0)


def tenacity() -> Decorator:
    import tenacity

    # Waits for nothing by default. `reraise` because everybody else raises the function's own error.
    return tenacity.retry(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        retry=tenacity.retry_if_exception_type(RETRIED),
        reraise=True,
    )


def stamina() -> Decorator:
    import stamina

    return stamina.retry(on=RETRIED, attempts=ATTEMPTS, timeout=None, wait_initial=0.0, wait_max=0.0, wait_jitter=0.0)


def backoff() -> Decorator:
    import backoff

    return backoff.on_exception(backoff.constant, RETRIED, max_tries=ATTEMPTS, jitter=None, interval=0)


def opnieuw() -> Decorator:
    import opnieuw

    # It has no delay of 0 (a window of 0 seconds means no retries), so it chooses one, which nobody waits for.
    return opnieuw.retry(retry_on_exceptions=RETRIED, max_calls_total=ATTEMPTS)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Everything is run inside: here `time.sleep` and `asyncio.sleep` return at once.

    Most peers sleep for 0 seconds between attempts and cannot be told not to. A system call or a turn of the event loop
    costs more than all else that is measured here, so without this they would be compared by their sleeps alone.
    """
    sleep, async_sleep = time.sleep, asyncio.sleep
    time.sleep, asyncio.sleep = _no_sleep, _no_async_sleep  # type: ignore[assignment]
    try:
        yield
    finally:
        time.sleep, asyncio.sleep = sleep, async_sleep


def _no_sleep(_seconds: float) -> None:
    return None


async def _no_async_sleep(_seconds: float) -> None:
    return None


LIBRARIES = (
    Peer("nopanic", nopanic),
    Peer("backoff", backoff),
    Peer("opnieuw", opnieuw),
    Peer("tenacity", tenacity),
    Peer("stamina", stamina),
)

FORWARDING, LOOP = "forwarding closure", "hand-written loop"


def _as_it_is(function: Function) -> Function:
    return function


FLOORS = (
    Peer("bare call", lambda: _as_it_is),
    Peer(FORWARDING, lambda: forwarding_closure),
    Peer("context variable closure", lambda: context_variable_closure),
)
ASYNC_FLOORS = (
    Peer("bare call", lambda: _as_it_is),
    Peer(FORWARDING, lambda: async_forwarding_closure),
    Peer("context variable closure", lambda: async_context_variable_closure),
)
HAND_WRITTEN_LOOP = Peer(LOOP, lambda: hand_written_loop)
ASYNC_HAND_WRITTEN_LOOP = Peer(LOOP, lambda: async_hand_written_loop)
