"""faststream-stomp, the peer of `stomp.py`: it acknowledges without a receipt and outside of any transaction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from stomp_work import Contender, Course, Seat

FASTSTREAM = "faststream-stomp, ACK"
SECONDS = 30.0


def missing() -> str | None:
    try:
        import faststream_stomp  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    return None


def _made(seat: Seat, course: Course) -> Any:
    import faststream_stomp
    import stompman
    from stompman.connection import Connection

    server = seat.server

    class There(Connection):
        """It takes the name of the machine for that of the virtual host, and cannot be told otherwise: here it is."""

        @classmethod
        async def connect(cls, **where: Any) -> Any:
            return await super().connect(**{**where, "host": server.host})

    login, passcode = server.login or ("", "")
    place = stompman.ConnectionParameters(server.kind.virtual_host, server.port, login, passcode)
    # One message after the other, as everybody here; and no line of log for each.
    beats = stompman.Heartbeat(10_000, 10_000)
    client = stompman.Client([place], max_concurrent_handlers=1, heartbeat=beats, connection_class=There)
    broker = faststream_stomp.StompBroker(client, logger=None)

    @broker.subscriber(seat.destination, headers={server.kind.prefetch_header: str(seat.prefetch)})
    async def handle(body: bytes) -> None:
        await course.async_handle(body)

    return broker


async def _serve(seat: Seat, course: Course, started: Future[tuple[Any, asyncio.Event]]) -> None:
    leave = asyncio.Event()
    try:
        broker = _made(seat, course)
        await broker.start()
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result((asyncio.get_running_loop(), leave))
    await leave.wait()
    await broker.stop()


@contextmanager
def _consuming(seat: Seat, course: Course) -> Iterator[None]:
    started: Future[tuple[Any, asyncio.Event]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(seat, course, started)), daemon=True)
    thread.start()
    loop, leave = started.result(SECONDS)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join(SECONDS)


CONTENDER = Contender(FASTSTREAM, "faststream-stomp", _consuming)
