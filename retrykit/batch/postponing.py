"""A partition that waits for attempts that others make of its items, and goes on when those may be over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.errors import AttemptsInFlightError

LONGEST: Final = 30.0
"""Seconds after which it is looked at again in any case: an attempt may end long before its lease does."""


class Pauses:
    """How long partitions wait: each time longer, and not beyond the lease of what they wait for.

    `shortest`: seconds, the first pause.
    """

    def __init__(self, shortest: float) -> None:
        self._back_off = ExponentialBackOffPolicy(initial=shortest, max_interval=max(shortest, LONGEST))
        self._times: Counter[int] = Counter()

    def next(self, part: int, error: AttemptsInFlightError, now: float) -> float:
        """Seconds; `now` by the clock that the lease goes by."""
        self._times[part] += 1
        until = vars(error).get("until")
        pause = self._back_off.interval(self._times[part])
        return pause if until is None else min(pause, max(until - now, self._back_off.initial))


class Withholding:
    """A job store for one run, which keeps it to itself that this has failed until somebody knows what follows.

    So nobody takes a partition for one that has failed when it is to go on. `since`: what was stopped then or later,
    perhaps while the step was made, is not begun.
    """

    def __init__(self, jobs: Any, since: float | None = None) -> None:
        self._jobs = jobs
        self._since = since
        self._claim: Any = None
        self._tell: Any = None

    def __getattr__(self, verb: str) -> Any:
        return getattr(self._jobs, verb)

    def claim(self, name: str, parameters: Mapping[str, Any], *, again: bool = False) -> Any:
        """As of a `SqlJobStore`; maybe an awaitable."""
        return self._jobs.claim(name, parameters, again=again, since=self._since)

    def release(self, claim: Any, *, status: str, reason: str, counts: Mapping[str, Any]) -> Any:
        """As of a `SqlJobStore`, but for a failure."""
        tell = partial(self._jobs.release, claim, reason=reason, counts=counts)
        if status != "failed":
            return tell(status=status)
        self._claim, self._tell = claim, tell
        return None

    def tell(self, pause: float | None) -> Any:
        """Say that the run has failed, if it has; or that it goes on after a pause. Maybe an awaitable."""
        tell, self._tell = self._tell, None
        if tell is None:
            return None
        return tell(status="failed") if pause is None else tell(status="stopped", pause=pause)

    def close(self) -> None:
        """Let go of a job of which nothing was said after all."""
        if self._tell is not None:
            self._jobs.abandon(self._claim)
