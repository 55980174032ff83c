"""What a batch job raises of its own, and what its writer may raise to say more than that it failed."""

from __future__ import annotations

from retrykit.check import wrong_type, wrong_value
from retrykit.errors import RetryError


class ItemError(Exception):
    """Raised by a writer that knows the culprit: `raise ItemError(index) from error`.

    `index` counts from 0 in the list that the writer was given. The error itself is what policies see, what is
    classified and recorded; without one it is this.
    """

    def __init__(self, index: int, error: Exception | None = None) -> None:
        if isinstance(index, bool) or not isinstance(index, int):
            raise wrong_type("index", "an int", index)
        if index < 0:
            raise wrong_value("index", "0 or more", index)
        super().__init__(f"item {index} of the writer's list is at fault")
        self.index = index
        if error is not None:
            self.__cause__ = error


class SkipLimitError(RetryError):
    """The step {name} is stopped at item {number}, which cannot be skipped: {reason}

    Raised from the item's own failure. What was written before the item is committed; a restart begins with it.
    """
