"""Whether an operation may be tried again, and why: pure questions about what a context remembers.

A policy changes nothing: asking twice gives the same answer. What it needs to know is in the context, derived from the
recorded failures and JSON-able, so that every policy works with every cache and in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import attrs

from retrykit.check import (
    Seconds,
    are_error_types,
    as_seconds,
    as_types,
    error_types,
    has,
    is_callable,
    more_than,
    one_of,
    seconds,
    whole,
    wrong_type,
    wrong_value,
)
from retrykit.failure import StoredError, type_name
from retrykit.value import Value

if TYPE_CHECKING:
    from datetime import datetime


def _verdict(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise wrong_type(name, "True or False", value)


def _pause(name: str, value: object) -> float:
    pause = seconds(name, value)
    if pause < 0:
        raise wrong_value(name, "at least 0", value)
    return pause


@attrs.frozen(slots=False, eq=False, repr=False, init=False)
class RetryDecision(Value):
    """Will it be retried, when, and why (not)? Listeners, logs and operators all show this one object.

    `delay`: seconds until the next attempt, 0 if none. `clauses`: the decisions that a composed policy's own was made
    from. `next_at`: the instant of the next attempt (aware, UTC) when there is a delay. `recoverable`: False forbids
    the recovery callback: it is a property of the failure, and is said with consents too. `reason` may be given as a
    text, as a tuple `(format, *values)`, or as a function that makes the text: it is worded when it is read, and most
    decisions are never looked at.
    """

    retry: bool
    delay: float = 0.0
    _reason: str | Callable[[], str] | tuple[Any, ...] = attrs.field(default="", eq=False, repr=False)
    clauses: tuple[RetryDecision, ...] = ()
    next_at: datetime | None = None
    recoverable: bool = True

    def __init__(  # noqa: PLR0917 - the fields in their order
        self,
        retry: bool,  # noqa: FBT001 - as above
        delay: Seconds = 0.0,
        reason: str | Callable[[], str] | tuple[Any, ...] = "",
        clauses: tuple[RetryDecision, ...] = (),
        next_at: datetime | None = None,
        recoverable: bool = True,  # noqa: FBT001, FBT002 - as above
    ) -> None:
        # Written by hand because one is made at every failure: only what is not the default is looked at.
        fields = self.__dict__
        fields["retry"] = retry if retry is True or retry is False else _verdict("retry", retry)
        fields["delay"] = 0.0 if delay.__class__ is float and delay == 0 else _pause("delay", delay)
        fields["_reason"] = reason
        fields["clauses"] = clauses
        fields["next_at"] = next_at
        fields["recoverable"] = recoverable if recoverable is True else _verdict("recoverable", recoverable)

    @property
    def reason(self) -> str:
        """The clause that decided, with its values: `SimpleRetryPolicy: attempt 3 of 3`."""
        reason = self._reason
        if isinstance(reason, str):
            return reason
        return str(reason[0]).format(*reason[1:]) if isinstance(reason, tuple) else reason()

    def __str__(self) -> str:
        verdict = (
            f"retry in {self.delay:g} s" if self.retry and self.delay else "retry at once" if self.retry else "give up"
        )
        return f"{verdict} ({self.reason})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reason": self.reason}


@runtime_checkable
class RetryPolicy(Protocol):
    """What decides whether a further attempt may be made. Give any object with this method."""

    def decide(self, context: Any) -> RetryDecision:
        """May another attempt be made, given what `context` remembers? Changes nothing, and raises nothing."""


is_policy = has("decide")

OTHERS: Final = "*"
"""The branch of the failures that a classifier does not name: no class can be called so."""

REMEMBERED: Final = 64
"""So many decisions and classifications a policy keeps at most."""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, outermost first, each once: chains may be cyclic."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def names_of(error: BaseException) -> tuple[str, ...]:
    """The names of the error's class and its bases, nearest first, as histories keep them."""
    if isinstance(error, StoredError):
        return error.classes
    return tuple(map(type_name, type(error).__mro__))


def nearest(error: BaseException, types: Iterable[type]) -> type | None:
    """That one of `types` which is nearest to the class of `error` among its bases; None if it is none of them.

    A live failure is compared by its very classes, because two may have one name; a recorded one has names only.
    """
    if isinstance(error, StoredError):
        by_name = {type_name(one): one for one in types}
        return next((by_name[name] for name in error.classes if name in by_name), None)
    given = tuple(types)
    return next((base for base in type(error).__mro__ if any(base is one for one in given)), None)


def is_crash(error: BaseException | None) -> bool:
    """Whether the last failure is an attempt that never ended: it has no exception that could be classified."""
    return isinstance(error, StoredError) and error.crash


@attrs.frozen(eq=False, repr=False)
class SimpleRetryPolicy(Value):
    """Up to `max_attempts` attempts, the first included, for the failures that are classified as retryable. Spring's
    default policy.

    `max_attempts=None`: no limit. The class nearest to the failure's own decides among `retry_for` and `no_retry_for`;
    `Exception` in `retry_for` (the default) stands for every failure not named. `traverse_causes`: a failure that is
    not named is classified by its causes. `default`: what holds for a failure named in neither; None derives it from
    `Exception` in `retry_for`. `not_recoverable`: failures after which the recovery callback must not run.
    """

    max_attempts: int | None = attrs.field(default=3, validator=whole(1, optional=True))
    retry_for: tuple[type[Exception], ...] = attrs.field(
        default=(Exception,), converter=as_types, validator=are_error_types
    )
    no_retry_for: tuple[type[Exception], ...] = attrs.field(
        default=(), converter=as_types, validator=are_error_types, kw_only=True
    )
    traverse_causes: bool = attrs.field(default=False, validator=one_of(True, False), kw_only=True)
    not_recoverable: tuple[type[Exception], ...] = attrs.field(
        default=(), converter=as_types, validator=are_error_types, kw_only=True
    )
    default: bool | None = attrs.field(default=None, validator=one_of(True, False, None), kw_only=True)

    # Decisions and classifications that were made before: both are values, made again and again of the same few facts.
    _consents: dict[int, RetryDecision] = attrs.field(init=False, factory=dict, eq=False, repr=False)
    _verdicts: dict[type, bool] = attrs.field(init=False, factory=dict, eq=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {field.alias: getattr(self, field.name) for field in attrs.fields(type(self)) if field.init}
        return _made_again, (type(self), fields)

    def decide(self, context: Any) -> RetryDecision:
        """Attempts left, and the last failure retryable?"""
        count: int = context.retry_count
        limit = self.max_attempts
        error: BaseException | None = context.last_error
        if (limit is None or count < limit) and (
            error is None or self._verdicts.get(type(error)) or self._is_retryable(error)
        ):
            return self._consents.get(count) or self._consent(count, error)
        return self._refuse(count, error)

    def _consent(self, count: int, error: BaseException | None) -> RetryDecision:
        reason = ("SimpleRetryPolicy: attempt {} of {} failed", count, _limit(self.max_attempts))
        decision = RetryDecision(True, 0.0, reason, (), None, self._is_recoverable(error))
        # Where failures differ in being recoverable, the count alone does not make the decision.
        if count < REMEMBERED and not self.not_recoverable:
            self._consents[count] = decision
        return decision

    def _is_recoverable(self, error: BaseException | None) -> bool:
        return not self.not_recoverable or all(nearest(link, self.not_recoverable) is None for link in chain(error))

    def _refuse(self, count: int, error: BaseException | None) -> RetryDecision:
        limit = self.max_attempts
        if limit is not None and count >= limit:
            reason: Any = ("SimpleRetryPolicy: attempt {} of {}", count, limit)
        else:
            reason = ("SimpleRetryPolicy: {} is not retryable", _short(error))
        return RetryDecision(False, 0.0, reason, (), None, self._is_recoverable(error))

    def _is_retryable(self, error: BaseException) -> bool:
        if type(error) is StoredError or self.traverse_causes:
            return self._judge(error)
        verdict = self._verdicts.get(type(error))
        if verdict is None:
            verdict = self._judge(error)
            if len(self._verdicts) < REMEMBERED:
                self._verdicts[type(error)] = verdict
        return verdict

    def _judge(self, error: BaseException) -> bool:
        for link in chain(error) if self.traverse_causes else (error,):
            found = self._classify(link)
            if found is not None:
                return found
        return is_crash(error) or self._unnamed

    def _classify(self, error: BaseException) -> bool | None:
        named = (*self.retry_for, *self.no_retry_for)
        if self.default is None:
            named = tuple(one for one in named if one is not Exception)
        found = nearest(error, named)
        return None if found is None else found not in self.no_retry_for

    @property
    def _unnamed(self) -> bool:
        return Exception in self.retry_for if self.default is None else self.default


def _made_again(kind: type[SimpleRetryPolicy], fields: Mapping[str, Any]) -> SimpleRetryPolicy:
    return kind(**fields)


def _limit(limit: int | None) -> str:
    return "unlimited" if limit is None else str(limit)


def _short(error: BaseException | None) -> str:
    return "no failure" if error is None else names_of(error)[0].rpartition(".")[2]


@attrs.frozen(eq=False, repr=False)
class MaxAttemptsRetryPolicy(Value):
    """Up to `max_attempts` attempts, the first included, whatever the failure. None: no limit."""

    max_attempts: int | None = attrs.field(default=3, validator=whole(1, optional=True))

    def decide(self, context: Any) -> RetryDecision:
        """Attempts left?"""
        count, limit = context.retry_count, self.max_attempts
        return RetryDecision(
            limit is None or count < limit, 0.0, lambda: f"MaxAttemptsRetryPolicy: attempt {count} of {_limit(limit)}"
        )


@attrs.frozen(eq=False, repr=False)
class TimeoutRetryPolicy(Value):
    """Further attempts until `timeout` seconds have passed since the first began.

    It never sleeps past its deadline: when the pause would end after it, it gives up at once.
    """

    timeout: float = attrs.field(default=1.0, converter=as_seconds, validator=more_than(0))

    def decide(self, context: Any) -> RetryDecision:
        """Would the next attempt begin in time?"""
        elapsed, pause, timeout = context.elapsed, context.pause, self.timeout
        return RetryDecision(
            elapsed + pause <= timeout,
            0.0,
            lambda: (
                f"TimeoutRetryPolicy: {elapsed:.3f} s"
                + (f" + pause {pause:.3f} s" if pause else "")
                + f" of {timeout:g} s"
            ),
        )


@attrs.frozen(eq=False, repr=False)
class AlwaysRetryPolicy(Value):
    """Every failure is retried, without end: for transient failures that are known to pass, and for tests."""

    def decide(self, context: Any) -> RetryDecision:
        """Yes."""
        return RetryDecision(True, 0.0, "AlwaysRetryPolicy")


@attrs.frozen(eq=False, repr=False)
class NeverRetryPolicy(Value):
    """The first attempt, and no other."""

    @property
    def max_attempts(self) -> int:
        """One."""
        return 1

    def decide(self, context: Any) -> RetryDecision:
        """Only if nothing has failed yet."""
        return RetryDecision(context.retry_count == 0, 0.0, "NeverRetryPolicy")


@attrs.frozen(eq=False, repr=False)
class PredicateRetryPolicy(Value):
    """Retry while `predicate(error)` is true. It is asked once for each failure, while that is live."""

    predicate: Callable[[BaseException], object] = attrs.field(validator=is_callable)

    def decide(self, context: Any) -> RetryDecision:
        """Does the predicate hold for the last failure?"""
        error = context.last_error
        if isinstance(error, StoredError):
            # The predicate was asked when the failure was live, and what was decided then stays decided.
            return RetryDecision(not context.exhausted, 0.0, "PredicateRetryPolicy: as decided when it failed")
        retry = error is None or bool(self.predicate(error))
        return RetryDecision(retry, 0.0, lambda: f"PredicateRetryPolicy: {_named(self.predicate)} is {retry}")


def _named(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


class Branch:
    """A context as one branch of a composed policy sees it: with that branch's own count and beginning."""

    __slots__ = ("_context", "_extra", "branch", "counted", "paid")

    def __init__(self, context: Any, branch: str, *, counted: bool = False, extra: int = 0, paid: bool = False) -> None:
        self._context = context
        self._extra = extra
        self.paid = paid or getattr(context, "paid", False)
        self.branch = branch
        self.counted = counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def retry_count(self) -> int:
        """The failures that this branch was asked about, and those assumed besides."""
        if self.counted and (tally := self._context.tallies.get(self.branch)) is not None:
            return int(tally.count) + self._extra
        return 0 if self.counted else int(self._context.retry_count) + self._extra

    @property
    def elapsed(self) -> float:
        """Seconds since this branch saw its first failure."""
        tally = self._context.tallies.get(self.branch) if self.counted else None
        elapsed: float = self._context.elapsed
        return elapsed if tally is None else max(0.0, elapsed - tally.since)


def branch_of(context: Any) -> str:
    """Where in a composed policy the question is asked; "" at its top."""
    return getattr(context, "branch", "")


def _as_mapping(given: Mapping[type[Exception], RetryPolicy]) -> Mapping[type[Exception], RetryPolicy]:
    # A copy: what the caller does to his mapping later changes no policy.
    return dict(given) if isinstance(given, Mapping) else given


@attrs.frozen(eq=False, repr=False)
class ExceptionClassifierRetryPolicy(Value):
    """Each failure is decided by the policy of the nearest of its classes, which counts only its own: "A up to 3, B up
    to 3".

    `policies` maps exception classes to policies; `default` decides what is not named (never, unless given).
    """

    policies: Mapping[type[Exception], RetryPolicy] = attrs.field(converter=_as_mapping, hash=False)
    default: RetryPolicy = attrs.field(factory=NeverRetryPolicy, validator=is_policy)

    @policies.validator
    def _check(self, field: Any, policies: Any) -> None:
        if not isinstance(policies, Mapping):
            raise wrong_type(field.name, "a mapping of exception classes to policies", policies)
        for error_type, policy in policies.items():
            if not isinstance(error_type, type):
                raise wrong_type(field.name, "a mapping of exception classes to policies", error_type)
            error_types(field.name, error_type)
            is_policy(self, field, policy)

    @property
    def max_attempts(self) -> int | None:
        """The most attempts that all branches together can allow; None if one has no limit."""
        limits: list[Any] = [getattr(policy, "max_attempts", None) for policy in self._branches().values()]
        return None if None in limits else 1 + sum(limit - 1 for limit in limits)

    def delegates(self) -> tuple[RetryPolicy, ...]:
        """The policies this one is made of."""
        return (*self.policies.values(), self.default)

    def decide(self, context: Any) -> RetryDecision:
        """Ask the branch of the last failure."""
        error = context.last_error
        if error is None:
            return RetryDecision(True, 0.0, "ExceptionClassifierRetryPolicy: no failure yet")
        if is_crash(error):
            return MaxAttemptsRetryPolicy(_highest(self.delegates())).decide(context)
        label, policy = self._branch(error)
        inner = policy.decide(Branch(context, f"{branch_of(context)}/{label}", counted=True))
        return RetryDecision(
            inner.retry,
            inner.delay,
            lambda: f"ExceptionClassifierRetryPolicy: {_short(error)} as {_shown(label)}: {inner.reason}",
            (inner,),
            recoverable=inner.recoverable,
        )

    def tally(self, error: BaseException, branch: str) -> Iterator[str]:
        """The branches that count this failure: of a crash nobody knows whose it was, so all do."""
        counting = self._branches() if is_crash(error) else dict([self._branch(error)])
        for label, policy in counting.items():
            here = f"{branch}/{label}"
            yield here
            yield from tallies_of(policy, error, here)

    def _branch(self, error: BaseException) -> tuple[str, RetryPolicy]:
        found = nearest(error, self.policies)
        policy = self.default if found is None else self.policies[found]
        # One policy under several classes is one branch: it is called by the first of them.
        return next((label, other) for label, other in self._named() if other is policy)

    def _named(self) -> Iterator[tuple[str, RetryPolicy]]:
        for error_type, policy in self.policies.items():
            yield type_name(error_type), policy
        yield OTHERS, self.default

    def _branches(self) -> dict[str, RetryPolicy]:
        distinct: dict[str, RetryPolicy] = {}
        for label, policy in self._named():
            if not any(policy is other for other in distinct.values()):
                distinct[label] = policy
        return distinct


def _shown(label: str) -> str:
    return "default" if label == OTHERS else label.rpartition(".")[2]


def _as_policies(given: Iterable[RetryPolicy]) -> tuple[RetryPolicy, ...]:
    return tuple(given) if isinstance(given, Iterable) else given


@attrs.frozen(eq=False, repr=False)
class CompositeRetryPolicy(Value):
    """Several policies as one: all must agree (pessimistic, the default), or any of them (`optimistic=True`)."""

    policies: tuple[RetryPolicy, ...] = attrs.field(converter=_as_policies)
    optimistic: bool = attrs.field(default=False, validator=one_of(True, False), kw_only=True)

    @policies.validator
    def _check(self, field: Any, policies: Any) -> None:
        if not isinstance(policies, tuple):
            raise wrong_type(field.name, "policies", policies)
        if not policies:
            raise wrong_value(field.name, "at least one policy", policies)
        for policy in policies:
            is_policy(self, field, policy)

    @property
    def max_attempts(self) -> int | None:
        """The limit that comes first (pessimistic) or last (optimistic); None if there is none."""
        if self.optimistic:
            return _highest(self.policies)
        limits = [limit for policy in self.policies if (limit := getattr(policy, "max_attempts", None)) is not None]
        return min(limits, default=None)

    def delegates(self) -> tuple[RetryPolicy, ...]:
        """The policies this one is made of."""
        return self.policies

    def decide(self, context: Any) -> RetryDecision:
        """Ask all; the first refusal (or the first consent) is the reason."""
        here = branch_of(context)
        counted = getattr(context, "counted", False)
        clauses = tuple(
            policy.decide(_Numbered(context, f"{here}/{n}", counted=counted) if hasattr(policy, "tally") else context)
            for n, policy in enumerate(self.policies)
        )
        retry = any(c.retry for c in clauses) if self.optimistic else all(c.retry for c in clauses)
        decisive = next((clause for clause in clauses if clause.retry is self.optimistic), clauses[-1])
        return RetryDecision(
            retry,
            max(clause.delay for clause in clauses),
            lambda: f"CompositeRetryPolicy: {decisive.reason}",
            clauses,
            recoverable=all(clause.recoverable for clause in clauses),
        )

    def tally(self, error: BaseException, branch: str) -> Iterator[str]:
        """The branches of its policies that count this failure."""
        for n, policy in enumerate(self.policies):
            yield from tallies_of(policy, error, f"{branch}/{n}")


class _Numbered(Branch):
    """A context as a member of a composite sees it: another name for its branches, the same count."""

    __slots__ = ()

    @property
    def retry_count(self) -> int:
        return int(self._context.retry_count)

    @property
    def elapsed(self) -> float:
        return float(self._context.elapsed)


def tallies_of(policy: Any, error: BaseException, branch: str) -> Iterable[str]:
    """The names of all branches of a policy that count this failure; none for a policy that is not composed."""
    tally = getattr(policy, "tally", None)
    return () if tally is None else tally(error, branch)


def every(policy: Any) -> Iterator[Any]:
    """The policy and all that it is made of, to any depth."""
    yield policy
    for delegate in getattr(policy, "delegates", tuple)():
        yield from every(delegate)


def _highest(policies: Iterable[RetryPolicy]) -> int | None:
    limits = [getattr(policy, "max_attempts", None) for policy in policies]
    return None if None in limits else max(limit for limit in limits if limit is not None)
