"""One call of the template for a group of items: its attempts and its recovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

import attrs

from retrykit.batch.errors import ItemError
from retrykit.batch.findings import Findings
from retrykit.batch.inplace import WriteInPlace
from retrykit.batch.lending import ended, lent
from retrykit.batch.processing import processed, processed_later
from retrykit.batch.recovery import Recovery
from retrykit.batch.report import SkippedItem, Tally
from retrykit.batch.source import Chunk
from retrykit.batch.vetoes import begin_after, vetoed
from retrykit.batch.work import Work
from retrykit.check import closes_without_commit, wrong_type
from retrykit.context import RetryContext
from retrykit.failure import ErrorSummary, summary
from retrykit.key import check_key
from retrykit.policy import is_crash
from retrykit.state import KEEP_VETO, RetryState

if TYPE_CHECKING:
    from retrykit.batch.course import Course
    from retrykit.batch.limits import Refusal


def _in_place(error: Exception) -> bool:  # noqa: ARG001 - the signature of `rollback_for`
    """A chunk stays in hand: what fails is tried again here, after the roll-back, and not rethrown to a source."""
    return False


def _meant(named: ItemError) -> Exception:
    """The failure that an item was named for."""
    return named.__cause__ if isinstance(named.__cause__, Exception) else named


def _aside_key(key: Any) -> Any:
    """What the mark of an item is kept under that was put aside untried. Not the item's own: a veto stays on that."""
    return ("put aside", *key) if isinstance(key, tuple) else ("put aside", key)


def _committing(manager: Any) -> Any:
    """The context manager, unless it is one of SQLAlchemy's that are left without a commit: `TypeError`."""
    if closes_without_commit(manager):
        wanted = "callable for a context manager that commits, such as sessionmaker(engine).begin or engine.begin"
        if not hasattr(manager, "__aexit__"):
            manager.close()
        raise wrong_type("transaction", wanted, manager)
    return manager


class Attempt(Findings):
    """The attempts to settle the items of a chunk that are not done, up to `end`. The template calls it.

    `whole`: it is the first time that they are tried, so failures are repeated as the policy says. `where`: what the
    attempt is doing that runs now, or was doing when it failed. `culprit` is known after a failure.
    """

    # Of most attempts little more is ever said than this: they come.
    tries = 0
    failures = 0
    tally: Any = None
    revision: int | None = None
    """The job's in the store after this transaction, if position and counts were stored in it."""
    recovered = False
    refusal: Refusal | None = None
    """If the item cannot be skipped because there are too many."""
    closes = False
    """The recovery of its last item has closed the chunk."""
    anew: bool = False
    """What is counted of its single item is left behind."""
    lent: Any = None
    """What tells whether the transaction is still as it was when it was lent to processor, writer and hooks."""
    _aside: tuple[SkippedItem, ...] = ()
    """Those that this very attempt skips without a roll-back."""
    _mark = 0.0

    def __init__(self, course: Course, chunk: Chunk, end: int, *, whole: bool) -> None:
        self.course = course
        self.step = course.step
        self.chunk = chunk
        self.end = self.goal = end
        self.live = chunk.live(end)
        self.whole = whole
        self.aside = chunk.aside(end) if course.step.settles_once and not self.live else None
        """The record of the only item, if that is to be put aside without having been tried, and leaves a mark."""

    # -- the call of the template

    def execute(self) -> Any:
        """What has committed, as a `Tally`; or an awaitable of it."""
        self._mark = perf_counter()
        templates = self.step.templates
        transaction = None if self.step.transaction is None else self._begin
        if len(self.live) == 1 or self.aside is not None:
            return templates.alone.execute(self, Recovery(self), state=self._state(), transaction=transaction)
        return (templates.whole if self.whole else templates.group).execute(self, transaction=transaction)

    def _state(self) -> RetryState | None:
        if self.aside is not None:
            key = _aside_key(self.aside.key)
        elif self.step.key is not None:
            key = self._key()
        elif self.course.careful:
            # What has no name is known by its place, for as long as it may kill.
            key = (self.course.claim.id, self.chunk.number + self.live[0] + 1)
        else:
            return None
        # What a run has counted that ended in good order says nothing of what came since: a mended program, or file.
        crashed = self.course.continues_a_crash
        fresh = self.anew or not (crashed or self.step.settles_once)
        return RetryState(
            key=key,
            # Who has the job knows that the attempts of the runner before him can commit no more.
            redelivered=crashed or None,
            rollback_for=_in_place,
            recover_on_redelivery=False,
            fresh=KEEP_VETO if fresh else False,
        )

    def begins_anew(self, error: Exception) -> bool:
        """Whether nothing was tried because of crashes, in a step that skips no item for them: then it just goes on."""
        if self.tries or self.anew or self.step.skip.skip_crashes or not is_crash(error):
            return False
        self.anew = True
        return True

    def _key(self) -> Any:
        self.where = "key"
        index = self.live[0]
        try:
            key = self.step.key(self.chunk.items[index])
            check_key(key)
        except Exception:
            self._named |= {index}
            raise
        self.where = "before"
        return key

    def _begin(self) -> Any:
        self.note_failed_commit()
        self.where = "begin"
        if self.tries and len(self.live) > 1 and self.step.key is not None:
            return begin_after(self.course.perform(self.heed_vetoes()), self._manager)
        return self._manager()

    def _manager(self) -> Any:
        return _committing(self.step.transaction())

    def heed_vetoes(self) -> Work[None]:
        """Leave out what was forbidden since the last attempt: it may have failed, and waited, for long."""
        found = yield from vetoed(self.step, self.chunk, self.live)
        self.chunk.condemned.update(found)
        if found and self.step.settles_once:
            # Each of those leaves a mark: it has a transaction for itself. (The first of all is recorded in this one.)
            self.end = self.goal = max(self.chunk.done + 1, min(found))
        self.live = self.chunk.live(self.end)

    def note_failed_commit(self) -> None:
        """If the last attempt came to its commit, that has failed: it names nobody, and may have happened."""
        if self.where == "commit":
            self.where = "before"
            self.failures += 1
            self._named |= {None}
            self.course.doubt = self.revision is not None

    def committed(self) -> None:
        """The call is over, and has settled its items."""
        self._spend("transaction")

    # -- one attempt

    def __call__(self, context: RetryContext) -> Any:
        """The callback of the template: the tally, or an awaitable of it."""
        return self.course.perform(self._attempt(context))

    def _attempt(self, context: RetryContext) -> Work[Tally]:
        self.context = context
        if self.tries and context.transaction is None and len(self.live) > 1 and self.step.key is not None:
            yield from self.heed_vetoes()
        self.tries += 1
        self._spend("transaction" if self.tries == 1 else "between")
        self.blamed = None
        self._aside = ()
        context.on_veto = self._note_veto
        try:
            tally = yield from self._settle(context.transaction)
        except Exception as error:
            self.failures += 1
            self._raised = error
            self._named |= {self.blamed}
            self._spend("failed")
            raise
        finally:
            # It knows this attempt, which knows the context.
            context.on_veto = None
        self.finish(tally)
        return tally

    def _note_veto(self) -> None:
        self._vetoing = self.blamed

    def _spend(self, phase: Any) -> None:
        before, self._mark = self._mark, perf_counter()
        seconds = self.course.counts.seconds
        seconds[phase] = seconds.get(phase, 0.0) + self._mark - before

    def finish(self, tally: Tally) -> None:
        """All is done but the commit."""
        self.tally = tally
        self._mark = perf_counter()
        self.where = "commit"

    def _settle(self, transaction: Any) -> Work[Tally]:
        # What there is nothing to do for costs nothing: most chunks have no trouble.
        joined = None if self.course.claim is None else (yield from self.join(transaction))
        self.lent = lent(transaction)
        if self.course.doubt and (yield from self.has_happened(joined)):
            return self.tally  # type: ignore[no-any-return]
        if self.step.none_closes_chunk and self.chunk.condemned:
            yield from self._ask_recoveries(transaction)
        if self.step.processor is None:
            outputs, origins = self.chunk.chosen(self.live, self.end), self.live
        else:
            outputs, origins = yield from self._process()
        written = len(outputs)
        if self.step.in_place and outputs:
            written = yield from WriteInPlace(self, transaction, outputs, origins).run()
        else:
            yield from self.write(transaction, outputs, origins)
        tally = self.make_tally(written, *self._aside)
        if joined is not None or tally.skipped:
            yield from self.store(transaction, joined, tally)
        return tally

    def make_tally(self, written: int, *others: SkippedItem) -> Tally:
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

    def _process(self) -> Work[tuple[list[Any], Sequence[int]]]:
        """What the writer is given, and of each the index of the item that it was made of."""
        self.where = "process"
        named: ItemError | None = None
        outputs, origins = [], ()
        try:
            outputs, origins = yield from self._hook(
                partial(processed_later if self.step.asynchronous else processed, self)
            )
        except ItemError as error:
            named = error
        if named is not None:
            # The processor has one item, and that is to blame in any case.
            raise _meant(named)
        self.blamed = None
        self._spend("process")
        return outputs, origins

    def _hook(self, call: Callable[[], Any]) -> Work[Any]:
        """What comes of a function of the user's, which has the transaction and is not to end it."""
        try:
            answer = yield call
        except Exception as error:
            if self.lent is not None and self.lent.is_over:
                self.failures += 1
                raise ended("over", self) from error
            raise
        fault = None if self.lent is None else self.lent.fault()
        if fault is not None:
            self.failures += 1
            raise ended(fault, self)
        return answer

    def write(self, transaction: Any, outputs: list[Any], origins: Sequence[int]) -> Work[None]:
        """Have the writer write what was made of the items with these indexes; `blamed` if it names one of them."""
        self.where = "write"
        self.blamed = None
        named: ItemError | None = None
        try:
            if outputs:
                yield from self._hook(lambda: self.step.writer(transaction, outputs))
            flush = getattr(transaction, "flush", None)
            if flush is not None:
                # A Session writes when it is told to: now, so that a failure is the writer's.
                yield flush
        except ItemError as error:
            named = error
        if named is not None:
            self._blame(named, origins)
        self._spend("write")

    def _blame(self, named: ItemError, origins: Sequence[int]) -> None:
        """Raise the failure that the writer has named the culprit of."""
        if not 0 <= named.index < len(origins):
            # No item's fault but the writer's own: nothing is skipped for it.
            self.where = "name"
            msg = f"ItemError({named.index}): the writer was given {len(origins)} items, counted from 0"
            raise IndexError(msg) from named
        self.blamed = origins[named.index]
        raise _meant(named)

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
        if self.course.refusal(self.chunk, index, error, self._aside) is not None:
            self.blamed = None
            raise error
        skipped = self.skipped(index, error, self.where)
        once = ErrorSummary(1, *summary(error), time())
        self._aside += (attrs.evolve(skipped, attempts=1, errors=(once,), reason="no roll-back"),)
        self.blamed = None

    # -- what is ours in the transaction

    def join(self, transaction: Any) -> Work[Any]:
        """The job store as seen through the open transaction; None if there is none, or it is somewhere else."""
        if self.course.claim is None or transaction is None:
            return None
        self.where = "store"
        joined = yield lambda: self.step.jobs.joined(transaction)
        if joined is not None:
            self.course.claim.within = joined if joined.snapshot else None
        return joined

    def has_happened(self, joined: Any) -> Work[bool]:
        """Whether the commit before this attempt only seemed to fail."""
        if joined is None or not self.course.doubt:
            return False
        claim = self.course.claim
        happened = yield lambda: joined.moved(claim)
        self.course.doubt = False
        return bool(happened)

    def _ask_recoveries(self, transaction: Any) -> Work[None]:
        """Tell of the condemned ones first: the transaction ends with one whose recovery closes the chunk."""
        self.where, self.closes = "store", False
        self.end, self.live = self.goal, self.chunk.live(self.goal)
        for index, skipped in self.chunk.skipped(self.goal).items():
            if (yield from self.recovery_of(transaction, skipped)) is None:
                self.end, self.closes = index + 1, True
                self.live = self.chunk.live(self.end)
                return

    def recovery_of(self, transaction: Any, skipped: SkippedItem) -> Work[Any]:
        """What the step's own recovery of a skipped item gives; None if there is none."""
        if self.step.on_skip is None:
            return None
        return (yield from self._hook(partial(self.step.on_skip, transaction, skipped)))

    def store(self, transaction: Any, joined: Any, tally: Tally) -> Work[None]:
        """Record who is skipped, and store position and counts, in the transaction if the job store is there."""
        self.where = "store"
        step, course = self.step, self.course
        if not step.none_closes_chunk:
            for skipped in tally.skipped:
                yield from self.recovery_of(transaction, skipped)
        if joined is not None:
            claim, position, counts = course.claim, self.chunk.position(self.end), course.counts_with(tally)
            self.revision = yield lambda: joined.book(claim, position, counts, self.step.parked(tally.skipped))
        self._spend("store")
