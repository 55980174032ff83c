from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session, sessionmaker

from retrykit.context import RetryContext
from retrykit.message import Message, Parked
from retrykit.sql import (
    SqlRetryContextCache,
    create_tables,
    park_in,
    park_in_transaction,
    parked_ids,
    parked_item,
    parked_items,
    remove_parked_in,
    sqlite_engine,
)
from tests.servers.databases import DATABASES, empty_database

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture(params=DATABASES)
def engine(request):
    url = empty_database(request, request.param)
    engine = sqlite_engine(url) if request.param == "sqlite" else create_engine(url)
    create_tables(engine)
    yield engine
    engine.dispose()


def park(engine, payload=b"", **facts):
    with Session(engine) as session, session.begin():
        return park_in(session, payload, **({"name": "orders", "reason": "no", "attempts": 3} | facts))


def test_parked_item_is_read_as_it_was_put_aside(engine):
    facts = {
        "key": "orders/m-1",
        "message_id": "m-1",
        "destination": "/queue/orders",
        "content_type": "application/octet-stream",
        "headers": {"priority": "4", "naïve": "ü\x00"},
        "reason": "SimpleRetryPolicy: attempt 3 of 3",
        "errors": [{"attempt": 1, "type": "ValueError", "message": "é", "at": 1.5}],
    }
    payload = bytes(range(256)) * 300
    number = park(engine, payload, **facts, first_failed_at=1.5, last_failed_at=NOON, parked_at=NOON)
    item = parked_item(engine, number)
    assert (item.id, item.name, item.payload, item.attempts) == (number, "orders", payload, 3)
    assert {name: getattr(item, name) for name in facts} == facts | {"errors": tuple(facts["errors"])}
    assert item.first_failed_at == datetime.fromtimestamp(1.5, UTC)
    assert (item.last_failed_at, item.parked_at) == (NOON, NOON)
    assert "ÿ" not in repr(item)
    assert parked_item(engine, number + 1) is None


def test_item_is_parked_now_with_nothing_more_than_it_has(engine):
    before = datetime.now(UTC)
    item = parked_item(engine, park(engine))
    assert before <= item.parked_at <= datetime.now(UTC)
    assert (item.key, item.message_id, item.destination, item.content_type, item.first_failed_at) == (None,) * 5
    assert (item.headers, item.errors) == ({}, ())


def test_parking_and_settling_the_history_commit_or_roll_back_together(engine):
    cache = SqlRetryContextCache(engine)
    version = cache.save("orders/m-1", {"retry_count": 3}, None)
    with Session(engine) as session:
        park_in(session, b"", name="orders", reason="no", attempts=3)
        assert cache.joined(session).remove("orders/m-1", version)
        session.rollback()
    assert list(parked_items(engine)) == []
    assert cache.load("orders/m-1").version == version
    with Session(engine) as session, session.begin():
        park_in(session, b"", name="orders", reason="no", attempts=3)
        assert cache.joined(session).remove("orders/m-1", version)
    assert len(list(parked_items(engine))) == 1
    assert cache.load("orders/m-1") is None


def test_items_are_browsed_by_template_from_the_longest_parked_on_in_pages(engine):
    with engine.begin() as connection:
        numbers = [
            park_in(connection, b"%d" % n, name=f"t{n % 2}", reason="no", attempts=1, parked_at=float(n))
            for n in range(450)
        ]
        assert [item.id for item in parked_items(connection)] == numbers
    assert [item.id for item in parked_items(engine)] == numbers
    assert [item.id for item in parked_items(engine, name="t1", limit=3)] == numbers[1:6:2]
    assert [item.id for item in parked_items(engine, after=numbers[200], limit=201)] == numbers[201:402]
    assert [item.id for item in parked_items(engine, limit=0)] == []
    assert [item.id for item in parked_items(engine, name="other")] == []
    with Session(engine) as session:
        assert [item.id for item in parked_items(session, limit=1)] == numbers[:1]
        assert parked_item(session, numbers[7]).payload == b"7"


def test_items_are_chosen_by_when_and_why_they_were_parked(engine):
    reasons = ["attempt 3 of 3", "vetoed: 100% Sure", "vetoed: 100 times", "VETOED: under_score"]
    with engine.begin() as connection:
        numbers = [
            park_in(connection, b"", name="orders", reason=reason, attempts=1, parked_at=float(n))
            for n, reason in enumerate(reasons)
        ]

    def chosen(**options):
        return [numbers.index(item.id) for item in parked_items(engine, **options)]

    assert chosen(since=1.0, until=datetime.fromtimestamp(3, UTC)) == [1, 2]
    assert chosen(reason="vetoed") == [1, 2, 3]
    assert chosen(reason="100%") == [1]
    assert chosen(reason="r_s") == [3]
    assert chosen(reason="vetoed", since=2.0, limit=1) == [2]
    assert chosen(reason="nothing") == []


def test_numbers_are_chosen_as_items_are_without_reading_these(engine):
    with engine.begin() as connection:
        for n in range(3):
            park_in(connection, b"", name=f"t{n % 2}", reason="VETOED", attempts=1, parked_at=float(n))
    numbers = [item.id for item in parked_items(engine)]
    seen = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
    assert list(parked_ids(engine)) == numbers
    assert list(parked_ids(engine, name="t0", reason="vetoed", since=1.0)) == numbers[2:]
    assert list(parked_ids(engine, after=numbers[0], limit=1)) == numbers[1:2]
    assert not [words for words in seen if "payload" in words]


def test_items_of_a_template_are_those_of_that_very_name(engine):
    for name in ("orders", "Orders", "ORDERS ", "orders"):
        park(engine, name=name)
    assert [item.name for item in parked_items(engine, name="orders")] == ["orders"] * 2
    assert [item.name for item in parked_items(engine, name="orders", limit=1)] == ["orders"]
    assert [item.name for item in parked_items(engine, name="ORDERS ")] == ["ORDERS "]


def test_texts_that_no_database_takes_are_parked_all_the_same(engine):
    odd = "a\0b\ud800c"
    with engine.begin() as connection:
        number = park_in(
            connection,
            b"",
            name=odd,
            reason=odd + "x" * 70_000,
            attempts=1,
            message_id=odd,
            destination=odd,
            content_type=odd,
            headers={odd: odd},
            errors=[{"message": odd}],
        )
    item = parked_item(engine, number)
    assert (item.name, item.message_id, item.destination, item.content_type) == ("a?b?c",) * 4
    assert (item.reason[:6], len(item.reason)) == ("a?b?cx", 10_000)
    assert (item.headers, item.errors) == ({odd: odd}, ({"message": odd},))


def test_item_is_taken_out_once_with_the_callers_transaction(engine):
    number = park(engine)
    with engine.connect() as connection:
        assert remove_parked_in(connection, number) is True
        connection.rollback()
    with Session(engine) as session, session.begin():
        assert remove_parked_in(session, number) is True
        assert remove_parked_in(session, number) is False
    assert list(parked_items(engine)) == []
    assert park(engine) != number


@pytest.mark.parametrize(
    ("facts", "error", "named"),
    [
        ({"payload": "text"}, TypeError, "payload"),
        ({"attempts": -1}, ValueError, "attempts"),
        ({"attempts": True}, ValueError, "attempts"),
        ({"headers": {"x": b""}}, TypeError, "headers"),
        ({"errors": [{"at": float("nan")}]}, TypeError, "errors"),
        ({"parked_at": datetime(2026, 1, 1)}, ValueError, "parked_at"),  # noqa: DTZ001 - that is the point
        ({"last_failed_at": "noon"}, TypeError, "last_failed_at"),
        ({"name": "x" * 256}, ValueError, "name"),
        ({"name": 7}, TypeError, "name"),
        ({"key": "x" * 601}, ValueError, "key"),
        ({"message_id": "x" * 16_001}, ValueError, "message_id"),
    ],
)
def test_bad_facts_are_refused_by_name_and_nothing_is_parked(engine, facts, error, named):
    with pytest.raises(error, match=f"^{named}"):
        park(engine, **facts)
    assert list(parked_items(engine)) == []


def test_transaction_must_be_one():
    with pytest.raises(TypeError, match="transaction: must be a SQLAlchemy Session or Connection, not str"):
        park_in("session", b"", name="orders", reason="no", attempts=1)


# -- as a recoverer

SNAPSHOT = {
    "format": 1,
    "name": "orders",
    "key": "m-1",
    "retry_count": 3,
    "first_failed_at": 10.0,
    "last_failed_at": 20.0,
    "errors": [{"attempt": 3, "type": "builtins.ValueError", "message": "no", "at": 20.0}],
}
MESSAGE = Message(
    destination="/queue/orders",
    id="m-1",
    key=("orders", "m-1"),
    body=b"\x00\xff",
    headers={"content-type": "Application/JSON; charset=latin-1", "priority": "4"},
)


def recovered(engine, **facts):
    context = RetryContext.from_snapshot(SNAPSHOT | facts)
    with sessionmaker(engine).begin() as session:
        context.transaction = session
        parked = park_in_transaction(MESSAGE, context)
    item = parked_item(engine, parked.id)
    assert parked == Parked("rk_parked", item.id, reason=item.reason)
    return item


def test_recoverer_parks_the_message_with_what_the_context_knows(engine):
    item = recovered(engine)
    assert (item.name, item.key, item.message_id, item.destination) == ("orders", "orders/m-1", "m-1", "/queue/orders")
    assert (item.payload, item.content_type) == (b"\x00\xff", "Application/JSON; charset=latin-1")
    assert item.headers == MESSAGE.headers
    assert (item.attempts, item.reason) == (3, "exhausted after 3 failed attempts")
    assert (item.first_failed_at.timestamp(), item.last_failed_at.timestamp()) == (10.0, 20.0)
    assert item.errors == ({"attempt": 3, "type": "builtins.ValueError", "message": "no", "at": 20.0},)


def test_recoverer_tells_a_veto_and_falls_back_on_the_messages_key(engine):
    item = recovered(engine, veto="the customer is gone", key=None)
    assert (item.reason, item.key) == ("vetoed: the customer is gone", "orders(/6:orders,/3:m-1)")


def test_recoverer_without_a_transaction_says_what_is_missing():
    with pytest.raises(TypeError, match=r"context\.transaction is None: give the container or template a transaction"):
        park_in_transaction(MESSAGE, RetryContext.from_snapshot(SNAPSHOT))
