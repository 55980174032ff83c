"""The public API as a user types it. Nothing here runs: mypy and pyright read it, and must agree.

A call that must be refused carries `# type: ignore[…]`: both checkers complain when it is accepted.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, assert_never, assert_type

from retrykit import (
    AlwaysRetryPolicy,
    AsyncRetryTemplate,
    BackOffPolicy,
    BudgetRetryPolicy,
    CircuitBreakerRetryPolicy,
    Clock,
    CompositeRetryPolicy,
    ErrorHintBackOffPolicy,
    ExceptionClassifierRetryPolicy,
    ExhaustedRetryError,
    ExponentialBackOffPolicy,
    FixedBackOffPolicy,
    LoggingListener,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    NeverRetryPolicy,
    NoBackOffPolicy,
    PredicateRetryPolicy,
    RetryBudget,
    RetryContext,
    RetryContextCache,
    RetryDecision,
    RetryError,
    RetryListener,
    RetryPolicy,
    RetryState,
    RetryTemplate,
    ScheduleBackOffPolicy,
    SimpleRetryPolicy,
    StatisticsListener,
    SystemClock,
    TimeoutRetryPolicy,
    UniformRandomBackOffPolicy,
    circuit_breaker,
    current_context,
    retryable,
    veto,
)
from retrykit.batch import (
    AsyncChunkStep,
    ChunkStep,
    CsvReader,
    Division,
    Report,
    SkipPolicy,
    async_run_partitions,
    run_partitions,
    stop,
)
from retrykit.cache import StoredContext
from retrykit.eviction import Eviction

# -- functions


@retryable
def bare(url: str, *, size: int = 1) -> bytes:
    return url.encode() * size


@retryable(retry_for=ConnectionError, max_attempts=5, back_off=ExponentialBackOffPolicy(jitter="full"), timeout=3.0)
def fetch(url: str, /, size: int = 1) -> bytes:
    return url.encode() * size


assert_type(bare("u", size=2), bytes)
assert_type(fetch("u", size=2), bytes)
assert_type(fetch("u", 2), bytes)
assert_type(fetch.template, RetryTemplate)
bare(1)  # type: ignore[arg-type]
bare("u", 2)  # type: ignore[call-arg]
bare("u", sise=2)  # type: ignore[call-arg]
bare()  # type: ignore[call-arg]
fetch(1)  # type: ignore[arg-type]
fetch(url="u")  # type: ignore[call-arg]
len(fetch)  # type: ignore[arg-type]

as_callable: Callable[[str, int], object] = fetch
as_wrong_callable: Callable[[int], bytes] = fetch  # type: ignore[assignment]

retryable(max_tries=3)  # type: ignore[call-overload]
retryable(max_attempts="3")  # type: ignore[call-overload]
retryable(retry_for=KeyboardInterrupt)  # type: ignore[arg-type]
retryable(back_off=3)  # type: ignore[call-overload]
retryable(retry_policy=SimpleRetryPolicy)  # type: ignore[call-overload]
retryable(3)  # type: ignore[call-overload]


# -- coroutine functions


@retryable
async def bare_later(url: str) -> bytes:
    return url.encode()


@retryable(max_attempts=2, timeout=timedelta(minutes=1))
async def fetch_later(url: str, *, size: int = 1) -> bytes:
    return url.encode() * size


async def coroutine_functions() -> None:
    assert_type(await bare_later("u"), bytes)
    assert_type(await fetch_later("u", size=2), bytes)
    assert_type(fetch_later.template, AsyncRetryTemplate)
    await bare_later(1)  # type: ignore[arg-type]
    await fetch_later("u", 2)  # type: ignore[call-arg]
    fetch_later("u") + b""  # type: ignore[operator]


as_async_callable: Callable[[str], Awaitable[bytes]] = fetch_later


# -- methods


class Client:
    @retryable
    def get(self, url: str, *, size: int = 1) -> bytes:
        return url.encode() * size

    @retryable(max_attempts=2)
    async def get_later(self, url: str) -> bytes:
        return url.encode()

    @classmethod
    @retryable
    def connect(cls, host: str, port: int = 80) -> Client:
        return cls() if host and port else Client()

    @classmethod
    @retryable(max_attempts=2)
    async def connect_later(cls, host: str) -> Client:
        return cls() if host else Client()

    @staticmethod
    @retryable
    def normal(url: str) -> str:
        return url

    @staticmethod
    @retryable(max_attempts=2)
    async def normal_later(url: str) -> str:
        return url


def methods(client: Client) -> None:
    assert_type(client.get("u", size=2), bytes)
    assert_type(Client.get(client, "u"), bytes)
    assert_type(Client.get.with_options(max_attempts=1)(client, "u"), bytes)
    client.get(1)  # type: ignore[arg-type]
    client.get("u", 2)  # type: ignore[call-arg]
    client.get()  # type: ignore[call-arg]
    Client.get(client, 1)  # type: ignore[arg-type]
    Client.get("u")  # type: ignore[arg-type, call-arg]
    Client.get.with_options(max_attempts=1)(client, 1)  # type: ignore[arg-type]

    assert_type(Client.connect("h", port=8080), Client)
    assert_type(client.connect("h"), Client)
    Client.connect(1)  # type: ignore[arg-type]
    client.connect(1)  # type: ignore[arg-type]
    Client.connect("h", "80")  # type: ignore[arg-type]

    assert_type(Client.normal("u"), str)
    Client.normal(1)  # type: ignore[arg-type]


async def coroutine_methods(client: Client) -> None:
    assert_type(await client.get_later("u"), bytes)
    assert_type(await Client.connect_later("h"), Client)
    assert_type(await Client.normal_later("u"), str)
    await client.get_later(1)  # type: ignore[arg-type]
    await client.get_later("u", 2)  # type: ignore[call-arg]
    await Client.connect_later(1)  # type: ignore[arg-type]
    await Client.normal_later(1)  # type: ignore[arg-type]


# -- with_options and recover keep signatures

once = fetch.with_options(max_attempts=1)
assert_type(once("u"), bytes)
assert_type(once.with_options(timeout=None)("u", size=2), bytes)
once(1)  # type: ignore[arg-type]
fetch.with_options(max_tries=1)  # type: ignore[call-arg]
fetch.with_options(max_attempts="1")  # type: ignore[arg-type]


async def variants_of_coroutine_functions() -> None:
    assert_type(await fetch_later.with_options(max_attempts=1)("u"), bytes)
    await fetch_later.with_options(max_attempts=1)(1)  # type: ignore[arg-type]


@bare.recover
def from_any(error: Exception, url: str, *, size: int = 1) -> bytes:
    return b""


@bare.recover()
def from_any_too(error: Exception, url: str, *, size: int = 1) -> bytes:
    return b""


@bare.recover(ConnectionError)
def from_one(error: ConnectionError, url: str, *, size: int = 1) -> bytes:
    return b""


@bare.recover(ConnectionError, ValueError)
def from_two(error: ConnectionError | ValueError, url: str, *, size: int = 1) -> bytes:
    return b""


@bare.recover(ConnectionError, ValueError, KeyError)
def from_three(error: Exception, url: str, *, size: int = 1) -> bytes:
    return b""


assert_type(from_one(ConnectionError(), "u", size=2), bytes)
from_one(ConnectionError(), 2)  # type: ignore[arg-type]


@bare.recover(OSError)  # type: ignore[arg-type]
def from_another_error(error: ConnectionError, url: str, *, size: int = 1) -> bytes:
    return b""


@bare.recover(OSError)  # type: ignore[arg-type]
def from_other_arguments(error: OSError, url: int, *, size: int = 1) -> bytes:
    return b""


@bare.recover(OSError)  # type: ignore[arg-type]
def to_another_type(error: OSError, url: str, *, size: int = 1) -> str:
    return ""


bare.recover(KeyboardInterrupt)  # type: ignore[arg-type]


@bare_later.recover(OSError)
async def later(error: OSError, url: str) -> bytes:
    return b""


@bare_later.recover(ValueError)
def now(error: ValueError, url: str) -> bytes:
    return b""


@bare_later.recover(KeyError)  # type: ignore[arg-type]
async def later_to_another_type(error: KeyError, url: str) -> str:
    return ""


# -- stateful by key, transactions


@contextmanager
def session() -> Generator[list[str]]:
    yield []


@asynccontextmanager
async def async_session() -> AsyncGenerator[list[str]]:
    yield []


def number_of(number: int, _text: str) -> int:
    return number


def is_repeated(number: int, _text: str) -> bool | None:
    return number > 1


@retryable(key=number_of, redelivered=is_repeated, transaction=session, recover_on_redelivery=False)
def handle(number: int, text: str) -> None: ...


handle(1, "t")
handle("t", 1)  # type: ignore[arg-type]
retryable(key="number")  # type: ignore[call-overload]


# -- circuit breakers


@circuit_breaker
def guarded(url: str) -> bytes:
    return b""


@circuit_breaker(failure_threshold=3, reset_timeout=timedelta(seconds=5), name="peer")
async def guarded_later(url: str) -> bytes:
    return b""


@guarded.recover
def open_circuit(error: Exception, url: str) -> bytes:
    return b""


async def circuits() -> None:
    assert_type(guarded("u"), bytes)
    assert_type(await guarded_later("u"), bytes)
    guarded(1)  # type: ignore[arg-type]
    await guarded_later(1)  # type: ignore[arg-type]
    circuit_breaker(max_attempts=3)  # type: ignore[call-overload]


# -- templates


def number(context: RetryContext) -> int:
    return context.attempt


def text(context: RetryContext) -> str:
    return str(context.last_error)


async def number_later(context: RetryContext) -> int:
    return context.attempt


async def text_later(context: RetryContext) -> str:
    return str(context.last_error)


def templates(template: RetryTemplate) -> None:
    assert_type(template.execute(number), int)
    assert_type(template.execute(number, text), int | str)
    assert_type(template.execute(number, recover=number), int)
    assert_type(template.execute(lambda context: context.attempt, recover=lambda _: None), int | None)
    state = RetryState(key=("orders", 7, b"x"), redelivered=True, rollback_for=lambda error: isinstance(error, OSError))
    assert_type(template.execute(number, text, state=state, transaction=session), int | str)
    assert_type(template.history("k"), RetryContext | None)
    assert_type(template.forget(7), bool)
    template.veto("k", "poison")
    template.execute(number, state="k")  # type: ignore[arg-type]
    template.execute(number, transaction=session())  # type: ignore[arg-type]
    template.execute(number, 3)  # type: ignore[arg-type]
    template.execute(3)  # type: ignore[arg-type]


RetryState(key=1.5)  # type: ignore[arg-type]
RetryState(key="k", journal="sometimes")  # type: ignore[arg-type]
RetryState("k")  # type: ignore[call-arg]
RetryTemplate("orders")  # type: ignore[call-arg]
RetryTemplate(max_attempts=3)  # type: ignore[call-arg]


async def async_templates(template: AsyncRetryTemplate) -> None:
    assert_type(await template.execute(number), int)
    assert_type(await template.execute(number_later), int)
    assert_type(await template.execute(number_later, text_later), int | str)
    assert_type(await template.execute(number_later, text), int | str)
    assert_type(await template.execute(number, text_later), int | str)
    assert_type(await template.execute(number, text), int | str)
    assert_type(await template.execute(number, transaction=async_session), int)
    assert_type(await template.history("k"), RetryContext | None)
    assert_type(await template.forget("k"), bool)
    await template.execute(3)  # type: ignore[call-overload]


def blocks(template: RetryTemplate) -> None:
    for attempt in template.attempts():
        with attempt as context:
            assert_type(context, RetryContext)
            assert_type(context.attempt, int)


async def async_blocks(template: AsyncRetryTemplate) -> None:
    async for attempt in template.attempts(state=RetryState(key=None)):
        async with attempt as context:
            assert_type(context, RetryContext)


# -- contexts, decisions, errors


def contexts(context: RetryContext, decision: RetryDecision) -> None:
    assert_type(context.last_error, BaseException | None)
    assert_type(context.max_attempts, int | None)
    assert_type(context.not_before, datetime | None)
    assert_type(context.evicted, Eviction | None)
    assert_type(context.parent, RetryContext | None)
    assert_type(context.snapshot(), dict[str, Any])
    assert_type(RetryContext.from_snapshot({}), RetryContext)
    context.attributes["seen"] = 3
    context.veto("poison")
    context.veto(3)  # type: ignore[arg-type]
    assert_type(current_context(), RetryContext | None)
    current_context().veto()  # type: ignore[union-attr]
    veto("poison")
    assert_type(decision.retry, bool)
    assert_type(decision.reason, str)
    assert_type(decision.clauses, tuple[RetryDecision, ...])
    decision.retry = True  # type: ignore[misc]
    error: RetryError = ExhaustedRetryError()
    raise error


# -- values

SimpleRetryPolicy(3, ConnectionError)
SimpleRetryPolicy(max_attempts=None, retry_for=(ConnectionError, TimeoutError), no_retry_for=KeyError, default=True)
SimpleRetryPolicy(retry_for=[OSError])
SimpleRetryPolicy("3")  # type: ignore[arg-type]
SimpleRetryPolicy(retry_for="OSError")  # type: ignore[arg-type]
MaxAttemptsRetryPolicy(None)
TimeoutRetryPolicy(timedelta(seconds=3))
TimeoutRetryPolicy("3")  # type: ignore[arg-type]
PredicateRetryPolicy(lambda error: isinstance(error, OSError))
ExceptionClassifierRetryPolicy({OSError: AlwaysRetryPolicy()}, default=NeverRetryPolicy())
CompositeRetryPolicy([SimpleRetryPolicy(), TimeoutRetryPolicy(3)], optimistic=True)
CompositeRetryPolicy(SimpleRetryPolicy())  # type: ignore[arg-type]
CircuitBreakerRetryPolicy(SimpleRetryPolicy(), failure_threshold=3, failure_rate=0.5, open_timeout=timedelta(seconds=5))
BudgetRetryPolicy(RetryBudget(ratio=0.1, reserve=5))
BudgetRetryPolicy(0.1)  # type: ignore[arg-type]

assert_type(FixedBackOffPolicy(timedelta(seconds=1)).interval, float)
FixedBackOffPolicy("1")  # type: ignore[arg-type]
UniformRandomBackOffPolicy(0.5, timedelta(seconds=1), seed=3)
ExponentialBackOffPolicy(initial=timedelta(milliseconds=100), multiplier=3, max_interval=10, jitter=0.5)
ExponentialBackOffPolicy(jitter="half")  # type: ignore[arg-type]
ScheduleBackOffPolicy([1, 2.5, timedelta(seconds=3)])
ScheduleBackOffPolicy(3)  # type: ignore[arg-type]
ErrorHintBackOffPolicy(fallback=NoBackOffPolicy(), hint=lambda _: 3.0, max_interval=60)

MapRetryContextCache(10, on_full="evict_oldest", time_to_live=timedelta(days=1))
MapRetryContextCache(10, tombstones=5, tombstone_time_to_live=timedelta(days=1))
MapRetryContextCache(10, tombstones="5")  # type: ignore[arg-type]
MapRetryContextCache(on_full="crash")  # type: ignore[arg-type]
RetryTemplate(remember_completed=timedelta(days=1), lease=60, listeners=[LoggingListener()])


# -- a user's own parts


class Patient:
    def decide(self, context: RetryContext) -> RetryDecision:
        return RetryDecision(context.retry_count < 100)


class Slow:
    def delay(self, context: RetryContext) -> float:
        return float(context.retry_count)


class OwnCache:
    def load(self, key: str) -> StoredContext | None:
        return None

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> int | None:
        return 1

    def remove(self, key: str, expected: int | None = None) -> bool:
        return False

    def items(self, prefix: str = "", after: str | None = None) -> Iterator[tuple[str, StoredContext]]:
        return iter(())

    def expire(self, now: float | None = None, limit: int | None = None) -> int:
        return 0


class Stopped:
    def time(self) -> float:
        return 0.0

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None: ...

    async def async_sleep(self, seconds: float) -> None: ...


class Ears(RetryListener):
    def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None:
        logging.getLogger("app").info("%s", decision.reason)


class AsyncEars(RetryListener):
    async def on_error(self, context: RetryContext, error: Exception, decision: RetryDecision) -> None: ...


policy: RetryPolicy = Patient()
back_off: BackOffPolicy = Slow()
cache: RetryContextCache = OwnCache()
clock: Clock = Stopped()
no_policy: RetryPolicy = Slow()  # type: ignore[assignment]
no_clock: Clock = Slow()  # type: ignore[assignment]
known_policies: tuple[RetryPolicy, ...] = (SimpleRetryPolicy(), NeverRetryPolicy(), CompositeRetryPolicy([Patient()]))
known_cache: RetryContextCache = MapRetryContextCache()
known_clock: Clock = SystemClock()

RetryTemplate(
    name="own",
    retry_policy=Patient(),
    back_off_policy=Slow(),
    context_cache=OwnCache(),
    clock=Stopped(),
    listeners=[Ears(), StatisticsListener()],
    recovery_policy=Patient(),
)
AsyncRetryTemplate(listeners=(AsyncEars(),), clock=Stopped())
RetryTemplate(retry_policy=Slow())  # type: ignore[arg-type]
RetryTemplate(back_off_policy=Patient())  # type: ignore[arg-type]
RetryTemplate(clock=Slow())  # type: ignore[arg-type]
RetryTemplate(listeners=Ears())  # type: ignore[arg-type]
retryable(retry_policy=Patient(), back_off=Slow(), clock=Stopped(), listeners=[Ears()])
retryable(template=RetryTemplate())

as_coroutine_callable: Callable[[str], Coroutine[Any, Any, bytes]] = bare_later


# -- batch jobs


def parse(row: dict[str, str]) -> dict[str, Any] | None: ...


def write_rows(transaction: Any, rows: list[Any]) -> None: ...


async def write_later(transaction: Any, rows: list[Any]) -> None: ...


load = ChunkStep(
    name="load",
    reader=CsvReader("orders.csv", dialect="excel-tab"),
    processor=parse,
    writer=write_rows,
    chunk_size=1_000,
    template=RetryTemplate(name="load"),
    skip=SkipPolicy(skip_for=ValueError, no_skip_for=[UnicodeError], limits={ValueError: 3}, share=0.01),
    no_rollback_for=(ValueError, KeyError),
)
assert_type(load.run({"file": "orders.csv"}, again=True), Report)
assert_type(load.run().counts.skipped, dict[str, int])
ChunkStep(name="load", reader=range(3))  # type: ignore[call-arg]
ChunkStep("load", range(3), write_rows)  # type: ignore[call-arg]
ChunkStep(name="load", reader=range(3), writer=3)  # type: ignore[arg-type]
SkipPolicy(skip_for="ValueError")  # type: ignore[arg-type]


async def run_later() -> None:
    later = AsyncChunkStep(name="load", reader=range(3), writer=write_later)
    assert_type(await later.run(), Report)
    assert_type(await async_run_partitions(part_later, 8, again=True), Division)
    await async_run_partitions(part_of, 8)  # type: ignore[arg-type]


def part_of(part: int, parts: int) -> ChunkStep:
    return load


def part_later(part: int, parts: int) -> AsyncChunkStep:
    return AsyncChunkStep(name="load", reader=range(part, 100, parts), writer=write_later)


assert_type(run_partitions(part_of, 8, {"day": 1}, again=datetime(2026, 11, 22, tzinfo=UTC)), Division)
run_partitions(part_later, 8)
run_partitions(load, 8)  # type: ignore[arg-type]


def never() -> None:
    assert_never(stop("no more"))
