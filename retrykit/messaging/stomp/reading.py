"""Who reads from a connection: whoever waits for what comes.

A thread that reads for another one costs two changes of threads a frame, and those take longer than all else that a
container does for a message. So a worker that waits for a delivery or a receipt reads by itself. While it handles a
message nobody need read, unless that takes long: heart-beats and the end of the connection have to be heard. For that,
and for waits that last, a thread of the connection stands by.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

OWN_SECONDS: Final = 0.05
"""So long a worker reads for itself. While it does, `interrupt` is not heard."""


class Reading:
    """One connection, read by one thread at a time. `news` is told of what comes, under the one `lock`."""

    def __init__(self, read: Callable[[float | None], bool], look: float) -> None:
        """`read` waits for so many seconds (None: without end), tells of what came, and says whether that was more than
        a sign of life. When nobody has read for `look` seconds, the thread that stands by takes its turn.
        """
        # Taken by itself: a `with` of a condition costs several calls, and there are some for each message.
        self.lock = threading.RLock()
        self.news = threading.Condition(self.lock)
        self._duty = threading.Condition(self.lock)
        self._read = read
        self._look = look
        self._turns = 0
        self._reads = False
        self._rests = False
        self._over = False

    def wait_for(self, ready: Callable[[], object], timeout: float | None = None) -> None:
        """Return when it is ready, when the connection has ended, or after `timeout` seconds.

        What has come already is looked at in any case.
        """
        now = time.monotonic()
        limit, own = None if timeout is None else now + timeout, now + OWN_SECONDS
        with self.lock:
            while not ready() and not self._over:
                now = time.monotonic()
                left = None if limit is None else max(0.0, limit - now)
                if not self._reads and now < own:
                    self._take_turn(own - now if left is None else min(own - now, left))
                else:
                    self._rest(left)
                if left == 0:
                    return

    def look(self) -> None:
        """Read what has come already."""
        with self.lock:
            if not self._reads and not self._over:
                self._take_turn(0.0)

    def stand_by(self) -> None:
        """The thread of the connection: until the connection ends."""
        with self.lock:
            while not self._over:
                turns = self._turns
                if self._reads or not self._rests:
                    self._duty.wait(self._look)
                if self._reads or not (self._rests or turns == self._turns):
                    continue
                while not self._over and not self._take_turn(None):
                    pass
                # Whoever waits in vain says so again; who was waiting for this reads for itself from now on.
                self._rests = False
                self.news.notify_all()

    def end(self) -> None:
        """The connection has ended: nobody reads any more."""
        with self.lock:
            self._over = True
            self.news.notify_all()
            self._duty.notify_all()

    def _take_turn(self, seconds: float | None) -> bool:
        self._reads, self._turns = True, self._turns + 1
        self.lock.release()
        try:
            return self._read(seconds)
        finally:
            self.lock.acquire()
            self._reads = False
            if self._rests:
                # What came may be for somebody else, who may want to read on.
                self.news.notify_all()
                self._duty.notify()

    def _rest(self, seconds: float | None) -> None:
        """Have the other thread read."""
        self._rests = True
        self._duty.notify()
        self.news.wait(seconds)
