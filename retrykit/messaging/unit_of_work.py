"""The transaction of one attempt: the database's inside, the broker's commit after it.

In which order it ends is written once, as a generator of steps at the broker and in the database; a template calls
them, or awaits them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from inspect import iscoroutine, iscoroutinefunction
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from retrykit.check import closes_without_commit
from retrykit.errors import CommitInDoubtError
from retrykit.messaging.errors import BrokerError, BrokerRefusedError, ConnectionLostError

if TYPE_CHECKING:
    from retrykit.messaging.coroutines.desk import Desk
    from retrykit.messaging.delivery import Delivery

Transaction = Callable[[], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]


class TransactionMisuseError(TypeError):
    """What `transaction` gives would never commit: no delivery can be handled, so the container stops."""


class MisusedError(BaseException):
    """Ends a call as an interrupt does: nothing is counted against the message."""


class _AtBroker(NamedTuple):
    """Something that the session is to do."""

    do: Callable[[], None]


class _InDatabase(NamedTuple):
    """The database's transaction is to be left: committed, or rolled back with an error."""

    error: BaseException | None


_Steps = Generator[_AtBroker | _InDatabase, None, None]


_NO_DATABASE: Final = nullcontext()


class UnitOfWork:
    """The transaction of one attempt (or recovery), to be entered and left by a template."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        transaction = delivery.work.transaction
        self._database: Any = _NO_DATABASE if transaction is None else transaction()

    def _ending(self, error: BaseException | None) -> _Steps:
        """The end of an attempt that has failed, or not."""
        return self._committing() if error is None else self._undoing(error)

    def _undoing(self, error: BaseException) -> _Steps:
        # Sends first: they must not be taken for those of the next try in the same delivery.
        yield _AtBroker(self._delivery.undo)
        yield _InDatabase(error)

    def _committing(self) -> _Steps:
        delivery = self._delivery
        try:
            if not self._is_alone():
                yield from self._committing_first()
            yield _AtBroker(delivery.acknowledge)
        except BrokerRefusedError as refused:
            delivery.refused = refused if delivery.recovering else None
            raise

    def _is_alone(self) -> bool:
        """Whether the acknowledgement is all that there is to commit."""
        return not self._delivery.sent and self._database is _NO_DATABASE

    def _committing_first(self) -> _Steps:
        """What comes before the acknowledgement."""
        delivery = self._delivery
        try:
            yield _AtBroker(delivery.flush)
        except BaseException as failure:
            yield from self._not_taken(failure)
            raise
        try:
            yield _InDatabase(None)
        except BaseException:
            yield _AtBroker(delivery.undo)
            raise

    def _not_taken(self, failure: BaseException) -> _Steps:
        """The broker has not taken what was sent."""
        if not isinstance(failure, BrokerError):
            # Something that cannot be sent at all.
            yield _AtBroker(self._delivery.undo)
        yield _InDatabase(failure)
        if isinstance(failure, ConnectionLostError):
            raise CommitInDoubtError from failure

    # -- called

    def __enter__(self) -> Any:
        database = self._database
        if not hasattr(database, "__enter__"):
            raise self._misused()
        given = database.__enter__()
        if given is database and closes_without_commit(given):
            database.__exit__(None, None, None)
            raise _never_commits(given)
        return given

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None and self._is_alone() and not self._delivery.recovering:
            # As below, for most attempts.
            self._delivery.acknowledge()
            return
        steps, fault = self._ending(error), None
        try:
            while True:
                step = next(steps) if fault is None else steps.throw(fault)
                fault = self._perform(step)
        except StopIteration:
            return
        finally:
            # Tracebacks keep this frame: what leads back to an exception may not stay in it.
            del fault

    def _perform(self, step: _AtBroker | _InDatabase) -> BaseException | None:
        try:
            if isinstance(step, _AtBroker):
                step.do()
            else:
                self._database.__exit__(*_facts(step.error))
        except BaseException as fault:  # noqa: BLE001 - what it means is said in `_ending`
            return fault
        return None

    # -- awaited

    async def __aenter__(self) -> Any:
        database = self._database
        if not hasattr(database, "__aenter__"):
            return self.__enter__()
        given = await database.__aenter__()
        if given is database and closes_without_commit(given):
            await database.__aexit__(None, None, None)
            raise _never_commits(given)
        if (misfit := self._misfit(given)) is not None:
            await database.__aexit__(*_facts(misfit))
            raise misfit
        return given

    def _misfit(self, given: object) -> MisusedError | None:
        """A store that blocks and cannot join the transaction: every attempt and recovery would fail at its end."""
        join = getattr(self._delivery.work.template.context_cache, "joined", None)
        if join is None or iscoroutinefunction(join):
            return None
        try:
            join(given)
        except TypeError as error:
            return MisusedError(f"transaction: {error}")
        return None

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        steps, fault = self._ending(error), None
        try:
            while True:
                step = next(steps) if fault is None else steps.throw(fault)
                fault = await self._async_perform(step)
        except StopIteration:
            return
        finally:
            del fault

    async def _async_perform(self, step: _AtBroker | _InDatabase) -> BaseException | None:
        if isinstance(step, _InDatabase) and not hasattr(self._database, "__aexit__"):
            return self._perform(step)
        try:
            if isinstance(step, _AtBroker):
                await self._desk.call(step.do)
            else:
                await self._database.__aexit__(*_facts(step.error))
        except BaseException as fault:  # noqa: BLE001 - as in `_perform`
            return fault
        return None

    @property
    def _desk(self) -> Desk:
        desk = self._delivery.work.desk
        assert desk is not None  # noqa: S101 - where it is awaited there is one
        return desk

    def _misused(self) -> MisusedError:
        """It cannot be entered."""
        database = self._database
        if iscoroutine(database):
            database.close()
        asynchronous = hasattr(database, "__aenter__")
        why = ": an asynchronous one needs an AsyncRetryTemplate" if asynchronous else ""
        return MisusedError(f"transaction: must give a context manager, not {type(database).__name__}{why}")


def _facts(error: BaseException | None) -> tuple[Any, Any, Any]:
    """What a context manager is told."""
    return (None, None, None) if error is None else (type(error), error, error.__traceback__)


def _never_commits(manager: object) -> MisusedError:
    kind = type(manager).__name__
    return MisusedError(f"transaction: a {kind} of SQLAlchemy is closed at its end, without a commit: give its `begin`")
