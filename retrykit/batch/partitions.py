"""A step divided into partitions, each a job of its own: whoever is free takes the next, on any machine.

The database is the coordinator. A partition is claimed as any job is, so one that runs somewhere is left alone, and one
whose process has died is taken over by whoever looks next. A finished run is followed by another one when somebody
wants it again: all partitions begin anew in one transaction, provided that each of them is finished; who comes while
they run takes part.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final, Protocol

import attrs

from retrykit.batch.postponing import Pauses, Withholding
from retrykit.batch.report import Report
from retrykit.batch.step import AsyncChunkStep, ChunkStep
from retrykit.batch.work import Work, async_drive, drive
from retrykit.check import Seconds, seconds, wrong_type, wrong_value
from retrykit.clock import SYSTEM_CLOCK, Clock
from retrykit.errors import (
    AttemptsInFlightError,
    JobBusyError,
    JobError,
    JobFinishedError,
    JobLostError,
    JobRunningError,
)

_log = logging.getLogger("retrykit.batch")

Make = Callable[[int, int], ChunkStep | AsyncChunkStep]

POLL: Final = 1.0
"""Seconds between two looks at what others run."""

_SAID: Final = {
    "begun": "all partitions of %s begin anew (%d)",
    "joined": "not all partitions of %s are finished (%d): what is left is run, and nothing begins anew",
    "done": "the partitions of %s have been run again already (%d)",
}


@attrs.frozen(kw_only=True)
class Division:
    """What has become of the partitions, by their numbers from 1: those that ran here, and what stopped those that
    failed, here or elsewhere.
    """

    reports: Mapping[int, Report]
    failures: Mapping[int, str]

    @property
    def finished(self) -> bool:
        """Whether every partition is."""
        return not self.failures


class Watch(Protocol):
    """Who is told of the partitions that run here."""

    def __call__(self, part: int, report: Report, earlier: Mapping[str, Any], /) -> Any:
        """After each transaction, and at the end. `earlier`: the counts, in JSON, with which this run began."""


def run_partitions(
    make: Make,
    parts: int,
    parameters: Mapping[str, Any] | None = None,
    *,
    again: bool | datetime = False,
    since: float | None = None,
    poll: Seconds = POLL,
    clock: Clock = SYSTEM_CLOCK,
) -> Division:
    """Run partitions until all of them are finished, or have failed: here, or in other processes that do the same.

    `make(part, parts)`: the step for a partition, counted from 1; with a name and a job store that all share. It is
    called when a partition is to be run here, and for the first one before anything else. The job of a partition has
    the parameters, and `"partition": "3/8"`. Steps that are asynchronous run in an event loop that lasts
    as long as the call. One that failed is not started again by this call, nor one that failed elsewhere at `since`
    (epoch seconds, by the clock of the store; default: now) or later. While others run what is left it is looked at
    every `poll` seconds: should they die, it is taken over. A partition that finds an item in the hands of another
    process (`AttemptsInFlightError`) is left for later: it pauses, `poll` seconds at first and 30 at most, never beyond
    the lease of what it waits for. `JobError` if the job was begun with another number of
    parts, or undivided. `ValueError` if a parameter is named "partition".

    `again`: when each partition is finished they all begin anew, in this number of parts. If some are not, those are
    run, and nothing else: so of several processes that say it one begins, and the others take part. One that says it
    when all is finished begins once more. An instant in place of True prevents that: they begin anew only if they were
    begun before it, by the clock of the store; `JobError` if a run that was begun before it is not finished yet, or if
    it is in the future. `JobError` too if the job was begun in another number of parts and is not finished.
    """
    worker = Worker(make, parts, dict(parameters or {}), again=again, since=since, poll=poll, clock=clock)
    return _run_in_a_loop(worker.run()) if worker.asynchronous else drive(worker.run())


def _run_in_a_loop(work: Work[Division]) -> Division:
    # A program without asynchronous steps need not load it.
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(async_drive(work))
    raise RuntimeError("an event loop is running here: await async_run_partitions()")


async def async_run_partitions(
    make: Callable[[int, int], AsyncChunkStep],
    parts: int,
    parameters: Mapping[str, Any] | None = None,
    *,
    again: bool | datetime = False,
    since: float | None = None,
    poll: Seconds = POLL,
    clock: Clock = SYSTEM_CLOCK,
) -> Division:
    """`run_partitions` of steps that are asynchronous, in the caller's event loop: one partition after the other."""
    worker = Worker(make, parts, dict(parameters or {}), again=again, since=since, poll=poll, clock=clock)
    if not worker.asynchronous:
        raise wrong_type("make", "a function that gives an AsyncChunkStep", worker.first)
    return await async_drive(worker.run())


class Worker:
    """One process that runs partitions. `watch`: who is told of them; `check`: called after each transaction, and may
    interrupt. `poll`: seconds between two looks at the others.

    The step of a partition is made when it is to be run, and once. That of the first one says before what all have in
    common: the name, the job store, the class.
    """

    def __init__(
        self,
        make: Make,
        parts: int,
        parameters: Any,
        *,
        again: bool | datetime = False,
        since: float | None = None,
        poll: Seconds = POLL,
        clock: Clock = SYSTEM_CLOCK,
        watch: Watch | None = None,
        check: Callable[[], object] = lambda: None,
        says_what_it_waits_for: bool = True,
    ) -> None:
        if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
            raise wrong_value("parts", "an int, at least 1", parts)
        if not callable(make):
            raise wrong_type("make", "callable as make(part, parts)", make)
        if not isinstance(again, bool | datetime):
            raise wrong_type("again", "a bool or a datetime", again)
        if "partition" in parameters:
            raise wrong_value("parameters", 'without "partition", which says of each job which one it is', parameters)
        if isinstance(again, datetime) and again.tzinfo is None:
            raise wrong_value("again", "an instant with its time zone", again)
        interval = seconds("poll", poll)
        if interval <= 0:
            raise wrong_value("poll", "more than 0 seconds", poll)
        self.make = make
        self.parts = parts
        self.parameters = parameters
        self.again = again
        self.since = since
        self.watch = watch
        self.check = check
        self.reports: dict[int, Report] = {}
        self.failures: dict[int, str] = {}
        self.first = self._checked(make(1, parts))
        self.name, self.jobs, self.asynchronous = self.first.name, self.first.jobs, self.first.asynchronous
        self._made = {1: self.first}
        """Steps that have not read anything."""
        self._perform: Any = async_drive if self.asynchronous else drive
        self._pause = partial(clock.async_sleep if self.asynchronous else clock.sleep, interval)
        self._pauses = Pauses(interval)
        self._says = says_what_it_waits_for

    def run(self) -> Work[Division]:
        """All of it."""
        yield from self.begin()
        return (yield from self.share())

    def begin(self) -> Work[None]:
        """Let them begin anew, if that is wanted; what fails from now on is not started again."""
        if self.since is None:
            self.since = yield self.jobs.now
        if self.again is False:
            return
        before = self.again if isinstance(self.again, datetime) else None
        found = yield lambda: self.jobs.begin_again(self.name, self.parameters, self.parts, before=before)
        _log.info(_SAID[found], self.name, self.parts)

    def share(self) -> Work[Division]:
        """Run what is free until nothing is left, looking again and again at what is not."""
        left, said = list(range(1, self.parts + 1)), None
        while left:
            before, left = left, (yield from self._left_of(left))
            if left != before:
                # It took its time: what was looked at first may be free by now.
                continue
            if self._says and left != said:
                names = ", ".join(map(str, left))
                _log.info(
                    "waiting for partitions of %s that others run, or that pause: %s of %d",
                    self.name,
                    names,
                    self.parts,
                )
                said = left
            yield self._pause
        return Division(reports=self.reports, failures=self.failures)

    def _left_of(self, parts: list[int]) -> Work[list[int]]:
        left = []
        for part in parts:
            if not (yield from self._is_over(part)):
                left.append(part)  # noqa: PERF401 - no comprehension may yield
        return left

    # -- one partition

    def state_of(self, part: int) -> Any:
        """The stored job of a partition, None if it was never begun; or an awaitable of it."""
        return self.jobs.state(self.name, self.parameters_of(part))

    def parameters_of(self, part: int) -> dict[str, Any]:
        """What identifies the job of a partition, beside the name."""
        return self.jobs.partition(self.parameters, part, self.parts)  # type: ignore[no-any-return]

    def _is_over(self, part: int) -> Work[bool]:
        """Run a partition, if it is to be run and nobody does. False: somebody does, or it waits."""
        job = yield partial(self.state_of, part)
        if job is None:
            return (yield from self._try(part))
        if job.status == "finished" or self._has_failed(part, job):
            return True
        return not self.jobs.is_taken(job) and (yield from self._try(part))

    def _try(self, part: int) -> Work[bool]:
        step = self._step(part)
        return step is None or (yield from self._try_with(step, part))

    def _try_with(self, step: ChunkStep | AsyncChunkStep, part: int) -> Work[bool]:
        course = self._course(step, part)
        try:
            report = self.reports[part] = yield from self._run(course, part)
        except JobFinishedError:
            return True
        except (JobRunningError, JobBusyError):
            self._keep(part, step)
            return False
        except AttemptsInFlightError:
            return False
        except JobLostError as error:
            return (yield from self._has_lost(part, error))
        except Exception as error:
            if isinstance(error, JobError) and course.claim is None:
                # Not this partition's: the job was begun in another number of them.
                raise
            # The others have nothing to do with it.
            _log.exception("partition %d of %d of %s has failed", part, self.parts, self.name)
            self.failures[part] = f"{type(error).__name__}: {error}"
            # As others are told it, if it could be stored.
            self._has_failed(part, (yield partial(self.state_of, part)))
            return True
        if report.status != "finished":
            self.failures[part] = f"stopped: {report.reason}"
        return True

    def _has_failed(self, part: int, job: Any) -> bool:
        """Whether the partition has failed, or was stopped, since this run of all of them began; not for a while."""
        if job is None or not self.jobs.has_ended(job, self.since):
            return False
        self.failures[part] = f"{job.status}: {job.reason}" if job.status == "stopped" else str(job.reason)
        return True

    def _has_lost(self, part: int, error: JobLostError) -> Work[bool]:
        """Whether the partition is over: it was stopped from elsewhere, which its state says; else it is another's."""
        if self._has_failed(part, (yield partial(self.state_of, part))):
            _log.info("partition %d of %d of %s is %s", part, self.parts, self.name, self.failures[part])
            return True
        _log.warning("partition %d of %d of %s: %s", part, self.parts, self.name, error)
        return False

    # -- its run

    def _course(self, step: ChunkStep | AsyncChunkStep, part: int) -> Any:
        course: Any = step.course(self.parameters_of(part), self._perform)
        watch, told = self.watch, step.on_progress

        def heard(report: Report) -> Any:
            if watch is not None:
                watch(part, report, course.claim.counts)
            self.check()
            return None if told is None else told(report)

        course.step = attrs.evolve(step, on_progress=heard, jobs=Withholding(step.jobs, self.since))
        return course

    def _run(self, course: Any, part: int) -> Work[Report]:
        jobs = course.step.jobs
        try:
            return (yield from course.run(again=False))  # type: ignore[no-any-return]
        except AttemptsInFlightError as error:
            pause = self._pauses.next(part, error, course.step.template.time())
            _log.info("partition %d of %d of %s goes on in %.3g s: %s", part, self.parts, self.name, pause, error)
            yield from self._tell(part, partial(jobs.tell, pause))
            raise
        except Exception:
            yield from self._tell(part, partial(jobs.tell, None))
            raise
        finally:
            jobs.close()
            if self.watch is not None and course.claim is not None:
                # Of attempts that failed after the last commit nobody has heard yet.
                self.watch(part, course.report("running"), course.claim.counts)

    def _tell(self, part: int, call: Callable[[], Any]) -> Work[None]:
        """Have the store told of the end of a run that has failed: what it has failed with is what counts."""
        try:
            yield call
        except Exception:  # noqa: BLE001 - the run has ended with another failure, which is raised on
            _log.exception("partition %d of %d of %s: telling the job store failed", part, self.parts, self.name)

    # -- steps

    def _step(self, part: int) -> ChunkStep | AsyncChunkStep | None:
        """The step of a partition; None, and it has failed, if it could not be made. `TypeError`, `ValueError`,
        `JobError` for one that cannot be run.
        """
        kept = self._made.pop(part, None)
        if kept is not None:
            return kept
        try:
            made = self.make(part, self.parts)
        except Exception as error:  # noqa: BLE001 - the user's function: the other partitions have nothing to do with it
            _log.exception("the step of partition %d of %d of %s cannot be made", part, self.parts, self.name)
            self.failures[part] = f"{type(error).__name__}: {error}"
            return None
        step = self._checked(made)
        if self.asynchronous != step.asynchronous:
            raise wrong_type("make", "a function that gives steps of one class", step)
        if self.name != step.name:
            raise wrong_value("make", f"a function that gives steps of one name ({self.name!r})", step.name)
        return step

    @staticmethod
    def _checked(step: Any) -> ChunkStep | AsyncChunkStep:
        if not isinstance(step, ChunkStep | AsyncChunkStep):
            raise wrong_type("make", "a function that gives a ChunkStep or an AsyncChunkStep", step)
        if step.jobs is None:
            raise JobError(f"{step.name}: partitions are claimed in a job store: give the step `jobs`")
        return step

    def _keep(self, part: int, step: ChunkStep | AsyncChunkStep) -> None:
        """Keep a step that has not read anything for the next time, unless it can be begun only once."""
        if not isinstance(step.reader, Iterator | AsyncIterator):
            self._made[part] = step
