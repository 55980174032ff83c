"""The recovery of a single item that may not be tried again: it is recorded, and the step goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retrykit.batch.lending import Ended, lent
from retrykit.batch.report import Tally
from retrykit.batch.work import Work
from retrykit.context import RetryContext
from retrykit.errors import JobLostError

if TYPE_CHECKING:
    from retrykit.batch.effects import Effects
    from retrykit.batch.findings import Where


class Recovery:
    """What the template calls when a single item may not be tried again: the item is recorded, and the step goes on."""

    def __init__(self, attempt: Effects) -> None:
        self._attempt = attempt
        self._where: Where = "before"

    def retrykit_handles(self, error: BaseException | None) -> bool:
        """Whether the item may be skipped: the failure is its own, and there are not too many."""
        attempt = self._attempt
        self._where = attempt.where
        if error is None or not attempt.live or not attempt.is_items_fault(error):
            return False
        attempt.refusal = attempt.ledger.refusal(attempt.chunk, attempt.live[0], error)
        return attempt.refusal is None

    def __call__(self, context: RetryContext) -> Any:
        """The recovery of the template: the tally, or an awaitable of it."""
        return self._attempt.perform(self._record(context))

    def _record(self, context: RetryContext) -> Work[Tally]:
        try:
            return (yield from self._recorded(context))
        except JobLostError as lost:
            # The recovery has not failed: it is no business of this run any more.
            raise Ended(lost) from lost.__cause__

    def _recorded(self, context: RetryContext) -> Work[Tally]:
        attempt = self._attempt
        attempt.context = context
        joined = yield from attempt.join(context.transaction)
        attempt.lent = lent(context.transaction)
        if (yield from attempt.has_happened(joined)):
            # The commit of this one, which does nothing, may go unconfirmed too.
            attempt.finish(attempt.tally)
            return attempt.tally  # type: ignore[no-any-return]
        error = context.last_error
        assert error is not None  # noqa: S101 - nothing is recovered that has not failed
        attempt.recovered = True
        skipped = attempt.skipped(attempt.live[0], error, self._where)
        if attempt.step.none_closes_chunk:
            attempt.where = "store"
            attempt.closes = (yield from attempt.recovery_of(context.transaction, skipped)) is None
        tally = attempt.make_tally(0, (skipped,))
        yield from attempt.store(context.transaction, joined, tally)
        attempt.finish(tally)
        return tally
