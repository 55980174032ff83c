from __future__ import annotations

import pytest
from sqlalchemy import Connection, Integer, bindparam, event, select, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError, StatementError

from retrykit.sql import sqlite_engine
from retrykit.sql.prepared import Prepared

DOUBLE = Prepared(select((bindparam("number", type_=Integer) * 2).label("doubled")))


@pytest.fixture
def engine():
    engine = sqlite_engine("sqlite://")
    yield engine
    engine.dispose()


def test_a_statement_that_nobody_hears_goes_past_sqlalchemy(engine, monkeypatch):
    with engine.begin() as connection:
        monkeypatch.delattr(Connection, "exec_driver_sql")
        assert double(connection).first().doubled == 42


def double(connection, number=21):
    return DOUBLE.on(connection, {"number": number})


def test_the_answer_is_the_same_whether_somebody_listens_or_not(engine):
    heard = []
    with engine.begin() as connection:
        unheard = double(connection)
        event.listen(connection, "before_cursor_execute", lambda *event: heard.append(event[2]))
        listened_to = double(connection)
    assert unheard.first().doubled == listened_to.first().doubled == 42
    assert len(unheard.rows) == len(listened_to.rows) == 1
    assert len(heard) == 1


@pytest.mark.parametrize("listening", [False, True])
def test_results_are_not_streamed_although_the_works_are(engine, listening):
    streamed = []

    def hear(*event):
        streamed.append(event[4].execution_options.get("stream_results"))

    with engine.connect().execution_options(stream_results=True) as connection:
        if listening:
            event.listen(connection, "before_cursor_execute", hear)
        assert double(connection).first().doubled == 42
    assert streamed[-1:] == [False] * listening  # before it there was a BEGIN


def test_columns_without_a_name_of_their_own_can_be_read_by_place(engine):
    with engine.begin() as connection:
        assert Prepared(text("SELECT 1, count(*)")).on(connection, {}).first() == (1, 1)


def test_an_error_of_the_driver_is_the_one_of_sqlalchemy(engine):
    twice = Prepared(text("INSERT INTO once VALUES (:number)"))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE once (number INTEGER PRIMARY KEY)")
        assert twice.on(connection, {"number": 1}).rowcount == 1
        with pytest.raises(IntegrityError, match="UNIQUE constraint failed") as failed:
            twice.on(connection, {"number": 1})
        assert failed.value.statement == "INSERT INTO once VALUES (?)"
        assert not failed.value.connection_invalidated
        assert double(connection).first().doubled == 42


def fails_to_read(connection, error):
    def read(*_):
        raise error

    connection.connection.dbapi_connection.row_factory = read
    double(connection)


def test_an_error_that_is_not_the_drivers_is_left_as_it_is(engine):
    with engine.begin() as connection, pytest.raises(LookupError, match="not the driver's"):
        fails_to_read(connection, LookupError("not the driver's"))


def test_an_interrupt_condemns_the_connection(engine):
    with engine.connect() as connection:
        with pytest.raises(KeyboardInterrupt):
            fails_to_read(connection, KeyboardInterrupt())
        assert connection.invalidated


def test_a_transaction_that_has_to_be_rolled_back_first_says_so(engine):
    with engine.connect() as connection:
        outer = connection.begin()
        connection.begin_nested()
        outer._deactivate_from_connection()
        with pytest.raises((PendingRollbackError, StatementError)):
            double(connection)
