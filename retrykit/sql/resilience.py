"""Trying a verb again when what stopped it passes: a connection lost, a server starting or ending, a deadlock.

Whether and when is a retry template's to decide. The first pause is short: a pool whose server was restarted holds
nothing but dead connections, of which the first that is found dead condemns the others.

In an event loop the same template runs, and its pauses let other tasks go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

import attrs
from sqlalchemy.util import await_only

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.clock import SYSTEM_CLOCK, Clock, SystemClock
from retrykit.errors import CacheCapacityError
from retrykit.policy import (
    CompositeRetryPolicy,
    NeverRetryPolicy,
    PredicateRetryPolicy,
    RetryPolicy,
    TimeoutRetryPolicy,
)
from retrykit.sql.dialects import Database
from retrykit.template import RetryTemplate

T = TypeVar("T")

_PAUSES: Final = ExponentialBackOffPolicy(0.01, 2.0, 0.5, jitter=0.5)


class _LoopClock(SystemClock):
    """A clock for blocking code that an event loop runs by the way (`greenlet_spawn`): its pauses are awaited."""

    def sleep(self, seconds: float) -> None:
        """Suspend the task that runs the code."""
        await_only(asyncio.sleep(seconds))


_LOOP_CLOCK: Final = _LoopClock()


@attrs.frozen(eq=False)
class Resilience:
    """For up to `patience` seconds; 0: never."""

    _template: RetryTemplate

    def run(self, work: Callable[[bool], T]) -> T:
        """The answer of `work(again)`. `again`: a try before this one may have done it, and could not say so."""
        return self._template.execute(lambda context: work(context.attempt > 1))


def resilience(database: Database, patience: float, *, evicts: bool, in_loop: bool) -> Resilience:
    """What tries again on one kind of database. `evicts`: a full store finds room, if not at once."""

    def passes(error: BaseException) -> bool:
        return database.passes(error) or (evicts and isinstance(error, CacheCapacityError))

    policy: RetryPolicy = NeverRetryPolicy()
    if patience > 0:
        policy = CompositeRetryPolicy((PredicateRetryPolicy(passes), TimeoutRetryPolicy(patience)))
    clock: Clock = _LOOP_CLOCK if in_loop else SYSTEM_CLOCK
    template = RetryTemplate(
        name="retrykit.sql", retry_policy=policy, back_off_policy=_PAUSES, clock=clock, throw_last=True
    )
    return Resilience(template)
