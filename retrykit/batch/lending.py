"""A transaction is lent to processor, writer and hooks; to end it is the step's business."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, Literal

from retrykit.batch.errors import TransactionEndedError

_ENDED: Final = (
    "{who} has ended the transaction that it was given, by a commit, a roll-back or a close. What it wrote of the "
    "items {first} to {last} may be there or not, and is not counted"
)
_ABORTED: Final = (
    "{who} has swallowed an error of the database, which has aborted the transaction: its COMMIT would be a roll-back "
    "of the items {first} to {last}"
)
_ADVICE: Final = "Only the step ends its transactions; go on after an error behind a savepoint, begin_nested()."
_HOOKS: Final = {"process": "the processor", "write": "the writer"}

Fault = Literal["over", "aborted"]
"""What would come of a commit: nothing, because it is over, or a roll-back, because an error was swallowed."""


class Ended(BaseException):
    """Raised through the template: nothing that handles failures sees it, since nothing of it can be tried again."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


_teller: Callable[[Any], Any] | None = None


def lent(transaction: Any) -> Any:
    """What tells whether somebody ends the transaction; None where nobody can tell: it is not SQLAlchemy's."""
    global _teller  # noqa: PLW0603 - known when SQLAlchemy is loaded, which steps do without
    if transaction is None:
        return None
    if _teller is None:
        if "sqlalchemy" not in sys.modules:
            return None
        from retrykit.sql.begun import Begun

        _teller = Begun.of
    return _teller(transaction)


def ended(fault: Fault, attempt: Any) -> Ended:
    """The end of the step, in words: which hook, and which items are concerned."""
    chunk, name = attempt.chunk, attempt.step.name
    facts = {"first": chunk.number + chunk.done + 1, "last": chunk.number + attempt.end}
    what = (_ENDED if fault == "over" else _ABORTED).format(who=_HOOKS.get(attempt.where, "on_skip"), **facts)
    return Ended(TransactionEndedError(f"step {name}: {what}. {_ADVICE}", name=name))
