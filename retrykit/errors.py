"""What retrykit raises of its own: few errors, always chained to the user's exception."""

from __future__ import annotations

from typing import Any


class _Facts(dict[str, Any]):
    """The facts of an error while its message is worded: one that is not known reads as "?"."""

    def __missing__(self, fact: str) -> str:
        return "?"


class RetryError(Exception):
    """The operation could not be retried to a good end."""

    def __init__(self, message: str | None = None, **facts: Any) -> None:
        if message is None:
            # The first sentence of a class's docstring is its message; the facts fill it in.
            message = (type(self).__doc__ or "").split("\n", 1)[0].format_map(_Facts(facts))
        super().__init__(message)
        self.__dict__.update(facts)


class ExhaustedRetryError(RetryError):
    """No further attempt is allowed for {name} {key!r} after {attempts} failed: {reason}

    Raised from the last failure, when there is no recovery. The history is kept: every later delivery is answered the
    same way until somebody forgets it, or gives a recovery.
    """


class TerminatedRetryError(RetryError):
    """The operation {name} {key!r} was ended before an attempt could be made: {reason}"""


class AttemptsInFlightError(TerminatedRetryError):
    """Attempts of {name} {key!r} are running elsewhere ({running}) and may use up its limit: deliver it again later.

    Nothing was run, counted or stored: the caller's session rolls back and the item comes again, when the others are
    done. `until`: when the first of them is believed dead unless it says that it still runs (epoch seconds, by the
    clock of the store).
    """


class BackOffInterruptedError(RetryError):
    """The pause of {seconds} s before the next attempt of {name} {key!r} was interrupted.

    Raised from what interrupted it. The history is kept.
    """


class RecoveryFailedError(RetryError):
    """The recovery of {name} {key!r} failed {attempts} times; its history is kept.

    Later deliveries try the recovery again, never the operation. Raised from the last exception of the recovery;
    `failure` is the operation's own last failure.
    """


class CommitInDoubtError(RetryError):
    """The commit of the attempt was not confirmed: it may or may not have happened.

    For a `transaction` to raise when it leaves. Nothing is counted and the history is kept: the source will say what
    became of it, by delivering the item again or not.
    """


class ContextCacheError(RetryError):
    """The history could not be read or stored."""


class CacheCapacityError(ContextCacheError):
    """The context cache is full ({capacity} histories): the new key {key!r} was not stored."""


class InconsistentKeyError(ContextCacheError):
    """The key {key!r} of {name} names two items: its history is that of one with another content ({stored}).

    `stored` and `fingerprint` are what the two were told apart by. Nothing was run, counted or stored. A failure that
    comes to light while it is to be stored is not added to the other item's history; it carries this error as a note.
    """


class CodecError(ContextCacheError):
    """A value cannot be kept in a history, or a history cannot be read: {reason}"""


class JobError(RetryError):
    """The batch job {name} cannot be run"""


class JobFinishedError(JobError):
    """The job {name} {parameters} (number {id}) was finished at {finished_at}; run it `again` to begin anew.

    Nothing was read or written.
    """


class JobRunningError(JobError):
    """The job {name} {parameters} (number {id}) is run by {owner}, which is believed alive until {until}

    Nothing was read or written.
    """


class JobBusyError(JobError):
    """{what}: the database is busy, others have been writing in it for too long

    Nothing was read or written.
    """


class JobLostError(JobError):
    """The job {name} (number {id}) {reason}: what was claimed under fence {fence} stores nothing.

    This process was believed dead, or silent for too long; or somebody has stopped the job. The open transaction is
    rolled back.
    """
