"""Care at fork: a child must not use the connections of its parent.

Two processes on one connection corrupt a SQLite file, and mix up the answers of a server.
"""

from __future__ import annotations

import os
from weakref import WeakSet

from sqlalchemy import Engine
from sqlalchemy.pool import Pool, StaticPool

_known: WeakSet[Engine] = WeakSet()
_inherited: list[Pool] = []


def forget_at_fork(engine: Engine) -> None:
    """In a forked child, leave the parent's connections alone."""
    _known.add(engine)


def _leave_to_the_parent() -> None:
    for engine in list(_known):
        if _is_in_memory(engine):
            continue  # a copy in this process's memory, no shared file; of no use where a thread was at work on it
        # Kept, not closed: closing would touch files, locks and sessions that are the parent's.
        _inherited.append(engine.pool)
        engine.dispose(close=False)


def _is_in_memory(engine: Engine) -> bool:
    from retrykit.sql.sqlite import is_in_memory

    return isinstance(engine.pool, StaticPool) or (engine.dialect.name == "sqlite" and is_in_memory(engine.url))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
