"""`retrykit parked …`: what was put aside in a database or in a queue, for operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO

import click
from click.core import ParameterSource

from retrykit.cli.brokers import as_headers, destination_in
from retrykit.cli.options import F, json_option, since_until, together, yes_option
from retrykit.cli.parked_items import Which
from retrykit.cli.parked_queue import (
    HELD,
    LISTED,
    Place,
    discard_messages,
    list_messages,
    requeue_messages,
    show_message,
)
from retrykit.cli.parked_table import discard_items, list_items, requeue_items, show_item
from retrykit.cli.words import safe

_BROKER: Final = "stomp://user:password@host:61613"

_store_option = click.option(
    "--store",
    "url",
    envvar="RETRYKIT_STORE",
    show_envvar=True,
    metavar="URL",
    help="The database: sqlite:///FILE, postgresql://…, mariadb://….",
)
_destination_option = click.option(
    "--destination", metavar="QUEUE", help="Not in a database, but in this queue of --broker: /queue/orders.parked."
)


def _broker_option(words: str) -> Callable[[F], F]:
    return click.option(
        "--broker", "broker_url", envvar="RETRYKIT_BROKER", show_envvar=True, metavar="URL", help=f"{words}: {_BROKER}."
    )


def _limit_option(default: int, words: str) -> Callable[[F], F]:
    return click.option("--limit", type=click.IntRange(1), metavar="N", help=f"{words}  [default: {default}]")


_queue_options: Callable[[F], F] = together(_broker_option("With --destination: the broker"), _destination_option)
_look_option = _limit_option(HELD, "With --destination: look at the first N messages.")
filters: Callable[[F], F] = together(
    click.option("--name", metavar="NAME", help="Of the template with this name."),
    since_until("Parked"),
    click.option("--reason", metavar="TEXT", help="With this text in the reason, in whatever case."),
)
chosen: Callable[[F], F] = together(
    click.argument("ids", nargs=-1, metavar="[ID]..."),
    filters,
    click.option("--all", "everything", is_flag=True, help="All that is parked."),
)


def _queue(broker_url: str | None, destination: str | None, **options: Any) -> Place | None:
    """The queue that is meant; None: it is not a queue."""
    if destination is None:
        return None
    if broker_url is None:
        raise click.UsageError("--destination needs a --broker (or RETRYKIT_BROKER).")
    return Place(broker_url=broker_url, destination=destination, **options)


def _table(url: str | None, broker_url: str | None = None, **only_for_queues: Any) -> str:
    """The database that is meant; `broker_url` where a broker would mean a queue of it."""
    for name, value in only_for_queues.items():
        if value is not None:
            raise click.UsageError(f"--{name} needs a --destination.")
    if url is None and (queue := destination_in(broker_url)):
        raise click.UsageError(f"--broker with a --destination: the queue goes there, out of the URL: {safe(queue)}")
    if url is None:
        raise click.UsageError("Say where: --store (or RETRYKIT_STORE), or --broker with --destination.")
    return url


def _refuse(*options: str) -> None:
    """Options that were given on the command line and mean nothing here."""
    context = click.get_current_context()
    for name in options:
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            shown = "--store" if name == "url" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{shown} and --destination: say one of them.")


@click.group()
def parked() -> None:
    """Look at what was put aside; send it back; discard it.

    With --store: in the table rk_parked of a SQL database, where `recover=park_in_transaction` puts what has used up
    its attempts, with body, headers and errors. ID is the number that `list` shows.

    With --broker and --destination: in a queue, where `recover=park("/queue/…")` puts it, with its history in headers.
    ID is the stable id of the original, as `list` shows it, or what the consumer's log calls the message. ActiveMQ
    shows a queue without touching it. RabbitMQ and others cannot: there each command receives the first N messages and
    gives back what it does not take out, flagged as redelivered (a quorum queue counts that as a delivery); others see
    them again when the command has ended.
    """


@parked.command("list")
@_store_option
@_queue_options
@filters
@_limit_option(LISTED, "At most N. With --destination: of the first N messages.")
@click.option("--after", metavar="ID", help="With --store: go on behind this one.")
@json_option
def list_(
    *,
    url: str | None,
    broker_url: str | None,
    destination: str | None,
    limit: int | None,
    after: str | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Show what is parked, the longest parked first.

    WHEN is how long ago (90s, 15m, 2h, 7d), or a date or time in ISO 8601, local unless it says otherwise. With --json:
    {"parked": […], "next": ID or null}, each item as `show --json` has it, without its body.
    """
    place = _queue(broker_url, destination, limit=limit)
    if place is None:
        list_items(_table(url, broker_url), Which(**where), limit=limit or LISTED, after=after, as_json=as_json)
    else:
        _refuse("url", "after")
        list_messages(place, Which(**where), as_json=as_json)


@parked.command()
@_store_option
@_queue_options
@click.argument("id_", metavar="ID")
@_look_option
@json_option
@click.option(
    "--body", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the whole body to FILE."
)
def show(
    *,
    url: str | None,
    broker_url: str | None,
    destination: str | None,
    limit: int | None,
    id_: str,
    as_json: bool,
    body: Path | None,
) -> None:
    """Show one item: its headers, its errors, and its body as far as it is text."""
    place = _queue(broker_url, destination, limit=limit)
    if place is None:
        show_item(_table(url, broker_url, limit=limit), id_, as_json=as_json, body=body)
    else:
        _refuse("url")
        show_message(place, id_, as_json=as_json, body=body)


@parked.command()
@_store_option
@_broker_option("Where to")
@_destination_option
@chosen
@_look_option
@click.option("--to", metavar="DESTINATION", help="Another destination than the one that they came from.")
@click.option(
    "--declare",
    multiple=True,
    callback=as_headers,
    metavar="NAME=VALUE",
    help="How RabbitMQ's queue there was made: x-queue-type=quorum.",
)
@click.option(
    "--keep-history", is_flag=True, help="With --store: let the count of attempts go on where it ended, if it is kept."
)
@click.option("--contexts", "contexts_url", metavar="URL", help="Where the histories are, if not in --store.")
@yes_option
def requeue(
    *,
    url: str | None,
    broker_url: str | None,
    destination: str | None,
    limit: int | None,
    ids: tuple[str, ...],
    everything: bool,
    to: str | None,
    declare: dict[str, str],
    keep_history: bool,
    contexts_url: str | None,
    yes: bool,
    **where: Any,
) -> None:
    """Send items back to the destination that they came from: by ID, or all that a filter finds.

    Each with its original body and headers; the header retrykit-id says what its id was. Its history is forgotten, so
    that its attempts are counted anew. The first item that cannot be sent ends the command; what was sent before stays
    sent.

    From a table: it is sent, and when the broker has confirmed that it is removed. A crash between the two leaves an
    item that was sent and is parked still: it is sent at least once, never lost.

    From a queue: it is sent and taken out in one transaction. RabbitMQ has none for both: there the same holds as for a
    table, and a copy that is sent twice has one id. It goes out as a new message, which no history and no completion
    mark is known of. Consumers that know messages by a header of their own or by content (`identify=`) tell it from
    the parked one by the header retrykit-sent-back. Where --store or --contexts has its history, that is forgotten
    instead, and the message keeps the id that it had.
    """
    place = _queue(broker_url, destination, limit=limit, declare=declare)
    meant: dict[str, Any] = {"ids": ids, "which": Which(**where), "everything": everything, "to": to, "yes": yes}
    if place is not None:
        _refuse("keep_history")
        requeue_messages(place, **meant, contexts_url=contexts_url or url)
        return
    table = _table(url, limit=limit)
    if broker_url is None:
        raise click.UsageError("Missing option '--broker' (or RETRYKIT_BROKER).")
    given: dict[str, Any] = {"broker_url": broker_url, "declare": declare, "contexts_url": contexts_url}
    requeue_items(table, **meant, **given, keep_history=keep_history)


@parked.command()
@_store_option
@_queue_options
@chosen
@_look_option
@click.option(
    "--export",
    "output",
    type=click.File("x", encoding="utf-8", lazy=True),
    metavar="FILE",
    help="Write them to a new FILE first, as JSON lines.",
)
@yes_option
def discard(
    *,
    url: str | None,
    broker_url: str | None,
    destination: str | None,
    limit: int | None,
    ids: tuple[str, ...],
    everything: bool,
    output: TextIO | None,
    yes: bool,
    **where: Any,
) -> None:
    """Drop items for good: by ID, or all that a filter finds.

    What is dropped is listed first, or written whole to a file with --export.
    """
    place = _queue(broker_url, destination, limit=limit)
    meant: dict[str, Any] = {"ids": ids, "which": Which(**where), "everything": everything, "yes": yes}
    if place is None:
        discard_items(_table(url, broker_url, limit=limit), **meant, output=output)
    else:
        _refuse("url")
        discard_messages(place, **meant, output=output)
