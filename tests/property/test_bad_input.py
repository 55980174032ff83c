"""Everything refuses a wrong value at once, and says which argument it is, what it must be, and the value.

The table below has an entry for every public name: a new one without an entry fails.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import retrykit
from retrykit import (
    AsyncRetryTemplate,
    BudgetRetryPolicy,
    CircuitBreakerRetryPolicy,
    CodecError,
    CompositeRetryPolicy,
    ErrorHintBackOffPolicy,
    ExceptionClassifierRetryPolicy,
    ExponentialBackOffPolicy,
    FixedBackOffPolicy,
    FrontContextCache,
    LoggingListener,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    NoBackOffPolicy,
    PredicateRetryPolicy,
    RetryBudget,
    RetryContext,
    RetryListener,
    RetryState,
    RetryTemplate,
    ScheduleBackOffPolicy,
    SimpleRetryPolicy,
    SystemClock,
    TimeoutRetryPolicy,
    UniformRandomBackOffPolicy,
    circuit_breaker,
    retryable,
)
from retrykit.check import is_finite, shown
from retrykit.decorators import BreakerOptions, RetryableOptions


def given_few(**strategies: Any) -> Any:
    """A few dozen examples an argument: there are hundreds of arguments."""
    return lambda test: settings(max_examples=25)(given(**strategies)(test))


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(10**400)]),
    st.floats(),
    st.text(max_size=100),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.timedeltas(),
    st.lists(st.integers(), max_size=2),
    st.lists(st.none(), max_size=2).map(tuple),
    st.sets(st.integers(), max_size=2),
    st.dictionaries(st.integers(), st.integers(), max_size=2),
    st.sampled_from(
        [int, str, OSError, KeyboardInterrupt, RetryListener, SystemClock, SimpleRetryPolicy, RetryTemplate]
    ),
    st.builds(object),
    st.builds(OSError),
    st.builds(iter, st.just(())),
    st.builds(lambda: (part for part in (None,))),
    st.sampled_from([len, print, (lambda: None)]),
    st.sampled_from([SystemClock(), SimpleRetryPolicy(), NoBackOffPolicy(), MapRetryContextCache(), RetryListener()]),
)


@attrs.frozen
class Kind:
    """What an argument may be: whatever is `right`; `near` are values that nearly are."""

    right: Callable[[Any], bool]
    near: st.SearchStrategy[Any] = attrs.field(factory=st.nothing)

    def wrong(self) -> st.SearchStrategy[Any]:
        return (ANYTHING | self.near).filter(lambda value: not self.right(value))

    def or_none(self) -> Kind:
        return Kind(lambda value: value is None or self.right(value), self.near)


def _is_fingerprint(value: Any) -> bool:
    return callable(value) or (isinstance(value, str) and 0 < len(value) <= 200)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def at_least(bound: float) -> Kind:
    return Kind(lambda value: _is_number(value) and value >= bound, st.floats(max_value=bound))


def more_than(bound: float) -> Kind:
    return Kind(lambda value: _is_number(value) and value > bound, st.floats(max_value=bound) | st.just(bound))


def lasting(number: Kind) -> Kind:
    """A duration: such a number, or a timedelta of so many seconds."""
    return Kind(
        lambda value: number.right(value.total_seconds() if isinstance(value, timedelta) else value),
        number.near | st.timedeltas(max_value=timedelta(0)),
    )


def whole(bound: int) -> Kind:
    return Kind(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= bound,
        st.integers(max_value=bound) | st.floats(1, 9),
    )


def among(*values: Any) -> Kind:
    return Kind(
        lambda value: any(type(value) is type(one) and value == one for one in values), st.sampled_from([0, 1, "x"])
    )


def having(*methods: str) -> Kind:
    return Kind(
        lambda value: not isinstance(value, type) and all(callable(getattr(value, method, None)) for method in methods)
    )


def _are_exceptions(value: Any) -> bool:
    if isinstance(value, type):
        return issubclass(value, Exception)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return False
    return _is_empty(value) or (
        isinstance(value, list | tuple | set | dict)
        and all(isinstance(one, type) and _are_exceptions(one) for one in value)
    )


def _is_empty(value: Any) -> bool:
    return (hasattr(value, "__len__") and len(value) == 0) or type(value) is type(iter(()))


def _is_key(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_key, value))
    return isinstance(value, str | int | bytes) and not isinstance(value, bool)


def _is_jitter(value: Any) -> bool:
    return (
        value is None or value in ("full", "equal", "decorrelated")
        if isinstance(value, str | None)
        else (_is_number(value) and 0 <= value <= 1)
    )


BOOL = among(True, False)
TEXT_NAME = Kind(lambda value: isinstance(value, str) and 0 < len(value) <= 80, st.sampled_from(["", "x" * 81]))
ERRORS = Kind(_are_exceptions, st.lists(st.sampled_from([OSError, 3, KeyboardInterrupt, int]), max_size=3))
POLICY = having("decide")
BACK_OFF = having("delay")
CACHE = having("load", "save", "remove")
CLOCK = having("time", "monotonic", "sleep", "async_sleep")
CALLABLE = Kind(callable)
LISTENER = having("open", "on_success", "on_error", "close")
LISTENERS = Kind(
    lambda value: isinstance(value, list | tuple) and all(map(LISTENER.right, value)),
    st.lists(st.sampled_from([RetryListener(), RetryListener, 3]), max_size=3),
)
POLICIES = Kind(
    lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(POLICY.right, value)),
    st.lists(st.sampled_from([SimpleRetryPolicy(), SimpleRetryPolicy, 3]), max_size=3),
)
CLASSIFIED = Kind(
    lambda value: (
        isinstance(value, Mapping)
        and all(_are_exceptions(key) and isinstance(key, type) and POLICY.right(one) for key, one in value.items())
    ),
    st.dictionaries(
        st.sampled_from([OSError, KeyboardInterrupt, "OSError"]), st.sampled_from([SimpleRetryPolicy(), 3]), max_size=2
    ),
)
SCHEDULE = Kind(
    lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(lasting(at_least(0)).right, value)),
    st.lists(st.floats() | st.text(max_size=2), max_size=3),
)
TEMPLATE = {
    "name": TEXT_NAME,
    "retry_policy": POLICY,
    "back_off_policy": BACK_OFF,
    "context_cache": CACHE,
    "listeners": LISTENERS,
    "clock": CLOCK,
    "throw_last": BOOL,
    "recovery_policy": POLICY,
    "remember_completed": lasting(more_than(0)).or_none(),
    "lease": lasting(more_than(0)),
}
BREAKER = {
    "delegate": POLICY,
    "failure_threshold": whole(1),
    "failure_rate": Kind(lambda value: value is None or (_is_number(value) and 0 < value <= 1)),
    "open_timeout": lasting(more_than(0)),
    "reset_timeout": lasting(more_than(0)),
    "half_open_max_calls": whole(1),
}
STATE = {
    "key": Kind(_is_key, st.tuples(st.floats() | st.none())).or_none(),
    "redelivered": BOOL.or_none(),
    "fresh": BOOL,
    "rollback_for": CALLABLE,
    "recover_on_redelivery": BOOL,
    "journal": among("redelivered", "always", "never"),
    "fingerprint": Kind(_is_fingerprint, st.sampled_from(["", "x" * 201])).or_none(),
}
RETRYABLE = {
    "retry_for": ERRORS,
    "no_retry_for": ERRORS,
    "max_attempts": whole(1).or_none(),
    "back_off": BACK_OFF,
    "timeout": lasting(more_than(0)).or_none(),
    "retry_policy": POLICY.or_none(),
    "template": Kind(lambda value: value is None),
    "name": TEXT_NAME.or_none(),
    "context_cache": CACHE.or_none(),
    "listeners": LISTENERS.or_none(),
    "clock": CLOCK.or_none(),
    "key": CALLABLE.or_none(),
    "redelivered": CALLABLE.or_none(),
    "recover_on_redelivery": BOOL,
    "transaction": CALLABLE.or_none(),
}
DURATION = lasting(at_least(0))
CONSTRUCTORS: dict[Any, dict[str, Kind]] = {
    SimpleRetryPolicy: {
        "max_attempts": whole(1).or_none(),
        "retry_for": ERRORS,
        "no_retry_for": ERRORS,
        "traverse_causes": BOOL,
        "not_recoverable": ERRORS,
        "default": BOOL.or_none(),
    },
    MaxAttemptsRetryPolicy: {"max_attempts": whole(1).or_none()},
    TimeoutRetryPolicy: {"timeout": lasting(more_than(0))},
    PredicateRetryPolicy: {"predicate": CALLABLE},
    ExceptionClassifierRetryPolicy: {"policies": CLASSIFIED, "default": POLICY},
    CompositeRetryPolicy: {"policies": POLICIES, "optimistic": BOOL},
    CircuitBreakerRetryPolicy: BREAKER,
    BudgetRetryPolicy: {"budget": Kind(lambda value: isinstance(value, RetryBudget), st.just(RetryBudget))},
    RetryBudget: {"ratio": at_least(0), "reserve": more_than(0)},
    FixedBackOffPolicy: {"interval": DURATION},
    UniformRandomBackOffPolicy: {
        "min_interval": DURATION,
        "max_interval": DURATION,
        "seed": whole(0).or_none(),
    },
    ExponentialBackOffPolicy: {
        "initial": lasting(more_than(0)),
        "multiplier": at_least(1),
        "max_interval": lasting(more_than(0)),
        "jitter": Kind(_is_jitter, st.floats() | st.sampled_from(["half", "FULL"])),
        "seed": whole(0).or_none(),
    },
    ScheduleBackOffPolicy: {"schedule": SCHEDULE},
    ErrorHintBackOffPolicy: {"fallback": BACK_OFF, "hint": CALLABLE, "max_interval": lasting(more_than(0))},
    FrontContextCache: {"store": CACHE, "capacity": whole(1)},
    MapRetryContextCache: {
        "capacity": whole(1),
        "on_full": among("reject", "evict_oldest"),
        "time_to_live": lasting(more_than(0)).or_none(),
        "tombstones": whole(0).or_none(),
        "tombstone_time_to_live": lasting(more_than(0)).or_none(),
    },
    LoggingListener: {
        "logger": Kind(lambda value: value is None or callable(getattr(value, "log", None))),
        "level": whole(0),
    },
    RetryState: STATE,
    RetryTemplate: TEMPLATE,
    AsyncRetryTemplate: TEMPLATE,
}
NEEDED: dict[Any, dict[str, Any]] = {
    PredicateRetryPolicy: {"predicate": len},
    ExceptionClassifierRetryPolicy: {"policies": {}},
    CompositeRetryPolicy: {"policies": [SimpleRetryPolicy()]},
    BudgetRetryPolicy: {"budget": RetryBudget()},
    UniformRandomBackOffPolicy: {"min_interval": 0, "max_interval": timedelta.max},
    RetryState: {"key": "m-1"},
    FrontContextCache: {"store": MapRetryContextCache()},
}
WITHOUT_ARGUMENTS = {
    "AlwaysRetryPolicy",
    "NeverRetryPolicy",
    "NoBackOffPolicy",
    "StatisticsListener",
    "SystemClock",
    "RetryListener",
    "current_context",
}
PROTOCOLS = {"BackOffPolicy", "Clock", "RetryContextCache", "RetryPolicy"}
EXEMPT = {
    "RetryDecision": "what policies answer, made at every failure; the flow reads it and calls nothing of it",
}
ELSEWHERE = {"RetryContext", "circuit_breaker", "retryable", "veto"}  # further down, each in a test of its own


def refused(argument: str, value: Any, call: Callable[[], object]) -> None:
    """The call raises, naming the argument and the value (or that part of it which is wrong)."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{argument}: must be"), message
    assert any(text in message for text in _texts(value)), message


def _texts(value: Any) -> list[str]:
    parts: list[Any] = [value]
    if isinstance(value, timedelta):
        parts.append(value.total_seconds())
    elif isinstance(value, Mapping):
        parts += [*value, *value.values(), tuple(value)]
    elif isinstance(value, list | tuple | set | str | bytes):
        parts += [*value, tuple(value), tuple(map(_in_seconds, value))]
    elif isinstance(value, Iterable) and not isinstance(value, type):
        parts += [None, ()]  # what the generator above yields; an exhausted iterator
    if _is_number(value):
        parts.append(float(value))
    return [shown(part) for part in parts]


def _in_seconds(value: Any) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else float(value) if _is_number(value) else value


def test_every_public_name_is_in_the_table():
    covered = {kind.__name__ for kind in CONSTRUCTORS} | WITHOUT_ARGUMENTS | PROTOCOLS | set(EXEMPT) | ELSEWHERE
    errors = {name for name in retrykit.__all__ if name.endswith("Error")}  # they word whatever they are given
    assert set(retrykit.__all__) == covered | errors


@pytest.mark.parametrize("kind", CONSTRUCTORS, ids=lambda kind: kind.__name__)
def test_every_argument_is_in_the_table(kind):
    assert set(inspect.signature(kind).parameters) == set(CONSTRUCTORS[kind])


def test_every_option_of_a_decorator_is_in_the_table():
    assert set(RetryableOptions.__annotations__) == set(RETRYABLE)
    assert set(BreakerOptions.__annotations__) == {*BREAKER, "name", "context_cache", "listeners", "clock"}


ARGUMENTS = [(kind, argument) for kind, arguments in CONSTRUCTORS.items() for argument in arguments]


@pytest.mark.parametrize(("kind", "argument"), ARGUMENTS, ids=[f"{kind.__name__}-{name}" for kind, name in ARGUMENTS])
@given_few(data=st.data())
def test_a_constructor_refuses_a_wrong_value(kind, argument, data):
    value = data.draw(CONSTRUCTORS[kind][argument].wrong())
    refused(argument, value, lambda: kind(**(NEEDED.get(kind, {}) | {argument: value})))


@pytest.mark.parametrize("name", sorted(WITHOUT_ARGUMENTS))
@given_few(value=ANYTHING)
def test_what_takes_no_argument_refuses_one(name, value):
    with pytest.raises(TypeError):
        getattr(retrykit, name)(value)


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_a_protocol_is_no_value(name):
    with pytest.raises(TypeError, match=r"[Pp]rotocol"):
        getattr(retrykit, name)()


@pytest.mark.parametrize("option", RETRYABLE)
@pytest.mark.parametrize("is_async", [False, True], ids=["function", "coroutine function"])
@given_few(data=st.data())
def test_retryable_refuses_a_wrong_option_before_anything_runs(option, is_async, data):
    async def coroutine_function():
        raise AssertionError("ran")

    def function():
        raise AssertionError("ran")

    value = data.draw(RETRYABLE[option].wrong())
    refused(option, value, lambda: retryable(**{option: value})(coroutine_function if is_async else function))
    decorated, value = retryable(function), data.draw(RETRYABLE[option].wrong())
    refused(option, value, lambda: decorated.with_options(**{option: value}))


@pytest.mark.parametrize("option", BREAKER)
@given_few(data=st.data())
def test_circuit_breaker_refuses_a_wrong_option(option, data):
    value = data.draw(BREAKER[option].wrong())
    refused(option, value, lambda: circuit_breaker(**{option: value}))


@pytest.mark.parametrize("decorator", [retryable, circuit_breaker], ids=lambda one: one.__name__)
@given_few(value=ANYTHING.filter(lambda value: not callable(value) and value is not None))
def test_a_decorator_refuses_what_is_no_function(decorator, value):
    refused("function", value, lambda: decorator(value))
    refused("function", value, lambda: decorator()(value))


@given_few(name=st.text(min_size=1).filter(lambda name: name not in RETRYABLE and name not in BREAKER))
def test_an_option_that_there_is_not_is_refused_by_name(name):
    for decorator in (retryable, circuit_breaker):
        with pytest.raises(TypeError) as caught:
            decorator(**{name: 1})
        assert name in str(caught.value)


EXECUTE = {
    "callback": CALLABLE,
    "recover": CALLABLE.or_none(),
    "state": Kind(lambda value: value is None, st.just(RetryState)),
    "transaction": CALLABLE.or_none(),
}


@pytest.mark.parametrize("argument", EXECUTE)
@pytest.mark.parametrize("state", [None, RetryState(key="k")], ids=["stateless", "stateful"])
@given_few(data=st.data())
def test_execute_refuses_a_wrong_argument_before_anything_runs(argument, state, data):
    def callback(context):
        raise AssertionError("ran") if argument != "recover" else OSError

    value = data.draw(EXECUTE[argument].wrong())
    given_ = {"callback": callback, "state": state} | {argument: value}
    refused(argument, value, lambda: RetryTemplate().execute(**given_))
    refused(argument, value, lambda: asyncio.run(AsyncRetryTemplate().execute(**given_)))


@pytest.mark.parametrize("argument", ["state", "transaction"])
@given_few(data=st.data())
def test_attempts_refuses_a_wrong_argument_at_once(argument, data):
    value = data.draw(EXECUTE[argument].wrong())
    refused(argument, value, lambda: RetryTemplate().attempts(**{argument: value}))
    refused(argument, value, lambda: AsyncRetryTemplate().attempts(**{argument: value}))


@given_few(key=Kind(_is_key).wrong())
def test_the_operators_verbs_refuse_what_is_no_key(key):
    template = RetryTemplate()
    for verb in (template.history, template.forget, template.withdraw_veto, template.key_of):
        refused("key", key, lambda verb=verb: verb(key))
    refused("key", key, lambda: template.veto(key, "reason"))


@given_few(reason=ANYTHING.filter(lambda value: not isinstance(value, str)))
def test_a_veto_refuses_a_reason_that_is_no_text(reason):
    refused("reason", reason, lambda: RetryTemplate().veto("k", reason))
    refused("reason", reason, lambda: RetryContext(RetryTemplate(), 0.0).veto(reason))
    refused("reason", reason, lambda: RetryTemplate().execute(lambda _: retrykit.veto(reason)))


@given_few(types=ANYTHING.filter(lambda value: not callable(value) and not isinstance(value, Iterable)))
def test_recover_refuses_what_is_no_exception_class(types):
    fetch = retryable(lambda: None)
    refused("error_types", types, lambda: fetch.recover(types))


@given_few(snapshot=ANYTHING)
def test_a_context_is_made_of_nothing_but_a_snapshot(snapshot):
    with pytest.raises(CodecError):
        RetryContext.from_snapshot(snapshot)
