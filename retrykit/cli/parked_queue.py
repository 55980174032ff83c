"""`retrykit parked … --destination`: what was put aside in a queue of a broker, for operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import attrs
import click

from retrykit.cli.brokers import broker_at, told_of
from retrykit.cli.options import told
from retrykit.cli.parked_items import TITLES, Which, counted, export, facts_of, origin, row_of, to_json
from retrykit.cli.screen import Screen, confirm, say_json
from retrykit.cli.stores import Store, opened
from retrykit.cli.words import safe
from retrykit.errors import CommitInDoubtError, RetryError

if TYPE_CHECKING:
    from retrykit.messaging.parked import Hands, InHand, ParkedMessage

LISTED: Final = 50
HELD: Final = 1_000
# They keep nothing, or hand it to whom they will.
_NO_QUEUES: Final = ("/topic/", "/exchange/", "/temp-")
# Of RabbitMQ, which makes a queue when something is first put there.
_NO_QUEUE: Final = "NOT_FOUND - no queue"
_MOST: Final = 65_000  # RabbitMQ counts what is on its way in 16 bits


@attrs.frozen(kw_only=True)
class Place:
    """A queue of a broker; `limit`: so many messages are looked at. `declare`: headers for what is sent to queues."""

    broker_url: str
    destination: str
    limit: int | None = None
    declare: dict[str, str] = attrs.field(factory=dict)

    def broker(self) -> Any:
        """What connects to it; `click.BadParameter` for what is no queue."""
        if not self.destination or self.destination.startswith(_NO_QUEUES):
            shown = safe(self.destination)
            raise click.BadParameter(
                f"a queue, such as /queue/orders.parked, not {shown!r}", param_hint="--destination"
            )
        return broker_at(self.broker_url, self.destination, self.declare)

    def bound(self, default: int) -> int:
        """How many messages are looked at."""
        return min(self.limit or default, _MOST)


def _screen() -> Screen:
    return Screen.here(datetime.now(UTC).timestamp())


def list_messages(place: Place, which: Which, *, as_json: bool) -> None:
    """`parked list`."""
    found, full = _browsed(place, LISTED)
    items = [item for item in found if which.fits(item)]
    screen = _screen()
    if as_json:
        say_json({"parked": [to_json(item, body=False) for item in items], "next": None})
    elif items or screen.console is None:
        screen.table(TITLES, map(row_of, items))
    else:
        screen.line("nothing is parked")
    if full:
        click.echo(
            f"there may be more: of the queue's messages {place.bound(LISTED)} were looked at (--limit)", err=True
        )


def _browsed(place: Place, default: int) -> tuple[list[ParkedMessage], bool]:
    broker = place.broker()
    from retrykit.messaging.parked import browse

    found: list[ParkedMessage] = []
    with told("--broker"), _nothing_in_no_queue(place):
        found = browse(broker, place.bound(default))
    return found, len(found) == place.bound(default)


@contextmanager
def _nothing_in_no_queue(place: Place) -> Iterator[None]:
    """Whoever looks into a queue that is not there has found nothing; it may be one that nobody has parked in yet."""
    from retrykit.messaging.errors import BrokerError

    try:
        yield
    except BrokerError as error:
        if _NO_QUEUE not in error.answer:
            raise
        click.echo(f"there is no queue {safe(place.destination)}: nobody has parked anything there", err=True)


def show_message(place: Place, id_: str, *, as_json: bool, body: Path | None) -> None:
    """`parked show`."""
    found, _ = _browsed(place, HELD)
    item = _called(place, id_, found)[0]
    if body is not None:
        body.write_bytes(item.payload)
    if as_json:
        say_json(to_json(item))
    else:
        _screen().facts(facts_of(item))


def _called(place: Place, name: str, items: Sequence[ParkedMessage]) -> list[ParkedMessage]:
    """Those that have this id; if none has, those that are called so otherwise, in the log for one."""
    found = [item for item in items if item.id == name] or [item for item in items if item.answers_to(name)]
    if not found:
        looked = f"the first {place.bound(HELD)} messages of {place.destination}"
        raise click.ClickException(f"no message {safe(name)} is among {looked}")
    return found


# -- sending back and discarding


@contextmanager
def _held(place: Place, ids: Sequence[str], which: Which, *, everything: bool) -> Iterator[tuple[Any, list[InHand]]]:
    """The connection, and the messages that are meant: of those named, or of those that the filter finds.

    For a queue that is not there, none that are meant, and what is of no use without any.
    """
    which.must_be_said(ids, everything=everything)
    broker = place.broker()
    from retrykit.messaging.parked import taken

    with told("--broker"), ExitStack() as stack:
        hands: Hands | None = None
        with _nothing_in_no_queue(place):
            hands = stack.enter_context(taken(broker, place.bound(HELD)))
        yield hands, _meant(place, () if hands is None else hands.found, ids, which)


def _meant(place: Place, found: Sequence[InHand], ids: Sequence[str], which: Which) -> list[InHand]:
    if not ids:
        return [one for one in found if which.fits(one.item)]
    items = [one.item for one in found]
    meant = {item.id for name in ids for item in _called(place, name, items)}
    return [one for one in found if one.item.id in meant]


def requeue_messages(
    place: Place,
    ids: Sequence[str],
    which: Which,
    *,
    everything: bool,
    to: str | None,
    contexts_url: str | None,
    yes: bool,
) -> None:
    """`parked requeue`."""
    histories = nullcontext(None) if contexts_url is None else opened(contexts_url)
    with told("--contexts"), histories as store, _held(place, ids, which, everything=everything) as (hands, meant):
        if not meant:
            click.echo("sent back: 0")
            return
        confirm(f"Send {counted(meant)} back to {safe(to) if to else origin(meant)}?", yes=yes)
        _each(meant, "sent back", lambda one: _send_back(hands, one, to, store))


def _send_back(hands: Hands, one: InHand, to: str | None, store: Store | None) -> None:
    # First: the copy may be delivered the moment it is sent.
    forgotten = store is not None and one.item.key is not None and store.histories.forget(one.item.key)
    hands.send_back(one, to, forgotten=forgotten)


def discard_messages(
    place: Place, ids: Sequence[str], which: Which, *, everything: bool, output: TextIO | None, yes: bool
) -> None:
    """`parked discard`."""
    with _held(place, ids, which, everything=everything) as (hands, meant):
        if not meant:
            click.echo("discarded: 0")
            return
        _show_or_export([one.item for one in meant], output)
        confirm(f"Discard {counted(meant)} for good?", yes=yes)
        _each(meant, "discarded", hands.drop)


def _show_or_export(items: Sequence[ParkedMessage], output: TextIO | None) -> None:
    if output is None:
        _screen().table(TITLES, map(row_of, items))
    else:
        export(items, output)


def _each(meant: Sequence[InHand], what: str, act: Any) -> None:
    """Do it with one after the other; the first that fails ends the command."""
    screen, done = _screen(), 0
    try:
        with screen.progress() as say:
            for one in meant:
                act(one)
                done += 1
                say(f"{done} of {len(meant)} {what}")
    except (CommitInDoubtError, KeyboardInterrupt) as error:
        why = safe(repr(error.__cause__ or error))
        msg = f"message {safe(one.item.id)} may have been {what} or not: the broker has not confirmed it"
        raise click.ClickException(f"{msg} ({why}); {done} {what} before") from error
    except (RetryError, ValueError) as error:
        msg = f"message {safe(one.item.id)} is still parked: {told_of(error)}"
        raise click.ClickException(f"{msg}; {done} {what} before") from error
    click.echo(f"{what}: {done}")
