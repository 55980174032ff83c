"""How long to wait before the next attempt: pure questions, answered in seconds.

The n-th failure asks for the n-th interval, so a series goes on across deliveries and processes. The cap is applied
first, jitter after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, runtime_checkable

import attrs

from retrykit.check import (
    Seconds,
    as_seconds,
    at_least,
    has,
    is_callable,
    is_finite,
    is_timedelta,
    more_than,
    seconds,
    whole,
    wrong_type,
    wrong_value,
)
from retrykit.key import key_to_json
from retrykit.value import Value

if TYPE_CHECKING:
    from datetime import timedelta

JITTERS: Final = ("full", "equal", "decorrelated")
Jitter = Literal["full", "equal", "decorrelated"] | float | None


@runtime_checkable
class BackOffPolicy(Protocol):
    """What says how long to wait. Give any object with this method."""

    def delay(self, context: Any) -> float:
        """Seconds (0 or more) from the failure number `context.retry_count` to the next attempt."""


is_back_off = has("delay")


def chance(seed: int | None, context: Any) -> float:
    """A number in [0, 1): with a seed it is the same for the same item and failure, in every process."""
    # Only those who use jitter pay for the import.
    import random

    if seed is None:
        return random.random()
    return random.Random(f"{seed}|{context.name}|{key_to_json(context.key)!r}|{context.retry_count}").random()


@attrs.frozen(eq=False, repr=False)
class NoBackOffPolicy(Value):
    """The next attempt follows at once."""

    longest: ClassVar[float] = 0.0
    """The longest interval that there can be, in seconds."""

    def delay(self, context: Any) -> float:
        """0."""
        return 0.0


@attrs.frozen(eq=False, repr=False)
class FixedBackOffPolicy(Value):
    """Always the same interval (seconds, default 1)."""

    interval: float = attrs.field(default=1.0, converter=as_seconds, validator=at_least(0))

    @property
    def longest(self) -> float:
        """The longest interval that there can be, in seconds."""
        return self.interval

    def delay(self, context: Any) -> float:
        """The interval."""
        return self.interval


@attrs.frozen(eq=False, repr=False)
class UniformRandomBackOffPolicy(Value):
    """An interval drawn evenly between two bounds (seconds, default 0.5 to 1.5)."""

    min_interval: float = attrs.field(default=0.5, converter=as_seconds, validator=at_least(0))
    max_interval: float = attrs.field(default=1.5, converter=as_seconds, validator=at_least(0))
    seed: int | None = attrs.field(default=None, validator=whole(0, optional=True), kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.max_interval < self.min_interval:
            raise wrong_value("max_interval", f"at least min_interval={self.min_interval:g}", self.max_interval)

    @property
    def longest(self) -> float:
        """The longest interval that there can be, in seconds."""
        return self.max_interval

    def delay(self, context: Any) -> float:
        """A draw."""
        return self.min_interval + (self.max_interval - self.min_interval) * chance(self.seed, context)


def _check_jitter(_instance: Any, field: Any, value: Any) -> None:
    if value is None or value in JITTERS:
        return
    wanted = f"None, one of {', '.join(map(repr, JITTERS))}, or a fraction from 0 to 1"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong_type(field.name, wanted, value)
    if isinstance(value, str) or not 0 <= value <= 1:
        raise wrong_value(field.name, wanted, value)


@attrs.frozen(eq=False, repr=False)
class ExponentialBackOffPolicy(Value):
    """`initial`, `initial * multiplier`, … seconds, never more than `max_interval`.

    The defaults are Spring's: 0.1, 2, 30, no jitter.

    `jitter` spreads callers that failed together: "full" draws from 0 to the interval, "equal" from its half up,
    "decorrelated" from `initial` to three times the last delay (Brooker, "Exponential Backoff And Jitter", 2015); a
    fraction f draws within ± f of it. `seed` makes the draws repeatable, for tests: production code leaves it None.
    """

    initial: float = attrs.field(default=0.1, converter=as_seconds, validator=more_than(0))
    multiplier: float = attrs.field(default=2.0, validator=at_least(1))
    max_interval: float = attrs.field(default=30.0, converter=as_seconds, validator=more_than(0))
    jitter: Jitter = attrs.field(default=None, validator=_check_jitter, kw_only=True)
    seed: int | None = attrs.field(default=None, validator=whole(0, optional=True), kw_only=True)

    @property
    def longest(self) -> float:
        """The longest interval that there can be, in seconds."""
        grows = self.multiplier > 1 or self.jitter == "decorrelated"
        widened = self.jitter if isinstance(self.jitter, int | float) else 0.0
        return (self.max_interval if grows else self.interval(1)) * (1 + widened)

    def delay(self, context: Any) -> float:
        """The interval for this failure."""
        if self.jitter == "decorrelated":
            last = max(self.initial, context.last_delay or self.initial)
            return min(self.max_interval, self.initial + (3 * last - self.initial) * chance(self.seed, context))
        interval = self.interval(max(1, context.retry_count))
        return interval if self.jitter is None else self._jittered(interval, chance(self.seed, context))

    def interval(self, failure: int) -> float:
        """The capped interval after failure number `failure` (from 1), before jitter."""
        try:
            return min(self.max_interval, self.initial * self.multiplier ** (failure - 1))
        except OverflowError:
            return self.max_interval

    def _jittered(self, interval: float, drawn: float) -> float:
        if self.jitter == "full":
            return interval * drawn
        if self.jitter == "equal":
            return interval / 2 * (1 + drawn)
        assert isinstance(self.jitter, int | float)  # noqa: S101 - for type checkers: validated at construction
        return interval * (1 + self.jitter * (2 * drawn - 1))


def _schedule(value: Iterable[Seconds]) -> tuple[float, ...]:
    # What has no order is no schedule.
    if isinstance(value, str | bytes | AbstractSet | Mapping) or not isinstance(value, Iterable):
        raise wrong_type("schedule", "intervals in seconds, in their order", value)
    return tuple(seconds("schedule", interval) for interval in value)


@attrs.frozen(eq=False, repr=False)
class ScheduleBackOffPolicy(Value):
    """Given intervals, one after the other; the last one repeats. The default is 1, 2, 3, 5, 8 … 55 seconds."""

    schedule: tuple[float, ...] = attrs.field(default=(1, 2, 3, 5, 8, 13, 21, 34, 55), converter=_schedule)

    @schedule.validator
    def _check(self, field: Any, schedule: tuple[float, ...]) -> None:
        if not schedule:
            raise wrong_value(field.name, "at least one interval", schedule)
        if min(schedule) < 0:
            raise wrong_value(field.name, "intervals of 0 seconds or more", schedule)

    @property
    def longest(self) -> float:
        """The longest interval that there can be, in seconds."""
        return max(self.schedule)

    def delay(self, context: Any) -> float:
        """The interval whose turn it is."""
        turn: int = min(max(1, context.retry_count), len(self.schedule))
        return self.schedule[turn - 1]


def retry_after(error: BaseException) -> float | timedelta | None:
    """The usual hint: the error's `retry_after` (seconds, timedelta), or its response's `Retry-After` header."""
    hint = getattr(error, "retry_after", None)
    if hint is None:
        get = getattr(getattr(getattr(error, "response", None), "headers", None), "get", None)
        hint = get("Retry-After") if callable(get) else None
    if isinstance(hint, str):
        return float(hint) if hint.strip().isdecimal() else None
    is_number = isinstance(hint, int | float) and not isinstance(hint, bool)
    return hint if is_number or is_timedelta(hint) else None


@attrs.frozen(eq=False, repr=False)
class ErrorHintBackOffPolicy(Value):
    """The failure itself says how long to wait (`Retry-After`, a throttling error); without a hint the `fallback` does.

    `hint(error)` gives seconds, a timedelta or None; a negative or non-finite hint counts as none, and so does one that
    raises (it is logged). Never more than `max_interval`.
    """

    fallback: BackOffPolicy = attrs.field(factory=ExponentialBackOffPolicy, validator=is_back_off)
    hint: Callable[[BaseException], float | timedelta | None] = attrs.field(default=retry_after, validator=is_callable)
    max_interval: float = attrs.field(default=300.0, converter=as_seconds, validator=more_than(0))

    @property
    def longest(self) -> float | None:
        """The longest interval that there can be, in seconds; None where the fallback does not know its own."""
        fallback: float | None = getattr(self.fallback, "longest", None)
        return None if fallback is None else max(fallback, self.max_interval)

    def delay(self, context: Any) -> float:
        """The hint, bounded; else the fallback's."""
        wanted = None if context.last_error is None else self._hinted(context.last_error)
        return self.fallback.delay(context) if wanted is None else min(wanted, self.max_interval)

    def _hinted(self, error: BaseException) -> float | None:
        try:
            hint = self.hint(error)
        except Exception:
            # What a failure looks like is not known beforehand. `import retrykit` must not cost what logging costs.
            import logging

            logging.getLogger("retrykit").warning("the back-off's hint could not be read", exc_info=True)
            return None
        wanted = hint.total_seconds() if is_timedelta(hint) else hint
        if isinstance(wanted, bool) or not isinstance(wanted, int | float):
            return None
        return float(wanted) if is_finite(wanted) and wanted >= 0 else None
