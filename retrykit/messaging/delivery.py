"""One message on its way through the template: who commits when, and what its source is told.

The order of effects in one delivery, and what a crash after each leaves behind:

1. the pause that is still due is waited for (nothing is open; the broker delivers again);
2. database transaction, handler; its sends open the broker's transaction (both are undone; delivered again);
3. the broker has taken the sends (the same);
4. database commit, with the completion mark where the history is kept in that database (delivered again: with a mark it
   is answered as a duplicate, without one the handler runs again);
5. acknowledgement last, broker commit, confirmed (done; a history that is left over is found at no later delivery);
6. the history is settled.

A failure rolls both back; the failure is stored before the message goes back. A recovery runs in 2 to 6 in place of the
handler, so what it sends and the acknowledgement are one broker transaction. A broker commit that is not confirmed is
neither: nothing is counted, see `CommitInDoubtError`. One that the broker refuses is a failure like others.

With a mark in the database the handler does not run again after a crash between 4 and 5. What it sent is therefore kept
with the mark, until 5 is confirmed; the duplicate delivery sends it again, under the same ids, and is acknowledged (see
`retrykit.messaging.outbox`). A recovery that parks is no other. Without a mark in the database whatever sends settles
its history in 6 only, never in 4, and so does every recovery: after a crash it is done again, not forgotten.

Where an attempt has left nothing but its success (no database, no sends, no history, nobody to be told), 6 is empty and
nothing hangs on 5 being confirmed. A source that can (`Overlapping`) then lets the next message that is at hand be
handled meanwhile; the one is confirmed before the other is acknowledged. A connection that is lost in between brings
both again.

All of this is decided here, for plain functions and for coroutines (`retrykit.messaging.coroutines.delivery`), whose
template runs elsewhere, and whose sends wait for 3.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from retrykit.errors import BackOffInterruptedError, InconsistentKeyError
from retrykit.histories import AsyncHistories, Histories
from retrykit.message import (
    SETTLEMENTS,
    Ack,
    Message,
    Park,
    Redeliver,
    Republish,
    Settlement,
    with_sender,
)
from retrykit.messaging.broker import Overlapping, Session
from retrykit.messaging.delays import still_due
from retrykit.messaging.ends import name_facts, tell_doubt, tell_failed, tell_settled, tell_withheld
from retrykit.messaging.errors import BrokerRefusedError, CutOffInterrupt, CutShortError
from retrykit.messaging.handler import exited, refuse_unfinished
from retrykit.messaging.outbox import Outgoing, identified
from retrykit.messaging.recoverers import ID, Recoverer, fitting, left_out, stable_id
from retrykit.messaging.unit_of_work import UnitOfWork
from retrykit.state import RetryState

if TYPE_CHECKING:
    from retrykit.context import RetryContext
    from retrykit.messaging.work import Work

_log = logging.getLogger("retrykit.messaging")


class Delivery:
    """One delivery: the callback, the recovery and the transaction that the template is given, and their result."""

    def __init__(self, work: Work, session: Session, message: Message) -> None:
        self.work = work
        self.session = session
        self.message = message
        self.key: Any = message.key
        self.settlement: Settlement = Ack()
        self.context: RetryContext | None = None
        self.answered = False
        self.recovering = False
        self._sending = threading.Lock()
        self._sender: object | None = None
        self._is_cut = False
        self.was_cut = False
        self.sent = 0
        self.refused: BrokerRefusedError | None = None

    def run(self) -> None:
        """Take it to its end, or raise what ended it: then it is to be given back."""
        self.work.tally.add(received=1, redelivered=int(self.message.redelivered))
        if not self.work.patience.wait(self.message.key, self.work.template.clock):
            self.session.rollback(self.message)
            self.work.tally.add(withheld=1)
            return
        key = self.message.key
        try:
            self.execute(key)
        except InconsistentKeyError as collision:
            facts = collision.__dict__
            if (facts.get("name"), facts.get("key")) != (self.work.template.name, key):
                # Another template's, which the handler has used.
                raise
            # Neither is to be lost, nor to be counted as the other: this one goes on under a name of its own.
            _log.error("message %r is not the one that has this key already: %s", key, collision)
            self.context = None
            self.execute((key, facts["fingerprint"]))
        if not self.answered:
            self.acknowledge_duplicate()
        self.work.patience.forgive(self.message.key)

    def acknowledge_duplicate(self) -> None:
        """The template had the answer already: nothing ran, so no transaction was opened."""
        unsent = self.unsent()
        for outgoing in unsent:
            self.session.send(outgoing.destination, outgoing.body, outgoing.headers)
        self.session.commit(self.message)
        self.work.tally.add(duplicates=1)
        _log.info(
            "message %r is acknowledged unread: it was completed before", self.message.key, extra=name_facts(self)
        )
        if unsent:
            _log.warning("message %r: sent again what its process may not have sent: %d", self.message.key, len(unsent))
            template = self.work.template
            histories = AsyncHistories if template.asynchronous else Histories
            self.complete(lambda: histories(template.context_cache, template.clock).sent((template.name, self.key)))

    def unsent(self) -> list[Outgoing]:
        """What was to be sent when the message was completed, and perhaps was not."""
        template = self.work.template
        if template.remember_completed is None or self.work.transaction is None:
            return []
        history = self.complete(lambda: template.history(self.key))
        return [] if history is None else [Outgoing.from_json(facts) for facts in history.outbox]

    def execute(self, key: Any) -> None:
        """One stateful call of the template, with the history of this key."""
        self.key = key
        template: Any = self.work.template
        recovery = None if self.work.recover is None else self.recovery
        state = self.state(key)
        pauses = self.work.pauses
        if pauses is not None:
            # Meanwhile a pause that the template takes is this message's.
            pauses.message = self.message
        try:
            self.complete(
                partial(template.execute, self.attempt, recovery, state=state, transaction=partial(UnitOfWork, self))
            )
        finally:
            if pauses is not None:
                pauses.message = None

    def complete(self, verb: Callable[[], Any]) -> Any:
        """Do something with the template."""
        try:
            return verb()
        except CutOffInterrupt:
            raise CutShortError("its handler had not come to its end when the container stopped at once") from None

    def state(self, key: Any) -> RetryState:
        """What the template is told of the item and of this delivery of it."""
        redelivered = True if self.message.redelivered else self.first_or_unknown(key)
        return RetryState(
            key=key,
            redelivered=redelivered,
            recover_on_redelivery=False,
            # Unless it is flagged: what brings a message again may have ended the worker that had it.
            journal="never" if self.work.in_hand is not None and not redelivered else self.work.journal,
            fingerprint=self.message.fingerprint,
        )

    def first_or_unknown(self, key: Any) -> bool | None:
        """False if this surely is the first delivery; None if the history has to be asked."""
        template = self.work.template
        if self.work.in_hand is not None and getattr(template.context_cache, "is_empty", None) is True:
            # Nobody else stores there what could be of this message. (A method of that name says nothing.)
            return False
        can = self.session.capabilities
        if can.trustworthy_flag:
            return False if template.remember_completed is None else None
        return False if can.flags_while_connected and self.work.open_keys.excludes(template, key) else None

    def attempt(self, context: RetryContext) -> Any:
        """The template's callback: the handler, and what its result asks for."""
        return self._obey(self._called(self.work.call, context, "handler"), context, "handler")

    def _called(self, function: Callable[[Message, RetryContext], Any], context: RetryContext, whose: str) -> Any:
        """What the user's function returns, if the container has not stopped at once meanwhile."""
        try:
            try:
                result = function(self._opened(context), context)
            finally:
                self._close()
        except SystemExit as leaving:
            self._go_on(leaving)
            raise exited(leaving, whose) from leaving
        except Exception as error:
            self._go_on(error)
            raise
        self._go_on(None)
        return result

    def _go_on(self, error: BaseException | None) -> None:
        """The user's function has ended, with an error perhaps; `CutOffInterrupt` if it was cut off."""
        if not self.was_cut:
            return
        if error is not None:
            text = "message %r: what was cut off has ended with %r"
            _log.warning(text, self.message.key, error, exc_info=error, extra=name_facts(self))
        raise CutOffInterrupt from error

    def cut(self) -> bool:
        """Have the user's function, if it runs, end as if it had been cancelled; and let none begin. Whether it runs.

        One that has just returned is not cut off: the delivery comes to its end by itself, one way or the other.
        """
        with self._sending:
            runs, self._sender = self._sender is not None, None
            self._is_cut, self.was_cut = True, self.was_cut or runs
            if runs:
                # Nobody may be there any more when it comes back.
                self.work.tally.add(withheld=1)
            return runs

    def _opened(self, context: RetryContext) -> Message:
        """The message as a handler gets it: it can send until `_close`, and nothing of an earlier attempt is sent."""
        self.context, sender = context, object()
        if _log.isEnabledFor(logging.DEBUG):
            what = "the recovery after attempt" if self.recovering else "attempt"
            _log.debug("message %r: %s %d begins", self.message.key, what, context.attempt, extra=name_facts(self))
        if self.sent:
            self.sent = 0
            context.outbox.clear()
        with self._sending:
            if self._is_cut:
                raise CutOffInterrupt
            self._sender = sender
        return with_sender(self.message, partial(self._send_as, sender))

    def _close(self) -> None:
        """Let no one send any more."""
        with self._sending:
            self._sender = None

    def _send_as(self, sender: object, *sent: Any) -> None:
        with self._sending:
            if sender is not self._sender:
                # Left behind by its handler, a thread or task: it would be sent by another attempt, or never.
                raise RuntimeError("a message can send while it is handled, and its handler has returned")
            self.send(*sent)

    def send(self, destination: str, body: bytes, headers: Mapping[str, str], given: str | None = None) -> None:
        """Send in the broker's transaction; kept beside the completion mark, should the database have one."""
        context, template = self.context, self.work.template
        assert context is not None  # noqa: S101 - only an attempt sends
        outgoing = Outgoing(destination, body, identified(headers, given, f"{template.name} {self.key!r}", self.sent))
        self.put(outgoing)
        self.sent += 1
        if template.remember_completed is not None and self.work.transaction is not None:
            context.outbox.append(outgoing.to_json())

    def put(self, outgoing: Outgoing) -> None:
        """Have it sent, before `flush` ends."""
        self.session.send(outgoing.destination, outgoing.body, outgoing.headers)

    def flush(self) -> None:
        """Return when the broker has taken all that was sent, as `Session.flush`."""
        self.session.flush()

    def undo(self) -> None:
        """What was sent is not sent."""
        self.session.rollback()

    def recovery(self, context: RetryContext) -> Any:
        """The template's recovery: the recoverer, and what its result asks for."""
        return self._obey(self._called(self._recoverer(), context, "recover"), context, "recover")

    def _recoverer(self) -> Recoverer:
        if self.refused is not None:
            # The connection went with the first try: this delivery has no other answer.
            raise self.refused
        assert self.work.recover is not None  # noqa: S101 - the template is given a recovery only if there is one
        self.recovering = True
        return self.work.recover

    def _obey(self, result: Any, context: RetryContext, whose: str) -> Any:
        refuse_unfinished(result, whose)
        self.settlement = result if isinstance(result, SETTLEMENTS) else Ack()
        match self.settlement:
            case Redeliver():
                raise TypeError(f"{whose} returned {result!r}: to have the message delivered again, raise an exception")
            case Park(destination, headers=headers) | Republish(destination, headers=headers):
                # A copy is the same message wherever it goes; in its own queue it is a new one, or it would be taken
                # for a duplicate of what is completed.
                again = destination == self.message.destination
                stable = None if again else stable_id(self.message.headers, self.message.id)
                named = {name: value for name, value in headers.items() if name != ID} if again else headers
                self.send(destination, self.message.body, self._fitting(named), stable)
        if (self.sent or self.recovering) and self.work.template.remember_completed is None:
            # No mark would say what is done: until the broker has confirmed, the history has to say where it stands.
            # The cache finds no transaction to join, so it outlives the database's commit.
            context.transaction = None
        return result

    def acknowledge(self) -> None:
        """The last act at the source: acknowledge the message, and commit what was sent."""
        if self._hangs_on_nothing():
            cast("Overlapping", self.session).acknowledge(self.message, self._told)
        else:
            self.session.commit(self.message)
            tell_settled(self)
        self.answered = True

    def _hangs_on_nothing(self) -> bool:
        """Whether nothing is to be done once the source has confirmed: see the end of the essay above."""
        context = self.context
        known = context is None or context.has_history
        return self.work.overlaps and not (known or self.sent or self.recovering)

    def _told(self, doubt: Exception | None) -> None:
        if doubt is None:
            tell_settled(self)
        else:
            self.work.late_doubts.append(self.message.key)
            tell_doubt(self, doubt)

    def _fitting(self, headers: Mapping[str, str]) -> dict[str, str]:
        """What the broker takes of the headers of a copy: of one that is refused there is no copy, ever."""
        fit, _ = fitting(headers, getattr(self.session, "longest_header", None))
        if long := left_out(fit):
            names = ", ".join(f"{name} ({size} bytes)" for name, size in long.items())
            text = "message %r: its copy goes without headers that are too long for it: %s"
            _log.warning(text, self.message.key, names, extra=name_facts(self))
        return fit

    def give_back(self, error: BaseException) -> None:
        """Have the message delivered again, after a pause where that would come to the same."""
        decision = None if self.context is None else self.context.decision
        delay = 0.0 if decision is None else decision.delay
        counts = not self.withheld(error)
        if not counts:
            self.work.tally.add(withheld=int(not self.was_cut))
            self.hold(error, delay)
            delay = still_due(error)
        else:
            self.work.tally.add(rolled_back=1)
            self.work.patience.forgive(self.message.key)
        where = self.work.delays.give_back(self.session, self.message, delay, self.work.tally)
        if counts:
            tell_failed(self, error, where)

    def withheld(self, error: BaseException) -> bool:
        """Whether the next delivery would come to the same: not so after a failed attempt that leaves others."""
        if isinstance(error, CutShortError):
            return True
        if self.context is None or self.context.exhausted or self.context.fault is not None:
            return isinstance(error, Exception)
        return False

    def hold(self, error: BaseException, at_least: float) -> None:
        """Keep the delivery in hand for a while: every other consumer would get the message at once."""
        work, key = self.work, self.message.key
        if still_due(error):
            return
        if isinstance(error, BackOffInterruptedError | CutShortError):
            _log.info("message %r goes back without a new attempt: %s", key, error)
            return
        tell_withheld(self, error, work.patience.withhold(work.template.name, key, at_least))
        work.patience.wait(key, work.template.clock)
