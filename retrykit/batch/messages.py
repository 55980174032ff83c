"""`MessageReader`: the messages of a broker as the items of a step, acknowledged when their chunk has committed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final

from retrykit.batch.source import END_OF_CHUNK
from retrykit.check import Seconds, seconds, wrong_type, wrong_value
from retrykit.message import Message

_log: Final = logging.getLogger("retrykit.batch")


class MessageReader:
    """Messages as they come, until none has come for `idle` seconds; for one run at a time.

    `broker`: as for a `ListenerContainer`; one with a `prefetch` gives at most so many at once: let it be the size of
    the chunks. When no further message comes for `linger` seconds the chunk is written as it is. A message is
    acknowledged after the transaction that settled it has committed: a process that dies between the two, or loses its
    connection, gets the message again. So its effect happens at least once: let the writer ignore what is there
    already.

    Messages have no positions. With a job store counts and skipped items are kept, and each run is to be `again`.
    """

    def __init__(self, broker: Any, *, idle: Seconds = 5.0, linger: Seconds = 0.05) -> None:
        if not callable(getattr(broker, "connect", None)):
            raise wrong_type("broker", "an object with connect()", broker)
        self.broker = broker
        self.idle = _positive("idle", idle)
        self.linger = _positive("linger", linger)
        self._session: Any = None

    def __repr__(self) -> str:
        return f"MessageReader({self.broker.name!r}, idle={self.idle:g}, linger={self.linger:g})"

    def read_from(self, position: Any) -> Iterator[Any]:
        """Each message; the position is the source's own, which forgets what is acknowledged."""
        session = self._session = self.broker.connect()
        if getattr(self.broker, "prefetch", 2) == 1:
            _log.warning(
                "%s: prefetch is 1, so every chunk is one message; let it be the size of chunks", self.broker.name
            )
        try:
            waiting = self.idle
            while True:
                message = session.receive(waiting)
                if message is not None:
                    yield message, None
                    waiting = self.linger
                elif waiting == self.idle:
                    return
                else:
                    yield END_OF_CHUNK
                    waiting = self.idle
        finally:
            self._session = None
            session.close()

    def settled(self, messages: list[Message]) -> None:
        """Acknowledge them."""
        for message in messages:
            self._session.commit(message)


def _positive(name: str, value: Any) -> float:
    length = seconds(name, value)
    if length <= 0:
        raise wrong_value(name, "more than 0 seconds", value)
    return length
