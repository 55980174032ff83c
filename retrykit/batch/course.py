"""THE course of a step: from its claim on the job, chunk by chunk, to its report; and who is told of it meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any

from retrykit.batch.arguments import check_position
from retrykit.batch.attempt import Attempt
from retrykit.batch.errors import StepStopped, is_veto
from retrykit.batch.frames import forget_frames
from retrykit.batch.ledger import Ledger, Run
from retrykit.batch.report import SHOWN, Report, SkippedItem, Status, Tally, kind_of
from retrykit.batch.settling import Failed, Settling
from retrykit.batch.source import Source
from retrykit.batch.work import Work
from retrykit.check import wrong_type
from retrykit.failure import message_of

_log = logging.getLogger("retrykit.batch")


class Course:
    """One run of a step. `perform`: drives the work inside an attempt, by calling or by awaiting."""

    def __init__(self, step: Any, parameters: dict[str, Any], perform: Callable[[Work[Any]], Any]) -> None:
        self.step = step
        self.parameters = parameters
        self.perform = perform
        self.ledger = Ledger()
        self.settling: Settling | None = None
        self.skipped: list[SkippedItem] = []
        self.started_at = datetime.now(UTC)
        self.started = perf_counter()

    @property
    def claim(self) -> Any:
        """The claim on the job; None if there is none yet, or no job store."""
        return self.ledger.claim

    # -- from beginning to end

    def run(self, *, again: bool) -> Work[Report]:
        """The whole run."""
        if not isinstance(again, bool):
            raise wrong_type("again", "True or False (an instant is for run_partitions)", again)
        position = yield from self.ledger.open(self.step, self.parameters, again=again)
        source = None
        try:
            source = Source(self.step.reader, position, self.ledger.counts.read)
            yield from self._write_all(source)
        except GeneratorExit:
            if self.claim is not None:
                self.step.jobs.abandon(self.claim)
            raise
        except StepStopped as stopped:
            forget_frames(stopped, locals_only=True)
            if stopped.job and self.claim is not None:
                yield from self._quietly(partial(self.ledger.stop_others, stopped.reason), "stopping the job")
            return (yield from self._leave(source, "stopped", stopped.reason))
        except BaseException as error:
            status: Status = "failed" if isinstance(error, Exception) else "stopped"
            if status == "stopped":
                forget_frames(error, locals_only=True)
            place = "" if self.settling is None or status == "stopped" else self.settling.place
            where = f"{place}: " if place else ""
            if place:
                # Not every exception can carry a note: one that is frozen goes on its way without.
                with suppress(Exception):
                    error.add_note(f"retrykit: step {self.step.name} has stopped at {place}")
            yield from self._leave(source, status, f"{where}{type(error).__name__}: {message_of(error)}")
            raise
        return (yield from self._leave(source, "finished", ""))

    def _write_all(self, source: Source) -> Work[None]:
        tells_all = source.settled is not None or self.step.on_progress is not None
        run = Run(self.step, self.ledger, self.perform)
        settling = self.settling = Settling(run, partial(self._tell, source), tells_all=tells_all)
        size = self.step.chunk_size
        unchecked = self.claim is not None and source.positioned
        while True:
            self.ledger.mark = perf_counter()
            chunk = source.take(size) if source.at_once else (yield partial(source.take, size))
            self.ledger.spend("read")
            if chunk is None:
                return
            if unchecked:
                check_position(chunk.positions)
                unchecked = False
            if source.positioned:
                yield from settling.condemn_unreadable(chunk)
            if self.step.key is not None:
                yield from settling.heed_vetoes(chunk, chunk.live(len(chunk.items)))
            failed: Failed | None = None
            if not (chunk.condemned or self.ledger.careful):
                # So `settle` begins too; for most chunks that is all, and costs them two generators less.
                attempt: Any = Attempt(run, chunk, len(chunk.items))
                error = yield from settling.execute(attempt)
                failed = None if error is None else (attempt, error)
            if chunk.done < len(chunk.items):
                yield from settling.settle(chunk, len(chunk.items), failed)
            self.ledger.careful = False
            # What is done with is let go of before more is read.
            chunk = attempt = failed = None

    def _leave(self, source: Source | None, status: Status, reason: str) -> Work[Report]:
        """Let go of everything: what fails here is logged, the outcome stands."""
        if source is not None:
            yield from self._quietly(source.close, "closing the reader")
        if self.claim is not None:
            end = partial(self.ledger.release, status, reason)
            yield from self._quietly(end, "telling the job store of the end", raises=status == "finished")
        return self.report(status, reason)

    def _quietly(self, call: Callable[[], Any], what: str, *, raises: bool = False) -> Work[None]:
        try:
            yield call
        except Exception:
            if raises:
                raise
            _log.exception("step %s: %s failed", self.step.name, what)

    def report(self, status: Status, reason: str = "") -> Report:
        """What the run has come to so far."""
        return Report(
            name=self.step.name,
            parameters=self.parameters,
            status=status,
            reason=reason,
            counts=self.ledger.counts.copy(),
            skipped=tuple(self.skipped),
            started_at=self.started_at,
            seconds=perf_counter() - self.started,
        )

    # -- who is told

    def _tell(self, source: Source, items: list[Any], tally: Tally) -> Work[None]:
        """The transaction of these items has committed, and counts."""
        if source.settled is not None:
            yield partial(source.settled, items)
        for skipped in tally.skipped:
            self._tell_of(skipped)
        hears = self.step.on_progress
        if hears is not None:
            yield lambda: hears(self.report("running"))

    def _tell_of(self, skipped: SkippedItem) -> None:
        if len(self.skipped) < SHOWN:
            forget_frames(skipped.error)
            self.skipped.append(skipped)
        if is_veto(skipped.error):
            _log.warning("step %s: item %d is skipped: %s", self._name, skipped.number, skipped.reason)
            return
        times = "once" if skipped.attempts == 1 else f"{skipped.attempts} times"
        # Not what it says: that may be the item's content, and is with the parked item.
        facts = (self._name, skipped.number, skipped.phase, kind_of(skipped.error), times)
        _log.warning("step %s: item %d is skipped: %s raised %s (%s)", *facts)

    @property
    def _name(self) -> str:
        """As logs have it: which partition an item is of is not seen from its number."""
        part = self.parameters.get("partition")
        return self.step.name if part is None else f"{self.step.name} {part}"
