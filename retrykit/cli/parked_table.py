"""`retrykit parked … --store`: what was put aside in a table of a database, for operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import attrs
import click

from retrykit.cli.brokers import broker_at, told_of
from retrykit.cli.options import id_of, told, use
from retrykit.cli.parked_items import TITLES, Which, counted, export, facts_of, origin, row_of, to_json
from retrykit.cli.screen import Screen, confirm, say_json
from retrykit.cli.stores import Store, opened
from retrykit.cli.words import safe
from retrykit.errors import CommitInDoubtError, RetryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from retrykit.messaging.requeue import Requeuer
    from retrykit.sql import ParkedItem

CHUNK: Final = 100


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


def list_items(url: str, which: Which, *, limit: int, after: str | None, as_json: bool) -> None:
    """`parked list`."""
    from retrykit.sql import parked_items

    with _open(url) as store:
        items = list(
            parked_items(
                store.engine,
                after=0 if after is None else id_of(after, "--after"),
                limit=limit,
                **attrs.asdict(which),
            )
        )
        screen = Screen.here(store.histories.now())
    more = items[-1].id if len(items) == limit else None
    if as_json:
        say_json({"parked": [to_json(item, body=False) for item in items], "next": more})
        return
    if items or screen.console is None:
        screen.table(TITLES, map(row_of, items))
    else:
        screen.line("nothing is parked")
    if more is not None:
        click.echo(f"there may be more: --after {more}", err=True)


def show_item(url: str, number: str, *, as_json: bool, body: Path | None) -> None:
    """`parked show`."""
    with _open(url) as store:
        item = _item(store.engine, number)
        screen = Screen.here(store.histories.now())
    if body is not None:
        body.write_bytes(item.payload)
    if as_json:
        say_json(to_json(item))
    else:
        screen.facts(facts_of(item))


def _item(engine: Any, number: str) -> ParkedItem:
    from retrykit.sql import parked_item

    item = parked_item(engine, id_of(number, "ID"))
    if item is None:
        raise click.ClickException(f"no item {number} is parked")
    return item


# -- sending back and discarding


def _chosen(engine: Any, ids: Sequence[str], which: Which, *, everything: bool) -> list[int]:
    """The numbers of the items that are meant: of those named, or of those that the filter finds."""
    from retrykit.sql import parked_ids

    which.must_be_said(ids, everything=everything)
    if ids:
        return [_item(engine, number).id for number in dict.fromkeys(ids)]
    return list(parked_ids(engine, **attrs.asdict(which)))


def requeue_items(
    url: str,
    ids: Sequence[str],
    which: Which,
    *,
    everything: bool,
    broker_url: str,
    declare: Mapping[str, str],
    to: str | None,
    keep_history: bool,
    contexts_url: str | None,
    yes: bool,
) -> None:
    """`parked requeue`."""
    broker = broker_at(broker_url, declare=declare)
    with _open(url) as store:
        numbers = _chosen(store.engine, ids, which, everything=everything)
        if not numbers:
            click.echo("sent back: 0")
            return
        confirm(f"Send {counted(numbers)} back to {safe(to) if to else origin(numbers)}?", yes=yes)
        screen = Screen.here(store.histories.now())
        with _requeuer(store, broker, contexts_url, keep_history=keep_history) as requeuer:
            _send_all(screen, requeuer, numbers, to)


@contextmanager
def _requeuer(store: Store, broker: Any, contexts_url: str | None, *, keep_history: bool) -> Iterator[Requeuer]:
    from retrykit.messaging.requeue import Requeuer

    histories = nullcontext(store) if contexts_url is None else opened(contexts_url)
    with told("--contexts"), histories as other, closing(broker.connect(consume=False)) as session:
        yield Requeuer(store.engine, session, other.histories, keep_history)


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
        raise click.ClickException(f"item {number} is still parked: {told_of(error)}; {sent} sent before") from error
    click.echo(f"sent back: {sent}" + (f"; {len(ids) - sent} were gone already" if sent < len(ids) else ""))


def _send(requeuer: Requeuer, number: int, to: str | None) -> bool:
    from retrykit.sql import parked_item

    item = parked_item(requeuer.engine, number)
    return item is not None and requeuer.send(item, to)


def discard_items(
    url: str, ids: Sequence[str], which: Which, *, everything: bool, output: TextIO | None, yes: bool
) -> None:
    """`parked discard`."""
    with _open(url) as store:
        numbers = _chosen(store.engine, ids, which, everything=everything)
        if not numbers:
            click.echo("discarded: 0")
            return
        items = (item for number in numbers if (item := _found(store.engine, number)) is not None)
        screen = Screen.here(store.histories.now())
        if output is None:
            screen.table(TITLES, map(row_of, items))
        else:
            export(items, output)
        confirm(f"Discard {counted(numbers)} for good?", yes=yes)
        gone = sum(_drop(store.engine, numbers[start : start + CHUNK]) for start in range(0, len(numbers), CHUNK))
    click.echo(f"discarded: {gone}" + (f"; {len(numbers) - gone} were gone already" if gone < len(numbers) else ""))


def _found(engine: Any, number: int) -> ParkedItem | None:
    from retrykit.sql import parked_item

    return parked_item(engine, number)


def _drop(engine: Any, ids: Sequence[int]) -> int:
    from retrykit.sql import remove_parked_in

    with engine.begin() as connection:
        return sum(remove_parked_in(connection, number) for number in ids)
