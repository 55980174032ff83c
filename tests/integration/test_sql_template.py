"""Stateful retry on one database: the work, its history, its completion mark and what is parked commit together."""

from __future__ import annotations

from contextlib import contextmanager

import attrs
import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from retrykit import RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.message import Message
from retrykit.sql import SqlRetryContextCache, park_in_transaction, parked_items


@pytest.fixture(params=["of a URL", "of the work's engine"])
def cache(request, url):
    engine = create_engine(url)
    given = url if request.param == "of a URL" else engine
    with SqlRetryContextCache(given) as cache:
        number = {"postgresql": "SERIAL PRIMARY KEY", "mariadb": "INTEGER PRIMARY KEY AUTO_INCREMENT"}
        deferred = "" if engine.dialect.name == "mariadb" else " DEFERRABLE INITIALLY DEFERRED"
        with cache.engine.begin() as connection:
            if engine.dialect.name == "sqlite":
                connection.execute(text("PRAGMA foreign_keys=ON"))
            connection.execute(text("CREATE TABLE customer (id INTEGER PRIMARY KEY)"))
            own = number.get(engine.dialect.name, "INTEGER PRIMARY KEY")
            reference = f"INTEGER REFERENCES customer (id){deferred}"
            connection.execute(text(f"CREATE TABLE orders (id {own}, customer {reference})"))
        if engine.dialect.name == "sqlite":
            event.listen(cache.engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
            cache.engine.dispose()
        yield cache
    engine.dispose()


@pytest.fixture
def template(cache):
    return RetryTemplate(
        name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3), context_cache=cache, remember_completed=3600
    )


@contextmanager
def statements():
    """What any engine sends, the database's transaction control as well: `[(engine, first word), …]`."""
    seen = []

    def see(connection, _cursor, statement, *_):
        seen.append(statement.split()[0])

    def see_commit(connection):
        seen.append("COMMIT")

    event.listen(Engine, "before_cursor_execute", see)
    event.listen(Engine, "commit", see_commit)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", see)
        event.remove(Engine, "commit", see_commit)


def deliver(template, work, *, redelivered, recover=None):
    return template.execute(
        work,
        recover,
        state=RetryState(key="m-1", redelivered=redelivered, recover_on_redelivery=False),
        transaction=sessionmaker(template.context_cache.engine).begin,
    )


def order(customer):
    def work(context):
        insert = text("INSERT INTO orders (customer) VALUES (:customer)")
        context.transaction.execute(insert, {"customer": customer})
        return context.attempt

    return work


def fail(context):
    raise OSError("no")


def orders(cache):
    with cache.engine.begin() as connection:
        return connection.scalar(text("SELECT count(*) FROM orders"))


def warmed_up(template):
    """What is asked once has been asked: the capacity, and what a new connection is asked first."""
    cache = template.context_cache
    assert cache.save("warm/1", {"retry_count": 1}, None) is not None
    assert cache.remove("warm/1")
    assert orders(cache) == 0


def test_effect_happens_once_and_a_duplicate_delivery_is_answered_without_the_work(template, cache):
    deliver(template, order(None), redelivered=False)
    deliver(template, order(None), redelivered=True)
    assert orders(cache) == 1
    assert [stored.snapshot["completed_at"] > 0 for _, stored in cache.items("orders/")] == [True]


def test_work_that_fails_to_commit_leaves_no_mark(template, cache):
    def work(context):
        order(None)(context)
        context.transaction.execute(text("INSERT INTO customer (id) VALUES (1), (2)"))
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        deliver(template, work, redelivered=False)
    assert orders(cache) == 0
    assert [stored.snapshot["retry_count"] for _, stored in cache.items("orders/")] == [1]


def test_commit_that_fails_counts_and_the_last_one_parks_the_message_in_one_transaction_with_the_history(
    template, cache
):
    message = Message(destination="/queue/orders", id="m-1", body=b"{}")
    for attempt in (1, 2):
        with pytest.raises(IntegrityError):
            deliver(template, order(404), redelivered=attempt > 1)
        (stored,) = [stored for _, stored in cache.items("orders/")]
        assert stored.snapshot["retry_count"] == attempt
    recover = lambda context: park_in_transaction(message, context)  # noqa: E731 - as users write it
    deliver(template, order(404), redelivered=True, recover=recover)
    deliver(template, order(404), redelivered=True, recover=recover)
    (item,) = parked_items(cache.engine)
    assert (item.attempts, item.key, item.message_id, len(item.errors)) == (3, "orders/m-1", "m-1", 3)
    assert "attempt 3 of 3" in item.reason
    assert orders(cache) == 0
    assert [stored.snapshot.get("completed_at") is not None for _, stored in cache.items()] == [True]


def test_first_delivery_that_succeeds_costs_one_statement_more_than_the_work_and_no_transaction(template, cache):
    warmed_up(template)
    with statements() as seen:
        deliver(template, order(None), redelivered=False)
    assert [word for word in seen if word != "BEGIN"] == ["INSERT", "INSERT", "COMMIT"]


def test_failure_of_a_first_delivery_costs_one_statement(template, cache):
    warmed_up(template)
    with statements() as seen, pytest.raises(OSError, match="no"):
        deliver(template, fail, redelivered=False)
    assert [word for word in seen if word not in ("BEGIN", "COMMIT")] == ["INSERT"]


def test_redelivery_that_fails_costs_a_load_a_journal_entry_and_a_save(template, cache):
    warmed_up(template)
    with pytest.raises(OSError, match="no"):
        deliver(template, fail, redelivered=False)
    with statements() as seen, pytest.raises(OSError, match="no"):
        deliver(template, fail, redelivered=True)
    assert [word for word in seen if word not in ("BEGIN", "COMMIT")] == ["SELECT", "UPDATE", "UPDATE"]


def test_redelivery_that_succeeds_settles_in_the_works_transaction(template, cache):
    warmed_up(template)
    with pytest.raises(OSError, match="no"):
        deliver(template, fail, redelivered=False)
    with statements() as seen:
        deliver(template, order(None), redelivered=True)
    assert [word for word in seen if word not in ("BEGIN", "COMMIT")] == ["SELECT", "UPDATE", "INSERT", "UPDATE"]


def test_evicted_history_costs_no_statement_more_than_a_known_one_and_its_count_goes_on(template, cache):
    brief = SqlRetryContextCache(cache.engine, time_to_live=10)
    template = attrs.evolve(template, context_cache=brief)
    warmed_up(template)
    with pytest.raises(OSError, match="no"):
        deliver(template, fail, redelivered=False)
    assert brief.expire(4e9) == 1
    assert list(brief.items()) == []
    seen_by_work = []

    def work(context):
        seen_by_work.append((context.attempt, context.evicted.failures, context.evicted.by))
        return order(None)(context)

    with statements() as seen:
        deliver(template, work, redelivered=True)
    assert seen_by_work == [(2, 1, "time_to_live")]
    assert [word for word in seen if word not in ("BEGIN", "COMMIT")] == ["SELECT", "UPDATE", "INSERT", "UPDATE"]
    assert brief.load("orders/m-1").snapshot["completed_at"] > 0


def test_history_that_was_evicted_when_exhausted_is_recovered_and_not_answered_as_a_duplicate(cache):
    small = SqlRetryContextCache(cache.engine, capacity=1, on_full="evict_oldest")
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=1), context_cache=small)

    def evicted(context):
        small.save("others/1", {"retry_count": 1}, None)
        raise OSError("no")

    assert deliver(template, evicted, redelivered=True, recover=lambda _: "recovered") == "recovered"
