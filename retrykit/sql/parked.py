"""Parked items: what exhausted its attempts and was put aside with its history, in the transaction of its recovery.

Functions with `_in` join the caller's open transaction: what they did commits or rolls back with it. So an item is
parked exactly when its message is done with, and sending one back (`remove_parked_in`, then whatever sends) happens
once, whoever else tries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import attrs
from sqlalchemy import Connection, Engine, Select, delete, insert, select
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from retrykit.check import shown, wrong_type, wrong_value
from retrykit.context import RetryContext
from retrykit.key import canonical_key
from retrykit.message import Message, Parked
from retrykit.sql.rows import checked, storable
from retrykit.sql.sqlite import reading
from retrykit.sql.tables import rk_parked
from retrykit.sql.transaction import connection_in, is_asynchronous

PAGE: Final = 200
NAME: Final = 255
TEXT: Final = 16_000  # what every database takes, whatever the characters
REASON: Final = 10_000

Instant = datetime | float

_c = rk_parked.c


@attrs.frozen(kw_only=True)
class ParkedItem:
    """One parked item; `payload` and `headers` are as they were delivered.

    `id` is its number in the table, `errors` are the last failures, oldest first, `key` is the canonical text of the
    history that it had, `destination` where it came from; `attempts` failed. Instants are UTC.
    """

    id: int
    name: str
    key: str | None
    message_id: str | None
    destination: str | None
    payload: bytes = attrs.field(repr=False)
    content_type: str | None
    headers: Mapping[str, str]
    reason: str
    attempts: int
    errors: tuple[Mapping[str, Any], ...]
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    parked_at: datetime


def park_in(
    transaction: Session | Connection,
    payload: bytes,
    *,
    name: str,
    reason: str,
    attempts: int,
    key: str | None = None,
    message_id: str | None = None,
    destination: str | None = None,
    content_type: str | None = None,
    headers: Mapping[str, str] | None = None,
    errors: Iterable[Mapping[str, Any]] = (),
    first_failed_at: Instant | None = None,
    last_failed_at: Instant | None = None,
    parked_at: Instant | None = None,
) -> int:
    """Put an item aside in the caller's transaction; the number it got.

    Instants are aware datetimes, or seconds since the epoch. In texts, what no database can store becomes "?". Of the
    reason 10,000 characters are kept. SQLAlchemy's own errors pass through: the transaction is the caller's. TypeError
    or ValueError, with nothing stored, for bad values.
    """
    if not isinstance(payload, bytes):
        raise wrong_type("payload", "bytes", payload)
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 0:
        raise wrong_value("attempts", "an int, 0 or more", attempts)
    row = {
        "name": _text("name", name, NAME),
        "context_key": None if key is None else checked(key),
        "message_id": _text("message_id", message_id),
        "destination": _text("destination", destination),
        "payload": payload,
        "content_type": _text("content_type", content_type),
        "headers": _json("headers", dict(headers or {})),
        "reason": storable(reason)[:REASON],
        "attempts": attempts,
        "errors": _json("errors", [dict(error) for error in errors]),
        "first_failed_at": _epoch("first_failed_at", first_failed_at),
        "last_failed_at": _epoch("last_failed_at", last_failed_at),
        "parked_at": time.time() if parked_at is None else _epoch("parked_at", parked_at),
    }
    made = connection_in(transaction).execute(insert(rk_parked).returning(_c.id), row)
    return int(made.scalar_one())


def park_in_transaction(message: Message, context: RetryContext) -> Any:
    """A recoverer: park the message, with what its context knows, in `context.transaction`; gives a `Parked` with its
    number.

    `ListenerContainer(…, recover=park_in_transaction)`.
        The tables must be in that database: a `SqlRetryContextCache` makes them, or `create_tables`.

    With an AsyncSession or AsyncConnection, as the transactions of an `AsyncRetryTemplate` give, it has to be awaited.
    """
    if context.transaction is None:
        raise TypeError(
            "park_in_transaction: context.transaction is None: give the container or template a transaction, "
            "such as Session.begin"
        )
    # Inside of `run_sync` the blocking call is the right one.
    if is_asynchronous(context.transaction) and not in_greenlet():
        return greenlet_spawn(_parked, message, context)
    return _parked(message, context)


def _parked(message: Message, context: RetryContext) -> Parked:
    key = message.key if context.key is None else context.key
    number = park_in(
        context.transaction,
        message.body,
        name=context.name,
        reason=_reason(context),
        attempts=context.retry_count,
        key=None if key is None else canonical_key(context.name, key),
        message_id=message.id,
        destination=message.destination,
        content_type=message.headers.get("content-type"),
        headers=message.headers,
        errors=[attrs.asdict(error) for error in context.errors],
        first_failed_at=context.first_failed_at,
        last_failed_at=context.last_failed_at,
    )
    return Parked(rk_parked.name, number, reason=_reason(context))


def parked_items(
    bind: Engine | Connection | Session,
    *,
    name: str | None = None,
    after: int = 0,
    limit: int | None = None,
    since: Instant | None = None,
    until: Instant | None = None,
    reason: str | None = None,
) -> Iterator[ParkedItem]:
    """What is parked, the longest parked first, read in pages.

    Of the template `name` or of all; behind the number `after`; at most `limit`; parked at `since` or later, before
    `until`; with this text in their reason, in whatever case.
    """
    found = _conditions(name, _epoch("since", since), _epoch("until", until), reason)
    return map(_item, _rows(bind, select(rk_parked).where(*found), name, after, limit))


def parked_ids(
    bind: Engine | Connection | Session,
    *,
    name: str | None = None,
    after: int = 0,
    limit: int | None = None,
    since: Instant | None = None,
    until: Instant | None = None,
    reason: str | None = None,
) -> Iterator[int]:
    """The numbers of what `parked_items` finds; nothing else of the items is read."""
    found = _conditions(name, _epoch("since", since), _epoch("until", until), reason)
    return (row.id for row in _rows(bind, select(_c.id, _c.name).where(*found), name, after, limit))


def parked_item(bind: Engine | Connection | Session, number: int) -> ParkedItem | None:
    """One parked item by its number."""
    with _reading(bind) as connection:
        row = connection.execute(select(rk_parked).where(_c.id == number)).first()
    return None if row is None else _item(row)


def remove_parked_in(transaction: Session | Connection, number: int) -> bool:
    """Take an item out, in the caller's transaction. False: it was not there, or somebody else was first."""
    return connection_in(transaction).execute(delete(rk_parked).where(_c.id == number)).rowcount > 0


def _conditions(name: str | None, since: float | None, until: float | None, reason: str | None) -> list[Any]:
    conditions = [
        None if name is None else _c.name == name,
        None if since is None else _c.parked_at >= since,
        None if until is None else _c.parked_at < until,
        None if reason is None else _c.reason.icontains(storable(reason), autoescape=True),
    ]
    return [one for one in conditions if one is not None]


def _rows(  # noqa: PLR0917 - what its two callers were given
    bind: Engine | Connection | Session, query: Select[Any], name: str | None, after: int, left: int | None
) -> Iterator[Any]:
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        with _reading(bind) as connection:
            page = connection.execute(query.where(_c.id > after).order_by(_c.id).limit(size)).all()
        # Collations may take two names for one.
        wanted = [row for row in page if name is None or row.name == name]
        yield from wanted
        if len(page) < size:
            return
        after, left = page[-1].id, None if left is None else left - len(wanted)


@contextmanager
def _reading(bind: Engine | Connection | Session) -> Iterator[Connection]:
    if isinstance(bind, Engine):
        with reading(bind).connect() as connection:
            yield connection
    else:
        yield connection_in(bind)


def _item(row: Any) -> ParkedItem:
    return ParkedItem(
        id=row.id,
        name=row.name,
        key=row.context_key,
        message_id=row.message_id,
        destination=row.destination,
        payload=row.payload,
        content_type=row.content_type,
        headers=json.loads(row.headers),
        reason=row.reason,
        attempts=row.attempts,
        errors=tuple(json.loads(row.errors)),
        first_failed_at=_instant(row.first_failed_at),
        last_failed_at=_instant(row.last_failed_at),
        parked_at=datetime.fromtimestamp(row.parked_at, UTC),
    )


def _reason(context: RetryContext) -> str:
    if context.veto_reason is not None:
        return f"vetoed: {context.veto_reason}"
    decision = context.decision
    return decision.reason if decision is not None else f"exhausted after {context.retry_count} failed attempts"


def _text(name: str, value: str | None, length: int = TEXT) -> str | None:
    if value is not None and not isinstance(value, str):
        raise wrong_type(name, "a str", value)
    if value is not None and len(value) > length:
        raise wrong_value(name, f"at most {length} characters", value)
    return None if value is None else storable(value)


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: must be JSON-able, not {shown(value)}: {error}") from error


def _epoch(name: str, value: Instant | None) -> float | None:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise wrong_value(name, "an aware datetime (a naive one names no instant)", value)
        return value.timestamp()
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise wrong_type(name, "an aware datetime or seconds since the epoch", value)


def _instant(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
