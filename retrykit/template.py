"""`RetryTemplate` and `AsyncRetryTemplate`: what to retry, how, and with which memory; the thin drivers of the flow."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import isawaitable, iscoroutinefunction
from time import monotonic
from types import CoroutineType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import attrs

from retrykit.attempts import AsyncAttempt, Attempt, async_attempts, attempts
from retrykit.backoff import BackOffPolicy, NoBackOffPolicy, is_back_off
from retrykit.breaker import CircuitBreakerRetryPolicy
from retrykit.budget import BudgetRetryPolicy
from retrykit.cache import MapRetryContextCache, StoredContext, identity, is_cache
from retrykit.call import Plan
from retrykit.check import Seconds, as_seconds, as_seconds_or_none, has, more_than, one_of, wrong_type, wrong_value
from retrykit.clock import SYSTEM_CLOCK, Clock, is_real
from retrykit.context import RetryContext, _bound
from retrykit.driver import Driver, readable
from retrykit.key import Key, check_key, in_namespace, is_name, namespace
from retrykit.listener import LISTENER_METHODS, RetryListener
from retrykit.loops import async_drive, drive, drive_at_once, without_frame
from retrykit.policy import RetryPolicy, SimpleRetryPolicy, TimeoutRetryPolicy, every, is_policy
from retrykit.state import RetryState
from retrykit.value import Value

if TYPE_CHECKING:
    from retrykit.histories import AsyncHistories, Histories

T = TypeVar("T")
R = TypeVar("R")

_bind = _bound.set
_unbind = _bound.reset
_short_cut = True


@contextmanager
def short_cut(allowed: bool) -> Iterator[None]:  # noqa: FBT001 - read as short_cut(False)
    """Switch the short cut for attempts that need no flow on or off, in the whole process.

    The conformance suite runs with both.
    """
    global _short_cut  # noqa: PLW0603 - a switch of the process, for tests
    before, _short_cut = _short_cut, allowed
    try:
        yield
    finally:
        _short_cut = before


def _listeners(given: Sequence[RetryListener]) -> tuple[RetryListener, ...]:
    return tuple(given) if isinstance(given, list | tuple) else given  # type: ignore[return-value] # what is none the validator refuses


def _check_listeners(instance: Any, field: Any, listeners: Any) -> None:
    if not isinstance(listeners, tuple):
        raise wrong_type(field.name, "a tuple of listeners", listeners)
    for listener in listeners:
        has(*LISTENER_METHODS)(instance, field, listener)


def _is_cache_for(template: Any, field: Any, cache: Any) -> None:
    is_cache(template, field, cache)
    if not template.asynchronous and iscoroutinefunction(cache.load):
        wanted = "a cache whose verbs need no await (AsyncRetryTemplate takes both)"
        raise wrong_type(field.name, wanted, cache)


@attrs.frozen(kw_only=True, eq=False, repr=False)
class _Template(Value):
    """What both templates are made of."""

    name: str = attrs.field(default="retry", validator=is_name)
    retry_policy: RetryPolicy = attrs.field(factory=SimpleRetryPolicy, validator=is_policy)
    back_off_policy: BackOffPolicy = attrs.field(factory=NoBackOffPolicy, validator=is_back_off)
    context_cache: Any = attrs.field(factory=MapRetryContextCache, validator=_is_cache_for, eq=identity)
    listeners: tuple[RetryListener, ...] = attrs.field(default=(), converter=_listeners, validator=_check_listeners)
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, validator=has("time", "monotonic", "sleep", "async_sleep"))
    throw_last: bool = attrs.field(default=False, validator=one_of(True, False))
    recovery_policy: RetryPolicy = attrs.field(factory=SimpleRetryPolicy, validator=is_policy)
    remember_completed: float | None = attrs.field(default=None, converter=as_seconds_or_none, validator=more_than(0))
    lease: float = attrs.field(default=300.0, converter=as_seconds, validator=more_than(0))
    plan: Plan = attrs.field(init=False, eq=False, repr=False)
    _space: str = attrs.field(init=False, eq=False, repr=False)
    runs_direct: bool = attrs.field(init=False, eq=False, repr=False)
    forgets: bool = attrs.field(init=False, eq=False, repr=False)

    @recovery_policy.validator
    def _check_recovery_policy(self, field: Any, policy: Any) -> None:
        for part in every(policy):
            if isinstance(part, CircuitBreakerRetryPolicy | BudgetRetryPolicy):
                raise wrong_value(field.name, "a policy without circuit breakers and budgets", policy)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "plan", self._make_plan())
        object.__setattr__(self, "_space", namespace(self.name))
        object.__setattr__(self, "runs_direct", self._needs_no_flow())
        object.__setattr__(self, "forgets", self.remember_completed is None)

    def _make_plan(self) -> Plan:
        parts = list(every(self.retry_policy))
        return Plan(
            name=self.name,
            policy=self.retry_policy,
            back_off=self.back_off_policy,
            recovery_policy=self.recovery_policy,
            listeners=self.listeners,
            reversed_listeners=self.listeners[::-1],
            breakers=tuple(part for part in parts if isinstance(part, CircuitBreakerRetryPolicy)),
            budgets=tuple(
                {id(part.budget): part.budget for part in parts if isinstance(part, BudgetRetryPolicy)}.values()
            ),
            breaker_key=f"{namespace(self.name)}@breaker",
            now=monotonic if is_real(self.clock) else None,
            quiet=not (
                self.listeners or any(isinstance(part, CircuitBreakerRetryPolicy | BudgetRetryPolicy) for part in parts)
            ),
            pauses=not isinstance(self.back_off_policy, NoBackOffPolicy),
            timed=any(isinstance(part, TimeoutRetryPolicy) for part in parts),
            evicts=getattr(self.context_cache, "may_forget", False),
            tallied=hasattr(self.retry_policy, "tally"),
            throw_last=self.throw_last,
            remember=self.remember_completed,
            lease=self.lease,
            renews=getattr(self.context_cache, "shared", True),
            fronted=hasattr(self.context_cache, "recent"),
        )

    def _needs_no_flow(self) -> bool:
        """Whether a first attempt that succeeds leaves nothing to do: then it is made without the flow."""
        return self.plan.quiet and self.plan.now is not None

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in attrs.fields(type(self)) if field.init}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self.__attrs_post_init__()

    def spelled(self, key: Key) -> str:
        """As `key_of`, of a key that is known to be one."""
        return in_namespace(self._space, key)

    def key_of(self, key: Key) -> str:
        """The canonical text under which the history of `key` is stored in the context cache."""
        check_key(key)
        return in_namespace(self._space, key)

    def time(self) -> float:
        """Seconds since the epoch: by the clock of the store, where it has one for all who share it; else by ours.

        Leases and due times are compared with it, so that machines whose clocks disagree agree about them.
        """
        store_clock = getattr(self.context_cache, "store_clock", None)
        return (self.clock if store_clock is None or not store_clock.become_known() else store_clock).time()

    def _now(self) -> float:
        try:
            return readable(self.clock.monotonic())
        except Exception:  # noqa: BLE001 - a clock's fault changes no outcome; the driver reports it at the next reading
            return monotonic()

    def context(self, state: RetryState | None = None) -> RetryContext:
        """A new context for a call of this template."""
        now = self.plan.now or self._now
        return RetryContext(self, now(), _bound.get(), state)

    def _block(self, state: RetryState | None, transaction: Any) -> Driver:
        return self.driver(self.context(state), _always, (), {}, None, transaction)

    def driver(  # noqa: PLR0917 - as in `Driver`
        self, context: RetryContext, function: Any, arguments: Any, keywords: Any, recover: Any, transaction: Any = None
    ) -> Driver:
        """One call on its way."""
        driver = Driver(self, context, function, arguments, keywords, recover, transaction)
        driver.spell_key()
        return driver


def _always(context: RetryContext) -> None:
    """What the block style has for a callback: the block is the attempt."""


def _check_execute(callback: Any, recover: Any, state: Any, transaction: Any) -> None:
    if (
        callable(callback)
        and (recover is None or callable(recover))
        and (transaction is None or callable(transaction))
        and (state is None or type(state) is RetryState)
    ):
        return
    for name, value in (("callback", callback), ("recover", recover), ("transaction", transaction)):
        if not callable(value) and (value is not None or name == "callback"):
            raise wrong_type(name, "callable", value)
    if state is not None and type(state) is not RetryState:
        raise wrong_type("state", "a RetryState or None", state)


class RetryTemplate(_Template):
    """Executes operations that may fail, again and again as its policies say, with a memory that survives the
    roll-back.

    `name` namespaces the histories: templates with different names never see each other's. `retry_policy`: whether
    again (default: 3 attempts); `back_off_policy`: when (default: at once); `context_cache`: where histories are kept
    (default: in memory); `listeners` are told. `throw_last`: an exhausted stateful call without recovery raises the
    last failure instead of `ExhaustedRetryError`. `recovery_policy`: how often a failing recovery is tried (default: 3
    times), then `RecoveryFailedError`. `remember_completed`: seconds for which a completion mark answers later
    duplicates of a key; None keeps none. `lease`: seconds for which an attempt of a process that nobody here can see is
    believed to be running.

    Immutable: `attrs.evolve(template, name="other")` makes the variant. Thread-safe. A pickled template leaves
    histories in memory behind.
    """

    __slots__ = ()
    asynchronous: ClassVar[bool] = False

    def execute(
        self,
        callback: Callable[[RetryContext], T],
        recover: Callable[[RetryContext], R] | None = None,
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> T | R:
        """Call `callback(context)`, again if it fails and the policy allows; its value, or that of `recover(context)`
        when nothing else is left.

        With a `state` each failure is rethrown, as the same object, so that the caller's session rolls back and the
        item comes again; the history remembers. `transaction`: any callable that gives a context manager; it is entered
        for each attempt (its value is `context.transaction`), left after it, and a commit that fails is a failed
        attempt. None is returned for a delivery of an item whose completion is remembered (`context.duplicate`).

        Raises the user's own last exception when a stateless call is exhausted; `ExhaustedRetryError` from it when a
        stateful one is; `RecoveryFailedError`, `BackOffInterruptedError`, `TerminatedRetryError` as they say.
        `TypeError` for bad arguments, before anything ran.
        """
        if (
            self.runs_direct
            # A first delivery, as the source says: the store has nothing to say, and nothing to be told of a success.
            and (
                state is None
                or (state.__class__ is RetryState and state.redelivered is False and state.plain and self.forgets)
            )
            and (recover is None or callable(recover))
            and _short_cut
        ):
            if transaction is None:
                context = RetryContext(self, monotonic(), None, state)
                token = context._outer = _bind(context)
                try:
                    value = callback(context)
                except Exception as error:  # noqa: BLE001 - this is where an attempt ends
                    first = (error, monotonic())
                else:
                    context.closed = True
                    return value
                finally:
                    _unbind(token)
                try:
                    _check_execute(callback, recover, state, transaction)
                    without_frame(first[0])
                    return drive(self.driver(context, callback, (context,), {}, recover), first)  # type: ignore[no-any-return]
                finally:
                    del first, context, token
            if callable(transaction) and callable(callback):
                context = RetryContext(self, monotonic(), _bound.get(), state)
                driver = Driver(self, context, callback, (context,), {}, recover, transaction)
                return drive_at_once(driver)  # type: ignore[no-any-return]
        _check_execute(callback, recover, state, transaction)
        context = self.context(state)
        return drive(self.driver(context, callback, (context,), {}, recover, transaction))  # type: ignore[no-any-return]

    def attempts(
        self, *, state: RetryState | None = None, transaction: Callable[[], Any] | None = None
    ) -> Iterator[Attempt]:
        """The block style: `for attempt in template.attempts(): with attempt as context: ...`.

        A failure inside the `with` is swallowed if it is tried again, else it leaves the block as it is. The loop ends
        after a success. Stateful as in `execute` with a `state`; recovery is what follows an `except` around the loop.
        """
        _check_execute(_always, None, state, transaction)
        return attempts(self._block(state, transaction))

    def history(self, key: Key) -> RetryContext | None:
        """What is remembered of a key: a context to look at, None if nothing is."""
        return _context_of(self.context_cache.load(self.key_of(key)))

    def veto(self, key: Key, reason: str, *, lasts: Seconds | None = None) -> None:
        """Forbid further attempts of an item, from outside: it takes effect at its next delivery, in every process.

        `lasts`: for so many seconds; None: until it is withdrawn.
        """
        self._histories().veto((self.name, key), reason, lasts=lasts)

    def withdraw_veto(self, key: Key) -> None:
        """Allow further attempts of an item again, as far as the policy does."""
        self._histories().withdraw_veto((self.name, key))

    def forget(self, key: Key) -> bool:
        """Drop the history of a key: its next delivery is the first. Whether there was one."""
        return self._histories().forget((self.name, key))

    def _histories(self) -> Histories:
        # What operators need is not loaded by programs that only retry.
        from retrykit.histories import Histories

        return Histories(self.context_cache, self.clock)


class AsyncRetryTemplate(_Template):
    """`RetryTemplate` for coroutines, on asyncio and trio: the same fields, the same `execute`, awaited.

    Callbacks and recoveries may be coroutine functions or plain ones, transactions async or plain context managers;
    caches and listeners may be asynchronous too.
    """

    __slots__ = ()
    asynchronous: ClassVar[bool] = True

    @overload
    async def execute(
        self,
        callback: Callable[[RetryContext], Awaitable[T]],
        recover: None = None,
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> T: ...
    @overload
    async def execute(
        self,
        callback: Callable[[RetryContext], Awaitable[T]],
        recover: Callable[[RetryContext], Awaitable[R]],
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> T | R: ...
    @overload
    async def execute(
        self,
        callback: Callable[[RetryContext], Awaitable[T]],
        recover: Callable[[RetryContext], R],
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> T | R: ...
    @overload
    async def execute(
        self,
        callback: Callable[[RetryContext], T],
        recover: None = None,
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> T: ...
    @overload
    async def execute(
        self,
        callback: Callable[[RetryContext], T],
        recover: Callable[[RetryContext], Awaitable[R]],
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> T | R: ...
    @overload
    async def execute(
        self,
        callback: Callable[[RetryContext], T],
        recover: Callable[[RetryContext], R],
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> T | R: ...
    async def execute(
        self,
        callback: Callable[[RetryContext], Any],
        recover: Callable[[RetryContext], Any] | None = None,
        *,
        state: RetryState | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> Any:
        """As `RetryTemplate.execute`, awaited."""
        if (
            self.runs_direct
            and transaction is None
            # A first delivery, as the source says: the store has nothing to say, and nothing to be told of a success.
            and (
                state is None
                or (state.__class__ is RetryState and state.redelivered is False and state.plain and self.forgets)
            )
            and (recover is None or callable(recover))
            and _short_cut
        ):
            context = RetryContext(self, monotonic(), None, state)
            token = context._outer = _bind(context)
            try:
                value = callback(context)
                if value.__class__ is CoroutineType or isawaitable(value):
                    value = await value
            except Exception as error:  # noqa: BLE001 - this is where an attempt ends
                first = (error, monotonic())
            else:
                context.closed = True
                return value
            finally:
                _unbind(token)
            try:
                _check_execute(callback, recover, state, transaction)
                without_frame(first[0])
                return await async_drive(self.driver(context, callback, (context,), {}, recover), first)
            finally:
                del first, context, token
        _check_execute(callback, recover, state, transaction)
        context = self.context(state)
        return await async_drive(self.driver(context, callback, (context,), {}, recover, transaction))

    def attempts(
        self, *, state: RetryState | None = None, transaction: Callable[[], Any] | None = None
    ) -> AsyncIterator[AsyncAttempt]:
        """The block style: `async for attempt in template.attempts(): async with attempt as context: ...`."""
        _check_execute(_always, None, state, transaction)
        return async_attempts(self._block(state, transaction))

    async def history(self, key: Key) -> RetryContext | None:
        """What is remembered of a key: a context to look at, None if nothing is."""
        return _context_of(await _awaited(self.context_cache.load(self.key_of(key))))

    async def veto(self, key: Key, reason: str, *, lasts: Seconds | None = None) -> None:
        """As `RetryTemplate.veto`."""
        await self._histories().veto((self.name, key), reason, lasts=lasts)

    async def withdraw_veto(self, key: Key) -> None:
        """Allow further attempts of an item again, as far as the policy does."""
        await self._histories().withdraw_veto((self.name, key))

    async def forget(self, key: Key) -> bool:
        """Drop the history of a key: its next delivery is the first. Whether there was one."""
        return await self._histories().forget((self.name, key))

    def _histories(self) -> AsyncHistories:
        from retrykit.histories import AsyncHistories

        return AsyncHistories(self.context_cache, self.clock)


async def _awaited(value: Any) -> Any:
    return await value if isawaitable(value) else value


def _context_of(stored: StoredContext | None) -> RetryContext | None:
    return None if stored is None else RetryContext.from_snapshot(stored.snapshot)
