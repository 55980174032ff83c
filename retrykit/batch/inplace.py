"""Skipping without a roll-back: the items of a failed write are found between savepoints, in the open transaction.

The same search as between transactions, and the same verdicts; but no pause can be spent here, so each test is made
once. What is found is skipped with the transaction it was found in: if that cannot commit, nobody was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retrykit.batch.isolation import Verdict, isolate, searched
from retrykit.batch.work import Work

if TYPE_CHECKING:
    from retrykit.batch.effects import Effects


class WriteInPlace:
    """One write of the processed items of an attempt; `aside` are the indexes of outputs that were not written."""

    def __init__(self, attempt: Effects, transaction: Any, outputs: list[Any], origins: Sequence[int]) -> None:
        self.attempt = attempt
        self.transaction = transaction
        self.outputs = outputs
        self.origins = origins
        self.aside: set[int] = set()

    def run(self) -> Work[int]:
        """How many were written; the others are put aside by the attempt. A failure that rolls back is raised."""
        # What processors left to be written is behind no savepoint: a failure of it rolls back.
        self.attempt.where = "write"
        flush = getattr(self.transaction, "flush", None)
        if flush is not None:
            yield flush
        size = len(self.outputs)
        verdict = yield from self._test(0, size)
        if verdict is Verdict.FAILED:
            left = [index for index in range(size) if index not in self.aside]
            yield from searched(isolate, left, size, self._test)
        return size - len(self.aside)

    def _test(self, start: int, end: int) -> Work[Verdict]:
        """Write a group behind a savepoint; again without the culprit, as long as one is named."""
        verdict = Verdict.DONE
        while chosen := [index for index in range(start, end) if index not in self.aside]:
            culprit = yield from self._written(chosen)
            if culprit is None:
                return verdict
            if culprit < 0:
                return Verdict.FAILED
            self.aside.add(culprit)
            verdict = Verdict.FOUND
        return verdict

    def _written(self, chosen: list[int]) -> Work[int | None]:
        """None: they are written. Else the one that is put aside, or -1 when nobody knows which is at fault."""
        attempt = self.attempt
        attempt.where = "store"
        savepoint = yield lambda: attempt.step.savepoint(self.transaction)
        origins = [self.origins[index] for index in chosen]
        try:
            yield from attempt.write(self.transaction, [self.outputs[index] for index in chosen], origins)
        except Exception as error:
            if not attempt.stays(error):
                raise
            yield savepoint.roll_back
            blamed = origins[0] if len(origins) == 1 else attempt.blamed
            if blamed is None:
                return -1
            attempt.put_aside(blamed, error)
            return chosen[origins.index(blamed)]
        yield savepoint.release
        return None
