"""Parked items on the screen and as JSON, wherever they are parked."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TextIO

import attrs
import click

from retrykit.cli.screen import Cell
from retrykit.cli.words import safe, shown_body

if TYPE_CHECKING:
    from retrykit.messaging.parked import ParkedMessage
    from retrykit.sql import ParkedItem

FORMAT: Final = 1
SHOWN: Final = 4_000
TITLES: Final = ("id", "name", "parked", "attempts", "destination", "message id", "bytes", "last error", "reason")


@attrs.frozen(kw_only=True)
class Which:
    """Parked items: of a template, parked within a time, with a text in their reason."""

    name: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    reason: str | None = None

    def must_be_said(self, ids: Sequence[str], *, everything: bool) -> None:
        """Nothing is sent or discarded that was not asked for: by numbers, by a filter, or all."""
        if bool(ids) + everything + (self != Which()) != 1:
            raise click.UsageError("Say which: by ID, by --name, --since, --until or --reason, or --all.")

    def fits(self, item: ParkedMessage) -> bool:
        """Whether it is one of them. What does not say when it was parked was parked at no time."""
        parked = item.parked_at
        return (
            self.name in (None, item.name)
            and (self.since is None or (parked is not None and parked >= self.since))
            and (self.until is None or (parked is not None and parked < self.until))
            and (self.reason is None or self.reason.casefold() in item.reason.casefold())
        )


def row_of(item: ParkedItem | ParkedMessage) -> tuple[Cell, ...]:
    """A row under `TITLES`."""
    error = item.errors[-1] if item.errors else {}
    told = f"{str(error.get('type', '')).rpartition('.')[2]}: {error.get('message', '')}"[:120] if error else None
    return (
        item.id,
        item.name,
        item.parked_at,
        item.attempts,
        item.destination,
        item.message_id,
        len(item.payload),
        told,
        item.reason,
    )


def facts_of(item: ParkedItem | ParkedMessage) -> Iterator[tuple[str, Cell]]:
    """All that is known of it."""
    yield "id", item.id
    yield "name", item.name
    yield "history", item.key
    yield "reason", item.reason
    yield "failed attempts", item.attempts
    yield "first failure", item.first_failed_at
    yield "last failure", item.last_failed_at
    yield "parked", item.parked_at
    yield "destination", item.destination
    yield "message id", item.message_id
    yield "content type", item.content_type
    if item.headers:
        yield "headers", "\n".join(f"{name}: {safe(value)}" for name, value in sorted(item.headers.items()))
    if left_out := getattr(item, "left_out", None):
        yield "left out", ", ".join(f"{safe(name)} ({size:,} bytes)" for name, size in sorted(left_out.items()))
    for error in item.errors:
        yield f"error {error.get('attempt', '')}".rstrip(), f"{error.get('type')}: {error.get('message')}"
    yield "body", shown_body(item.payload, SHOWN)


def to_json(item: ParkedItem | ParkedMessage, *, body: bool = True) -> dict[str, Any]:
    """The documented JSON form: every field, instants in ISO 8601 (UTC), the body as text or in base64."""
    fields = {
        name: value.isoformat() if isinstance(value, datetime) else value
        for name, value in attrs.asdict(item, recurse=False).items()
        if name != "payload"
    }
    errors = [{**error, "at": _moment(error.get("at"))} for error in item.errors]
    fields = {"format": FORMAT, **fields, "headers": dict(item.headers), "errors": errors, "bytes": len(item.payload)}
    return fields | {"body": _body(item.payload)} if body else fields


def _moment(seconds: Any) -> Any:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if isinstance(seconds, int | float) else seconds


def _body(payload: bytes) -> dict[str, str]:
    try:
        return {"text": payload.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(payload).decode("ascii")}


def counted(ids: Sized) -> str:
    """How many: "1 item", "2 items"."""
    return "1 item" if len(ids) == 1 else f"{len(ids)} items"


def origin(ids: Sized) -> str:
    """Where they go back to."""
    return "where it came from" if len(ids) == 1 else "where they came from"


def export(items: Iterable[ParkedItem | ParkedMessage], output: TextIO) -> None:
    """Write items as JSON lines, and see that they are on the disk."""
    output.writelines(f"{json.dumps(to_json(item))}\n" for item in items)
    # What is about to be deleted must be on the disk.
    output.flush()
    os.fsync(output.fileno())
