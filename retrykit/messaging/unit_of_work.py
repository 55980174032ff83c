"""The transaction of one attempt: the database's inside, the broker's commit after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

from retrykit.errors import CommitInDoubtError
from retrykit.messaging.broker import Session
from retrykit.messaging.errors import BrokerError, BrokerRefusedError, ConnectionLostError

if TYPE_CHECKING:
    from retrykit.messaging.delivery import Delivery

Transaction = Callable[[], AbstractContextManager[Any]]


class TransactionMisuseError(TypeError):
    """What `transaction` gives would never commit: no delivery can be handled, so the container stops."""


class MisusedError(BaseException):
    """Ends a call as an interrupt does: nothing is counted against the message."""


class UnitOfWork:
    """The transaction of one attempt (or recovery): the database's inside, the broker's commit after it."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        transaction = delivery.work.transaction
        self._database: AbstractContextManager[Any] = nullcontext() if transaction is None else transaction()

    def __enter__(self) -> Any:
        given = self._database.__enter__()
        if given is self._database and _closes_only(given):
            self._database.__exit__(None, None, None)
            kind = type(given).__name__
            msg = f"transaction: a {kind} of SQLAlchemy is closed at its end, without a commit: give its `begin`"
            raise MisusedError(msg)
        return given

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session = self._delivery.session
        if error is not None:
            # Sends first: they must not be taken for those of the next try in the same delivery.
            session.rollback()
            self._database.__exit__(kind, error, trace)
            return
        try:
            self._commit(session)
        except BrokerRefusedError as refused:
            self._delivery.refused = refused if self._delivery.recovering else None
            raise
        self._delivery.settled()

    def _commit(self, session: Session) -> None:
        try:
            session.flush()
        except BrokerError as failure:
            self._database.__exit__(type(failure), failure, failure.__traceback__)
            if isinstance(failure, ConnectionLostError):
                raise CommitInDoubtError from failure
            raise
        try:
            self._database.__exit__(None, None, None)
        except BaseException:
            session.rollback()
            raise
        session.commit(self._delivery.message)


def _closes_only(manager: object) -> bool:
    """Whether this is SQLAlchemy's Session or Connection itself, in place of a transaction of it."""
    leave = getattr(type(manager), "__exit__", None)
    return hasattr(manager, "in_transaction") and getattr(leave, "__module__", "").partition(".")[0] == "sqlalchemy"
