"""A consumer process of the demo: what a user of retrykit writes, with a handler that obeys the message's fate.

`python -m retrykit.cli.demo.worker` reads its job from the first line of standard input, and stops when standard input
ends: with whoever started it, however that came about.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, Final

import attrs

from retrykit import (
    ExponentialBackOffPolicy,
    RetryContext,
    RetryDecision,
    RetryListener,
    RetryTemplate,
    SimpleRetryPolicy,
)
from retrykit.cli.demo import events
from retrykit.cli.demo.events import EventWriter
from retrykit.cli.demo.job import FATE, RUN, Job
from retrykit.cli.demo.ledger import Ledger, write_effect
from retrykit.cli.demo.plan import Fate, Kind
from retrykit.errors import CommitInDoubtError
from retrykit.messaging import ListenerContainer, Message, Recoverer, Republish
from retrykit.messaging.recoverers import ID
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import SqlRetryContextCache, park_in_transaction

REMEMBERED: Final = 3600.0


class FlakyServiceError(Exception):
    """The service behind the handler is not there at the moment."""


class PoisonError(ValueError):
    """The message cannot be processed, now or ever."""


@attrs.frozen
class Handler:
    """Writes the effect of a message into the database, unless the message's fate strikes.

    It strikes after the row is written: what is seen of it afterwards was not rolled back.
    """

    job: Job
    log: EventWriter

    def __call__(self, message: Message, context: RetryContext) -> Any:
        """One attempt."""
        if message.headers.get(RUN) != self.job.run:
            return Republish(f"{message.destination}.not-of-the-demo", headers=_own_headers(message))
        id_, fate = message.headers[ID], Fate.parse(message.headers[FATE])
        self.log.write(events.ATTEMPT, id=id_, key=message.id, attempt=context.attempt)
        strikes = fate.strikes(context.attempt)
        storable = not (strikes and fate.kind in {Kind.LATE, Kind.UNSTORABLE})
        write_effect(context.transaction, self.job.run, id_, message.body, storable=storable)
        if strikes:
            _strike(fate.kind)
        return None


def _own_headers(message: Message) -> dict[str, str]:
    """What the sender of a message that is none of ours may have set: it travels on."""
    frame = {
        "message-id",
        "subscription",
        "ack",
        "destination",
        "content-length",
        "redelivered",
        "timestamp",
        "expires",
        "persistent",
    }
    return {name: value for name, value in message.headers.items() if name not in frame}


def _strike(kind: Kind) -> None:
    match kind:
        case Kind.FLAKY:
            raise FlakyServiceError("the service is not there")
        case Kind.POISON:
            raise PoisonError("this can never work")
        case Kind.CRASH | Kind.KILLER:
            os.kill(os.getpid(), signal.SIGKILL)


@attrs.frozen(eq=False)
class Reporter(RetryListener):
    """Tells the supervisor what was decided, and why."""

    log: EventWriter

    def open(self, context: RetryContext) -> None:
        """Only deliveries of what is done already are of interest."""
        if context.duplicate:
            self._write(events.DUPLICATE, context)

    def on_success(self, context: RetryContext, result: Any) -> None:
        """The attempt is committed."""
        self._write(events.DONE, context)

    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None:
        """The attempt was rolled back."""
        words = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        self._write(events.FAILED, context, error=words, decision=str(decision))

    def on_recover(self, context: RetryContext, result: Any) -> None:
        """The message is parked."""
        reason = "" if context.decision is None else context.decision.reason
        self._write(events.PARKED, context, decision=reason)

    def close(self, context: RetryContext, error: BaseException | None) -> None:
        """An attempt whose commit was not confirmed does not count."""
        if isinstance(error, CommitInDoubtError):
            self._write(events.IN_DOUBT, context)

    def _write(self, kind: str, context: RetryContext, **facts: Any) -> None:
        key = context.key[-1] if isinstance(context.key, tuple) else context.key
        self.log.write(kind, key=key, attempt=context.attempt, **facts)


def consumer(job: Job, recover: Recoverer = park_in_transaction) -> ListenerContainer:
    """The container: handler, policy, back-off, history and database as in an application."""
    log, ledger = EventWriter.open(job.events), Ledger.at(job.database)
    template = RetryTemplate(
        name=job.name,
        retry_policy=SimpleRetryPolicy(max_attempts=job.max_attempts),
        back_off_policy=ExponentialBackOffPolicy(initial=0.02, multiplier=2.0, max_interval=0.2),
        context_cache=SqlRetryContextCache(ledger.engine),
        listeners=(Reporter(log),),
        remember_completed=REMEMBERED,
    )
    return ListenerContainer(
        StompBroker(job.broker),
        Handler(job, log),
        template=template,
        transaction=ledger.sessions.begin,
        recover=recover,
        # A message that kills its process at every attempt: here the first one counts too.
        journal="always",
    )


def main(recover: Recoverer = park_in_transaction) -> None:
    """Consume until told to stop."""
    container = consumer(Job.from_json(sys.stdin.readline()), recover)
    threading.Thread(target=_stop_with_the_parent, args=(container,), daemon=True).start()
    container.run()


def _stop_with_the_parent(container: ListenerContainer) -> None:
    sys.stdin.read()
    container.stop()


if __name__ == "__main__":
    main()
