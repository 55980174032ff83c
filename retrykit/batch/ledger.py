"""The ledger of a run: what its transactions have come to, here and in the job store.

*The counts follow the commit.* What an attempt has come to is a `Tally`, which is added when its transaction has
committed, and in no other case. The position that is stored in the transaction is the one behind its last item.

*A crash* at any moment leaves what was committed last. Position and counts commit with the items where the job store
can join the transaction: then a restart loses nothing and repeats nothing. Else they are stored after it, and a crash
between the two has the chunk written again: at least once.

*A commit that is not confirmed*, because the connection was lost in it, looks like one that failed. So after a failed
commit the job store is asked before anything is done again: each transaction advances its revision by one, and a
revision that has advanced says that it was committed after all.

*Somebody else's job.* A job is claimed before it runs, under a fence that grows with each claim; the lease is renewed
while it runs. A process that was believed dead and is overtaken finds another fence when it stores its position, and
its transaction cannot commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import attrs

from retrykit.batch.errors import is_veto
from retrykit.batch.limits import Refusal, refused
from retrykit.batch.report import Counts, Phase, SkippedItem, Status, Tally
from retrykit.batch.source import Chunk
from retrykit.batch.work import Work


@attrs.frozen
class Run:
    """What all attempts of one run share. `perform`: drives the work inside them, by calling or by awaiting."""

    step: Any
    ledger: Ledger
    perform: Callable[[Work[Any]], Any]


class Ledger:
    """The counts of one run, and its claim on the job, if there is a job store."""

    step: Any = None
    claim: Any = None
    doubt = False
    """The last commit may have happened although it failed."""
    continues_a_crash = False
    """The run before was not ended by its program: what it has begun to count goes on."""
    careful = False
    """The next chunk may be the one in which that run died, because of one of its items."""
    mark = 0.0
    """Since when the time has not been counted yet."""

    def __init__(self) -> None:
        self.counts = Counts()

    # -- the claim

    def open(self, step: Any, parameters: Mapping[str, Any], *, again: bool) -> Work[Any]:
        """Claim the job: the position that it goes on from. None for its beginning, or if there is no job store."""
        self.step = step
        if step.jobs is None:
            return None
        claim = self.claim = yield partial(step.jobs.claim, step.name, parameters, again=again)
        self.counts = Counts.from_json(claim.counts)
        self.continues_a_crash = claim.crashed
        self.careful = claim.crashed and step.skip.skip_crashes
        return claim.position

    def stop_others(self, reason: str) -> Any:
        """Have the other partitions of the job stopped, or an awaitable of it."""
        return self.step.jobs.stop_others(self.claim, reason)

    def release(self, status: Status, reason: str) -> Any:
        """Tell the job store of the end, or an awaitable of it."""
        return self.step.jobs.release(self.claim, status=status, reason=reason, counts=self.counts.to_json())

    # -- beside the items, in their transaction or after it

    def join(self, transaction: Any) -> Work[Any]:
        """The job store as seen through the open transaction; None if it is somewhere else."""
        joined = yield partial(self.step.jobs.joined, transaction)
        if joined is not None:
            self.claim.within = joined if joined.snapshot else None
        return joined

    def has_moved(self, store: Any) -> Work[bool]:
        """Whether the commit that is in doubt has happened, as the job store says, or a joined one."""
        claim = self.claim
        moved = yield lambda: store.moved(claim)
        self.doubt = False
        return bool(moved)

    def has_happened(self) -> Work[bool]:
        """As `has_moved`, when the call is over; then nobody doubts any longer, whatever the store has to say."""
        self.doubt = False
        return (yield from self.has_moved(self.step.jobs))

    def book(self, store: Any, position: Any, tally: Tally) -> Work[int]:
        """Store position and counts, as they are with what this adds, and who is skipped: the revision after it."""
        claim, counts = self.claim, self._counts_with(tally)
        return (yield lambda: store.book(claim, position, counts, self.step.parked(tally.skipped)))  # type: ignore[no-any-return]

    def _counts_with(self, tally: Tally) -> dict[str, Any]:
        counts = self.counts.copy()
        counts.add(tally, self._limiting(tally))
        return counts.to_json()

    # -- the counts

    def add(self, tally: Tally, revision: int | None) -> None:
        """What a transaction has come to that has committed, and the job's revision since."""
        self.counts.add(tally, self._limiting(tally) if tally.skipped else ())
        if self.claim is not None:
            # After the counts: a signal between the two leaves those in the store, which are right.
            self.claim.revision = revision

    def _limiting(self, tally: Tally) -> list[str | None]:
        """Of each skipped item the class that limits it."""
        errors = (skipped.error for skipped in tally.skipped)
        return [None if is_veto(error) else self.step.skip.limited_as(error) for error in errors]

    def spend(self, phase: Phase) -> None:
        """Count the time since the last mark, and begin anew."""
        before, now = self.mark, perf_counter()
        self.mark = now
        seconds = self.counts.seconds
        if phase in seconds:
            seconds[phase] += now - before
        else:
            seconds[phase] = now - before

    def refusal(
        self, chunk: Chunk, index: int, error: BaseException, besides: Iterable[SkippedItem] = ()
    ) -> Refusal | None:
        """The first item that cannot be skipped if this one is; None if all of them can."""
        return refused(self.step.skip, self.counts, chunk, index, error, besides)
