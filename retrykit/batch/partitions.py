"""A step divided into partitions, each a job of its own: whoever is free takes the next, on any machine.

The database is the coordinator. A partition is claimed as any job is, so one that runs somewhere is left alone, and one
whose process has died is taken over by whoever looks next. A finished run is followed by another one when somebody
wants it again: all partitions begin anew in one transaction, provided that each of them is finished; who comes while
they run takes part.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final, Protocol

import attrs

from retrykit.batch.report import Report
from retrykit.batch.step import AsyncChunkStep, ChunkStep
from retrykit.batch.work import Work, async_drive, drive
from retrykit.check import wrong_type, wrong_value
from retrykit.clock import SYSTEM_CLOCK, Clock
from retrykit.errors import (
    JobBusyError,
    JobError,
    JobFinishedError,
    JobLostError,
    JobRunningError,
)

_log = logging.getLogger("retrykit.batch")

Make = Callable[[int, int], ChunkStep | AsyncChunkStep]

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
    poll: float = 1.0,
    clock: Clock = SYSTEM_CLOCK,
) -> Division:
    """Run partitions until all of them are finished, or have failed: here, or in other processes that do the same.

    `make(part, parts)`: the step for a partition, counted from 1; with a job store that all share. The job of a
    partition has the parameters, and `"partition": "3/8"`. Steps that are asynchronous run in an event loop that lasts
    as long as the call. One that failed is not started again by this call, nor one that failed elsewhere at `since`
    (epoch seconds, by the clock of the store; default: now) or later. While others run what is left it is looked at
    every `poll` seconds: should they die, it is taken over. `JobError` if the job was begun with another number of
    parts, or undivided. `ValueError` if a parameter is named "partition".

    `again`: when each partition is finished they all begin anew, in this number of parts. If some are not, those are
    run, and nothing else: so of several processes that say it one begins, and the others take part. One that says it
    when all is finished begins once more. An instant in place of True prevents that: they begin anew only if they were
    begun before it, by the clock of the store; `JobError` if a run that was begun before it is not finished yet, or if
    it is in the future. `JobError` too if the job was begun in another number of parts and is not finished.
    """
    worker = Worker(make, parts, dict(parameters or {}), again=again, since=since)
    if not worker.asynchronous:
        return drive(worker.run(partial(clock.sleep, poll)))
    return _run_in_a_loop(worker.run(partial(clock.async_sleep, poll)))


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
    poll: float = 1.0,
    clock: Clock = SYSTEM_CLOCK,
) -> Division:
    """`run_partitions` of steps that are asynchronous, in the caller's event loop: one partition after the other."""
    worker = Worker(make, parts, dict(parameters or {}), again=again, since=since)
    if not worker.asynchronous:
        raise wrong_type("make", "a function that gives an AsyncChunkStep", worker.step(1))
    return await async_drive(worker.run(partial(clock.async_sleep, poll)))


class Worker:
    """One process that runs partitions. `watch`: who is told of them."""

    def __init__(
        self,
        make: Make,
        parts: int,
        parameters: Any,
        *,
        again: bool | datetime = False,
        since: float | None = None,
        watch: Watch | None = None,
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
        self.make = make
        self.parts = parts
        self.parameters = parameters
        self.again = again
        self.since = since
        self.watch = watch
        self.reports: dict[int, Report] = {}
        self.failures: dict[int, str] = {}
        self._waiting: dict[int, ChunkStep | AsyncChunkStep] = {}
        """The steps of partitions that others run, for the next look at them."""
        self.asynchronous: bool | None = None
        self.asynchronous = self.step(1).asynchronous
        self._perform: Any = async_drive if self.asynchronous else drive

    def run(self, pause: Callable[[], Awaitable[None] | None]) -> Work[Division]:
        """All of it."""
        yield from self.begin()
        return (yield from self.share(pause))

    def share(self, pause: Callable[[], Awaitable[None] | None]) -> Work[Division]:
        """Run what is free until nothing is left; `pause` before looking again at what others run."""
        left = list(range(1, self.parts + 1))
        while True:
            left = yield from self._left_of(left)
            if not left:
                return Division(reports=self.reports, failures=self.failures)
            yield pause

    def _left_of(self, parts: list[int]) -> Work[list[int]]:
        left = []
        for part in parts:
            if not (yield from self._is_over(part)):
                left.append(part)  # noqa: PERF401 - no comprehension may yield
        return left

    def begin(self) -> Work[None]:
        """Let them begin anew, if that is wanted; what fails from now on is not started again."""
        step = self.step(1)
        if self.since is None:
            self.since = yield step.jobs.now
        if self.again is False:
            return
        before = self.again if isinstance(self.again, datetime) else None
        found = yield lambda: step.jobs.begin_again(step.name, self.parameters, self.parts, before=before)
        _log.info(_SAID[found], step.name, self.parts)

    def _is_over(self, part: int) -> Work[bool]:
        """Run a partition, if it is to be run and nobody does. False: somebody does."""
        step = self._waiting.pop(part, None) or self.step(part)
        parameters = step.jobs.partition(self.parameters, part, self.parts)
        if (yield from self._has_failed(step, part, parameters)):
            return True
        course = self._course(step, part, parameters)
        try:
            report = self.reports[part] = yield from self._run(course, part)
        except JobFinishedError:
            return True
        except (JobRunningError, JobBusyError):
            # It has not read anything: the next time it does as well as another one.
            self._waiting[part] = step
            return False
        except JobLostError as error:
            return (yield from self._has_lost(step, part, parameters, error))
        except Exception as error:
            if isinstance(error, JobError) and course.claim is None:
                # Not this partition's: the job was begun in another number of them.
                raise
            # The others have nothing to do with it.
            _log.exception("partition %d of %d of %s has failed", part, self.parts, step.name)
            self.failures[part] = f"{type(error).__name__}: {error}"
            # As others are told it, if it could be stored.
            yield from self._has_failed(step, part, parameters)
            return True
        if report.status != "finished":
            self.failures[part] = f"stopped: {report.reason}"
        return True

    def _has_lost(
        self, step: ChunkStep | AsyncChunkStep, part: int, parameters: Mapping[str, Any], error: JobLostError
    ) -> Work[bool]:
        """Whether the partition is over: it was stopped from elsewhere, which its state says; else it is another's."""
        if (yield from self._has_failed(step, part, parameters)):
            _log.info("partition %d of %d of %s is %s", part, self.parts, step.name, self.failures[part])
            return True
        _log.warning("partition %d of %d of %s: %s", part, self.parts, step.name, error)
        return False

    def _course(self, step: ChunkStep | AsyncChunkStep, part: int, parameters: Mapping[str, Any]) -> Any:
        watch, told = self.watch, step.on_progress
        if watch is None:
            return step.course(parameters, self._perform)

        def heard(report: Report) -> Any:
            watch(part, report, course.claim.counts)
            return None if told is None else told(report)

        course = attrs.evolve(step, on_progress=heard).course(parameters, self._perform)
        return course

    def _run(self, course: Any, part: int) -> Work[Report]:
        try:
            return (yield from course.run(again=False))  # type: ignore[no-any-return]
        finally:
            if self.watch is not None and course.claim is not None:
                # Of attempts that failed after the last commit nobody has heard yet.
                self.watch(part, course.report("running"), course.claim.counts)

    def step(self, part: int) -> ChunkStep | AsyncChunkStep:
        """The step of a partition. `TypeError`, `JobError` for one that cannot be run."""
        step = self.make(part, self.parts)
        if not isinstance(step, ChunkStep | AsyncChunkStep):
            raise wrong_type("make", "a function that gives a ChunkStep or an AsyncChunkStep", step)
        if self.asynchronous not in {None, step.asynchronous}:
            raise wrong_type("make", "a function that gives steps of one class", step)
        if step.jobs is None:
            raise JobError(f"{step.name}: partitions are claimed in a job store: give the step `jobs`")
        return step

    def _has_failed(self, step: ChunkStep | AsyncChunkStep, part: int, parameters: Mapping[str, Any]) -> Work[bool]:
        job = yield lambda: step.jobs.state(step.name, parameters)
        if job is None or job.status not in {"failed", "stopped"} or job.updated_at.timestamp() < self.since:
            return False
        self.failures[part] = f"{job.status}: {job.reason}" if job.status == "stopped" else str(job.reason)
        return True
