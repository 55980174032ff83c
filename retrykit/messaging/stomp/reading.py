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
from threading import get_ident
from typing import Final

OWN_SECONDS: Final = 0.05
"""So long a worker reads for itself, before it leaves that to the other thread. Meanwhile nobody can wake it."""


class Reading:
    """One connection, read by one thread at a time. `news` is told of what comes, under the one `lock`."""

    def __init__(self, read: Callable[[float | None], bool], unread: float) -> None:
        """`read` waits for so many seconds (None: without end), tells of what came, and says whether that was more than
        a sign of life. A connection that nobody has read for `unread` seconds is read by the thread that stands by.
        """
        # Taken by itself: a `with` of a condition costs several calls, and there are some for each message.
        self.lock = threading.RLock()
        self.news = threading.Condition(self.lock)
        self._duty = threading.Condition(self.lock)
        self._read = read
        self._unread = unread
        self._turns = 0
        self._reader: int | None = None
        self._wanted = False
        self._over = False

    def wait_for(self, ready: Callable[[], object], timeout: float | None = None) -> None:
        """Return when it is ready, when the connection has ended, or after `timeout` seconds.

        What has come already is looked at, even if there is no time to wait.
        """
        now = time.monotonic()
        limit, own = None if timeout is None else now + timeout, now + OWN_SECONDS
        while True:
            with self.lock:
                if ready() or self._over:
                    return
                now = time.monotonic()
                left = None if limit is None else max(0.0, limit - now)
                mine = now < own and self._take_turn()
                if not mine:
                    self._leave_it(left)
            if mine:
                self._use_turn(own - now if left is None else min(own - now, left))
            if left == 0:
                return

    def look(self) -> None:
        """Read what has come already, unless somebody is reading."""
        with self.lock:
            mine = not self._over and self._take_turn()
        if mine:
            self._use_turn(0.0)

    def stand_by(self) -> None:
        """The thread of the connection: until the connection ends."""
        while self._is_called():
            if self._use_turn(None):
                with self.lock:
                    # Whoever waited for what has come reads the next one by himself; who waits for another asks again.
                    self._wanted = False
                    self.news.notify_all()

    def end(self) -> None:
        """The connection has ended: nobody reads any more."""
        with self.lock:
            self._over = True
            self.news.notify_all()
            self._duty.notify_all()

    def _is_called(self) -> bool:
        """Wait until somebody wants this thread to read, or nobody has read for too long. False at the end."""
        with self.lock:
            while not self._over:
                turns = self._turns
                if self._reader is not None or not self._wanted:
                    self._duty.wait(self._unread)
                if (self._wanted or turns == self._turns) and self._take_turn():
                    return not self._over
            return False

    def _take_turn(self) -> bool:
        """Whether this thread may read now. (Under the lock.)"""
        # A thread that finds itself reading was interrupted before it could end its turn.
        if self._reader not in (None, get_ident()):
            return False
        self._reader, self._turns = get_ident(), self._turns + 1
        return True

    def _use_turn(self, seconds: float | None) -> bool:
        try:
            return self._read(seconds)
        finally:
            with self.lock:
                self._reader = None
                if self._wanted:
                    # What came may be for somebody else, who may want to read on.
                    self.news.notify_all()
                    self._duty.notify()

    def _leave_it(self, seconds: float | None) -> None:
        """Have the other thread read. (Under the lock.)"""
        self._wanted = True
        self._duty.notify()
        self.news.wait(seconds)
