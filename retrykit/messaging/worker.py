"""One worker of a container: a thread that connects, receives, delivers, and connects again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import inf
from operator import call
from typing import TYPE_CHECKING, Final

import attrs

from retrykit.backoff import BackOffPolicy
from retrykit.errors import BackOffInterruptedError, RetryError
from retrykit.messaging.broker import Broker, Session, overlaps
from retrykit.messaging.connecting import Tries, connected
from retrykit.messaging.delays import Pauses
from retrykit.messaging.errors import (
    BrokerError,
    BrokerUnavailableError,
    CredentialsError,
    DelayUnavailableError,
    LoopEndedError,
    NoStableIdError,
    NotSupportedError,
    SubscriptionRefusedError,
)
from retrykit.messaging.open_keys import OpenKeys, open_keys_of
from retrykit.messaging.recoverers import misplaced_by
from retrykit.messaging.unit_of_work import TransactionMisuseError
from retrykit.messaging.waiting import WaitingClock
from retrykit.messaging.work import Work
from retrykit.policy import PredicateRetryPolicy
from retrykit.template import RetryTemplate

if TYPE_CHECKING:
    from retrykit.context import RetryContext
    from retrykit.message import Message
    from retrykit.messaging.coroutines.desk import Desk

MISCONFIGURED: Final = (
    NoStableIdError,
    TransactionMisuseError,
    DelayUnavailableError,
    NotSupportedError,
    SubscriptionRefusedError,
    CredentialsError,
)
"""What would be so again with every connection, and in every process, until somebody changes something."""

STEADY: Final = 10.0
"""Seconds. A connection that lived so long has come to something, though nothing was delivered: there was nothing."""

_FATAL: Final = (*MISCONFIGURED, LoopEndedError)
_log = logging.getLogger("retrykit.messaging")


def _told(error: Exception, broker: Broker) -> str:
    """What ended a connection, in the words of whoever knows: what left a commit in doubt is its cause.

    Errors of brokers name theirs.
    """
    told = error if isinstance(error, BrokerError) else error.__cause__ or error
    if isinstance(told, BrokerError):
        return str(told)
    return f"the connection to {broker.name} ended: {str(told) or repr(told)}"


@attrs.frozen(eq=False)
class Worker:
    """Consumes until `stopping`.

    `enlist` registers a session with the container, which interrupts it to stop, and closes it after use. `heard` is
    told what ended a connection, or kept it from being made.
    """

    broker: Broker
    work: Work
    reconnect: BackOffPolicy
    stopping: threading.Event
    enlist: Callable[[Session], AbstractContextManager[Session]]
    heard: Callable[[Exception], None]
    desk: Desk | None = None

    def run(self) -> None:
        """Live one connection after the other; after a life that came to nothing the next one waits longer.

        Raises what no later connection can mend, such as `NoStableIdError`.
        """
        lives = self._supervisor()
        while not self.stopping.is_set():
            try:
                lives.execute(self._life)
            except BackOffInterruptedError:
                return

    @property
    def _tries(self) -> Tries:
        return Tries(self.work.template.name, self.broker, self.work.template.clock)

    def _supervisor(self) -> RetryTemplate:
        template = self.work.template
        return RetryTemplate(
            name=f"{template.name[:60]}.connection",
            retry_policy=PredicateRetryPolicy(lambda error: not isinstance(error, _FATAL)),
            back_off_policy=self.reconnect,
            listeners=(self._tries,),
            clock=WaitingClock(template.clock, lambda seconds: not self.stopping.wait(seconds)),
        )

    def _life(self, context: RetryContext) -> None:
        clock = self.work.template.clock
        # Connecting may take its time: that is no part of the life.
        work, delivered, began = self.work, 0, inf
        try:
            connection = connected(self._connect, self.stopping)
            if connection is None:
                return
            self._tries.connected()
            began = clock.monotonic()
            with self.enlist(connection) as session:
                work = self._work_in(session)
                while (message := self._next(session)) is not None:
                    work.deliver(session, message)
                    delivered += 1
        except _FATAL:
            raise
        except Exception as error:
            delivered -= len(work.late_doubts)
            self._report(error, delivered, context)
            if not delivered and clock.monotonic() - began < STEADY:
                raise

    def _connect(self) -> Session:
        self.work.delays.check(self.broker)
        return self.broker.connect()

    def _next(self, session: Session) -> Message | None:
        return None if self.stopping.is_set() else session.receive()

    def _work_in(self, session: Session) -> Work:
        """The work with a template whose pauses end when this session does."""
        if fault := misplaced_by(self.work.recover, session):
            raise NotSupportedError(broker=self.broker.name, reason=f"recover: {fault}")
        template = self.work.template
        self.work.delays.tell(f"{template.name} from {self.broker.name}", session, template.back_off_policy)
        pauses = Pauses(self.work.delays, session)
        clock = WaitingClock(template.clock, pauses.wait, self.desk, pauses.defers)
        complete = call if self.desk is None else self.desk.run
        known = open_keys_of(template, complete) if session.capabilities.flags_while_connected else OpenKeys()
        return attrs.evolve(
            self.work,
            template=attrs.evolve(template, clock=clock),
            open_keys=known,
            desk=self.desk,
            pauses=pauses,
            overlaps=self.work.may_overlap() and overlaps(session),
        )

    def _report(self, error: Exception, delivered: int, context: RetryContext) -> None:
        self.heard(error)
        # Whatever ended the connection, the container's answer is another one; what it was is for a person to read.
        if isinstance(error, BrokerUnavailableError):
            # `Tries` says that.
            return
        expected = isinstance(error, RetryError)
        _log.warning(
            "%s: %s; deliveries settled before that: %d (try %d)",
            self.work.template.name,
            _told(error, self.broker),
            delivered,
            context.attempt,
            exc_info=None if expected else error,
        )
