"""Connecting in a thread of its own: whoever is to stop does not wait for a server that does not answer.

Nothing is in hand before there is a session, so nothing is lost when nobody waits for it any more.

What comes of it is told here, too: many workers try in vain again and again while a broker is away, and the log is to
say that once, and then now and then.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from retrykit.clock import Clock
from retrykit.failure import type_name
from retrykit.listener import RetryListener
from retrykit.messaging.broker import Broker, Session
from retrykit.messaging.errors import BrokerUnavailableError
from retrykit.messaging.logs import ATTRIBUTE
from retrykit.outage import Outages

if TYPE_CHECKING:
    from retrykit.context import RetryContext
    from retrykit.policy import RetryDecision

_LOOK: Final = 0.05
_outages: Final = Outages()
_log = logging.getLogger("retrykit.messaging")


@attrs.frozen(eq=False)
class Tries(RetryListener):
    """Tells of the tries to connect to a broker, once for all workers of one container, who have it in common."""

    name: str
    broker: Broker
    clock: Clock

    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None:
        """One has failed, and when the next one is."""
        if not isinstance(error, BrokerUnavailableError):
            return
        now = self.clock.monotonic()
        told, outage = _outages.add(self.broker, "connecting", error, now)
        since = f"; not connected for {now - outage.began:.3g} s, {outage.faults} tries" if told == "reminder" else ""
        # It names the broker itself.
        text, level = "%s: %s (try %d%s); the next one is in %.2g s", logging.WARNING if told else logging.DEBUG
        facts = {ATTRIBUTE: {"name": self.name, "error": type_name(type(error)), "delay": decision.delay}}
        _log.log(level, text, self.name, error, context.attempt, since, decision.delay, extra=facts)

    def connected(self) -> None:
        """One has succeeded."""
        outage = _outages.end(self.broker, "connecting")
        if outage is not None:
            seconds = self.clock.monotonic() - outage.began
            text = "%s: connected to %s again, after %.3g s and %d tries that failed"
            facts = {ATTRIBUTE: {"name": self.name}}
            _log.warning(text, self.name, self.broker.name, seconds, outage.faults, extra=facts)


def forget(broker: Broker) -> None:
    """Nobody connects any more: whoever does so later begins anew."""
    _outages.end(broker, "connecting")


def connected(connect: Callable[[], Session], stopping: threading.Event) -> Session | None:
    """What `connect` gives, or raises. None as soon as it is to stop: a session that comes later is closed."""
    attempt = _Attempt(connect)
    # A daemon: a server that does not answer keeps no interpreter either.
    name = f"{threading.current_thread().name}-connecting"
    threading.Thread(target=attempt.run, name=name, daemon=True).start()
    return attempt.wait(stopping)


@attrs.define(eq=False)
class _Attempt:
    """One call of `connect`, and what came of it."""

    connect: Callable[[], Session]
    _done: threading.Event = attrs.field(factory=threading.Event, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)
    _session: Session | None = attrs.field(default=None, init=False)
    _error: BaseException | None = attrs.field(default=None, init=False)
    _unwanted: bool = attrs.field(default=False, init=False)

    def run(self) -> None:
        """In the thread."""
        try:
            self._session = self.connect()
        except BaseException as error:  # noqa: BLE001 - raised to the one who waits
            self._error = error
        with self._lock:
            self._done.set()
            unwanted = self._unwanted
        if unwanted:
            self._put_away()

    def wait(self, stopping: threading.Event) -> Session | None:
        """For its end, or that of the patience for it."""
        while not self._done.wait(_LOOK):
            if stopping.is_set() and self._left():
                return None
        try:
            if self._error is not None:
                raise self._error
            return self._session
        finally:
            # What leads back to an exception may not stay in its traceback.
            self._error = None

    def _left(self) -> bool:
        """Nobody waits any more, unless it is done."""
        with self._lock:
            self._unwanted = not self._done.is_set()
            return self._unwanted

    def _put_away(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._error is not None:
            _log.debug("a connection that is no longer wanted could not be made: %s", self._error)
