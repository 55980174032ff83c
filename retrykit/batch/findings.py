"""What an attempt knows of its failures: whose they are, whether that item may be skipped, and its record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from retrykit.batch.report import SkippedItem
from retrykit.context import RetryContext
from retrykit.errors import RetryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from retrykit.batch.source import Chunk

Where = Literal["before", "key", "begin", "process", "write", "name", "store", "commit"]
"""What an attempt does. "name": the writer names a culprit that is none of its items."""


class Findings:
    """What is known of the failures of an attempt, which says what it is doing in `where`."""

    step: Any
    chunk: Chunk
    end: int
    live: Sequence[int]
    where: Where = "before"
    context: RetryContext | None = None
    blamed: int | None = None
    """The item that the failure is of, if the processor was at it or the writer has named it."""
    _named: frozenset[int | None] = frozenset()
    _raised: Exception | None = None
    _vetoing: int | None = None
    """The item at which a processor forbade further attempts."""

    @property
    def culprit(self) -> int | None:
        """The item that every failed attempt has named; None if there is none.

        Nor if another one has vetoed: then the policy has not had its say.
        """
        named = next(iter(self._named)) if len(self._named) == 1 else None
        return named if self._vetoing in {None, named} else None

    @property
    def is_unrecoverable(self) -> bool:
        """Whether the policy forbids to recover from the failure that decided: then nobody is skipped for it."""
        decision = None if self.context is None else self.context.decision
        return decision is not None and not decision.recoverable

    def is_items_fault(self, error: BaseException | None) -> bool:
        """Whether the failure may be an item's own, and such an item be skipped."""
        if error is None or self.where in {"begin", "name", "store"} or getattr(error, "connection_invalidated", False):
            return False
        if isinstance(error, RetryError) and error is not self._raised:
            # The template's own: it was interrupted, or could not record the item.
            return False
        return bool(self.step.skip.may_skip(error))

    def skipped(self, index: int, error: BaseException, where: Where) -> SkippedItem:
        """The record of an item that is put aside for this failure, which happened there."""
        context = self.context
        if context is None:
            return self.chunk.once(index, error, where, "has no key")
        vetoed = context.veto_reason
        return SkippedItem(
            item=self.chunk.items[index],
            number=self.chunk.number + index + 1,
            phase="an earlier run" if where == "before" else where,
            error=error,
            attempts=context.retry_count,
            errors=context.errors,
            key=self.step.key_of(self.chunk.items[index]),
            reason=f"vetoed: {vetoed}" if vetoed is not None else self._reason(context),
        )

    @staticmethod
    def _reason(context: RetryContext) -> str:
        return "" if context.decision is None else context.decision.reason

    def place(self) -> str:
        """Which item the failure is of, or which items it may be of, and what was done with them."""
        number = self.chunk.number + 1
        index = self.live[0] if len(self.live) == 1 else self.blamed
        if index is not None and self.where in {"before", "key", "process", "write"}:
            return f"item {number + index} ({self.where})"
        return f"items {number + self.chunk.done} to {self.chunk.number + self.end} ({self.where})"
