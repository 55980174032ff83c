"""A step divided into partitions, each a job of its own: whoever is free takes the next, on any machine.

The database is the coordinator. A partition is claimed as any job is, so one that runs somewhere is left alone, and one
whose process has died is taken over by whoever looks next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from retrykit.batch.report import Report
from retrykit.batch.step import ChunkStep
from retrykit.check import wrong_type, wrong_value
from retrykit.clock import SYSTEM_CLOCK, Clock
from retrykit.errors import JobError, JobFinishedError, JobLostError, JobRunningError

_log = logging.getLogger("retrykit.batch")


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


def run_partitions(
    make: Callable[[int, int], ChunkStep],
    parts: int,
    parameters: Mapping[str, Any] | None = None,
    *,
    since: float | None = None,
    poll: float = 1.0,
    clock: Clock = SYSTEM_CLOCK,
) -> Division:
    """Run partitions until all of them are finished, or have failed: here, or in other processes that do the same.

    `make(part, parts)`: the step for a partition, counted from 1; with a job store that all share. The job of a
    partition has the parameters, and `"partition": "3/8"`. One that failed is not started again by this call, nor one
    that failed elsewhere at `since` (epoch seconds, by the clock of the store; default: now) or later. While others run
    what is left it is looked at every `poll` seconds: should they die, it is taken over. `JobError` if the job was
    begun with another number of parts, or undivided.
    """
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise wrong_value("parts", "an int, at least 1", parts)
    if not callable(make):
        raise wrong_type("make", "callable as make(part, parts)", make)
    return _Worker(make, parts, dict(parameters or {}), since).work(poll, clock)


class _Worker:
    def __init__(self, make: Callable[[int, int], ChunkStep], parts: int, parameters: Any, since: float | None) -> None:
        self.make = make
        self.parts = parts
        self.parameters = parameters
        self.since = since
        self.reports: dict[int, Report] = {}
        self.failures: dict[int, str] = {}

    def work(self, poll: float, clock: Clock) -> Division:
        left = list(range(1, self.parts + 1))
        while left := [part for part in left if not self._is_over(part)]:
            clock.sleep(poll)
        return Division(reports=self.reports, failures=self.failures)

    def _is_over(self, part: int) -> bool:
        """Run a partition, if it is to be run and nobody does. False: somebody does."""
        step = self._step(part)
        parameters = step.jobs.partition(self.parameters, part, self.parts)
        if self._has_failed(step, part, parameters):
            return True
        try:
            report = self.reports[part] = step.run(parameters)
        except JobFinishedError:
            return True
        except JobRunningError:
            return False
        except JobLostError as error:
            # Perhaps it was stopped from elsewhere, which its state says; else it is another's now.
            _log.warning("partition %d of %d of %s: %s", part, self.parts, step.name, error)
            return self._has_failed(step, part, parameters)
        except JobError:
            # Not this partition's: the job was begun in another number of them.
            raise
        except Exception as error:  # noqa: BLE001 - the partition ends here, and is recorded as failed
            # The others have nothing to do with it.
            _log.exception("partition %d of %d of %s has failed", part, self.parts, step.name)
            self.failures[part] = f"{type(error).__name__}: {error}"
            return True
        if report.status != "finished":
            self.failures[part] = f"stopped: {report.reason}"
        return True

    def _step(self, part: int) -> ChunkStep:
        step = self.make(part, self.parts)
        if not isinstance(step, ChunkStep):
            raise wrong_type("make", "a function that gives a ChunkStep", step)
        if step.jobs is None:
            raise JobError(f"{step.name}: partitions are claimed in a job store: give the step `jobs`")
        return step

    def _has_failed(self, step: ChunkStep, part: int, parameters: Mapping[str, Any]) -> bool:
        if self.since is None:
            self.since = step.jobs.now()
        job = step.jobs.state(step.name, parameters)
        if job is None or job.status not in {"failed", "stopped"} or job.updated_at.timestamp() < self.since:
            return False
        self.failures[part] = f"{job.status}: {job.reason}" if job.status == "stopped" else str(job.reason)
        return True
