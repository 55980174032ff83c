"""The main job with coroutines: an asynchronous database transaction for each message, on an event loop they share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine

from retrykit import AsyncRetryTemplate, ExponentialBackOffPolicy, FixedBackOffPolicy, RetryTemplate, SimpleRetryPolicy
from retrykit.errors import CommitInDoubtError
from retrykit.messaging import ListenerContainer, park
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import (
    AsyncSqlRetryContextCache,
    SqlRetryContextCache,
    async_sqlite_engine,
    create_tables,
    park_in_transaction,
    parked_items,
    sqlite_engine,
)
from tests.servers.databases import empty_database, with_driver

PATIENCE = 90.0
QUICK = ExponentialBackOffPolicy(initial=0.01, max_interval=0.2, jitter="full")
SLOW_TO_FAIL = {"receipt_timeout": 20.0, "connect_timeout": 20.0}
SLOW = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000000) SELECT count(*) FROM c"
DRIVERS = {"sqlite": ("aiosqlite", "pysqlite"), "postgresql": ("asyncpg", "psycopg")}


@pytest.fixture(params=["embedded", "activemq", "rabbitmq"])
def server(request):
    return request.getfixturevalue(request.param)


class Database:
    """A database for the work, through an asynchronous driver; `look` looks into it through another one."""

    def __init__(self, request, name):
        driver, other = DRIVERS[name]
        self.url = empty_database(request, name, driver)
        address = with_driver(self.url, other)
        self.beside = sqlite_engine(address) if name == "sqlite" else create_engine(address)
        create_tables(self.beside)
        with self.beside.begin() as connection:
            connection.execute(text("CREATE TABLE work (body VARCHAR(20) NOT NULL)"))
        make = async_sqlite_engine if name == "sqlite" else create_async_engine
        # As many connections as the tests have workers at most: a delivery needs one at a time.
        self.engine = make(self.url, pool_size=8, max_overflow=0)
        self.connections = []
        event.listen(self.engine.sync_engine, "connect", lambda connection, _: self.connections.append(connection))

    @asynccontextmanager
    async def open(self):
        """For the lifespan of the loop: the engine belongs to it."""
        try:
            yield
        finally:
            await self.engine.dispose()

    def effects(self):
        with self.beside.connect() as connection:
            return Counter(body for (body,) in connection.execute(text("SELECT body FROM work")))

    def histories(self):
        """The stored histories, without the marks of what is completed."""
        with SqlRetryContextCache(self.beside) as cache:
            return [found.snapshot for _, found in cache.items() if not found.snapshot.get("completed_at")]


@pytest.fixture
def sqlite(request):
    yield from opened(request, "sqlite")


@pytest.fixture
def postgres(request):
    yield from opened(request, "postgresql")


@pytest.fixture(params=["sqlite", "postgres"])
def database(request):
    return request.getfixturevalue(request.param)


def opened(request, name):
    made = Database(request, name)
    yield made
    made.beside.dispose()


async def write(context, body):
    await context.transaction.execute(text("INSERT INTO work VALUES (:body)"), {"body": body})


def consumer(broker, handler, database, *, max_attempts=3, remember_completed=3600.0, back_off=QUICK, **options):
    template = AsyncRetryTemplate(
        name="orders",
        retry_policy=SimpleRetryPolicy(max_attempts=max_attempts),
        back_off_policy=back_off,
        context_cache=AsyncSqlRetryContextCache(database.engine),
        remember_completed=remember_completed,
    )
    given = {"transaction": async_sessionmaker(database.engine).begin, "reconnect": QUICK, "lifespan": database.open}
    return ListenerContainer(broker, handler, template=template, **given | options)


def broker_of(server, queue, **options):
    return StompBroker(server.url, destination=queue, **SLOW_TO_FAIL | options)


def publish(server, queue, bodies):
    session = StompBroker(server.url).connect(consume=False)
    for body in bodies:
        session.send(queue, str(body).encode(), {"content-type": "text/plain"})
    session.flush()
    session.commit()
    session.close()


def take(server, queue, count):
    """Everything in a queue: the expected number, and then nothing more."""
    session = broker_of(server, queue).connect()
    found = []
    while (message := session.receive(PATIENCE if len(found) < count else 0.5)) is not None:
        found.append(message)
        session.commit(message)
    session.close()
    return found


def wait_for(condition, container):
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in time: {container.counters}"
        pause.wait(0.02)


# -- the main job


def test_every_effect_happens_once_and_poison_is_parked_once(server, queue, database):
    attempts = Counter()

    async def handle(message, context):
        number = int(message.text)
        attempts[number] += 1
        await write(context, message.text)
        message.send(f"{queue}.next", message.body)
        if number % 7 == 0 or (number % 5 == 0 and context.attempt < 3):
            raise ConnectionError(f"number {number}, attempt {context.attempt}")

    numbers = range(1, 31)
    publish(server, queue, numbers)
    good = [number for number in numbers if number % 7]
    container = consumer(broker_of(server, queue), handle, database, recover=park(f"{queue}.parked"), concurrency=3)
    with container:
        wait_for(lambda: container.counters.acknowledged + container.counters.parked == len(numbers), container)
    assert database.effects() == {str(number): 1 for number in good}
    assert attempts == {number: 1 if number % 5 and number % 7 else 3 for number in numbers}
    assert container.counters.in_doubt == 0
    # RabbitMQ need not keep an order when several send.
    assert sorted(int(copy.text) for copy in take(server, f"{queue}.next", len(good))) == good
    parked = take(server, f"{queue}.parked", len(numbers) - len(good))
    assert sorted(int(copy.text) for copy in parked) == [number for number in numbers if number % 7 == 0]
    assert {copy.headers["retrykit-attempts"] for copy in parked} == {"3"}
    assert database.histories() == []


def test_workers_share_one_engine(embedded, queue, database):
    publish(embedded, queue, range(100))
    present, most = 0, 0

    async def handle(message, context):
        nonlocal present, most
        present += 1
        most = max(most, present)
        await asyncio.sleep(0.005)
        await write(context, message.text)
        present -= 1

    container = consumer(broker_of(embedded, queue), handle, database, concurrency=8)
    with container:
        wait_for(lambda: container.counters.acknowledged == 100, container)
    assert database.effects() == {str(number): 1 for number in range(100)}
    assert container.counters.rolled_back == 0
    assert most > 1
    assert len(database.connections) <= 8


@pytest.mark.parametrize("recover", [park_in_transaction, park("parked")], ids=["in the database", "at the broker"])
def test_commit_that_fails_is_a_failed_attempt(postgres, recover):
    with postgres.beside.begin() as connection:
        connection.execute(text("CREATE TABLE customer (id INTEGER PRIMARY KEY)"))
        connection.execute(
            text("CREATE TABLE orders (customer INTEGER REFERENCES customer DEFERRABLE INITIALLY DEFERRED)")
        )
    calls = []

    async def handle(message, context):
        calls.append(context.attempt)
        await write(context, message.text)
        await context.transaction.execute(text("INSERT INTO orders VALUES (1)"))

    broker = MemoryBroker("orders")
    broker.publish("x")
    container = consumer(broker, handle, postgres, recover=recover)
    with container:
        assert broker.wait_until_empty(PATIENCE)
    assert calls == [1, 2, 3]
    assert (container.counters.rolled_back, container.counters.recovered, container.counters.parked) == (2, 1, 1)
    assert postgres.effects() == {}
    in_table = [item.attempts for item in parked_items(postgres.beside)]
    in_queue = [copy.headers["retrykit-error-type"] for copy in broker.at("parked").messages()]
    assert (len(in_table), len(in_queue)) == ((1, 0) if recover is park_in_transaction else (0, 1))
    assert all("IntegrityError" in error for error in in_queue)


# -- doubts


@pytest.mark.parametrize("moment", ["drop_before_commit", "drop_before_receipt", "drop_after_receipt"])
def test_commit_that_is_not_confirmed_repeats_and_loses_nothing(embedded, queue, sqlite, moment):
    calls = Counter()

    async def handle(message, context):
        calls[message.text] += 1
        await write(context, message.text)
        message.send(f"{queue}.next", message.body)

    publish(embedded, queue, range(10))
    getattr(embedded, moment)(times=4)
    container = consumer(broker_of(embedded, queue), handle, sqlite)
    try:
        with container:
            wait_for(lambda: len(sqlite.effects()) == 10, container)
            sent = take(embedded, f"{queue}.next", 10)
    finally:
        embedded.clear_faults()
    assert sqlite.effects() == {str(number): 1 for number in range(10)}
    # One that comes just before its connection ends is begun, rolled back, and begun again.
    assert set(calls) == set(sqlite.effects())
    assert calls.total() <= 10 + 4
    assert Counter(copy.text for copy in sent) == calls
    assert len({copy.id for copy in sent}) == 10
    if moment != "drop_after_receipt":
        assert container.counters.in_doubt == 4
        # What the database committed and the broker did not is answered from the marks.
        assert (container.counters.duplicates > 0) == (moment == "drop_before_commit")


def test_without_marks_what_is_in_doubt_is_done_again(sqlite):
    calls = []

    async def handle(message, context):
        calls.append(message.text)
        await write(context, message.text)

    broker = MemoryBroker("orders")
    broker.publish("x")
    broker.doubt_next_commit("undone")
    with consumer(broker, handle, sqlite, remember_completed=None):
        assert broker.wait_until_empty(PATIENCE)
    assert (calls, sqlite.effects()) == (["x"] * 2, {"x": 2})


def test_connection_lost_while_the_handler_runs_rolls_back(embedded, queue, database):
    cut = []

    async def handle(message, context):
        await write(context, message.text)
        if not cut:
            cut.append(embedded.drop_connections())

    publish(embedded, queue, [1, 2])
    container = consumer(broker_of(embedded, queue), handle, database, max_attempts=1)
    with container:
        wait_for(lambda: len(database.effects()) == 2, container)
    assert database.effects() == {"1": 1, "2": 1}
    assert (container.counters.in_doubt, container.counters.generations) == (1, 2)


def test_doubt_of_the_database_itself_counts_nothing(sqlite):
    calls = []

    @asynccontextmanager
    async def begin():
        async with async_sessionmaker(sqlite.engine).begin() as session:
            yield session
        if len(calls) == 1:
            raise CommitInDoubtError

    async def handle(message, context):
        calls.append(context.attempt)
        await write(context, message.text)

    broker = MemoryBroker("orders")
    broker.publish("x")
    container = consumer(broker, handle, sqlite, transaction=begin, max_attempts=1)
    with container:
        assert broker.wait_until_empty(PATIENCE)
    assert (calls, sqlite.effects()) == ([1], {"x": 1})
    assert (container.counters.in_doubt, container.counters.duplicates) == (1, 1)


# -- waiting


def test_handlers_and_pauses_longer_than_the_heart_beat_keep_their_connections(server, queue, sqlite):
    async def handle(message, context):
        await write(context, message.text)
        await asyncio.sleep(1.2)
        if context.attempt == 1:
            raise ConnectionError

    publish(server, queue, [1])
    broker = broker_of(server, queue, heart_beat=0.4)
    container = consumer(broker, handle, sqlite, back_off=FixedBackOffPolicy(1.2))
    with container:
        wait_for(lambda: container.counters.acknowledged == 1, container)
    assert (sqlite.effects(), container.counters.generations) == ({"1": 1}, 1)


def test_pauses_can_be_the_brokers(embedded, queue, sqlite):
    attempts = []

    async def handle(message, context):
        attempts.append(context.attempt)
        await write(context, message.text)
        if context.attempt < 3:
            raise ConnectionError

    options = {"back_off": FixedBackOffPolicy(0.6)}
    publish(embedded, queue, [1])
    container = consumer(broker_of(embedded, queue), handle, sqlite, **options)
    with container:
        # The pause is waited for in the session, until that ends.
        wait_for(lambda: container.counters.received == 2, container)
    container = consumer(broker_of(embedded, queue), handle, sqlite, delay="schedule", **options)
    with container:
        wait_for(lambda: container.counters.acknowledged == 1, container)
    assert (attempts, sqlite.effects()) == ([1, 2, 3], {"1": 1})
    assert container.counters.postponed == 2


def test_stopping_lets_the_handler_finish_and_stopping_at_once_cancels_it(server, queue, database):
    running, cancelled = threading.Semaphore(0), []

    async def handle(message, context):
        await write(context, message.text)
        running.release()
        try:
            await asyncio.sleep(0.2 if message.text == "quick" else 3600)
        except asyncio.CancelledError:
            cancelled.append(message.text)
            raise

    publish(server, queue, ["quick"])
    container = consumer(broker_of(server, queue), handle, database, max_attempts=1)
    container.start()
    assert running.acquire(timeout=PATIENCE)
    container.stop()
    assert container.wait(PATIENCE)
    assert database.effects() == {"quick": 1}

    publish(server, queue, ["slow"])
    container = consumer(broker_of(server, queue), handle, database, max_attempts=1, journal="always")
    container.start()
    assert running.acquire(timeout=PATIENCE)
    container.stop(now=True)
    assert container.wait(PATIENCE)
    assert (cancelled, database.effects(), database.histories()) == (["slow"], {"quick": 1}, [])
    (left,) = take(server, queue, 1)
    assert left.text == "slow"


# -- what is no transaction


@pytest.mark.parametrize("kind", ["sessionmaker", "connection", "scoped"])
def test_transaction_that_would_never_commit_stops_the_container(sqlite, kind):
    sessions = async_sessionmaker(sqlite.engine)
    makers = {
        "sessionmaker": sessions,
        "connection": sqlite.engine.connect,
        "scoped": async_scoped_session(sessions, asyncio.current_task),
    }
    calls = []

    async def handle(message):
        calls.append(message)

    broker = MemoryBroker("orders")
    broker.publish("x")
    container = consumer(broker, handle, sqlite, transaction=makers[kind])
    container.start()
    with pytest.raises(TypeError, match=r"transaction: a(n)? Async(Session|Connection) .*begin"):
        container.wait(PATIENCE)
    assert (calls, len(broker.messages())) == ([], 1)


@pytest.mark.parametrize("kind", ["engine", "session", "plain"])
def test_transactions_of_many_kinds_are_taken(sqlite, kind):
    @contextmanager
    def plain():
        with sqlite.beside.begin() as connection:
            yield connection

    makers = {"engine": sqlite.engine.begin, "session": async_sessionmaker(sqlite.engine).begin, "plain": plain}

    async def handle(message, context):
        if kind == "plain":
            context.transaction.execute(text("INSERT INTO work VALUES ('x')"))
        else:
            await write(context, "x")

    broker = MemoryBroker("orders")
    broker.publish("x")
    with consumer(broker, handle, sqlite, transaction=makers[kind]):
        assert broker.wait_until_empty(PATIENCE)
    assert sqlite.effects() == {"x": 1}


def test_plain_container_with_an_asynchronous_transaction_stops(sqlite):
    broker = MemoryBroker("orders")
    broker.publish("x")
    container = ListenerContainer(
        broker, lambda _message: None, template=RetryTemplate(), transaction=async_sessionmaker(sqlite.engine).begin
    )
    container.start()
    with pytest.raises(TypeError, match="AsyncRetryTemplate"):
        container.wait(PATIENCE)


@pytest.mark.parametrize("end", ["timeout", "stop"])
def test_statement_that_is_cancelled_holds_up_nothing(sqlite, end):
    broker = MemoryBroker("/queue/orders")
    broker.publish("x")
    attempts, running = [], threading.Event()

    async def handler(message, context):
        attempts.append(context.attempt)
        await write(context, message.text)
        running.set()
        async with asyncio.timeout(0.05 if end == "timeout" else None):
            await context.transaction.execute(text(SLOW))

    made = consumer(broker, handler, sqlite, recover=park("/queue/parked"))
    began = time.monotonic()
    made.start()
    assert running.wait(PATIENCE)
    if end == "timeout":
        assert broker.wait_until_empty(PATIENCE)
    made.stop(now=True)
    assert made.wait(PATIENCE)
    assert time.monotonic() - began < 20  # less than the time for which connections wait for a lock
    assert sqlite.effects() == {}
    assert sqlite.histories() == []
    assert (attempts, made.counters.rolled_back) == (([1, 2, 3], 2) if end == "timeout" else ([1], 0))


def test_store_that_blocks_and_cannot_join_the_transaction_stops_the_container(sqlite):
    broker, calls = MemoryBroker("/queue/orders"), []
    broker.publish("x")

    async def handler(message):
        calls.append(message)

    made = consumer(broker, handler, sqlite, recover=park("/queue/parked"))
    made.template = AsyncRetryTemplate(name="orders", context_cache=SqlRetryContextCache(sqlite.beside))
    made.start()
    with pytest.raises(TypeError, match=r"AsyncSession cannot be joined by a cache that blocks.*AsyncSqlRetryContext"):
        made.wait(PATIENCE)
    assert (calls, [message.body for message in broker.messages()]) == ([], [b"x"])
