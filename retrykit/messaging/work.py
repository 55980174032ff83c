"""What the workers of a container do with each message: `Work`, what does not change from one delivery to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import attrs

from retrykit.errors import AttemptsInFlightError, CommitInDoubtError
from retrykit.messaging.counters import Tally
from retrykit.messaging.delays import Delays, Pauses
from retrykit.messaging.ends import tell_doubt
from retrykit.messaging.errors import LoopEndedError, NoStableIdError
from retrykit.messaging.in_hand import KeysInHand, in_hand_of
from retrykit.messaging.open_keys import OpenKeys
from retrykit.messaging.patience import Patience
from retrykit.messaging.recoverers import Recoverer
from retrykit.messaging.retraction import Retraction
from retrykit.messaging.unit_of_work import MisusedError, Transaction, TransactionMisuseError

if TYPE_CHECKING:
    from retrykit.context import RetryContext
    from retrykit.message import Message
    from retrykit.messaging.broker import Session
    from retrykit.messaging.coroutines.desk import Desk
    from retrykit.messaging.delivery import Delivery
    from retrykit.messaging.handler import Template


@attrs.frozen(eq=False)
class Work:
    """What is done with each message: the user's handler, recoverer, transaction and template, and the counters."""

    template: Template
    call: Callable[[Message, RetryContext], Any]
    recover: Recoverer | None
    transaction: Transaction | None
    tally: Tally
    patience: Patience
    deliveries: type[Delivery]
    open_keys: OpenKeys = attrs.field(factory=OpenKeys)
    journal: Literal["redelivered", "always", "never"] = "redelivered"
    desk: Desk | None = None
    """Where the worker waits for its delivery, if that runs on an event loop."""
    delays: Delays = attrs.field(factory=Delays)
    retraction: Retraction = attrs.field(factory=Retraction)
    pauses: Pauses | None = None
    overlaps: bool = False
    """Whether a message may be handled before it is confirmed that the one before is acknowledged."""
    late_doubts: list[Any] = attrs.field(factory=list, init=False)
    """The keys of what was taken to its end in this session, and turned out to be in doubt afterwards."""
    in_hand: KeysInHand | None = attrs.field(init=False)

    @in_hand.default
    def _in_hand(self) -> KeysInHand | None:
        return in_hand_of(self.template.context_cache) if self.journal == "redelivered" else None

    def may_overlap(self) -> bool:
        """Whether a success leaves nothing behind that has to wait until it is confirmed."""
        return self.transaction is None and self.template.plan.quiet and self.template.forgets

    def deliver(self, session: Session, message: Message) -> None:
        """Take one delivery to its end: settled, or given back, after a pause where the next one would be no better.

        `CommitInDoubtError` means that the session is of no more use; `NoStableIdError` that the message cannot be
        known again.
        """
        if message.key is None:
            remedy = "its session must give every message a key"
            raise NoStableIdError(destination=message.destination, remedy=remedy)
        name = self.template.name
        if self.in_hand is None or self.in_hand.take((name, message.key)):
            try:
                self._take_on(self.deliveries(self, session, message))
            finally:
                if self.in_hand is not None:
                    self.in_hand.leave((name, message.key))
            return
        self.tally.add(received=1, redelivered=int(message.redelivered))
        facts: Any = {"name": name, "key": message.key, "running": 1, "reason": "1 running"}
        self.deliveries(self, session, message).give_back(AttemptsInFlightError(**facts))

    def _take_on(self, delivery: Delivery) -> None:
        session, message = delivery.session, delivery.message
        self.retraction.take(delivery)
        try:
            delivery.run()
        except MisusedError as misused:
            session.rollback(message)
            self.tally.add(withheld=1)
            raise TransactionMisuseError(str(misused)) from None
        except CommitInDoubtError as doubt:
            tell_doubt(delivery, doubt.__cause__ or doubt)
            raise
        except BaseException as error:
            delivery.give_back(error)
            if isinstance(error, LoopEndedError) or not isinstance(error, Exception):
                raise
        finally:
            self.retraction.leave(delivery)
