"""`retrykit parked …`: what was put aside in a database, for operators."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import attrs
import click

from retrykit.cli.options import F, database_option, json_option, pages, since_until, together, told, use, yes_option
from retrykit.cli.screen import Cell, Screen, confirm, say_json
from retrykit.cli.stores import Store, opened
from retrykit.cli.words import safe, shown_body
from retrykit.errors import CommitInDoubtError, RetryError

if TYPE_CHECKING:
    from retrykit.messaging.requeue import Requeuer
    from retrykit.sql import ParkedItem

FORMAT: Final = 1
SHOWN: Final = 4_000
CHUNK: Final = 100
_TITLES: Final = ("id", "name", "parked", "attempts", "destination", "message id", "bytes", "last error", "reason")


@attrs.frozen(kw_only=True)
class Which:
    """Parked items: of a template, parked within a time, with a text in their reason."""

    name: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    reason: str | None = None

    def items(self, engine: Any, after: int, limit: int) -> Iterator[ParkedItem]:
        """At most `limit` of them, the longest parked first, read in pages."""
        from retrykit.sql import parked_items

        return parked_items(engine, after=after, limit=limit, **attrs.asdict(self))

    def ids(self, engine: Any) -> list[int]:
        """Their numbers."""
        from retrykit.sql import parked_ids

        return list(parked_ids(engine, **attrs.asdict(self)))


filters: Callable[[F], F] = together(
    click.option("--name", metavar="NAME", help="Of the template with this name."),
    since_until("Parked"),
    click.option("--reason", metavar="TEXT", help="With this text in the reason, in whatever case."),
)
chosen: Callable[[F], F] = together(
    click.argument("ids", nargs=-1, type=click.IntRange(1), metavar="[ID]..."),
    filters,
    click.option("--all", "everything", is_flag=True, help="All that is parked."),
)


@click.group()
def parked() -> None:
    """Look at what was put aside; send it back; discard it.

    Items are parked in the table rk_parked of a SQL database by `recover=park_in_transaction`, when their attempts are
    used up, with their body, headers and errors. ID is the number that `list` shows.
    """


@contextmanager
def _open(url: str) -> Iterator[Store]:
    """The store, if it is a SQL database; faults of that one in words."""
    closed: BrokenPipeError | None = None
    with use(url) as store:
        engine = store.engine
        from retrykit.sql.faults import wording

        with wording("parked items", "", engine.url):
            try:
                yield store
            except BrokenPipeError as error:
                # Whoever reads what this prints has read enough: no fault of the database.
                closed = error
    if closed is not None:
        raise closed


@parked.command("list")
@database_option
@filters
@pages("ID")
@json_option
def list_(*, url: str, limit: int, after: str | None, as_json: bool, **where: Any) -> None:
    """Show what is parked, the longest parked first.

    WHEN is how long ago (90s, 15m, 2h, 7d), or a date or time in ISO 8601, local unless it says otherwise. With --json:
    {"parked": […], "next": ID or null}, each item as `show --json` has it, without its body.
    """
    with _open(url) as store:
        items = list(Which(**where).items(store.engine, _id(after), limit))
        screen = Screen.here(store.histories.now())
    more = items[-1].id if len(items) == limit else None
    if as_json:
        say_json({"parked": [to_json(item, body=False) for item in items], "next": more})
        return
    if items or screen.console is None:
        screen.table(_TITLES, map(_row, items))
    else:
        screen.line("nothing is parked")
    if more is not None:
        click.echo(f"there may be more: --after {more}", err=True)


def _id(text: str | None) -> int:
    if text is not None and not text.isdecimal():
        raise click.BadParameter(f"{text!r} is no ID", param_hint="--after")
    return int(text or 0)


def _row(item: ParkedItem) -> tuple[Cell, ...]:
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


@parked.command()
@database_option
@click.argument("number", type=click.IntRange(1), metavar="ID")
@json_option
@click.option(
    "--body", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the whole body to FILE."
)
def show(*, url: str, number: int, as_json: bool, body: Path | None) -> None:
    """Show one item: its headers, its errors, and its body as far as it is text."""
    with _open(url) as store:
        item = _item(store.engine, number)
        screen = Screen.here(store.histories.now())
    if body is not None:
        body.write_bytes(item.payload)
    if as_json:
        say_json(to_json(item))
    else:
        screen.facts(_facts(item))


def _item(engine: Any, number: int) -> ParkedItem:
    from retrykit.sql import parked_item

    item = parked_item(engine, number)
    if item is None:
        raise click.ClickException(f"no item {number} is parked")
    return item


def _facts(item: ParkedItem) -> Iterator[tuple[str, Cell]]:
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
    for error in item.errors:
        yield f"error {error.get('attempt', '')}".rstrip(), f"{error.get('type')}: {error.get('message')}"
    yield "body", shown_body(item.payload, SHOWN)


def to_json(item: ParkedItem, *, body: bool = True) -> dict[str, Any]:
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


# -- sending back and discarding


def _chosen(engine: Any, ids: Sequence[int], *, everything: bool, **where: Any) -> list[int]:
    """The numbers of the items that are meant: of those named, or of those that the filter finds."""
    which = Which(**where)
    if bool(ids) + everything + (which != Which()) != 1:
        raise click.UsageError("Say which: by ID, by --name, --since, --until or --reason, or --all.")
    if ids:
        return [_item(engine, number).id for number in dict.fromkeys(ids)]
    found = which.ids(engine)
    if not found:
        raise click.ClickException("no such item is parked")
    return found


def _counted(ids: Sequence[int]) -> str:
    return "1 item" if len(ids) == 1 else f"{len(ids)} items"


@parked.command()
@database_option
@chosen
@click.option(
    "--broker",
    "broker_url",
    required=True,
    envvar="RETRYKIT_BROKER",
    show_envvar=True,
    metavar="URL",
    help="Where to: stomp://user:password@host:61613.",
)
@click.option("--to", metavar="DESTINATION", help="Another destination than the one that they came from.")
@click.option("--keep-history", is_flag=True, help="Let the count of attempts go on where it ended, if it is kept.")
@click.option("--contexts", "contexts_url", metavar="URL", help="Where the histories are, if not in the same store.")
@yes_option
def requeue(
    *,
    url: str,
    broker_url: str,
    to: str | None,
    keep_history: bool,
    contexts_url: str | None,
    yes: bool,
    **which: Any,
) -> None:
    """Send items back to the destination that they came from: by ID, or all that a filter finds.

    Each with its original body and headers; the header retrykit-id says what its id was. Its history is forgotten, so
    that its attempts are counted anew. Then it is sent, and when the broker has confirmed that it is removed from the
    table. A crash between the two leaves an item that was sent and is parked still: it is sent at least once, never
    lost. The first item that cannot be sent ends the command; what was sent before stays sent.
    """
    with _open(url) as store:
        ids = _chosen(store.engine, **which)
        confirm(f"Send {_counted(ids)} back to {safe(to) if to else 'where they came from'}?", yes=yes)
        screen = Screen.here(store.histories.now())
        with _requeuer(store, broker_url, contexts_url, keep_history=keep_history) as requeuer:
            _send_all(screen, requeuer, ids, to)


@contextmanager
def _requeuer(store: Store, broker_url: str, contexts_url: str | None, *, keep_history: bool) -> Iterator[Requeuer]:
    broker = _broker(broker_url)
    from retrykit.messaging.requeue import Requeuer

    histories = nullcontext(store) if contexts_url is None else opened(contexts_url)
    with told("--contexts"), histories as other, closing(broker.connect(consume=False)) as session:
        yield Requeuer(store.engine, session, other.histories, keep_history)


def _broker(url: str) -> Any:
    try:
        from retrykit.messaging.stomp import StompBroker

        broker = StompBroker(url)
    except (ImportError, ValueError) as error:
        raise click.BadParameter(safe(str(error)), param_hint="--broker") from error
    if broker.destination:
        raise click.BadParameter("without a destination: use --to, if they go elsewhere", param_hint="--broker")
    return broker


def _send_all(screen: Screen, requeuer: Requeuer, ids: Sequence[int], to: str | None) -> None:
    sent = 0
    try:
        with screen.progress() as say:
            for number in ids:
                sent += _send(requeuer, number, to)
                say(f"{sent} of {len(ids)} sent")
    except (CommitInDoubtError, KeyboardInterrupt) as error:
        msg = f"item {number} may have been sent, and is still parked: the broker has not confirmed it"
        raise click.ClickException(f"{msg} ({safe(repr(error.__cause__ or error))}); {sent} sent before") from error
    except (RetryError, ValueError) as error:
        raise click.ClickException(f"item {number} is still parked: {safe(str(error))}; {sent} sent before") from error
    click.echo(f"sent back: {sent}" + (f"; {len(ids) - sent} were gone already" if sent < len(ids) else ""))


def _send(requeuer: Requeuer, number: int, to: str | None) -> bool:
    from retrykit.sql import parked_item

    item = parked_item(requeuer.engine, number)
    return item is not None and requeuer.send(item, to)


@parked.command()
@database_option
@chosen
@click.option(
    "--export",
    "output",
    type=click.File("x", encoding="utf-8", lazy=False),
    metavar="FILE",
    help="Write them to a new FILE first, as JSON lines.",
)
@yes_option
def discard(*, url: str, output: TextIO | None, yes: bool, **which: Any) -> None:
    """Drop items for good: by ID, or all that a filter finds.

    What is dropped is listed first, or written whole to a file with --export.
    """
    with _open(url) as store:
        ids = _chosen(store.engine, **which)
        items = (item for number in ids if (item := _found(store.engine, number)) is not None)
        screen = Screen.here(store.histories.now())
        if output is None:
            screen.table(_TITLES, map(_row, items))
        else:
            _export(items, output)
        confirm(f"Discard {_counted(ids)} for good?", yes=yes)
        gone = sum(_drop(store.engine, ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK))
    click.echo(f"discarded: {gone}" + (f"; {len(ids) - gone} were gone already" if gone < len(ids) else ""))


def _found(engine: Any, number: int) -> ParkedItem | None:
    from retrykit.sql import parked_item

    return parked_item(engine, number)


def _export(items: Iterable[ParkedItem], output: TextIO) -> None:
    output.writelines(f"{json.dumps(to_json(item))}\n" for item in items)
    # What is about to be deleted must be on the disk.
    output.flush()
    os.fsync(output.fileno())


def _drop(engine: Any, ids: Sequence[int]) -> int:
    from retrykit.sql import remove_parked_in

    with engine.begin() as connection:
        return sum(remove_parked_in(connection, number) for number in ids)
