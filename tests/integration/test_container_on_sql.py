"""The listener container where the work, its history and what is parked are in one database."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from retrykit import ExponentialBackOffPolicy, RetryTemplate, SimpleRetryPolicy
from retrykit.messaging import ListenerContainer, Message, park, retraction
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import SqlRetryContextCache, park_in_transaction, parked_items
from retrykit.testing import StompServer
from tests import waiting

PATIENCE = 20.0
AT_ONCE = ExponentialBackOffPolicy(initial=0.001, max_interval=0.01)


@pytest.fixture
def cache(tmp_path):
    with SqlRetryContextCache(f"sqlite:///{tmp_path}/work.db") as cache:
        with cache.engine.begin() as connection:
            connection.execute(text("CREATE TABLE effects (body TEXT)"))
        yield cache


@pytest.fixture
def broker():
    return MemoryBroker("orders")


def consume(broker, cache, handler, *, remember_completed=None, **options):
    template = RetryTemplate(
        name="orders",
        retry_policy=SimpleRetryPolicy(max_attempts=3),
        context_cache=cache,
        remember_completed=remember_completed,
    )
    given = {
        "transaction": sessionmaker(cache.engine).begin,
        "reconnect": AT_ONCE,
    }
    container = ListenerContainer(broker, handler, template=template, **given | options)
    with container:
        assert broker.wait_until_empty(PATIENCE)
    return container


def effects(cache):
    with cache.engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM effects"))


@pytest.mark.parametrize(("remember_completed", "rows"), [(60, 1), (None, 2)])
def test_a_recovery_in_doubt_runs_no_further_attempts(broker, cache, remember_completed, rows):
    calls = []

    def handler(message):
        calls.append(message.text)
        raise ValueError

    broker.publish("x")
    broker.doubt_next_commit("undone")
    consume(broker, cache, handler, recover=park_in_transaction, remember_completed=remember_completed)
    assert len(calls) == 3
    # Without a mark nothing says that the first recovery was committed: it is repeated, and it alone.
    assert [item.attempts for item in parked_items(cache.engine)] == [3] * rows
    assert list(cache.items("orders(")) == [] or remember_completed


def test_what_is_parked_in_the_database_is_counted_as_parked_and_the_log_has_its_number(broker, cache, caplog):
    def handler(message):
        raise ValueError

    broker.publish("x", id="o-1")
    counters = consume(broker, cache, handler, recover=park_in_transaction).counters
    assert (counters.parked, counters.recovered, counters.acknowledged) == (1, 1, 0)
    (item,) = parked_items(cache.engine)
    words = f"message ('orders', 'o-1') was parked in rk_parked as {item.id}: SimpleRetryPolicy: attempt 3 of 3"
    assert words in caplog.text


@pytest.mark.parametrize("profile", ["activemq", "rabbitmq"])
def test_a_connection_that_ended_while_the_handler_ran_is_known_before_the_database_commits(cache, profile):
    calls = []

    def handler(message, context):
        context.transaction.execute(text("INSERT INTO effects VALUES ('x')"))
        calls.append(message.id)
        if len(calls) == 1:
            server.drop_connections()

    with StompServer(profile=profile) as server:
        server.publish("/queue/orders", b"x", {"retrykit-id": "o-1", "amqp-message-id": "o-1"})
        template = RetryTemplate(name="orders", context_cache=cache)
        source = StompBroker(server.url, destination="/queue/orders")
        begin = sessionmaker(cache.engine).begin
        with ListenerContainer(source, handler, template=template, transaction=begin, reconnect=AT_ONCE):
            waiting.until(lambda: len(calls) == 2 and not server.depth("/queue/orders"), PATIENCE)
    # There are no completion marks: committed the first time, it would be here twice.
    assert effects(cache) == 1


@pytest.fixture
def little_patience(monkeypatch):
    """Whoever has written to a file of SQLite holds up all others, who would have to be waited for."""
    monkeypatch.setattr(retraction, "PATIENCE", 0.02)


class Halted:
    """Where a delivery is halted until it is told to go on, the first time."""

    def __init__(self, where):
        self.where = where
        self.reached, self.go_on = threading.Event(), threading.Event()

    def at(self, where):
        if where == self.where and not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(PATIENCE)

    def handle(self, message, context):
        self.at("before the handler's work")
        context.transaction.execute(text("INSERT INTO effects VALUES ('x')"))
        self.at("after the handler's work")

    @contextmanager
    def transaction(self, engine):
        with sessionmaker(engine).begin() as session:
            yield session
            self.at("before the commit")
        self.at("after the commit")


@pytest.mark.parametrize("remember_completed", [60, None])
@pytest.mark.parametrize(
    "where", ["before the handler's work", "after the handler's work", "before the commit", "after the commit"]
)
@pytest.mark.usefixtures("little_patience")
def test_work_is_done_once_whenever_the_container_is_stopped_at_once(broker, cache, where, remember_completed):
    broker.publish("x")
    halted = Halted(where)
    template = RetryTemplate(name="orders", context_cache=cache, remember_completed=remember_completed)
    options = {"transaction": partial(halted.transaction, cache.engine), "template": template, "reconnect": AT_ONCE}
    made = ListenerContainer(broker, halted.handle, journal="always", **options)
    made.start()
    assert halted.reached.wait(PATIENCE)
    made.stop(now=True)
    halted.go_on.set()
    assert made.wait(PATIENCE)
    with ListenerContainer(broker, halted.handle, journal="always", **options) as again:
        assert broker.wait_until_empty(PATIENCE)
    # Once the broker has been asked, the database commits, and what is not acknowledged is known by its mark only.
    committed = where.endswith("the commit")
    assert effects(cache) == (2 if committed and remember_completed is None else 1)
    assert again.counters.duplicates == int(committed and remember_completed is not None)
    assert [stored.snapshot["retry_count"] for _, stored in cache.items()] == [0] * (remember_completed is not None)


def writes_and_sends(message, context):
    context.transaction.execute(text("INSERT INTO effects VALUES ('x')"))
    message.send("next", "é", {"content-type": "text/plain"})
    message.send("next", b"\xff\x00")


def sent(broker, destination="next"):
    return [(copy.headers["retrykit-id"], copy.body) for copy in broker.at(destination).messages()]


def marks(cache):
    return [stored.snapshot for _, stored in cache.items() if stored.snapshot.get("completed_at")]


@pytest.mark.parametrize("fate", ["done", "undone"])
def test_what_a_handler_sends_is_there_once_and_its_rows_too_when_the_brokers_commit_is_in_doubt(broker, cache, fate):
    broker.publish("x")
    broker.doubt_next_commit(fate)
    container = consume(broker, cache, writes_and_sends, remember_completed=60)
    assert effects(cache) == 1
    assert [body for _, body in sent(broker)] == ["é".encode(), b"\xff\x00"]
    assert container.counters.duplicates == (1 if fate == "undone" else 0)
    # What may not have been sent is kept until it has been.
    (mark,) = marks(cache)
    assert len(mark.get("outbox", ())) == (2 if fate == "done" else 0)


def test_what_was_sent_is_kept_no_longer_when_the_whole_transaction_is_confirmed(broker, cache):
    broker.publish("x")
    consume(broker, cache, writes_and_sends, remember_completed=60)
    (mark,) = marks(cache)
    assert "outbox" not in mark
    assert len(sent(broker)) == 2


def test_sends_of_an_attempt_that_fails_are_neither_sent_nor_kept(broker, cache):
    calls = []

    def handler(message, context):
        calls.append(1)
        message.send("next", f"attempt {len(calls)}")
        if len(calls) < 3:
            raise ConnectionError("not yet")

    broker.publish("x")
    broker.doubt_next_commit("undone")
    consume(broker, cache, handler, remember_completed=60)
    assert [body for _, body in sent(broker)] == [b"attempt 3"]


@pytest.mark.parametrize("remember_completed", [60, None])
def test_ids_of_what_is_sent_are_the_same_when_it_is_sent_again_and_differ_otherwise(broker, cache, remember_completed):
    seen = []

    def handler(message, context):
        writes_and_sends(message, context)
        seen.append(message.id)

    for text_ in ("x", "y"):
        broker.publish(text_, id=text_)
    broker.doubt_next_commit("undone")
    consume(broker, cache, handler, remember_completed=remember_completed)
    ids = [identity for identity, _ in sent(broker)]
    assert len(ids) == len(set(ids)) == 4
    assert len(seen) == (2 if remember_completed else 3)


def test_parked_copy_is_sent_again_when_only_the_database_committed(broker, cache):
    def handler(message):
        raise ValueError("poison")

    broker.publish("x", id="m-1")
    broker.doubt_next_commit("undone")
    consume(broker, cache, handler, recover=park("parked"), remember_completed=60)
    assert sent(broker, "parked") == [("m-1", b"x")]


def test_reply_goes_where_the_message_says_with_its_correlation(broker, cache):
    broker.publish("question", {"reply-to": "answers", "correlation-id": "c-1"})
    consume(broker, cache, lambda message: message.reply("answer", {"x": "1"}))
    (answer,) = broker.at("answers").messages()
    assert (answer.text, answer.headers["correlation-id"], answer.headers["x"]) == ("answer", "c-1", "1")


def test_message_can_send_only_while_it_is_handled(broker, cache):
    with pytest.raises(RuntimeError, match="handled"):
        Message(destination="orders").send("next", "x")
    with pytest.raises(ValueError, match="reply-to"):
        Message(destination="orders").reply("x")


@pytest.mark.parametrize("kind", ["session class", "sessionmaker", "connection", "scoped"])
def test_a_transaction_that_would_never_commit_stops_the_container_before_the_handler_runs(broker, cache, kind):
    makers = {
        "session class": lambda: Session(cache.engine),
        "sessionmaker": sessionmaker(cache.engine),
        "connection": cache.engine.connect,
        "scoped": scoped_session(sessionmaker(cache.engine)),
    }
    calls = []
    broker.publish("x")
    template = RetryTemplate(name="orders", context_cache=cache)
    container = ListenerContainer(broker, calls.append, template=template, transaction=makers[kind])
    container.start()
    with pytest.raises(TypeError, match=r"transaction: a (Session|Connection) .*begin"):
        container.wait(PATIENCE)
    assert calls == []
    assert len(broker.messages()) == 1
    assert list(cache.items()) == []


@pytest.mark.parametrize("kind", ["session begin", "sessionmaker begin", "engine begin", "own session"])
def test_a_transaction_that_commits_is_taken(broker, cache, kind):
    class Committing(Session):
        def __exit__(self, kind, error, trace):
            if error is None:
                self.commit()
            super().__exit__(kind, error, trace)

    session = Session(cache.engine)
    makers = {
        "session begin": session.begin,
        "sessionmaker begin": sessionmaker(cache.engine).begin,
        "engine begin": cache.engine.begin,
        "own session": lambda: Committing(cache.engine),
    }

    def handler(message, context):
        target = session if kind == "session begin" else context.transaction
        target.execute(text("INSERT INTO effects VALUES ('x')"))

    broker.publish("x")
    consume(broker, cache, handler, transaction=makers[kind])
    session.close()
    assert effects(cache) == 1
