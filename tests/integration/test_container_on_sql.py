"""The listener container where the work, its history and what is parked are in one database."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from retrykit import ExponentialBackOffPolicy, RetryTemplate, SimpleRetryPolicy
from retrykit.messaging import ListenerContainer, Republish
from retrykit.messaging.memory import MemoryBroker
from retrykit.sql import SqlRetryContextCache, park_in_transaction, parked_items

PATIENCE = 20.0


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
        "reconnect": ExponentialBackOffPolicy(initial=0.001, max_interval=0.01),
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


@pytest.mark.parametrize("case", [(True, 60, 1), (True, None, 0), (False, 60, 0)])
def test_a_handler_that_writes_and_sends_is_warned_once(broker, cache, caplog, case):
    sends, remember_completed, warnings = case

    def handler(message, context):
        context.transaction.execute(text("INSERT INTO effects VALUES ('x')"))
        return Republish("next") if sends else None

    for _ in range(3):
        broker.publish("x")
    consume(broker, cache, handler, remember_completed=remember_completed, concurrency=2)
    assert effects(cache) == 3
    told = [record for record in caplog.records if "it runs again" in record.getMessage()]
    assert len(told) == warnings


def test_what_a_handler_sends_is_there_once_after_a_doubt_and_its_rows_are_written_again(broker, cache):
    def handler(message, context):
        context.transaction.execute(text("INSERT INTO effects VALUES ('x')"))
        return Republish("next")

    broker.publish("x")
    broker.doubt_next_commit("undone")
    consume(broker, cache, handler, remember_completed=60)
    assert (effects(cache), len(broker.at("next").messages())) == (2, 1)


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
