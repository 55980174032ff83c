"""Faults of a store in words: the operation, the key, the database's own text; never parameters or passwords."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from retrykit.errors import ContextCacheError
from retrykit.sql.dialects import database_of

# Some drivers let the system's own errors pass when there is no connection to be had.
STORE_FAULTS: Final = (SQLAlchemyError, OSError)


def worded(error: BaseException, operation: str, key: str, url: URL | None) -> ContextCacheError:
    """What to raise from a fault."""
    told = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    what = f"{operation} of {key!r}" if key else operation
    database = None if url is None else database_of(url)
    advice = "" if database is None or url is None else database.hint(error, url)
    msg = f"context cache: {what} failed: {type(told).__name__}: {_first_line(told)}{advice}"
    return ContextCacheError(msg, operation=operation, key=key)


def _first_line(error: BaseException) -> str:
    # MariaDB's drivers give a number and a text.
    arguments = error.args
    text = arguments[1] if len(arguments) == 2 and isinstance(arguments[0], int) else error  # noqa: PLR2004 - as said
    return str(text).partition("\n")[0][:300]


@contextmanager
def wording(operation: str, key: str, url: URL | None) -> Iterator[None]:
    """Word the faults of a block."""
    try:
        yield
    except STORE_FAULTS as error:
        raise worded(error, operation, key, url) from error
