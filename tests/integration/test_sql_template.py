"""Stateful retry on one SQLite file: the work, its history, its completion mark and what is parked commit together."""

from __future__ import annotations

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from retrykit import RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.message import Message
from retrykit.sql import SqlRetryContextCache, park_in_transaction, parked_items


@pytest.fixture
def cache(tmp_path):
    with SqlRetryContextCache(f"sqlite:///{tmp_path}/work.db") as cache:
        with cache.engine.begin() as connection:
            connection.execute(text("CREATE TABLE customer (id INTEGER PRIMARY KEY)"))
            reference = "INTEGER REFERENCES customer DEFERRABLE INITIALLY DEFERRED"
            connection.execute(text(f"CREATE TABLE orders (id INTEGER PRIMARY KEY, customer {reference})"))
        yield cache


@pytest.fixture
def template(cache):
    return RetryTemplate(
        name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3), context_cache=cache, remember_completed=3600
    )


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


def orders(cache):
    with cache.engine.begin() as connection:
        return connection.scalar(text("SELECT count(*) FROM orders"))


def test_effect_happens_once_and_a_duplicate_delivery_is_answered_without_the_work(template, cache):
    deliver(template, order(None), redelivered=False)
    deliver(template, order(None), redelivered=True)
    assert orders(cache) == 1
    assert [stored.snapshot["completed_at"] > 0 for _, stored in cache.items("orders/")] == [True]


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


def test_first_delivery_that_succeeds_costs_one_statement_more_than_the_work(template, cache):
    seen = []

    def see(*arguments):
        seen.append(arguments[2].split()[0])

    event.listen(cache.engine, "before_cursor_execute", see)
    deliver(template, order(None), redelivered=False)
    event.remove(cache.engine, "before_cursor_execute", see)
    assert seen == ["BEGIN", "INSERT", "INSERT"]


def test_failure_costs_one_statement(cache):
    template = RetryTemplate(name="orders", context_cache=cache)
    seen = []

    def see(*arguments):
        seen.append(arguments[2].split()[0])

    def fail(context):
        raise OSError

    event.listen(cache.engine, "before_cursor_execute", see)
    with pytest.raises(OSError):  # noqa: PT011 - whichever
        deliver(template, fail, redelivered=False)
    event.remove(cache.engine, "before_cursor_execute", see)
    assert seen == ["INSERT"]
