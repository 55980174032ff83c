"""Messages as the items of a batch step: acknowledged with their chunk, back when it was rolled back."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.orm import sessionmaker

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import END_OF_CHUNK, ChunkStep, MessageReader, SkipPolicy
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import SqlJobStore, SqlRetryContextCache, parked_items, sqlite_engine
from retrykit.testing import StompServer

QUEUE = "/queue/orders"


@pytest.fixture
def engine(tmp_path):
    engine = sqlite_engine(f"sqlite:///{tmp_path}/orders.db", durability="process")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (item INTEGER PRIMARY KEY)"))
    yield engine
    engine.dispose()


@pytest.fixture(params=["memory", "activemq"])
def broker(request):
    """A broker, and what publishes there."""
    if request.param == "memory":
        broker = MemoryBroker(QUEUE)
        yield broker, broker.publish
        return
    with StompServer(profile=request.param) as server:
        yield StompBroker(server.url, destination=QUEUE, prefetch=10), lambda body: server.publish(QUEUE, body)


def write(session, messages):
    rows = [{"item": int(message.body)} for message in messages]
    session.execute(text("INSERT INTO work VALUES (:item) ON CONFLICT DO NOTHING"), rows)
    if any(message.body == b"7" for message in messages):
        raise ValueError("seven")


def step(engine, broker, **options):
    options = {
        "writer": write,
        "skip": SkipPolicy(skip_for=ValueError),
        "reader": MessageReader(broker, idle=0.5, linger=0.1),
        "template": RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(1)),
    } | options
    return ChunkStep(
        name="orders",
        transaction=sessionmaker(engine).begin,
        chunk_size=10,
        jobs=SqlJobStore(engine),
        **options,
    )


def written(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(text("SELECT item FROM work")))


def left(broker):
    session = broker.connect()
    try:
        found = []
        while (message := session.receive(0.3)) is not None:
            found.append(int(message.body))
        return sorted(found)
    finally:
        session.close()


def test_messages_are_acknowledged_with_their_chunk_and_poison_is_parked_as_it_was_delivered(engine, broker):
    source, publish = broker
    for number in range(25):
        publish(str(number).encode())
    report = step(engine, source).run(again=True)
    assert written(engine) == [number for number in range(25) if number != 7]
    assert (report.counts.written, report.counts.all_skipped) == (24, 1)
    assert left(source) == []
    (item,) = parked_items(engine)
    assert (item.payload, item.destination) == (b"7", QUEUE)
    assert item.message_id
    # The next run takes what has come since.
    publish(b"99")
    assert step(engine, source).run(again=True).counts.written == 1


def test_messages_of_a_chunk_that_stopped_the_step_go_back(engine, broker):
    source, publish = broker
    for number in range(15):
        publish(str(number).encode())

    def fail(session, messages):
        if any(message.body == b"12" for message in messages):
            raise OSError("disk full")
        write(session, messages)

    with pytest.raises(OSError, match="disk full"):
        step(engine, source, writer=fail).run()
    assert written(engine) == [number for number in range(10) if number != 7]
    assert left(source) == list(range(10, 15))


class Torn(MessageReader):
    """Its connection is gone when the bad message is to be acknowledged; once."""

    torn = False

    def settled(self, messages):
        if not Torn.torn and any(message.body == b"7" for message in messages):
            Torn.torn = True
            raise ConnectionError("the broker is gone")
        super().settled(messages)


def test_a_bad_message_that_is_delivered_again_is_not_parked_again(engine, broker, monkeypatch):
    source, publish = broker
    monkeypatch.setattr(Torn, "torn", False)
    for number in range(5, 10):
        publish(str(number).encode())

    def load():
        # As another process would: nothing is remembered but what is stored.
        remembering = RetryTemplate(
            name="orders",
            retry_policy=SimpleRetryPolicy(1),
            context_cache=SqlRetryContextCache(engine),
            remember_completed=3600,
        )
        reader = Torn(source, idle=0.5, linger=0.1)
        key = lambda message: message.id  # noqa: E731 - one line says it
        return step(engine, source, template=remembering, reader=reader, key=key).run(again=True)

    with pytest.raises(ConnectionError):
        load()
    assert len(list(parked_items(engine))) == 1
    report = load()
    assert written(engine) == [5, 6, 8, 9]
    assert len(list(parked_items(engine))) == 1
    assert (report.counts.all_skipped, report.counts.filtered) == (1, 1)
    assert left(source) == []


class Groups:
    """A reader that says where its chunks end."""

    def __init__(self):
        self.told = []

    def read_from(self, position):
        for number in range(position or 0, 7):
            if number % 3 == 0:
                yield END_OF_CHUNK
            yield number, number + 1

    def settled(self, items):
        self.told.append(items)


def test_a_reader_says_where_a_chunk_ends_and_hears_what_is_settled():
    chunks, reader = [], Groups()
    ChunkStep(name="groups", reader=reader, writer=lambda _, items: chunks.append(items)).run()
    assert chunks == reader.told == [[0, 1, 2], [3, 4, 5], [6]]
    chunks, reader = [], Groups()
    ChunkStep(name="groups", reader=reader, writer=lambda _, items: chunks.append(items), chunk_size=2).run()
    assert chunks == reader.told == [[0, 1], [2], [3, 4], [5], [6]]


@pytest.mark.parametrize(("prefetch", "warned"), [(1, True), (10, False)])
def test_a_broker_that_gives_one_at_a_time_is_warned_of(caplog, prefetch, warned):
    with StompServer() as server:
        reader = MessageReader(StompBroker(server.url, destination=QUEUE, prefetch=prefetch), idle=0.01)
        assert list(reader.read_from(None)) == []
    assert ("prefetch is 1, so every chunk is one message" in caplog.text) == warned


@pytest.mark.parametrize("options", [{"broker": "stomp://"}, {"idle": 0}, {"linger": -1}, {"idle": "1"}])
def test_bad_arguments_are_refused(options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
        MessageReader(**({"broker": MemoryBroker(QUEUE)} | options))
