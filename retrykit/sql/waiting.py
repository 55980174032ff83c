"""Who waits for others that write says so, and that he has waited in vain."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy.exc import OperationalError

from retrykit.errors import JobBusyError

_log = logging.getLogger("retrykit.sql")

PATIENCE: Final = 2.0


def is_busy(error: BaseException) -> bool:
    """Whether SQLite has given up because somebody else has its lock."""
    told = error.orig if isinstance(error, OperationalError) else None
    return str(getattr(told, "sqlite_errorname", "")).startswith("SQLITE_BUSY")


@contextmanager
def telling(what: str, /, **facts: Any) -> Iterator[None]:
    """Say in the log what is waited for, if the block takes longer than two seconds.

    `JobBusyError`, with the facts, when SQLite gives up because somebody else has its lock.
    """
    words = "%s: it waits for the database, in which somebody else has a transaction open that writes"
    timer = threading.Timer(PATIENCE, _log.warning, (words, what))
    timer.daemon = True
    timer.start()
    try:
        yield
    except OperationalError as error:
        if not is_busy(error):
            raise
        raise JobBusyError(what=what, **facts) from error
    finally:
        timer.cancel()
