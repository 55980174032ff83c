"""What a batch job raises of its own, and what its writer may raise to say more than that it failed."""

from __future__ import annotations

from typing import NoReturn

from retrykit.check import wrong_type, wrong_value
from retrykit.errors import RetryError, TerminatedRetryError


class ItemError(Exception):
    """Raised by a writer that knows the culprit: `raise ItemError(index) from error`.

    `index` counts from 0 in the list that the writer was given; one that is not in it stops the step. The error itself
    is what policies see, what is classified and recorded; without one it is this. Raised by a processor it is of the
    item that this has in hand.
    """

    def __init__(self, index: int, error: Exception | None = None) -> None:
        if isinstance(index, bool) or not isinstance(index, int):
            raise wrong_type("index", "an int", index)
        super().__init__(f"item {index} of the writer's list is at fault")
        self.index = index
        if error is not None:
            self.__cause__ = error


class SkipLimitError(RetryError):
    """The step {name} is stopped at item {number}, which cannot be skipped: {reason}

    Raised from the item's own failure. What was written before the item is committed; a restart begins with it.
    """


class TransactionEndedError(RetryError):
    """The transaction of the step {name} was ended by a function that it was only lent to

    The step stops at once: what the function has written may be there or not, and nothing of it is counted. Raised too
    for one that has swallowed an error of the database that has aborted the transaction.
    """


class VetoedError(TerminatedRetryError):
    """The item {key!r} of {name} is vetoed: {reason}

    Never raised: the failure of a skipped item that somebody has forbidden from outside.
    """


def is_veto(error: BaseException) -> bool:
    """Whether an item is skipped because somebody has forbidden it from outside."""
    return isinstance(error, VetoedError)


class StepStopped(BaseException):
    """Raised by `stop`. Nothing that handles failures sees it: it is not tried again, and no item is skipped for it."""

    def __init__(self, reason: str, *, job: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.job = job


def stop(reason: str, *, job: bool = False) -> NoReturn:
    """Stop the step that the caller is a part of (its reader, processor, writer or hook), for a reason.

    The open transaction is rolled back, the job is "stopped" with the reason, and goes on from there when it is started
    again. Of a step that is one of several partitions only this one is stopped; with `job` the others are too, at their
    next commit. (`retrykit.veto` forbids further attempts of an item.)
    """
    if not isinstance(reason, str):
        raise wrong_type("reason", "a str", reason)
    if not reason:
        raise wrong_value("reason", "a text that says why", reason)
    raise StepStopped(reason, job=job)
