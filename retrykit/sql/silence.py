"""Psycopg waits for an answer as long as the server's TCP peer lives: connections that wait only so long.

What notices dead peers (keepalive, `tcp_user_timeout`) sees nothing of a server that was stopped, or of a proxy that
hangs; and `statement_timeout` is such a server's own. A statement of the cache's own that takes so long was lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Final, TypeVar

from sqlalchemy import Engine, event

T = TypeVar("T")
# psycopg's: yields what is to be waited for, and gets what is ready: nothing, each tenth of a second.
Waiting = Generator[Any, Any, T]

CANCELING: Final = 2.0


def limit_silence(engine: Engine, seconds: float) -> None:
    """Let connections of a psycopg engine end with an OperationalError when no answer came for so long."""
    impatient = _impatient(seconds)

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return impatient(*arguments, **options)


def _impatient(seconds: float) -> Callable[..., Any]:
    import psycopg

    class Impatient(psycopg.Connection[Any]):
        def wait(self, gen: Waiting[T], *arguments: Any, **options: Any) -> T:
            return super().wait(_bounded(gen, seconds, self._give_up), *arguments, **options)

        def _give_up(self) -> None:
            # A healthy server (the statement waits for a lock) need not go on with it.
            if psycopg.capabilities.has_cancel_safe():
                with suppress(psycopg.Error):
                    self.cancel_safe(timeout=CANCELING)
            self.close()
            raise psycopg.OperationalError(f"no answer from the server for {seconds:g} seconds: connection closed")

    return Impatient.connect


def _bounded(waiting: Waiting[T], seconds: float, give_up: Callable[[], None]) -> Waiting[T]:
    deadline = time.monotonic() + seconds
    try:
        wanted = next(waiting)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                give_up()
            wanted = waiting.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result
