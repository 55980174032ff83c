"""Where items come from, chunk by chunk, and how far it is from the beginning to any of them.

A chunk is read once. What is tried again is tried with the items that are there: no reader is asked to go back, and a
forward-only one loses nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from itertools import islice
from time import time
from typing import Any, Protocol, runtime_checkable

import attrs

from retrykit.batch.report import SkippedItem
from retrykit.check import wrong_type
from retrykit.failure import ErrorSummary, summary


@runtime_checkable
class Reader(Protocol):
    """What can begin in the middle of its input. A plain iterable begins there by leaving out what it gave before."""

    def read_from(self, position: Any) -> Iterator[tuple[Any, Any]]:
        """Each item from `position` on, with the position behind it (JSON-able); None: from the beginning.

        An async iterator does as well, in an `AsyncChunkStep`. Of a record that cannot be read an `Unreadable` is given
        for an item, so that the records behind it can be. In place of a pair `END_OF_CHUNK` may be given: what was read
        since the last chunk is one, although it may be small.

        A reader that has a method `settled(items)` too is told of items after the transaction that settled them has
        committed, in the order in which it gave them.
        """


class _EndOfChunk:
    def __repr__(self) -> str:
        return "END_OF_CHUNK"


END_OF_CHUNK = _EndOfChunk()
"""What a reader gives in place of an item and its position: what it has given so far is not to wait for more."""


@attrs.frozen
class Unreadable:
    """A record that is there and makes no item: `raw` as it stands in the input, and what is wrong with it."""

    raw: Any
    error: Exception


@attrs.define(eq=False)
class Chunk:
    """The items that are read at once.

    `number`: that of the item before the first, counted from 1 in the whole input. `positions`: behind each item; None
    where the number is the position. `done`: so many are settled for good. `condemned`: those that are to be skipped,
    by index; None of one that was settled before.
    """

    items: list[Any]
    number: int
    positions: list[Any] | None = None
    done: int = 0
    condemned: dict[int, SkippedItem | None] = attrs.field(factory=dict)

    def position(self, end: int) -> Any:
        """The position behind the first `end` items."""
        return self.number + end if self.positions is None else self.positions[end - 1]

    def chosen(self, live: Sequence[int], end: int) -> list[Any]:
        """The items with these indexes: those before `end` that are neither settled nor condemned."""
        items = self.items
        return [items[index] for index in live] if self.condemned else items[self.done : end]

    def skipped(self, end: int) -> dict[int, SkippedItem]:
        """Those before `end` that are to be skipped with what is settled next, by index, in order."""
        chosen = ((index, self.condemned.get(index)) for index in range(self.done, end))
        return {index: one for index, one in chosen if one is not None}

    def marked(self, end: int) -> int | None:
        """The first item before `end` that is to be skipped and has a key; None if there is none."""
        return next((at for at, one in self.skipped(end).items() if one.key is not None), None)

    def aside(self, end: int) -> SkippedItem | None:
        """That item's record, if there is no other one before `end`; else None."""
        return self.condemned[self.done] if end == self.done + 1 and self.marked(end) == self.done else None

    def once(self, index: int, error: BaseException, phase: str, reason: str) -> SkippedItem:
        """The record of an item that had one chance."""
        item = self.items[index]
        return SkippedItem(
            item=item.raw if isinstance(item, Unreadable) else item,
            number=self.number + index + 1,
            phase=phase,
            error=error,
            attempts=1,
            errors=(ErrorSummary(1, *summary(error), time()),),
            reason=reason,
        )

    def live(self, end: int) -> Sequence[int]:
        """The indexes of items before `end` that are neither settled nor condemned."""
        if not self.condemned:
            return range(self.done, end)
        return [index for index in range(self.done, end) if index not in self.condemned]


class Source:
    """The items of an iterable or a reader, from a position on."""

    def __init__(self, given: Any, position: Any, number: int) -> None:
        self.number = number
        self.positioned = isinstance(given, Reader)
        read = given.read_from(position) if self.positioned else given
        self._iterator: Iterator[Any] | None = None
        self._async_iterator: AsyncIterator[Any] | None = None
        if isinstance(read, AsyncIterable):
            self._async_iterator = aiter(read)
        else:
            self._iterator = iter(read)
        self._to_leave_out = 0 if self.positioned else number
        self.at_once = self._iterator is not None
        """Whether `take` gives no awaitables."""
        self.settled = getattr(given, "settled", None) if self.positioned else None
        """Whom to tell of items that are settled; None: nobody."""

    def take(self, size: int) -> Any:
        """The next chunk of at most so many items, or an awaitable of it; None at the end."""
        if self._iterator is None:
            return self._take_later(size)
        if self._to_leave_out:
            _drop(self._iterator, self._to_leave_out)
            self._to_leave_out = 0
        if self.positioned:
            return self._chunk(self._until_its_end(self._iterator, size))
        taken = list(islice(self._iterator, size))
        number, self.number = self.number, self.number + len(taken)
        return Chunk(taken, number) if taken else None

    @staticmethod
    def _until_its_end(iterator: Iterator[Any], size: int) -> list[Any]:
        taken: list[Any] = []
        for pair in iterator:
            if pair is not END_OF_CHUNK:
                taken.append(pair)
            if len(taken) == size or (pair is END_OF_CHUNK and taken):
                break
        return taken

    async def _take_later(self, size: int) -> Chunk | None:
        assert self._async_iterator is not None  # noqa: S101 - it is one of the two
        while self._to_leave_out and await anext(self._async_iterator, self) is not self:
            self._to_leave_out -= 1
        taken: list[Any] = []
        while len(taken) < size and (item := await anext(self._async_iterator, self)) is not self:
            if item is not END_OF_CHUNK:
                taken.append(item)
            elif taken:
                break
        return self._chunk(taken)

    def _chunk(self, taken: list[Any]) -> Chunk | None:
        if not taken:
            return None
        number, self.number = self.number, self.number + len(taken)
        if not self.positioned:
            return Chunk(taken, number)
        return Chunk([item for item, _ in taken], number, [position for _, position in taken])

    def close(self) -> Any:
        """Let go of an iterator that was not read to its end; maybe an awaitable."""
        close = getattr(self._async_iterator, "aclose", None) or getattr(self._iterator, "close", None)
        return None if close is None or not self.positioned else close()


def _drop(iterator: Iterator[Any], number: int) -> None:
    for _ in islice(iterator, number):
        pass


def check_reader(name: str, reader: object, *, asynchronous: bool) -> None:
    """`TypeError` for what gives no items."""
    wanted = "an iterable or an object with read_from(position)"
    if asynchronous and isinstance(reader, AsyncIterable):
        return
    if isinstance(reader, AsyncIterable):
        raise wrong_type(name, f"{wanted} (asynchronous ones need an AsyncChunkStep)", reader)
    if isinstance(reader, type | str | bytes) or not isinstance(reader, Iterable | Reader):
        raise wrong_type(name, wanted, reader)
