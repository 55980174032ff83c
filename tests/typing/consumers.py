"""Consumers as a user types them, plain and with coroutines. Nothing here runs: mypy and pyright read it.

A call that must be refused carries `# type: ignore[…]`: both checkers complain when it is accepted.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from retrykit import AsyncRetryTemplate, RetryContext, RetryTemplate
from retrykit.messaging import Consumers, Discard, ListenerContainer, Message, Park, discard, park, republish
from retrykit.messaging.memory import MemoryBroker

broker = MemoryBroker("/queue/orders")
engine = create_async_engine("postgresql+asyncpg://localhost/shop")
plain, later = RetryTemplate(name="shop"), AsyncRetryTemplate(name="shop")


@contextmanager
def transaction() -> Generator[list[str]]:
    yield []


@asynccontextmanager
async def async_transaction() -> AsyncGenerator[list[str]]:
    yield []


@asynccontextmanager
async def lifespan() -> AsyncGenerator[None]:
    yield
    await engine.dispose()


def handle(message: Message, context: RetryContext) -> None:
    message.send("/queue/next", message.body)


async def async_handle(message: Message, context: RetryContext) -> None:
    message.send("/queue/next", message.body)


async def settles(message: Message) -> Park | Discard | None:
    return Park("/queue/parked") if message.text else None


def recover(message: Message, context: RetryContext) -> Park:
    return Park("/queue/parked")


async def async_recover(message: Message, context: RetryContext) -> Park:
    return Park("/queue/parked")


class Shop:
    async def book(self, message: Message, *, context: RetryContext) -> None: ...

    async def __call__(self, message: Message) -> None: ...


# -- containers

ListenerContainer(broker, handle, template=plain, transaction=transaction, recover=recover)
ListenerContainer(broker, handle, template=plain, transaction=sessionmaker().begin, recover=park("/queue/parked"))
ListenerContainer(broker, async_handle, template=later, transaction=async_transaction, recover=async_recover)
ListenerContainer(broker, async_handle, template=later, transaction=async_sessionmaker(engine).begin, recover=recover)
ListenerContainer(broker, settles, template=later, transaction=engine.begin, recover=republish("/queue/elsewhere"))
ListenerContainer(broker, Shop().book, template=later, transaction=transaction, recover=discard("nobody wants it"))
ListenerContainer(broker, Shop(), template=later, lifespan=lifespan, journal="always", concurrency=8)
ListenerContainer(broker, handle, template="shop")  # type: ignore[arg-type]
ListenerContainer(broker, async_handle, template=later, lifespan=transaction)  # type: ignore[arg-type]
ListenerContainer(broker, async_handle, template=later, transaction=async_handle)  # type: ignore[arg-type]
ListenerContainer(broker, async_handle, template=later, recover=park)  # type: ignore[arg-type]

container = ListenerContainer(broker, async_handle, template=later)
assert_type(container.template, RetryTemplate | AsyncRetryTemplate)
assert_type(container.run(grace=25), bool)
with container as running:
    assert_type(running, ListenerContainer)


# -- the registry: what is registered stays what it was

consumers = Consumers("stomp://localhost:61613", template=later, transaction=async_transaction, lifespan=lifespan)


@consumers.consumer("/queue/orders", recover=async_recover, concurrency=4)
async def book(message: Message) -> int:
    return len(message.body)


@consumers.consumer("/queue/bills", template=plain, transaction=None)
def send_bill(message: Message, context: RetryContext) -> str:
    return message.text


as_coroutine_function: Callable[[Message], Coroutine[Any, Any, int]] = book
as_function: Callable[[Message, RetryContext], str] = send_bill
consumers.add("/queue/others", Shop().book)
Consumers(broker, template=later, lifespan=lifespan, span=lifespan)  # type: ignore[call-arg]


async def a_test_calls_it() -> None:
    assert_type(await book(Message(destination="/queue/orders")), int)
    wrong: Awaitable[str] = book(Message(destination="/queue/orders"))  # type: ignore[assignment]
    await wrong
