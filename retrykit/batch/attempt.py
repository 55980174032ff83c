"""One call of the template for a group of items: its attempts and its recovery."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

from retrykit.batch.effects import Effects, meant
from retrykit.batch.errors import ItemError
from retrykit.batch.inplace import WriteInPlace
from retrykit.batch.ledger import Run
from retrykit.batch.lending import lent
from retrykit.batch.processing import processed, processed_later
from retrykit.batch.recovery import Recovery
from retrykit.batch.report import SkippedItem, Tally
from retrykit.batch.source import Chunk
from retrykit.batch.vetoes import begin_after, vetoed
from retrykit.batch.work import Work
from retrykit.check import closes_without_commit, wrong_type
from retrykit.context import RetryContext
from retrykit.key import check_key
from retrykit.policy import is_crash
from retrykit.state import KEEP_VETO, RetryState


def _in_place(error: Exception) -> bool:  # noqa: ARG001 - the signature of `rollback_for`
    """A chunk stays in hand: what fails is tried again here, after the roll-back, and not rethrown to a source."""
    return False


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


class Attempt(Effects):
    """The attempts to settle the items of a chunk that are not done, up to `end`. The template calls it.

    `whole`: it is the first time that they are tried, so failures are repeated as the policy says. `where`: what the
    attempt is doing that runs now, or was doing when it failed. `culprit` is known after a failure.
    """

    tries = 0
    anew: bool = False
    """What is counted of its single item is left behind."""
    aside: SkippedItem | None = None
    """The record of the only item, if that is to be put aside without having been tried, and leaves a mark."""

    def __init__(self, run: Run, chunk: Chunk, end: int, *, whole: bool = True) -> None:
        self.ledger = run.ledger
        self.step = run.step
        self.perform = run.perform
        self.whole = whole
        self.chunk = chunk
        self.end = self.goal = end
        self.live = chunk.live(end) if chunk.condemned else range(chunk.done, end)
        if not self.live and self.step.settles_once:
            self.aside = chunk.aside(end)

    # -- the call of the template

    def execute(self) -> Any:
        """What has committed, as a `Tally`; or an awaitable of it."""
        self.ledger.mark = perf_counter()
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
        elif self.ledger.careful:
            # What has no name is known by its place, for as long as it may kill.
            key = (self.ledger.claim.id, self.chunk.number + self.live[0] + 1)
        else:
            return None
        # What a run has counted that ended in good order says nothing of what came since: a mended program, or file.
        crashed = self.ledger.continues_a_crash
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
        if self.tally is not None:
            self.note_failed_commit()
        self.where = "begin"
        if self.tries and len(self.live) > 1 and self.step.key is not None:
            return begin_after(self.perform(self.heed_vetoes()), lambda: _committing(self.step.transaction()))
        manager = self.step.transaction()
        return _committing(manager) if hasattr(manager, "in_transaction") else manager

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
            self.ledger.doubt = self.revision is not None

    # -- one attempt

    def __call__(self, context: RetryContext) -> Any:
        """The callback of the template: the tally, or an awaitable of it."""
        return self.perform(self._attempt(context))

    def _attempt(self, context: RetryContext) -> Work[Tally]:
        """What there is nothing to do for costs nothing: most chunks have no trouble."""
        self.context = context
        if self.tries:
            yield from self._again(context)
        else:
            self.ledger.spend("transaction")
        self.tries += 1
        step, ledger, chunk, transaction = self.step, self.ledger, self.chunk, context.transaction
        try:
            joined = None if ledger.claim is None else (yield from self.join(transaction))
            self.lent = lent(transaction)
            if ledger.doubt and (yield from self.has_happened(joined)):
                self.where = "commit"
                return self.tally  # type: ignore[no-any-return]
            if step.none_closes_chunk and chunk.condemned:
                yield from self._ask_recoveries(transaction)
            if step.processor is None:
                outputs, origins = chunk.chosen(self.live, self.end), self.live
            else:
                outputs, origins = yield from self._process()
            written = len(outputs)
            if step.in_place and outputs:
                written = yield from WriteInPlace(self, transaction, outputs, origins).run()
            else:
                yield from self.write(transaction, outputs, origins)
            tally = self.make_tally(written, self._aside)
            if joined is not None or tally.skipped:
                yield from self.store(transaction, joined, tally)
        except Exception as error:
            self.failures += 1
            self._raised = error
            self._named |= {self.blamed}
            ledger.spend("failed")
            raise
        # As `finish` says.
        self.tally, self.where = tally, "commit"
        return tally

    def _again(self, context: RetryContext) -> Work[None]:
        """What was known of the last attempt is over."""
        if context.transaction is None and len(self.live) > 1 and self.step.key is not None:
            yield from self.heed_vetoes()
        self.ledger.spend("between")
        self.blamed = None
        self._aside = ()

    def _ask_recoveries(self, transaction: Any) -> Work[None]:
        """Tell of the condemned ones first: the transaction ends with one whose recovery closes the chunk."""
        self.where, self.closes = "store", False
        self.end, self.live = self.goal, self.chunk.live(self.goal)
        for index, skipped in self.chunk.skipped(self.goal).items():
            if (yield from self.recovery_of(transaction, skipped)) is None:
                self.end, self.closes = index + 1, True
                self.live = self.chunk.live(self.end)
                return

    def _process(self) -> Work[tuple[list[Any], Sequence[int]]]:
        """What the writer is given, and of each the index of the item that it was made of."""
        self.where = "process"
        named: ItemError | None = None
        outputs, origins = [], ()
        context: Any = self.context
        context.on_veto = self._note_veto
        try:
            outputs, origins = yield from self.hook(
                partial(processed_later if self.step.asynchronous else processed, self)
            )
        except ItemError as error:
            named = error
        finally:
            # It knows this attempt, which knows the context.
            context.on_veto = None
        if named is not None:
            # The processor has one item, and that is to blame in any case.
            raise meant(named)
        self.blamed = None
        self.ledger.spend("process")
        return outputs, origins

    def _note_veto(self) -> None:
        self._vetoing = self.blamed
