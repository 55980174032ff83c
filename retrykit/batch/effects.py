"""What an attempt does within its transaction: it has items written, puts some aside, and stores what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import time
from typing import Any, NoReturn

import attrs

from retrykit.batch.errors import ItemError
from retrykit.batch.findings import Findings
from retrykit.batch.ledger import Ledger
from retrykit.batch.lending import Fault, ended
from retrykit.batch.limits import Refusal
from retrykit.batch.report import SkippedItem, Tally
from retrykit.batch.work import Work, called
from retrykit.failure import ErrorSummary, summary


def meant(named: ItemError) -> Exception:
    """The failure that an item was named for."""
    return named.__cause__ if isinstance(named.__cause__, Exception) else named


class Effects(Findings):
    """The verbs of an attempt whose transaction is open."""

    # Of most attempts little more is ever said than this: they come.
    failures = 0
    tally: Any = None
    revision: int | None = None
    """The job's in the store after this transaction, if position and counts were stored in it."""
    recovered = False
    refusal: Refusal | None = None
    """If the item cannot be skipped because there are too many."""
    closes = False
    """The recovery of its last item has closed the chunk."""
    lent: Any = None
    """What tells whether the transaction is still as it was when it was lent to processor, writer and hooks."""
    _aside: tuple[SkippedItem, ...] = ()
    """Those that this very attempt skips without a roll-back."""

    ledger: Ledger
    perform: Callable[[Work[Any]], Any]
    """Drives work, by calling or by awaiting."""

    # -- what is the user's

    def write(self, transaction: Any, outputs: list[Any], origins: Sequence[int]) -> Work[None]:
        """Have the writer write what was made of the items with these indexes; `blamed` if it names one of them."""
        self.where = "write"
        self.blamed = None
        named: ItemError | None = None
        try:
            if outputs:
                # As in `hook`, which is one generator more.
                if self.step.asynchronous:
                    yield partial(self.step.writer, transaction, outputs)
                else:
                    called(self.step.writer(transaction, outputs))
                if self.lent is not None and (fault := self.lent.fault()) is not None:
                    self._is_ended(fault)
            flush = getattr(transaction, "flush", None)
            if flush is not None:
                # A Session writes when it is told to: now, so that a failure is the writer's.
                yield flush
        except Exception as error:
            self._not_over(error)
            if not isinstance(error, ItemError):
                raise
            named = error
        if named is not None:
            self._blame(named, origins)
        self.ledger.spend("write")

    def _blame(self, named: ItemError, origins: Sequence[int]) -> None:
        """Raise the failure that the writer has named the culprit of."""
        if not 0 <= named.index < len(origins):
            # No item's fault but the writer's own: nothing is skipped for it.
            self.where = "name"
            msg = f"ItemError({named.index}): the writer was given {len(origins)} items, counted from 0"
            raise IndexError(msg) from named
        self.blamed = origins[named.index]
        raise meant(named)

    def hook(self, call: Callable[[], Any]) -> Work[Any]:
        """What comes of a function of the user's, which has the transaction and is not to end it."""
        try:
            answer = yield call
        except Exception as error:
            self._not_over(error)
            raise
        if self.lent is not None and (fault := self.lent.fault()) is not None:
            self._is_ended(fault)
        return answer

    def _not_over(self, error: Exception) -> None:
        """Nothing can be tried again if whoever has failed has ended the transaction before."""
        if self.lent is not None and self.lent.is_over:
            self._is_ended("over", error)

    def _is_ended(self, fault: Fault, error: Exception | None = None) -> NoReturn:
        self.failures += 1
        raise ended(fault, self) from error

    def recovery_of(self, transaction: Any, skipped: SkippedItem) -> Work[Any]:
        """What the step's own recovery of a skipped item gives; None if there is none."""
        if self.step.on_skip is None:
            return None
        return (yield from self.hook(partial(self.step.on_skip, transaction, skipped)))

    # -- without a roll-back

    def stays(self, error: Exception) -> bool:
        """Whether the transaction may go on after this failure."""
        return isinstance(error, self.step.in_place) and self.is_items_fault(error)

    def leave_out(self, index: int, error: Exception) -> None:
        """Skip an item that the processor has refused; what the database has refused is rolled back in any case."""
        if hasattr(error, "orig") or not self.stays(error):
            raise error
        self.put_aside(index, error)

    def put_aside(self, index: int, error: Exception) -> None:
        """Skip an item in this transaction. If there are too many, raises its failure: then all is rolled back, and
        groups are written one after the other up to the item that is too much.
        """
        if self.ledger.refusal(self.chunk, index, error, self._aside) is not None:
            self.blamed = None
            raise error
        skipped = self.skipped(index, error, self.where)
        once = ErrorSummary(1, *summary(error), time())
        self._aside += (attrs.evolve(skipped, attempts=1, errors=(once,), reason="no roll-back"),)
        self.blamed = None

    # -- what is ours

    def join(self, transaction: Any) -> Work[Any]:
        """The job store as seen through the open transaction; None if there is none, or it is somewhere else."""
        if self.ledger.claim is None or transaction is None:
            return None
        self.where = "store"
        return (yield from self.ledger.join(transaction))

    def has_happened(self, joined: Any) -> Work[bool]:
        """Whether the commit before this attempt only seemed to fail."""
        if joined is None or not self.ledger.doubt:
            return False
        return (yield from self.ledger.has_moved(joined))

    def make_tally(self, written: int, others: tuple[SkippedItem, ...]) -> Tally:
        """What this transaction adds; `others` are skipped besides those that were condemned before."""
        read = self.end - self.chunk.done
        if not others and not self.chunk.condemned:
            return Tally(read, written, read - written)
        skipped = self._skipped(others)
        return Tally(read, written, read - written - len(skipped), skipped)

    def _skipped(self, others: tuple[SkippedItem, ...]) -> tuple[SkippedItem, ...]:
        if not self.chunk.condemned and len(others) < 2:  # noqa: PLR2004 - one is in order
            return others
        skipped = self.chunk.skipped(self.end)
        return tuple(sorted((*skipped.values(), *others), key=lambda one: one.number))

    def store(self, transaction: Any, joined: Any, tally: Tally) -> Work[None]:
        """Record who is skipped, and store position and counts, in the transaction if the job store is there."""
        self.where = "store"
        if not self.step.none_closes_chunk:
            for skipped in tally.skipped:
                yield from self.recovery_of(transaction, skipped)
        if joined is not None:
            self.revision = yield from self.ledger.book(joined, self.chunk.position(self.end), tally)
        self.ledger.spend("store")

    def finish(self, tally: Tally) -> None:
        """All is done but the commit."""
        self.tally = tally
        self.where = "commit"
