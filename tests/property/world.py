"""A small world for templates to run in, in which everything fails when a script says so.

Clock, store, transactions, listeners and the work itself. What happens is written down in a trace, and each event is
shown to a `watcher` as it happens.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import attrs
import trio

from retrykit import (
    AsyncRetryTemplate,
    FrontContextCache,
    MapRetryContextCache,
    RetryListener,
    RetryState,
    RetryTemplate,
    current_context,
)
from retrykit.errors import CommitInDoubtError, ContextCacheError
from retrykit.owner import this_process

LEASE = 300.0
ELSEWHERE = "elsewhere/boot/pid:[1]/7/7"
"""A process on another host: nobody here can see whether it lives."""


def dead_owner() -> str:
    """A call in a process of this machine that is gone: its number was given to another one."""
    return f"{this_process()}0/1"


def renamed(text: str, owner: str) -> str:
    """The text with every call of this process called `owner`."""
    return re.sub(rf"{re.escape(this_process())}/\d+", lambda _: owner, text)


class Failed(Exception):
    """The work fails."""


class Fatal(Exception):
    """The work fails in a way that no policy retries."""


class StoreFault(ContextCacheError):
    """The store cannot be reached."""


class ListenerFault(Exception):
    """A listener raises."""


class ClockFault(Exception):
    """The clock cannot be read."""


class SleepFault(Exception):
    """A pause is interrupted by an ordinary error."""


class Died(BaseException):
    """The process is gone: whatever was to happen after this did not."""


@attrs.frozen
class Script:
    """One delivery: how it is made, and how everything in its course goes.

    `works`, `recoveries`, `transactions`: one word after the other, each time it is its turn; the last work and
    recovery repeat, further transactions commit. `faults`: (place, how often it was passed before) -> what happens.
    """

    name: str = "orders"
    key: str = "m-1"
    runner: str = "sync"
    redelivered: bool | None = None
    transactional: bool = False
    in_place: bool = False
    recover_now: bool = False
    works: tuple[str, ...] = ("ok",)
    recoveries: tuple[str, ...] | None = None
    transactions: tuple[str, ...] = ()
    pause: str = "is spent"
    faults: Mapping[tuple[str, int], str] = attrs.field(factory=dict, hash=False)


class VirtualClock:
    """Time that passes only when somebody sleeps, or the test says so."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.passed = 1_000.0
        self.offset = 1_700_000_000.0

    def time(self) -> float:
        if self.world.is_due("time") is not None:
            raise ClockFault
        return self.passed + self.offset

    def monotonic(self) -> float:
        if self.world.is_due("monotonic") is not None:
            raise ClockFault
        return self.passed

    def sleep(self, seconds: float) -> None:
        self.world.happens("pause", seconds)
        match self.world.script.pause:
            case "raises":
                raise SleepFault
            case "is cancelled":
                self.world.cancel()
        self.passed += seconds

    async def async_sleep(self, seconds: float) -> None:
        await self.world.checkpoint()
        self.sleep(seconds)
        await self.world.checkpoint()


class Store:
    """Real compare-and-set in memory, with faults and other processes by script; the transactions here can join it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.real = MapRetryContextCache()

    def load(self, key: str) -> Any:
        self.fault("load", key)
        return self.real.load(key)

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        fault = self.fault("save", key)
        json.dumps(snapshot, allow_nan=False)
        before = self.real.load(key)
        saved = self.real.save(key, snapshot, expected)
        if saved is not None:
            self.world.note("saved", key, dict(snapshot), before, fault is not None)
        if fault is not None:
            raise fault
        return saved

    def remove(self, key: str, expected: int | None = None) -> bool:
        fault = self.fault("remove", key)
        before = self.real.load(key)
        removed = self.real.remove(key, expected)
        if removed:
            self.world.note("removed", key, before)
        if fault is not None:
            raise fault
        return removed

    def items(self, prefix: str = "", after: str | None = None) -> Iterator[Any]:
        return self.real.items(prefix, after)

    def expire(self, now: float | None = None, limit: int | None = None) -> int:
        return self.real.expire(now, limit)

    def joined(self, transaction: Any) -> JoinedStore | None:
        return JoinedStore(self, transaction) if self.world.joins else None

    def fault(self, verb: str, key: str) -> Exception | None:
        """Raise what is to fail before it is done; the fault that is to be raised after it."""
        self.world.happens("store", verb)
        what = self.world.is_due(verb)
        if what == "raises":
            self.world.note("faulted", verb)
            raise StoreFault(f"{verb} failed")
        if what == "raises when it is done":
            return StoreFault(f"{verb} was done and failed")
        if what is not None:
            self.world.somebody_else(what, key)
        return None


class AsyncStore(Store):
    """The same, to be awaited."""

    async def load(self, key: str) -> Any:
        await self.world.checkpoint()
        return super().load(key)

    async def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        await self.world.checkpoint()
        return super().save(key, snapshot, expected)

    async def remove(self, key: str, expected: int | None = None) -> bool:
        await self.world.checkpoint()
        return super().remove(key, expected)

    def joined(self, transaction: Any) -> Any:
        return AsyncJoinedStore(self, transaction) if self.world.joins else None


class JoinedStore:
    """The store through an open transaction: what is done here happens when that commits."""

    def __init__(self, store: Store, transaction: Transaction) -> None:
        self.store = store
        self.transaction = transaction

    def load(self, key: str) -> Any:
        return self.store.real.load(key)

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        return self._stage("save", key, lambda: Store.save(self.store, key, snapshot, expected), expected)

    def remove(self, key: str, expected: int | None = None) -> bool:
        return bool(self._stage("remove", key, lambda: Store.remove(self.store, key, expected), expected))

    def _stage(self, verb: str, key: str, act: Callable[[], Any], expected: int | None) -> int | None:
        # A transaction with a fault can only be rolled back: that is a failed attempt.
        try:
            fault = self.store.fault(verb, key)
        except StoreFault as before:
            fault = before
        if fault is not None:
            raise self.store.world.failure(fault)
        found = self.store.real.load(key)
        if (None if found is None else found.version) != expected:
            return None
        self.transaction.staged.append(act)
        return 1


class AsyncJoinedStore(JoinedStore):
    """The same, to be awaited."""

    async def load(self, key: str) -> Any:
        return super().load(key)

    async def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        await self.store.world.checkpoint()
        return super().save(key, snapshot, expected)

    async def remove(self, key: str, expected: int | None = None) -> bool:
        await self.store.world.checkpoint()
        return super().remove(key, expected)


class Transaction:
    """A transaction that fails as the present fate says; what was staged in it is done when it commits."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.staged: list[Callable[[], Any]] = []
        self.fate = "commits"

    def __enter__(self) -> Self:
        self.fate = self.world.turn("transaction", (*self.world.script.transactions, "commits"))
        if self.fate == "does not begin":
            raise self.world.failure(Failed("no transaction"))
        self.world.happens("begin")
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self.world.happens("rolled back")
            if self.fate == "does not roll back":
                raise Failed("the roll-back failed")
            return
        if self.fate == "does not commit":
            self.world.happens("rolled back")
            raise self.world.failure(Failed("the commit failed"))
        if self.fate == "in doubt, not done":
            self.world.happens("in doubt")
            raise CommitInDoubtError
        self._commit()
        if self.fate == "in doubt, done":
            self.world.happens("in doubt")
            raise CommitInDoubtError

    def _commit(self) -> None:
        self.world.happens("commit")
        self.world.note("committed")
        faults, self.world.faults = self.world.faults, {}
        for act in self.staged:
            act()
        self.world.faults = faults


class AsyncTransaction(Transaction):
    """The same, asynchronous."""

    __enter__ = None  # type: ignore[assignment]
    __exit__ = None  # type: ignore[assignment]

    async def __aenter__(self) -> Transaction:
        await self.world.checkpoint()
        return Transaction.__enter__(self)

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        Transaction.__exit__(self, kind, error, trace)


class Listener(RetryListener):
    """Tells the world everything, and fails when the script says so."""

    def __init__(self, world: World) -> None:
        self.world = world

    def open(self, context: Any) -> Any:
        return self._heard("open", context)

    def on_success(self, context: Any, result: Any) -> Any:
        return self._heard("on_success", context)

    def on_error(self, context: Any, error: Exception, decision: Any) -> Any:
        self.world.happens("told", error, decision, context.retry_count)
        return self._heard("on_error", context)

    def on_recover(self, context: Any, result: Any) -> Any:
        return self._heard("on_recover", context)

    def close(self, context: Any, error: BaseException | None) -> Any:
        return self._heard("close", context)

    def _heard(self, event: str, context: Any) -> Any:
        self.world.happens("listener", event)
        match self.world.is_due(event):
            case "raises":
                raise ListenerFault(event)
            case "vetoes":
                self.world.happens("vetoed", f"by {event}")
                context.veto(f"by {event}")


class AsyncListener(Listener):
    """The same, to be awaited."""

    def _heard(self, event: str, context: Any) -> Any:
        async def heard() -> None:
            await self.world.checkpoint()
            Listener._heard(self, event, context)

        return heard()


@attrs.define(slots=False)
class World:
    """Everything around the templates. `watch(event, *facts)` is called for each event; `awaits`: store, listeners and
    transactions of asynchronous templates are asynchronous too; `fronted`: memory in front of the store."""

    policy: Any
    back_off: Any
    watch: Callable[..., None]
    remember: float | None = None
    joins: bool = False
    awaits: bool = True
    fronted: bool = False
    trace: list[str] = attrs.field(factory=list)
    script: Script = attrs.field(factory=Script)
    faults: dict[tuple[str, int], str] = attrs.field(factory=dict)
    times: dict[str, int] = attrs.field(factory=dict)
    turns: dict[str, int] = attrs.field(factory=dict)
    failures: list[Exception] = attrs.field(factory=list)
    recovering: bool = False
    dead: bool = False
    stop: Callable[[], None] | None = None
    cancelled: BaseException | None = None
    violation: AssertionError | None = None

    def __attrs_post_init__(self) -> None:
        self.clock = VirtualClock(self)
        self.store = Store(self)
        self.async_store = AsyncStore(self)
        self.async_store.real = self.store.real
        self.begin_process()
        self.loop = asyncio.Runner()

    def begin_process(self) -> None:
        """A process that begins remembers nothing in front of the store."""
        self.caches = (self.store, self.async_store)
        if self.fronted:
            self.caches = tuple(FrontContextCache(store, capacity=2) for store in self.caches)

    def close(self) -> None:
        self.loop.close()

    # -- what happens

    def happens(self, event: str, *facts: Any) -> None:
        """Write it down; the process may be dead before it."""
        if self.dead:
            raise Died
        if self.is_due("death") is not None:
            self.dead = True
            raise Died
        self.note(event, *facts)

    def note(self, event: str, *facts: Any) -> None:
        """Write down what belongs to the event before it: nothing can come between."""
        self.trace.append(renamed(f"{event} {facts!r}", "here"))
        try:
            self.watch(event, *facts)
        except AssertionError as error:
            # Raised here it would be one more failure of the work.
            self.violation = self.violation or error

    def is_due(self, place: str) -> str | None:
        """What is to happen at this place now."""
        count = self.times.get(place, 0)
        self.times[place] = count + 1
        return self.faults.get((place, count))

    def failure(self, error: Exception) -> Exception:
        """An attempt (or a recovery) fails."""
        self.failures.append(error)
        self.happens("recovery failed" if self.recovering else "failed", error)
        return error

    def cancel(self) -> None:
        """The operation is cancelled, in the way of whoever runs it."""
        self.happens("cancelled")
        if self.stop is None:
            self.cancelled = KeyboardInterrupt()
            raise self.cancelled
        self.stop()

    async def checkpoint(self) -> None:
        """Where tasks change hands and cancellation arrives."""
        if self.script.runner == "trio":
            await trio.lowlevel.checkpoint()
        else:
            await asyncio.sleep(0)

    def somebody_else(self, what: str, key: str) -> None:
        """Another process was faster."""
        found = self.store.real.load(key)
        snapshot = (
            {"format": 1, "name": self.script.name, "key": self.script.key, "retry_count": 0}
            if found is None
            else dict(found.snapshot)
        )
        version = None if found is None else found.version
        if (
            "completed_at" in snapshot
            or (found is None and what == "settles")
            or (self.remember is None and what == "completes")
        ):
            return
        match what:
            case "fails":
                snapshot["retry_count"] += 1
                snapshot["last_error"] = {"type": "other.Error", "message": "theirs", "classes": ["other.Error"]}
            case "vetoes":
                snapshot["veto"] = "theirs"
            case "completes":
                now = self.clock.passed + self.clock.offset
                snapshot = {**snapshot, "in_flight": [], "completed_at": now, "expires_at": now + (self.remember or 0)}
            case "settles":
                self.store.real.remove(key)
                self.note("others", what)
                return
        assert self.store.real.save(key, snapshot, version) is not None
        self.note("others", what)

    # -- the work

    def turn(self, place: str, words: tuple[str, ...]) -> str:
        """Whose turn it is."""
        count = self.turns.get(place, 0)
        self.turns[place] = count + 1
        return words[min(count, len(words) - 1)]

    def work(self, context: Any) -> str:
        """One attempt."""
        assert current_context() is context
        self.happens("attempt", context.attempt, context.retry_count, context.fence)
        return self._does(self.turn("work", self.script.works), context, "work")

    def recovery(self, context: Any) -> str:
        """One try to recover."""
        assert current_context() is context
        self.happens("recovery", context.retry_count)
        return self._does(self.turn("recovery", self.script.recoveries or ()), context, "substitute")

    def _does(self, word: str, context: Any, value: str) -> str:
        if "vetoes" in word:
            self.happens("vetoed", "by the work")
            context.veto("by the work")
        match word.rpartition(" ")[2]:
            case "fails":
                raise self.failure(Failed("the work failed"))
            case "fatally":
                raise self.failure(Fatal("the work failed for good"))
            case "cancelled":
                self.cancel()
                return value
        self.happens("returned", value)
        return value

    async def async_work(self, context: Any) -> str:
        await self.checkpoint()
        value = self.work(context)
        await self.checkpoint()
        return value

    async def async_recovery(self, context: Any) -> str:
        await self.checkpoint()
        value = self.recovery(context)
        await self.checkpoint()
        return value

    # -- deliveries

    def template(self, script: Script) -> Any:
        """The template of the script; a new one each time, as after a restart."""
        awaited = script.runner != "sync"
        parts = awaited and self.awaits
        return (AsyncRetryTemplate if awaited else RetryTemplate)(
            name=script.name,
            retry_policy=self.policy,
            back_off_policy=self.back_off,
            context_cache=self.caches[parts],
            listeners=((AsyncListener if parts else Listener)(self),),
            clock=self.clock,
            remember_completed=self.remember,
            lease=LEASE,
        )

    def deliver(self, script: Script) -> tuple[str, Any]:
        """Run the delivery: ("value", …), ("error", …), ("cancelled", …) or ("died", None)."""
        self.script, self.faults, self.times = script, dict(script.faults), {}
        self.turns, self.failures, self.recovering, self.dead, self.cancelled, self.stop = (
            {},
            [],
            False,
            False,
            None,
            None,
        )
        assert current_context() is None
        outcome = _RUNNERS[script.runner](self, self._call(script))
        assert current_context() is None, "P10: a context was left bound"
        if self.dead:
            outcome = ("died", None)
            self.begin_process()
        self.faults, self.dead = {}, False
        self.trace.append(f"outcome {outcome!r}")
        if self.violation is not None:
            raise self.violation
        return outcome

    def _call(self, script: Script) -> Callable[[], Any]:
        parts = script.runner != "sync" and self.awaits
        state = RetryState(
            key=script.key,
            redelivered=script.redelivered,
            rollback_for=lambda _: not script.in_place,
            recover_on_redelivery=not script.recover_now,
        )
        recover = (
            None
            if script.recoveries is None
            else Recovery(self, self.recovery if script.runner == "sync" else self.async_recovery)
        )
        return functools.partial(
            self.template(script).execute,
            self.work if script.runner == "sync" else self.async_work,
            recover,
            state=state,
            transaction=functools.partial(AsyncTransaction if parts else Transaction, self)
            if script.transactional
            else None,
        )


class Recovery:
    """A recovery that lets the world know when it is chosen."""

    def __init__(self, world: World, call: Callable[[Any], Any]) -> None:
        self.world = world
        self.call = call

    def retrykit_handles(self, error: BaseException | None) -> bool:
        self.world.recovering = True
        return True

    def __call__(self, context: Any) -> Any:
        return self.call(context)


def _outcome(world: World, call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "value", call()
    except Died:
        return "died", None
    except KeyboardInterrupt as error:
        return "cancelled", error
    except Exception as error:
        return "error", error


def _in_asyncio(world: World, call: Callable[[], Any]) -> tuple[str, Any]:
    async def main() -> tuple[str, Any]:
        task = asyncio.ensure_future(call())
        world.stop = task.cancel
        try:
            return "value", await task
        except Died:
            return "died", None
        except asyncio.CancelledError as error:
            return "cancelled", error
        except Exception as error:
            return "error", error

    return world.loop.run(main())


def _in_trio(world: World, call: Callable[[], Any]) -> tuple[str, Any]:
    async def main() -> tuple[str, Any]:
        with trio.CancelScope() as scope:
            world.stop = scope.cancel
            try:
                return "value", await call()
            except Died:
                return "died", None
            except Exception as error:
                return "error", error
        assert scope.cancelled_caught
        return "cancelled", None

    return trio.run(main)


_RUNNERS = {"sync": _outcome, "asyncio": _in_asyncio, "trio": _in_trio}
