"""How a chunk is brought to its end: what is written together, what is tried again, and what is put aside.

*A chunk* is so many items, read before any transaction is begun and kept until each of them is settled: written,
filtered out, or skipped. It is written in one transaction if all goes well. Readers are not part of it: nothing is read
twice, and no transaction is open while a reader waits.

*Who decides.* Each test of a group of items is one call of the template: `execute(attempt, recover, transaction=…)`.
Whether a failed attempt is made again, and after what pause, is the answer of its policies, and the pause is spent
between two transactions. Nothing here counts attempts or computes delays. What is asked here is what follows when the
template gives up: is the failure an item's own fault (`SkipPolicy`)? If not, the step stops, and the failure goes to
the caller as it is.

*One transaction*, in this order: the items are processed; the writer writes them, and a Session is flushed, so that
their failures are theirs; the skipped ones are recorded, and position and counts stored; commit. What is ours comes
last: it takes its lock late, and when it fails (`JobLostError`, a table that is not there) that is no item's fault:
the step stops.

*Who was it?* A failure that the processor raised is that of the item it was given. A writer may name the culprit
(`ItemError`). Then that item is condemned, and the next transaction writes the others and records it: one more, not
several; provided that each failed attempt named the same one. A failure without a name is searched for
(`retrykit.batch.isolation`): groups from the first unsettled item on, each in a transaction of its own, that commit if
they are good. An attempt of several suspects is made once: repeating would not tell more about each of them. A failure
that is no item's fault is repeated there too, as the policy says. A single item has all the attempts that the policy
gives it, and a history of its own if it has a key. Then its recovery, in a transaction of its own, records it. Nobody
is condemned but by his own failure.

*Vetoes from outside* are asked for once a chunk, before its first transaction and beside it (`retrykit.batch.vetoes`),
and again before it is tried again.
What somebody has forbidden is skipped as if it had been condemned before it was read. One that is tried alone is looked
up anew by the template: then a veto ends the call without an attempt, and the chunk is asked again whose it was. What a
processor vetoes is its own item: another one that fails beside it is not judged by an attempt that this has made the
last, but searched for.

*The end of a chunk.* A recovery may close it (`none_closes_chunk`): its transaction ends with that item, and the items
behind it are settled as a chunk of their own.

*Recovered once.* A source without positions, which is told what is settled, may not hear it, and gives items again. For
those that are tried alone a completion mark of the template answers; so there each culprit is, named or not, and each
item that is put aside untried, vetoed or unreadable, is settled alone too, if it has a key. What a mark answers for is
settled like an item that was filtered out.

*Too many.* Limits are counted in the order of the items. When one is found that cannot be skipped any more, the items
before it are settled first, and then the step stops: a restart begins with it.

*An item that kills* its process is found too, if such items are to be skipped (`skip_crashes`): the chunk that comes
after a crash is written carefully, one item first and then in groups that double. So each run that dies leaves less
before the killer, until it is alone, and then its history counts the attempts that never ended.

What is counted of it, and when, is the ledger's (`retrykit.batch.ledger`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import attrs

from retrykit.batch.attempt import Attempt
from retrykit.batch.errors import SkipLimitError
from retrykit.batch.findings import Where
from retrykit.batch.isolation import Search, Verdict, isolate, searched, tread_carefully
from retrykit.batch.ledger import Run
from retrykit.batch.lending import Ended
from retrykit.batch.limits import Refusal
from retrykit.batch.report import SkippedItem, Tally
from retrykit.batch.source import Chunk, Unreadable
from retrykit.batch.vetoes import vetoed
from retrykit.batch.work import Work
from retrykit.errors import TerminatedRetryError

Told = Callable[[list[Any], Tally], Work[None]]
Failed = tuple[Attempt, Exception]
"""An attempt, and its failure, which is an item's own."""


class ChunkClosed(Exception):  # noqa: N818 - says to the settling where a transaction has ended; nobody else hears of it
    """The recovery of an item has closed its chunk: what stands behind it begins another one."""


class Settling:
    """Settles the chunks of one run.

    `told`: who is told of items when their transaction has committed; without `tells_all` only where one was skipped.
    """

    place = ""
    """Where the failure happened that stops the step: the item, or the items, and what was done with them."""

    def __init__(self, run: Run, told: Told, *, tells_all: bool) -> None:
        self.run = run
        self.step = run.step
        self.ledger = run.ledger
        self.told = told
        self.tells_all = tells_all

    def condemn_unreadable(self, chunk: Chunk) -> Work[None]:
        """Have what was read and is no item skipped, if it may be."""
        for index, item in enumerate(chunk.items):
            if not isinstance(item, Unreadable):
                continue
            if not self.step.skip.may_skip(item.error):
                self.place = f"item {chunk.number + index + 1} (read)"
                raise item.error
            skipped = chunk.once(index, item.error, "read", "cannot be read")
            if self.step.settles_once:
                skipped = attrs.evolve(skipped, key=self.step.key_of(item.raw))
            yield from self._condemn(chunk, index, skipped)

    def heed_vetoes(self, chunk: Chunk, asked: Sequence[int]) -> Work[bool]:
        """Have items skipped that somebody has forbidden from outside. Whether there were any."""
        found = yield from vetoed(self.step, chunk, asked)
        chunk.condemned.update(found)
        return bool(found)

    def settle(self, chunk: Chunk, size: int, failed: Failed | None = None) -> Work[None]:
        """Bring the first so many items of the chunk to their end. Where it is closed, the rest is another chunk.

        In one transaction, or after a search for the culprits. `failed`: the attempt that was made of all of
        them already.
        """
        while chunk.done < size:
            made, failed = failed, None
            try:
                if self.ledger.careful:
                    yield from self._search(chunk, size, tread_carefully)
                elif (yield from self._test(chunk, size, whole=True, made=made)) is Verdict.FAILED:
                    yield from self._search(chunk, size, isolate)
            except ChunkClosed:
                continue

    def _search(self, chunk: Chunk, size: int, method: Callable[[int], Search]) -> Work[None]:
        live = chunk.live(size)
        if not live:
            yield from self._test(chunk, size, whole=False)
        yield from searched(method, live, size, lambda _, end: self._test(chunk, end, whole=False))

    def _test(self, chunk: Chunk, end: int, *, whole: bool, made: Failed | None = None) -> Work[Verdict]:
        """Write the unsettled items before `end`; again without the culprit, as long as one is named."""
        error: Exception | None
        found = False
        # Of a group that failed, a part may have been settled already.
        while chunk.done < end:
            condemned = chunk.condemned.copy()
            if made is not None:
                (attempt, error), made, condemned = made, None, {}
            elif condemned and self.step.settles_once and (yield from self._set_aside(chunk, end)):
                found = True
                continue
            else:
                attempt = Attempt(self.run, chunk, self._goal(chunk, end), whole=whole)
                error = yield from self.execute(attempt)
            if error is None:
                if attempt.closes:
                    raise ChunkClosed
                found = found or attempt.recovered
                continue
            culprit = attempt.culprit
            if culprit is None and chunk.condemned == condemned:
                return Verdict.FAILED
            if culprit is not None and self.step.settles_once and len(attempt.live) > 1:
                yield from self.settle(chunk, culprit)
                yield from self.settle(chunk, culprit + 1)
            elif culprit is not None:
                yield from self._condemn(chunk, culprit, attempt.skipped(culprit, error, attempt.where))
            found = True
        return Verdict.FOUND if found else Verdict.DONE

    def _set_aside(self, chunk: Chunk, end: int) -> Work[bool]:
        """Settle the first item before `end` that leaves a mark although nobody tried it, unless it is the only one.

        Whether there was one.
        """
        index = chunk.marked(end)
        if index is None or (index == chunk.done and end == index + 1):
            return False
        yield from self.settle(chunk, index)
        yield from self.settle(chunk, index + 1)
        return True

    def _goal(self, chunk: Chunk, end: int) -> int:
        """How far the next transaction may go: a recovery that may close the chunk has one for itself."""
        live = chunk.live(end)
        if not (chunk.condemned and self.step.none_closes_chunk) or len(live) != 1:
            return end
        return live[0] + 1 if chunk.done == live[0] else live[0]

    def execute(self, attempt: Attempt) -> Work[Exception | None]:
        """One call of the template. None: its items are settled; else the failure, which is an item's own."""
        try:
            # What need not be awaited need not go through the loop that would.
            tally = (yield attempt.execute) if self.step.asynchronous else attempt.execute()
            self.ledger.spend("transaction")
            if attempt.failures:
                self._note(attempt)
        except Ended as over:
            self._note(attempt)
            self.place = attempt.place()
            raise over.error from over.__cause__
        except Exception as error:  # noqa: BLE001 - the attempt has ended; what is no item's fault is raised on
            where = attempt.where
            attempt.note_failed_commit()
            self._note(attempt)
            happened = self.ledger.doubt and (yield from self.ledger.has_happened())
            tally = attempt.tally if happened else None
            if tally is None and attempt.begins_anew(error):
                return (yield from self.execute(attempt))
            if tally is None:
                return (yield from self._judged(attempt, error, where))
        if tally is None:
            return self._settled_before(attempt)
        # The transaction has committed: only now it counts.
        chunk = attempt.chunk
        if attempt.revision is None and self.ledger.claim is not None:
            # After the transaction, since it was not done in it.
            attempt.revision = yield from self.ledger.book(self.step.jobs, chunk.position(attempt.end), tally)
        self.ledger.add(tally, attempt.revision)
        done, chunk.done = chunk.done, attempt.end
        if self.tells_all or tally.skipped:
            yield from self.told(chunk.items[done : attempt.end], tally)
        return None

    def _settled_before(self, attempt: Attempt) -> Exception:
        """Nothing was done, because the single item was brought to its end before.

        As in a run whose acknowledgment was lost: that is said to the source again.
        """
        step = self.step
        facts = {"name": step.name, "key": attempt.context and attempt.context.key}
        error = TerminatedRetryError(reason="its history was settled by somebody else", **facts)
        if not step.settles_once:
            raise error
        attempt.chunk.condemned[attempt.chunk.done if attempt.aside else attempt.live[0]] = None
        return error

    def _note(self, attempt: Attempt) -> None:
        self.ledger.counts.rollbacks += attempt.failures
        self.ledger.counts.retries += max(0, attempt.tries - 1) if attempt.failures else 0

    def _judged(self, attempt: Attempt, error: Exception, where: Where) -> Work[Exception]:
        """The failure, if it is an item's own; raises it if it is not, or if nobody may recover from it."""
        attempt.where, chunk = where, attempt.chunk
        if attempt.refusal is not None:
            yield from self._refuse(chunk, attempt.refusal)
        if not attempt.tries and self.step.key is not None and (yield from self.heed_vetoes(chunk, attempt.live)):
            # It came after the chunk was read.
            return error
        if not attempt.live or attempt.is_unrecoverable or not attempt.is_items_fault(error):
            self.place = attempt.place()
            raise error
        return error

    # -- verdicts

    def _condemn(self, chunk: Chunk, index: int, skipped: SkippedItem) -> Work[None]:
        """An item is to be skipped. `SkipLimitError` if there are too many."""
        refused = self.ledger.refusal(chunk, index, skipped.error)
        if refused is not None:
            yield from self._refuse(chunk, refused)
        chunk.condemned[index] = skipped

    def _refuse(self, chunk: Chunk, refused: Refusal) -> Work[NoReturn]:
        """Stop at an item that cannot be skipped, when all before it are settled: a restart begins with it."""
        index, error, reason = refused
        chunk.condemned = {at: skipped for at, skipped in chunk.condemned.items() if at < index}
        if index > chunk.done:
            yield from self.settle(chunk, index)
        raise SkipLimitError(name=self.step.name, number=chunk.number + index + 1, reason=reason) from error
