"""A consumer process of a broker and a database: it writes down what it does, step by step, and may die at any of them.

`python -m tests.fault.broker_consumer` reads orders (`tests.fault.forks`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from retrykit import AsyncRetryTemplate, ExponentialBackOffPolicy, RetryListener, RetryTemplate, SimpleRetryPolicy
from retrykit.errors import CommitInDoubtError
from retrykit.messaging import ListenerContainer, park
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import SqlRetryContextCache
from tests.fault.forks import serve
from tests.fault.ledger import LoggedFaults, Pen
from tests.fault.store_consumer import engine_for

metadata = sa.MetaData()
effects = sa.Table("effects", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("number", sa.Integer))

MAX_ATTEMPTS = 4
TROUBLES = (ConnectionError, KeyError, ValueError, TimeoutError)


def is_poison(number: int) -> bool:
    """Whether no attempt of this message can succeed."""
    return number % 50 == 7


def failures(number: int) -> int:
    """How many attempts of a message fail at least."""
    if is_poison(number):
        return MAX_ATTEMPTS
    return 1 + number // 10 % 2 if number % 10 == 3 else 0


def is_slow(number: int) -> bool:
    """Whether its handler takes longer than the heart-beats are apart."""
    return number % 500 == 11


class WatchedSession:
    """A session of the broker that writes down what is asked of it."""

    def __init__(self, session: Any, consumer: Consumer) -> None:
        self._session = session
        self._consumer = consumer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def receive(self, timeout: float | None = None) -> Any:
        message = self._session.receive(timeout)
        if message is not None:
            self._consumer.begin(message)
        return message

    def flush(self) -> None:
        self._consumer.step()
        self._session.flush()

    def commit(self, message: Any = None) -> None:
        self._consumer.step()
        self._session.commit(message)
        if message is not None:
            self._consumer.note("acked")
        self._consumer.step()

    def rollback(self, message: Any = None, *others: Any) -> None:
        self._session.rollback(message, *others)
        if message is not None:
            self._consumer.note("returned")
            self._consumer.step()


class Reporter(RetryListener):
    """Writes down what the template decides; and it raises, which must change nothing."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def on_error(self, context: Any, error: Exception, decision: Any) -> None:
        self._consumer.note("fail", count=context.retry_count)
        raise RuntimeError("a listener that raises")

    def on_recover(self, context: Any, result: Any) -> None:
        self._consumer.note("recovered")
        raise RuntimeError("a listener that raises")

    def close(self, context: Any, error: BaseException | None) -> None:
        self._consumer.note("doubt" if isinstance(error, CommitInDoubtError) else "closed")


class Consumer:
    """One process, as an order describes it; `AsyncConsumer` is one whose handlers are coroutines.

    `broker`: what a `StompBroker` is made of, its queue included; what handlers send goes to QUEUE.out, poison to
    QUEUE.parked. `database`: of the work, the histories and the marks. `dies_after`: so many steps, then SIGKILL.
    `takes`: how long a slow handler takes. `journal`, `concurrency`: of the container.
    """

    template_class: type[RetryTemplate | AsyncRetryTemplate] = RetryTemplate

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.pen = Pen(order["ledger"], w=order["worker"])
        self.broker = StompBroker(**order["broker"])
        self.engine = engine_for(order["database"])
        self.begun = sessionmaker(self.engine).begin
        self.options: dict[str, Any] = {}
        self.present: ContextVar[dict[str, Any]] = ContextVar("present")
        self.lock = threading.Lock()
        self.steps_left = order.get("dies_after")
        self.deliveries = 0
        logging.getLogger("retrykit").addHandler(LoggedFaults(self.pen))

    def run(self) -> None:
        destination = self.broker.destination
        container = ListenerContainer(
            self,
            self.handle,
            template=self.template_class(
                name="orders",
                retry_policy=SimpleRetryPolicy(max_attempts=MAX_ATTEMPTS),
                back_off_policy=ExponentialBackOffPolicy(initial=0.005, max_interval=0.05, jitter="full"),
                context_cache=SqlRetryContextCache(self.engine),
                remember_completed=3600,
                listeners=(Reporter(self),),
            ),
            transaction=self.transaction,
            recover=park(f"{destination}.parked"),
            journal=self.order["journal"],
            concurrency=self.order.get("concurrency", 1),
            reconnect=ExponentialBackOffPolicy(initial=0.02, max_interval=0.5, jitter="full"),
            **self.options,
        )
        self.pen("began")
        container.run()
        self.pen("done")

    # -- the work

    def handle(self, message: Any, context: Any) -> None:
        number = int(message.text)
        self.note("attempt", n=context.attempt)
        context.transaction.execute(sa.insert(effects).values(number=number))
        message.send(f"{message.destination}.out", message.text)
        self.step()
        if is_slow(number):
            time.sleep(self.order["takes"])
        if context.attempt <= failures(number):
            raise TROUBLES[number % len(TROUBLES)](f"attempt {context.attempt} of {number} failed")

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        with self.begun() as session:
            yield session
            self.step()
        self.step()

    # -- the broker, as the container sees it

    @property
    def name(self) -> str:
        return self.broker.name

    def connect(self, *, consume: bool = True) -> WatchedSession:
        session = self.broker.connect(consume=consume)
        self.pen("connected")
        return WatchedSession(session, self)

    # -- what is written down

    def begin(self, message: Any) -> None:
        """A delivery has come."""
        with self.lock:
            self.deliveries += 1
            self.present.set({"d": self.deliveries, "k": int(message.text)})
        self.note("receive", again=message.redelivered)
        self.step()

    def note(self, event: str, **facts: Any) -> None:
        """Write an event of the delivery in hand."""
        self.pen(event, **self.present.get(), **facts)

    def step(self) -> None:
        """Between two steps: this may be where the process dies."""
        if self.steps_left is None:
            return
        with self.lock:
            self.steps_left -= 1
            if self.steps_left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    logging.getLogger("retrykit").propagate = False
    logging.getLogger("stomp.py").addHandler(logging.NullHandler())
    # Loaded once, for all children.
    __import__("psycopg")
    serve(Consumer)


if __name__ == "__main__":
    main()
