"""Options that several commands have, and what becomes of the errors below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from retrykit.cli.stores import Store, StoreError, StoreMissingError, opened
from retrykit.cli.words import as_instant, as_key, safe
from retrykit.errors import RetryError
from retrykit.histories import Item
from retrykit.key import Key

F = TypeVar("F", bound=Callable[..., Any])


def _store_option(words: str) -> Callable[[F], F]:
    return click.option(
        "--store", "url", required=True, envvar="RETRYKIT_STORE", show_envvar=True, metavar="URL", help=words
    )


store_option = _store_option("Where the histories are: sqlite:///FILE, postgresql://…, mariadb://…, redis://….")
database_option = _store_option("The database: sqlite:///FILE, postgresql://…, mariadb://….")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


item_options: Callable[[F], F] = together(
    click.argument("history", required=False),
    click.option("--name", metavar="NAME", help="With --key: the template's name."),
    click.option("--key", metavar="TEXT", help="A key that is a text, as it is."),
    click.option(
        "--key-json",
        metavar="JSON",
        callback=as_key,
        help='Any key, in JSON: 7, {"bytes": "6d31"}, ["/queue/orders", "ID:1"].',
    ),
)


def item_of(history: str | None, name: str | None, key: str | None, key_json: Key | None) -> Item:
    """The item that is meant: by its canonical key, or by name and key."""
    keys = [given for given in (key, key_json) if given is not None]
    if history is not None and name is None and not keys:
        return history
    if history is None and name is not None and len(keys) == 1:
        return name, keys[0]
    raise click.UsageError("Say which: HISTORY as it is listed, or --name with --key (or with --key-json).")


def id_of(text: str, hint: str, what: str = "ID", *, least: int = 1) -> int:
    """A number by which a database knows something: what SQL takes for one, and no more."""
    if not (text.isascii() and text.isdecimal() and least <= int(text) < 1 << 63):
        raise click.BadParameter(f"{text!r} is no {what}", param_hint=hint)
    return int(text)


def since_until(what: str) -> Callable[[F], F]:
    """`--since` and `--until`."""
    return together(
        click.option("--since", metavar="WHEN", callback=as_instant, help=f"{what} then or later: 2h, 2026-11-22."),
        click.option("--until", metavar="WHEN", callback=as_instant, help=f"{what} before then."),
    )


def pages(cursor: str) -> Callable[[F], F]:
    """`--limit` and `--after`."""
    return together(
        click.option("--limit", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="At most N."),
        click.option("--after", metavar=cursor, help="Go on behind this one."),
    )


@contextmanager
def use(url: str, hint: str = "--store") -> Iterator[Store]:
    """The store at a URL; what goes wrong with it ends the command with a line that says so."""
    with told(hint), opened(url) as store:
        yield store


@contextmanager
def told(hint: str = "--store") -> Iterator[None]:
    """Errors of the library as one line for people."""
    try:
        yield
    except (StoreMissingError, RetryError) as error:
        raise click.ClickException(safe(str(error))) from error
    except StoreError as error:
        raise click.BadParameter(safe(str(error)), param_hint=hint) from error
