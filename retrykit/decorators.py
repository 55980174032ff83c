"""`@retryable`: a function that retries itself, with the function's own signature.

A call that succeeds at once costs little more than the call: nothing is made for it but a frame that
`current_context()` can turn into a context. Everything else begins with the first failure. See `retrykit.signature` for
how the wrapper is made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypedDict, TypeVar, Unpack, overload

import attrs

from retrykit.backoff import BackOffPolicy, NoBackOffPolicy, is_back_off
from retrykit.breaker import CircuitBreakerRetryPolicy
from retrykit.check import Seconds, error_types, is_callable_or_none, one_of, wrong_type
from retrykit.clock import Clock
from retrykit.context import RetryContext
from retrykit.driver import Driver
from retrykit.key import Key
from retrykit.listener import RetryListener
from retrykit.loops import async_drive, drive, without_frame
from retrykit.policy import (
    CompositeRetryPolicy,
    MaxAttemptsRetryPolicy,
    RetryPolicy,
    SimpleRetryPolicy,
    TimeoutRetryPolicy,
    nearest,
)
from retrykit.signature import direct_wrapper, driven_wrapper
from retrykit.state import RetryState
from retrykit.template import AsyncRetryTemplate, RetryTemplate, _Template

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")
H = TypeVar("H")
E = TypeVar("E", bound=Exception)
E2 = TypeVar("E2", bound=Exception)
R_co = TypeVar("R_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])

ErrorTypes = type[Exception] | tuple[type[Exception], ...]


class RetryableOptions(TypedDict, total=False):
    """What `@retryable(...)` and `.with_options(...)` can be given; `retryable` explains them."""

    retry_for: ErrorTypes
    no_retry_for: ErrorTypes
    max_attempts: int | None
    back_off: BackOffPolicy
    timeout: Seconds | None
    retry_policy: RetryPolicy
    template: RetryTemplate | AsyncRetryTemplate
    name: str
    context_cache: Any
    listeners: Sequence[RetryListener]
    clock: Clock
    key: Callable[..., Key | None]
    redelivered: Callable[..., bool | None]
    recover_on_redelivery: bool
    transaction: Callable[[], Any]


class BreakerOptions(TypedDict, total=False):
    """What `@circuit_breaker(...)` can be given."""

    delegate: RetryPolicy
    failure_threshold: int
    failure_rate: float | None
    open_timeout: Seconds
    reset_timeout: Seconds
    half_open_max_calls: int
    name: str
    context_cache: Any
    listeners: Sequence[RetryListener]
    clock: Clock


class BoundRetryable(Protocol, Generic[P, R_co]):
    """A decorated method, bound to its instance or class."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call it; again if it fails and the policy allows."""


class Registers(Protocol, Generic[P, H]):
    """What `.recover(…)` gives: the decorator of a recovery, which is given back as it is."""

    def __call__(self, handler: Callable[P, H], /) -> Callable[P, H]:
        """Register it."""


class _Decorated(Generic[P, R, H]):
    """What sync and async functions have in common; H is what a recovery may return."""

    __wrapped__: Callable[..., Any]
    __name__: str
    __qualname__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it; again if it fails and the policy allows."""
        raise NotImplementedError

    # A method looked up on its class, a method, a static method: told apart by the first parameter.
    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self: _Decorated[Concatenate[S, Q], R, H], instance: S, owner: type[Any]) -> BoundRetryable[Q, R]: ...
    @overload
    def __get__(self, instance: object, owner: type[Any]) -> Self: ...
    def __get__(self, instance: Any, owner: Any) -> Any:
        """As functions are bound to instances."""
        raise NotImplementedError

    @overload
    def recover(self, handler: Callable[Concatenate[Exception, P], H], /) -> Callable[Concatenate[Exception, P], H]: ...
    @overload
    def recover(self, error_type: type[E], /) -> Registers[Concatenate[E, P], H]: ...
    @overload
    def recover(self, first: type[E], second: type[E2], /) -> Registers[Concatenate[E | E2, P], H]: ...
    @overload
    def recover(self, *error_types: type[Exception]) -> Registers[Concatenate[Exception, P], H]: ...
    def recover(self, *error_types: Any) -> Any:
        """Register a recovery: `@fetch.recover(ConnectionError)` on `def cached(error, …the function's arguments…)`.

        It runs when no further attempt is allowed, for the failures of these classes (none given: all); the nearest
        base class wins.
        """
        raise NotImplementedError

    def with_options(self, **options: Unpack[RetryableOptions]) -> Self:
        """The same function with other options, for some of its calls: `fetch.with_options(max_attempts=1)(url)`."""
        raise NotImplementedError


class Retryable(_Decorated[P, R, R]):
    """What `@retryable` makes of a function, as type checkers see it: at run time, a function with these attributes."""

    template: RetryTemplate


class AsyncRetryable(_Decorated[P, Coroutine[Any, Any, T], Coroutine[Any, Any, T] | T]):
    """What `@retryable` makes of a coroutine function, as type checkers see it. Recoveries may be plain functions."""

    template: AsyncRetryTemplate


class RetryableOfClass(_Decorated[Concatenate[type[S], P], R, R]):
    """What `@retryable` makes of a function whose first parameter is a class: `@classmethod` goes above it."""

    template: RetryTemplate | AsyncRetryTemplate

    def __get__(self, instance: object, owner: type[Any]) -> BoundRetryable[P, R]:  # type: ignore[override]
        """As class methods are bound to classes."""
        raise NotImplementedError


class Decorator(Protocol):
    """What `@retryable(…)` gives: the decorator of functions and coroutine functions."""

    @overload
    def __call__(self, function: Callable[Concatenate[type[S], P], R], /) -> RetryableOfClass[S, P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncRetryable[P, T]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> Retryable[P, R]: ...
    def __call__(self, function: Any, /) -> Any:
        """Decorate it."""


@attrs.frozen(kw_only=True)
class _Options:
    """The options of a decorated function."""

    retry_for: Any = Exception
    no_retry_for: Any = ()
    max_attempts: int | None = 3
    back_off: BackOffPolicy = attrs.field(factory=NoBackOffPolicy, validator=is_back_off)
    timeout: Any = None
    retry_policy: RetryPolicy | None = None
    template: RetryTemplate | AsyncRetryTemplate | None = None
    name: str | None = None
    context_cache: Any = None
    listeners: Any = None
    clock: Any = None
    key: Callable[..., Any] | None = attrs.field(default=None, validator=is_callable_or_none)
    redelivered: Callable[..., bool | None] | None = attrs.field(default=None, validator=is_callable_or_none)
    recover_on_redelivery: bool = attrs.field(default=True, validator=one_of(True, False))
    transaction: Callable[[], Any] | None = attrs.field(default=None, validator=is_callable_or_none)


_OF_POLICY = ("retry_for", "no_retry_for", "max_attempts", "timeout")
_OF_TEMPLATE = ("name", "context_cache", "listeners", "clock")


def _checked(given: dict[str, Any]) -> _Options:
    """The options, all of them known. Iterators among those given become tuples: every variant reads them."""
    known = {field.name for field in attrs.fields(_Options)}
    for option in given:
        if option not in known:
            msg = f"{option}: no option of a retryable function; there are {', '.join(sorted(known))}"
            raise TypeError(msg)
    given |= {option: error_types(option, given[option]) for option in ("retry_for", "no_retry_for") if option in given}
    return _Options(**given)


def _policy(options: _Options) -> RetryPolicy:
    policy: RetryPolicy = SimpleRetryPolicy(options.max_attempts, options.retry_for, no_retry_for=options.no_retry_for)
    if options.timeout is None:
        return policy
    return CompositeRetryPolicy((policy, TimeoutRetryPolicy(options.timeout)))


def _template(function: Any, options: _Options, given: dict[str, Any], *, awaited: bool) -> Any:
    """The template behind a decorated function."""
    kind = AsyncRetryTemplate if awaited else RetryTemplate
    if options.template is not None:
        return _given_template(function, options.template, given, awaited=awaited)
    if options.retry_policy is not None:
        _refuse(given, _OF_POLICY, "retry_policy")
    fields = {option: value for option in _OF_TEMPLATE if (value := getattr(options, option)) is not None}
    fields.setdefault(
        "name", f"{function.__module__}.{function.__qualname__}"[-80:] if hasattr(function, "__qualname__") else "retry"
    )
    policy = _policy(options) if options.retry_policy is None else options.retry_policy
    return kind(retry_policy=policy, back_off_policy=options.back_off, **fields)


def _given_template(function: Any, template: Any, given: dict[str, Any], *, awaited: bool) -> Any:
    if not isinstance(template, _Template):
        raise wrong_type("template", "a RetryTemplate or AsyncRetryTemplate", template)
    _refuse(given, ("retry_policy", "back_off", *_OF_POLICY, *_OF_TEMPLATE), "template")
    if awaited:
        return template if isinstance(template, AsyncRetryTemplate) else AsyncRetryTemplate(**_fields_of(template))
    if isinstance(template, AsyncRetryTemplate):
        raise wrong_type("template", f"a RetryTemplate, because {function!r} is not a coroutine function", template)
    return template


def _fields_of(template: _Template) -> dict[str, Any]:
    return {field.name: getattr(template, field.name) for field in attrs.fields(RetryTemplate) if field.init}


def _refuse(given: dict[str, Any], options: tuple[str, ...], instead: str) -> None:
    for option in options:
        if option in given:
            msg = f"{option}: is a part of {instead}={given[instead]!r:.60}, so it cannot be given beside it"
            raise ValueError(msg)


def _check_function(function: Any) -> None:
    if isinstance(function, staticmethod | classmethod):
        msg = f"function: put @retryable below @{type(function).__name__}, directly on the function"
        raise TypeError(msg)
    if not callable(function):
        raise wrong_type("function", "callable", function)
    if any(map(inspect.isgeneratorfunction, _bodies(function))) or any(
        map(inspect.isasyncgenfunction, _bodies(function))
    ):
        name = getattr(function, "__qualname__", None) or repr(function)
        msg = (
            f"function: {name} is a generator function: calling it runs nothing, so there is nothing"
            " that could fail and be retried; make a function that does one step retryable, or the one that consumes"
            " the whole generator"
        )
        raise TypeError(msg)


def _bodies(function: Any) -> tuple[Any, ...]:
    """What runs when it is called: itself, or the `__call__` of its class."""
    return (function, getattr(type(function), "__call__", None))  # noqa: B004 - asked for its kind, not whether it is there


class _Handlers:
    """The recoveries of one decorated function, by the class of the failure."""

    def __init__(self) -> None:
        self.by_type: dict[type[BaseException], Callable[..., Any]] = {}
        self.awaited = False

    def of(self, error: BaseException | None) -> Callable[..., Any] | None:
        """The handler of the nearest class."""
        if error is None:
            return self.by_type.get(Exception)
        found = nearest(error, self.by_type)
        return None if found is None else self.by_type[found]

    def register(self, *types: Any) -> Any:
        """The decorator that registers a handler; used bare, or with no classes, for every failure."""
        if len(types) == 1 and not isinstance(types[0], type) and callable(types[0]):
            return self.register()(types[0])
        classes = error_types("error_types", types or (Exception,))

        def registered(handler: F) -> F:
            _check_function(handler)
            if not self.awaited and any(map(inspect.iscoroutinefunction, _bodies(handler))):
                raise wrong_type("handler", "a plain function, as the function that it recovers is", handler)
            self.by_type.update(dict.fromkeys(classes, handler))
            return handler

        return registered


class _Recovery:
    """The recovery of one call: the handlers with the call's own arguments."""

    __slots__ = ("arguments", "handlers", "keywords")

    def __init__(self, handlers: _Handlers, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.handlers = handlers
        self.arguments = arguments
        self.keywords = keywords

    def retrykit_handles(self, error: BaseException | None) -> bool:
        """Whether there is a handler for this failure."""
        return self.handlers.of(error) is not None

    def __call__(self, context: RetryContext) -> Any:
        """Run it."""
        handler = self.handlers.of(context.last_error)
        assert handler is not None  # noqa: S101 - the flow asks `retrykit_handles` first
        return handler(context.last_error, *self.arguments, **self.keywords)


def _decorated(function: Callable[..., Any], given: dict[str, Any], handlers: _Handlers) -> Any:
    """The wrapper, with its attributes."""
    _check_function(function)
    options = _checked(given)
    _check_state_options(given)
    awaited = handlers.awaited = any(map(inspect.iscoroutinefunction, _bodies(function)))
    template = _template(function, options, given, awaited=awaited)
    loop = async_drive if awaited else drive
    if options.key is None and options.transaction is None and template.runs_direct:
        wrapper = direct_wrapper(function, template, loop, _resumer(function, template, handlers), awaited=awaited)
    else:
        wrapper = driven_wrapper(function, loop, _starter(function, template, options, handlers), awaited=awaited)
    functools.update_wrapper(wrapper, function)
    wrapper.template = template
    wrapper.recover = handlers.register
    wrapper.with_options = lambda **changes: _decorated(function, _merged(given, changes, template), handlers)
    return wrapper


def _check_state_options(given: dict[str, Any]) -> None:
    """What is said of a delivery means nothing where nothing is remembered."""
    for option in ("redelivered", "recover_on_redelivery"):
        if option in given and given.get("key") is None:
            msg = f"{option}: {given[option]!r:.60} was given without a key: there is no history that it could be about"
            raise ValueError(msg)


def _resumer(function: Any, template: Any, handlers: _Handlers) -> Any:
    """What goes on with a call whose first attempt was made directly, and failed."""

    def resume(arguments: Any, keywords: Any, frame: list[Any], failure: BaseException) -> Any:
        without_frame(failure)
        recovery = _Recovery(handlers, arguments, keywords) if handlers.by_type else None
        if len(frame) > 3:  # noqa: PLR2004 - somebody has asked for the context
            return Driver(template, frame[3], function, arguments, keywords, recovery)
        # Threads and tasks of the first attempt have the frame: what they ask for, and veto, is this context too.
        frame.append(RetryContext(*frame[:3]))
        context = frame[3]
        driver = Driver(template, context, function, arguments, keywords, recovery)
        driver.binding = [context]
        return driver

    return resume


def _starter(function: Any, template: Any, options: _Options, handlers: _Handlers) -> Any:
    """What begins a call that goes through the flow from the beginning."""

    def start(arguments: Any, keywords: Any) -> Any:
        state = None
        if options.key is not None:
            state = RetryState(
                key=options.key(*arguments, **keywords),
                redelivered=None if options.redelivered is None else options.redelivered(*arguments, **keywords),
                recover_on_redelivery=options.recover_on_redelivery,
            )
        recovery = _Recovery(handlers, arguments, keywords) if handlers.by_type else None
        return template.driver(template.context(state), function, arguments, keywords, recovery, options.transaction)

    return start


def _merged(given: dict[str, Any], changes: dict[str, Any], template: Any) -> dict[str, Any]:
    """The options of a variant. Those that a given template holds make a variant of the template."""
    _checked(changes)
    if "template" in changes:
        return {
            option: value
            for option, value in given.items()
            if option not in (*_OF_POLICY, *_OF_TEMPLATE, "retry_policy", "back_off")
        } | changes
    if given.get("template") is None:
        # The same memory and the same name: a variant of a function speaks of the same items.
        return {"name": template.name, "context_cache": template.context_cache} | given | changes
    fields: dict[str, Any] = {option: changes.pop(option) for option in _OF_TEMPLATE if option in changes}
    if "back_off" in changes:
        fields["back_off_policy"] = changes.pop("back_off")
    if "retry_policy" in changes:
        fields["retry_policy"] = changes.pop("retry_policy")
    policy = {option: changes.pop(option) for option in _OF_POLICY if option in changes}
    if policy:
        fields["retry_policy"] = _evolved(template.retry_policy, policy)
    return given | {"template": attrs.evolve(template, **fields)} | changes


def _evolved(policy: Any, changes: dict[str, Any]) -> Any:
    fields = {field.name for field in attrs.fields(type(policy))} if attrs.has(type(policy)) else set()
    for option in changes:
        if option not in fields:
            msg = f"{option}: {type(policy).__name__} has no such field; give with_options a retry_policy instead"
            raise ValueError(msg)
    return attrs.evolve(policy, **changes)


@overload
def retryable(function: Callable[Concatenate[type[S], P], R], /) -> RetryableOfClass[S, P, R]: ...
@overload
def retryable(function: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncRetryable[P, T]: ...  # type: ignore[overload-overlap]
@overload
def retryable(function: Callable[P, R], /) -> Retryable[P, R]: ...
@overload
def retryable(**options: Unpack[RetryableOptions]) -> Decorator: ...
def retryable(function: Any = None, /, **options: Any) -> Any:
    """Make a function or coroutine function retry itself when it fails.

    `retry_for`, `no_retry_for`, `max_attempts` (3, the first included): see `SimpleRetryPolicy`; or give a
    `retry_policy`. `back_off`: when (at once). `timeout`: give up this many seconds after the first attempt began. Or
    give a `template` that says all that, and more.

    `key(*arguments)` makes it stateful: each failure is rethrown so that the caller's session rolls back, and the
    history of the key remembers. `redelivered(*arguments)` tells what the source says (see `RetryState`).
    `transaction`: entered for each attempt.

    On methods: below `@staticmethod` and `@classmethod`. `TypeError` for generator functions: calling one runs nothing.
    """
    if function is not None:
        return _decorated(function, options, _Handlers())
    _checked(options)
    return lambda function: _decorated(function, options, _Handlers())


@overload
def circuit_breaker(function: Callable[Concatenate[type[S], P], R], /) -> RetryableOfClass[S, P, R]: ...
@overload
def circuit_breaker(function: Callable[P, Coroutine[Any, Any, T]], /) -> AsyncRetryable[P, T]: ...  # type: ignore[overload-overlap]
@overload
def circuit_breaker(function: Callable[P, R], /) -> Retryable[P, R]: ...
@overload
def circuit_breaker(**options: Unpack[BreakerOptions]) -> Decorator: ...
def circuit_breaker(function: Any = None, /, **options: Any) -> Any:
    """Put a function behind a circuit breaker: one attempt a call, and none while the circuit is open.

    The options are those of `CircuitBreakerRetryPolicy`; `name`, `context_cache` (shared by processes: they share the
    circuit), `listeners` and `clock` those of the template. While the circuit is open a call goes to its `.recover`
    handler for `Exception`, or raises `ExhaustedRetryError`.
    """
    own = {option: options[option] for option in _OF_TEMPLATE if option in options}
    rest = {option: value for option, value in options.items() if option not in own}
    own["retry_policy"] = CircuitBreakerRetryPolicy(**{"delegate": MaxAttemptsRetryPolicy(1)} | rest)
    return retryable(function, **own) if function is not None else retryable(**own)
