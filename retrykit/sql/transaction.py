"""Finding the open connection in what a user calls a transaction."""

from __future__ import annotations

import sys
from typing import Any

from sqlalchemy import Connection, Engine, Transaction
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction, object_mapper, scoped_session
from sqlalchemy.util.concurrency import in_greenlet

from retrykit.errors import ContextCacheError
from retrykit.sql.dialects import database_of
from retrykit.sql.places import Place
from retrykit.sql.tables import rk_context


def names_fault(bind: Engine | Connection) -> str | None:
    """What is wrong with a `schema_translate_map` that renames the tables of the cache; None if nothing is."""
    names = bind.get_execution_options().get("schema_translate_map")
    if not names or None not in names:
        return None
    return (
        f"its schema_translate_map sends tables without a schema to {names[None]!r}, which the statements of a context "
        "cache do not follow: put that schema on the connection's search path instead (MariaDB: name it in the URL), "
        "or map a name (schema=…) of your own tables rather than None"
    )


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
    return _beneath(transaction)


def is_asynchronous(transaction: object) -> bool:
    """Whether it is an AsyncSession or AsyncConnection, or what stands for one."""
    return _beneath(transaction) is not None


def _beneath(transaction: Any) -> Session | Connection | None:
    """Of an AsyncSession, AsyncConnection, their transactions and scopes: what runs their statements."""
    asynchronous = sys.modules.get("sqlalchemy.ext.asyncio")
    if asynchronous is not None and isinstance(transaction, asynchronous.async_scoped_session):
        transaction = transaction()
    for name in ("sync_session", "sync_connection", "sync_transaction"):
        inner = getattr(transaction, name, None)
        if isinstance(inner, Session | Connection | SessionTransaction | Transaction):
            return unwrapped(inner)
    return None


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


def commits_at_once(transaction: object) -> bool:
    """Whether the commit is one: not if a Session has begun on several connections, and commits them in turn.

    Nor if it is going to, because what it has not flushed yet belongs on another.
    """
    handle = unwrapped(transaction)
    if not isinstance(handle, Session) or handle.twophase:
        return True
    root: Any = handle.get_transaction()
    if root is None:
        return True
    begun = connections_in(root)
    return len(begun) == 1 and _flushes_to(handle) <= {connection.engine for connection in begun}


def connections_in(root: Any) -> set[Connection]:
    """Those on which a Session has begun."""
    if hasattr(root, "connections"):
        return set(root.connections)
    # Before SQLAlchemy 2.1.7.
    return {connection for connection, *_ in root._connections.values()}  # noqa: SLF001 - it has no other name


def _flushes_to(session: Session) -> set[Engine | None]:
    """The engines that what is not flushed yet belongs on; None among them if nobody knows for some of it."""
    plain = type(session).get_bind is Session.get_bind
    if plain and not getattr(session, "_Session__binds", True):
        # It has one bind for everything, so it need not be looked through.
        return set()
    mappers = {object_mapper(item) for items in (session.new, session.dirty, session.deleted) for item in items}
    return {_engine_for(session, mapper) for mapper in mappers}


def _engine_for(session: Session, mapper: Any) -> Engine | None:
    try:
        return session.get_bind(mapper).engine
    except UnboundExecutionError:
        return None


def keeps_a_snapshot(connection: Connection) -> bool:
    """Whether the transaction fails when it changes a row that others have changed since it began. Asks the server."""
    database = database_of(connection)
    if database is None or not database.is_server:
        return False
    if connection.get_isolation_level() in {"READ COMMITTED", "READ UNCOMMITTED", "AUTOCOMMIT"}:
        return False
    if not database.reads_the_past:
        return True
    found = connection.exec_driver_sql("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'").first()
    return found is not None and found[1] == "ON"


def _check_committable(connection: Connection) -> None:
    """Joined or not: the work is lost if the server answers its COMMIT with a ROLLBACK."""
    database = database_of(connection)
    if database is not None and database.is_aborted is not None and database.is_aborted(connection):
        raise ContextCacheError(
            "the work's transaction is aborted, so its COMMIT would be a ROLLBACK: an error of the database was "
            "swallowed (let it pass, or catch it around a savepoint, as `begin_nested` makes)"
        )


def joinable(transaction: object, engine: Engine, place: Place) -> Connection | None:
    """The connection of `transaction`, if it is open on the database of `engine`, which is `place`; else None.

    Whether it commits there alone is another question, and changes while it is open: `commits_at_once`.
    """
    handle = unwrapped(transaction)
    theirs = None if handle is None else engine_beneath(handle)
    if handle is None or theirs is None or database_of(theirs) is not database_of(engine):
        return None
    if is_asynchronous(transaction) and not in_greenlet():
        kind = type(transaction).__name__
        raise TypeError(f"an {kind} cannot be joined by a cache that blocks: it needs an AsyncSqlRetryContextCache")
    connection = open_connection(handle)
    if (fault := names_fault(connection)) is not None:
        raise ContextCacheError(f"the work's connection cannot be joined: {fault}")
    _check_committable(connection)
    if place.commits_by_itself(connection):
        return None
    # Nothing is asked on a connection of ours here: theirs may hold the lock already.
    if theirs.pool is not engine.pool and not place.has(connection):
        return None
    place.watch(theirs)
    return connection
