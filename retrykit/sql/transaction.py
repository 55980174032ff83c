"""Finding the open connection in what a user calls a transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, Transaction
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction, scoped_session

from retrykit.sql.sqlite import database_of, driver_connection, undo_what_a_failed_commit_left
from retrykit.sql.tables import rk_context


def unwrapped(transaction: object) -> Session | Connection | None:
    """The Session or Connection meant by one of SQLAlchemy's many handles, sync or async; None for anything else."""
    match transaction:
        case Session() | Connection():
            return transaction
        case scoped_session():
            session: Session = transaction()
            return session
        case SessionTransaction():
            return transaction.session
        case Transaction():
            return transaction.connection
    inner = getattr(transaction, "sync_session", None) or getattr(transaction, "sync_connection", None)
    return inner if isinstance(inner, Session | Connection) else None


def engine_beneath(handle: Session | Connection) -> Engine | None:
    """The engine that statements on `rk_context` would go to; None if a Session with several binds has none for it."""
    if isinstance(handle, Connection):
        return handle.engine
    try:
        return handle.get_bind(clause=rk_context).engine
    except UnboundExecutionError:
        return None


def open_connection(handle: Session | Connection) -> Connection:
    """The connection with the transaction; begun now if it was not yet."""
    connection = handle if isinstance(handle, Connection) else handle.connection({"clause": rk_context})
    if not connection.in_transaction():
        connection.begin()
    return connection


def connection_in(transaction: Any) -> Connection:
    """As `open_connection`, for whatever the user gives. TypeError for what is no SQLAlchemy transaction."""
    handle = unwrapped(transaction)
    if handle is None:
        msg = f"transaction: must be a SQLAlchemy Session or Connection, not {type(transaction).__name__}"
        raise TypeError(msg)
    return open_connection(handle)


def joinable(transaction: object, engine: Engine, file: str) -> Connection | None:
    """The connection of `transaction`, if it is open on the database of `engine` (whose file is `file`); else None."""
    handle = unwrapped(transaction)
    theirs = None if handle is None else engine_beneath(handle)
    if handle is None or theirs is None or theirs.dialect.name != engine.dialect.name:
        return None
    connection = open_connection(handle)
    # Nothing is asked on a connection of ours here: theirs may hold the lock already.
    same = theirs.pool is engine.pool or (file != "" and database_of(connection) == file)
    if not same or _commits_by_itself(connection):
        return None
    undo_what_a_failed_commit_left(theirs)
    return connection


def _commits_by_itself(connection: Connection) -> bool:
    """AUTOCOMMIT: every statement is a transaction of its own, there is nothing to join."""
    driver = driver_connection(connection)
    no_begin = getattr(driver, "isolation_level", "") is None or getattr(driver, "autocommit", None) is True
    return no_begin and not driver.in_transaction
