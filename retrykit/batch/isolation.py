"""Which items of a failed chunk are at fault? Adaptive group testing, in the order of the items.

A chunk of n items has failed, and nobody knows which of them it was. A *test* writes a group of neighboring items in a
transaction of its own: when it commits, those items are done, for good; when it fails, one of them at least is at
fault. The search says what to test next and is told the verdict. It reads nothing, writes nothing and counts no
attempts, so it can be tested with numbers alone.

*In order.* A group always begins with the first item that is not done. So what is done is a prefix of the chunk, and a
position in the input says all that a restart has to know, in the middle of a search too.

*Halving.* A group that failed is halved: if the first half commits, the culprit is in the second one, which need not be
tested as a whole; if it fails, nothing is known any more of the second half, and that goes back to the rest. After
log₂ n tests a single item is left.

*The rest* is tested next, and how much of it at once is what makes many culprits as cheap as few (Hwang's generalized
binary splitting, the number of culprits estimated from those found: as many are expected as have been found). After the
first culprit the whole rest is tested, after j of them a j-th part; and each test that commits doubles the next one. k
culprits among n items cost about k·log₂(n/k) + O(k) tests, and never more than 2·k·log₂(n/k) + O(k).

*Nothing is believed of a single item but its own failure.* One that only must be the culprit, since all its neighbors
committed, is tested like any other. If it commits the failure was not one of an item: the chunk was too large for a
packet, two items fail only together, a deadlock went by. Then halving proves nothing, and the rest goes one by one, in
groups that double as long as they commit and are halved when they fail: at most twice as many tests as there are items,
and still everything that commits is done, and whatever fails by itself is at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from enum import Enum
from typing import Any

import attrs

from retrykit.batch.work import Work


class Verdict(Enum):
    """What came of a test. The first two bring the group to its end."""

    DONE = "all items of the group are done"
    FOUND = "all are done with, and a culprit was among them: named by the writer, or a group of one"
    FAILED = "the group has failed, and nobody knows which item it was"


Group = tuple[int, int]
"""The items from the first number up to, not including, the second; counted from 0."""
Search = Generator[Group, Verdict, None]


def isolate(size: int) -> Search:
    """The groups to test of a chunk of that many items, which has failed as a whole; ends when every item is done.

    Of a group of one the verdict is never FAILED.
    """
    return _search(_Known(size=size, failed_to=size, width=size))


def tread_carefully(size: int) -> Search:
    """As `isolate`, of a chunk that may kill whoever writes it: one item first, then groups that double.

    Whoever dies in it leaves everything written that stands before the last group; so the next one comes at least
    twice as near to the item that kills, and at last tests it alone.
    """
    return _search(_Known(size=size, failed_to=0, width=1, believes=False))


@attrs.define
class _Known:
    """What is known: items before `start` are done, one of those from there to `failed_to` is at fault."""

    size: int
    failed_to: int
    width: int
    """How many to test at once where nothing is known."""
    start: int = 0
    found: int = 0
    believes: bool = True
    """False: a failure was seen that was none of an item, so it is not concluded from one test to another."""

    def next_group(self) -> Group:
        """The next test."""
        suspects = self.failed_to - self.start
        if suspects > 0:
            return self.start, self.start + max(1, suspects // 2)
        return self.start, min(self.size, self.start + self.width)

    def learn(self, end: int, verdict: Verdict) -> None:
        """Take in what came of the test of the items up to `end`."""
        if verdict is Verdict.FAILED:
            self._failed(end)
        elif verdict is Verdict.FOUND:
            self._found(end)
        else:
            self._done(end)

    def _done(self, end: int) -> None:
        if end == self.failed_to:
            # Each of them has been written, and one of them should have failed.
            self.believes, self.width = False, 1
        elif end > self.failed_to:
            self.width = max(1, 2 * self.width)
        self.start = end

    def _failed(self, end: int) -> None:
        if self.believes:
            self.failed_to = end
        else:
            self.failed_to, self.width = self.start, max(1, (end - self.start) // 2)

    def _found(self, end: int) -> None:
        self.start = self.failed_to = end
        self.found += 1
        self.width = max(1, (self.size - end) // self.found) if self.believes else 1


def _search(known: _Known) -> Search:
    while known.start < known.size:
        start, end = known.next_group()
        verdict: Any = yield start, end
        assert verdict is not Verdict.FAILED or end - start > 1, "a group of one has a verdict of its own"  # noqa: S101
        known.learn(end, verdict)


def searched(
    method: Callable[[int], Search], places: Sequence[int], end: int, test: Callable[[int, int], Work[Verdict]]
) -> Work[None]:
    """Bring the items at these places to their end by a search: `test(start, end)` says what comes of those from one
    place up to, not including, another; the last group reaches to `end`.
    """
    search = method(len(places))
    group = next_group(search)
    while group is not None:
        first, behind = group
        verdict = yield from test(places[first], end if behind == len(places) else places[behind])
        group = next_group(search, verdict)


def next_group(search: Search, verdict: Verdict | None = None) -> Group | None:
    """What is to be tested next, after the verdict on what was tested last; None at the end."""
    try:
        return search.send(verdict)  # type: ignore[arg-type] # a generator is begun with None
    except StopIteration:
        return None
