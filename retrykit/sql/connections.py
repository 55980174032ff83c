"""The connections on which the verbs of a cache run.

Each statement of a verb sees what was committed before it, whatever isolation level an engine has: either it is a
transaction of its own, or its transaction says READ COMMITTED.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import attrs
from sqlalchemy import Connection, Engine
from sqlalchemy.pool import Pool, StaticPool
from sqlalchemy.util import await_only

from retrykit.errors import ContextCacheError
from retrykit.sql.dialects import Database
from retrykit.sql.sqlite import in_transaction, needs_no_begin, reading, start_writing

Opener = Callable[[], AbstractContextManager[Connection]]


@attrs.frozen(kw_only=True, eq=False)
class Connections:
    """What a verb asks for a connection.

    `reading`: for a statement that changes nothing. `single`: for one statement, or several of which each may be done
    without the others. `several`: for statements that are done together or not at all.
    """

    reading: Opener
    single: Opener
    several: Opener


def connections_of(engine: Engine, database: Database, own: Engine | None, *, in_loop: bool) -> Connections:
    """Those of a cache: on its engine, or on an engine of the cache's own for single statements."""
    if not database.is_server:
        return _of_sqlite(engine, in_loop=in_loop)
    if own is None and database.switches_for_nothing:
        own = engine.execution_options(isolation_level="AUTOCOMMIT")
    return Connections(
        reading=engine.connect if own is None else own.connect,
        single=engine.begin if own is None else own.connect,
        several=engine.execution_options(isolation_level="READ COMMITTED").begin,
    )


def _of_sqlite(engine: Engine, *, in_loop: bool) -> Connections:
    reader = reading(engine)

    @contextmanager
    def writing() -> Iterator[Connection]:
        with engine.begin() as connection:
            start_writing(connection)
            yield connection

    if not isinstance(engine.pool, StaticPool):
        single = reader.connect if needs_no_begin(engine) else writing
        return Connections(reading=reader.connect, single=single, several=writing)
    read, write = _taken_in_turn(engine, reader.connect, in_loop), _taken_in_turn(engine, writing, in_loop)
    return Connections(reading=read, single=write, several=write)


# -- one connection for all


class _LoopLock:
    """A lock for blocking code that an event loop runs by the way (`greenlet_spawn`): who waits for it is suspended."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    def __enter__(self) -> None:
        await_only(self._lock.acquire())

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Locks:
    """The lock of each pool. In a forked child all are new: who held one is not there to let go of it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[Pool, AbstractContextManager[Any]] = WeakKeyDictionary()

    def of(self, pool: Pool, make: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[Any]:
        with self._lock:
            if pool not in self._of:
                self._of[pool] = make()
            return self._of[pool]


_locks: Final = _Locks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.forget)


def _taken_in_turn(engine: Engine, opener: Opener, in_loop: bool) -> Opener:  # noqa: FBT001 - as Connections says it
    @contextmanager
    def taken() -> Iterator[Connection]:
        with _locks.of(engine.pool, _LoopLock if in_loop else threading.RLock):
            _refuse_to_disturb(engine.pool)
            with opener() as connection:
                yield connection

    return taken


def _refuse_to_disturb(pool: Pool) -> None:
    """On a StaticPool our COMMIT would commit, and our giving it back would roll back, whatever else is open on it."""
    assert isinstance(pool, StaticPool)  # noqa: S101 - asked before
    if in_transaction(pool.connection.dbapi_connection):
        msg = (
            "the in-memory database has one connection for all (StaticPool) and a transaction is open on it: "
            "join that transaction, or use a file, or retrykit.sql.sqlite_engine('sqlite://')"
        )
        raise ContextCacheError(msg)
