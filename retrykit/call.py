"""The facts of one call that the flow works on.

Its template's plan, its context, and what has been learned of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from retrykit.context import RetryContext
from retrykit.errors import RetryError
from retrykit.failure import StoredError
from retrykit.owner import begin
from retrykit.state import RetryState
from retrykit.steps import Raise, Step

Flow = Generator[Step, Any, Any]
Failure = tuple[Exception, float]


class Plan:
    """What all calls of one template have in common, worked out once."""

    __slots__ = (
        "back_off",
        "breaker_key",
        "breakers",
        "budgets",
        "evicts",
        "fronted",
        "lease",
        "listeners",
        "name",
        "now",
        "pauses",
        "policy",
        "quiet",
        "recovery_policy",
        "remember",
        "renews",
        "reversed_listeners",
        "tallied",
        "throw_last",
        "timed",
    )

    name: str
    policy: Any
    back_off: Any
    recovery_policy: Any
    listeners: tuple[Any, ...]
    reversed_listeners: tuple[Any, ...]
    breakers: tuple[Any, ...]
    budgets: tuple[Any, ...]
    breaker_key: str
    now: Callable[[], float] | None
    """The monotonic clock itself, where it is the machine's and cannot fail."""
    quiet: bool
    """Nobody has to be told or asked: no listeners, breakers or budgets."""
    pauses: bool
    tallied: bool
    timed: bool
    """A deadline is among the policies: time is looked at before each attempt."""
    evicts: bool
    """The store may forget a history that nobody settled."""
    fronted: bool
    """The cache tells what this process stored last, before it looks into the store."""
    throw_last: bool
    remember: float | None
    lease: float
    renews: bool
    """The store is shared by processes, which cannot see each other's attempts: leases of long ones are renewed."""

    def __init__(self, **facts: Any) -> None:
        for fact, value in facts.items():
            setattr(self, fact, value)


class Call:
    """One call as the flow sees it: facts that the driver gives, and what the flow has learned of the store."""

    plan: Plan
    context: RetryContext
    state: RetryState | None
    key: str | None = None
    transactional: bool = False
    recovers: Callable[[BaseException | None], bool] | None = None
    first: Failure | None = None
    """How the first attempt failed, if it was made before the flow began."""
    admitted: tuple[Any, ...] = ()
    """What the circuit breakers that let the present attempt through gave: each knows its own again."""
    version: int | None = None
    """The version of the history in the store, as far as it is known."""
    flight: int | None = None
    """The fence under which the present attempt is reserved there."""
    seen: bool = False
    """There was a history in the store."""
    recent: bool = False
    """What is known is what this process stored last: only a compare-and-set can tell whether it still holds."""
    content: str | None = None
    """The fingerprint of this item, once it was made."""
    made_out: bool = False
    deaths: tuple[tuple[str, int, StoredError], ...] = ()
    """What was found never to have ended, and is to be told when it is counted: what it was, of which number, by whom.
    """
    collision: str | None = None
    """The fingerprint of the other item that this key stands for."""
    blind: bool = False
    """The store cannot be read (because of `fault`), so nothing is stored over what cannot be seen."""
    fault: Exception | None = None
    doubtful: bool = False
    """A write seemed to fail: what is stored has to be looked at before the history is settled."""
    believed_until: float = 0.0
    """When the lease of that reservation is over, by the store's clock, as far as it was confirmed."""
    lease_version: int | None = None
    """The version of the renewed lease in the store, if it was renewed."""
    reporting: bool = False
    """The attempt is over, and what came of it is being stored: nobody need renew its lease."""
    unsent: tuple[Any, int] | None = None
    """The completion mark whose outbox is still to be emptied, and its version."""
    settled: bool = False
    """The history was brought to its end within the work's own transaction."""

    to_close: list[Any] | None = None
    """The listeners that have not been told yet that the call is over, last one first to be told."""
    named: str = ""

    @property
    def owner(self) -> str:
        """What the store calls this call.

        From the first time it is asked for, this process knows the call to be running.
        """
        if not self.named:
            self.named = begin()
        return self.named


def raising(error_type: type[RetryError], call: Call, cause: BaseException | None, **facts: Any) -> Raise:
    """The outcome of a call that ends with one of our errors: with what is known of the call, chained to its cause."""
    error = error_type(name=call.plan.name, key=call.context.key, **facts)
    error.__cause__ = cause
    return Raise(error)
