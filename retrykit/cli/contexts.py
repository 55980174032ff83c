"""`retrykit contexts …`: the histories of a store, for operators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, TextIO

import click

from retrykit.cli.options import (
    F,
    item_of,
    item_options,
    json_option,
    pages,
    since_until,
    store_option,
    together,
    use,
    yes_option,
)
from retrykit.cli.screen import Cell, Screen, confirm, say_json
from retrykit.cli.words import as_duration, duration, safe
from retrykit.histories import HistoryFilter, HistoryPage, HistorySummary, Item, Pruned

_TITLES: Final = ("history", "state", "failed", "last failure", "next attempt", "last error", "why")
_INTERRUPTED: Final = 130

filters: Callable[[F], F] = together(
    click.option("--name", metavar="NAME", help="Of the template with this name."),
    click.option("--key-prefix", default="", metavar="TEXT", help="Whose key is a text that begins so."),
    click.option("--vetoed/--not-vetoed", default=None, help="With, or without, a veto."),
    click.option("--exhausted/--not-exhausted", default=None, help="Whose attempts are used up, or not."),
    click.option("--running/--not-running", default=None, help="With, or without, an attempt under way."),
    click.option("--waiting/--not-waiting", default=None, help="Whose next attempt is due later, or not."),
    click.option("--completed", is_flag=True, help="The marks of what is done with, instead of histories."),
    click.option(
        "--evicted/--not-evicted",
        default=None,
        help="The tombstones of what the store has dropped, instead of histories; or none. [default: none, but with "
        "--vetoed those too that have a veto]",
    ),
    since_until("Whose last failure was"),
    click.option("--error", metavar="CLASS", help="Whose last error is a CLASS, or derived from one: TimeoutError."),
)


@click.group()
def contexts() -> None:
    """Look at histories, veto, forget, export, prune.

    A history is what is remembered of an item (a message, a job): how often it failed and with what, when it is tried
    again, whether somebody has vetoed it. HISTORY is its canonical key, as `list` shows it, such as orders/m-1. It can
    be named by --name orders and --key m-1 as well, or, when the key is no text, by --key-json:

    \b
        --key-json 7                              a number
        --key-json '{"bytes": "6d31"}'            bytes, in hexadecimal
        --key-json '["/queue/orders", "ID:1"]'    what a listener container uses: destination and id
    """  # noqa: D301 - click wants the control character itself


def _where(options: dict[str, Any]) -> HistoryFilter:
    renamed = {"since": "failed_since", "until": "failed_before", "error": "error_type"}
    return HistoryFilter(**{renamed.get(name, name): value for name, value in options.items()})


@contexts.command("list")
@store_option
@filters
@pages("HISTORY")
@click.option("--count", is_flag=True, help="Only say how many there are, on all pages.")
@json_option
def list_(*, url: str, limit: int, after: str | None, count: bool, as_json: bool, **options: Any) -> None:
    """Show histories, in the order of their canonical keys.

    WHEN is how long ago (90s, 15m, 2h, 7d), or a date or time in ISO 8601, local unless it says otherwise. With --json:
    {"histories": […], "next": HISTORY or null}, each history as `show --json` has it; with --count too: {"count": N}.
    """
    if count:
        with use(url) as store:
            number = sum(1 for _ in store.histories.find(_where(options), after=after))
        say_json({"count": number}) if as_json else click.echo(number)
        return
    with use(url) as store:
        page = store.histories.page(_where(options), limit=limit, after=after)
        screen = Screen.here(store.histories.now())
    if as_json:
        say_json({"histories": [summary.to_json() for summary in page.histories], "next": page.next})
    else:
        _show_page(screen, page)


def _show_page(screen: Screen, page: HistoryPage) -> None:
    if page.histories or screen.console is None:
        screen.table(_TITLES, map(_row, page.histories))
    else:
        screen.line("no such history")
    if page.next is not None:
        click.echo(f"there may be more: --after {safe(_quoted(page.next))}", err=True)


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _row(summary: HistorySummary) -> tuple[Cell, ...]:
    return (
        summary.canonical_key,
        summary.state,
        summary.retry_count,
        summary.last_failed_at,
        summary.next_attempt_at if summary.waiting else None,
        _last_error(summary),
        _why(summary),
    )


def _last_error(summary: HistorySummary) -> str | None:
    error = summary.last_error
    return None if error is None else _bounded(f"{error.type.rpartition('.')[2]}: {error.message}")


def _bounded(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _why(summary: HistorySummary) -> str:
    veto = summary.veto
    why = summary.fault or summary.why if veto is None else _bounded(f"vetoed: {veto.reason}")
    return why if summary.evicted is None else summary.evicted.told_in(why)


@contexts.command()
@store_option
@item_options
@json_option
def show(*, url: str, as_json: bool, **which: Any) -> None:
    """Show one history: errors, running attempts, attributes."""
    item = item_of(**which)
    with use(url) as store:
        summary = store.histories.get(item)
        screen = Screen.here(store.histories.now())
    if summary is None:
        raise _nothing(item)
    if as_json:
        say_json(summary.to_json())
    else:
        screen.facts(_facts(screen, summary))


def _facts(screen: Screen, summary: HistorySummary) -> Iterator[tuple[str, Cell]]:
    yield "history", summary.canonical_key
    yield "name", summary.name
    yield "key", summary.shown_key
    yield "state", summary.state
    yield "fault", summary.fault
    yield "failed attempts", _count(summary)
    yield "why", summary.why
    yield "evicted", _evicted(screen, summary)
    if summary.veto is not None:
        yield "veto", summary.veto.reason
        yield "veto until", summary.veto.until or "it is withdrawn"
    yield "next attempt", summary.next_attempt_at
    yield "first failure", summary.first_failed_at
    yield "last failure", summary.last_failed_at
    yield "completed", summary.completed_at
    yield "remembered until", summary.expires_at
    yield "sent, not confirmed", summary.unsent or None
    for attempt in summary.running:
        yield ("recovering" if attempt.recovery else "running"), _running(screen, attempt)
    if summary.attributes:
        yield "attributes", _json_lines(summary.attributes)
    for error in summary.errors:
        yield f"error {error.attempt}", f"{error.type}: {error.message}"
    if summary.last_error is not None:
        yield "last error", summary.last_error.traceback


def _count(summary: HistorySummary) -> str:
    extra = (("crash", "crashes", summary.crashes), ("failed recovery", "failed recoveries", summary.recovery_failures))
    told = [f"{count} {one if count == 1 else many}" for one, many, count in extra if count]
    return f"{summary.retry_count}" + (f" ({', '.join(told)})" if told else "")


def _evicted(screen: Screen, summary: HistorySummary) -> str | None:
    evicted = summary.evicted
    if evicted is None:
        return None
    bound = {"capacity": "the store was full", "time_to_live": "past its time"}[evicted.by]
    return f"{screen.when(evicted.at)} ({bound}), with {evicted.failures} failed: they count on, their errors are gone"


def _running(screen: Screen, attempt: Any) -> str:
    known = {True: "alive", False: "dead", None: "alive or not, nobody here can tell"}[attempt.alive]
    since, until = screen.when(attempt.since), screen.when(attempt.until)
    return f"by {attempt.owner} ({known}) since {since}, believed until {until}"


def _json_lines(value: Any) -> str:
    import json

    return json.dumps(dict(value), indent=2, ensure_ascii=False)


def _nothing(item: Item) -> click.ClickException:
    from retrykit.histories import text_of

    return click.ClickException(f"nothing is stored under {safe(text_of(item))}")


@contexts.command()
@store_option
@item_options
@click.option("--reason", required=True, metavar="TEXT", help="Why: it is shown wherever the veto is.")
@click.option("--for", "lasts", metavar="TIME", callback=as_duration, help="How long: 90s, 2h, 7d. [default: for good]")
def veto(*, url: str, reason: str, lasts: float | None, **which: Any) -> None:
    """Forbid further attempts of an item.

    In every process, from its next delivery on; an attempt that is under way goes on. Its history is kept. An item that
    was never seen can be vetoed too, by --name and --key.
    """
    item = item_of(**which)
    with use(url) as store:
        try:
            summary = store.histories.veto(item, reason, lasts=lasts)
        except LookupError as error:
            raise click.ClickException(safe(str(error.args[0]))) from error
        screen = Screen.here(store.histories.now())
    if summary.veto is None:
        when = "" if summary.completed_at is None else f" {screen.when(summary.completed_at)}"
        raise click.ClickException(f"{safe(summary.canonical_key)} was completed{when}: nothing is left to forbid")
    until = "until it is withdrawn" if summary.veto.until is None else f"until {screen.when(summary.veto.until)}"
    screen.line(f"{safe(summary.canonical_key)} is vetoed {until}")


@contexts.command()
@store_option
@item_options
def withdraw(*, url: str, **which: Any) -> None:
    """Withdraw the veto of an item.

    It may be tried again, as far as its policy allows.
    """
    item = item_of(**which)
    with use(url) as store:
        before = store.histories.get(item)
        if before is None:
            raise _nothing(item)
        after = store.histories.withdraw_veto(item)
        screen = Screen.here(store.histories.now())
    shown = safe(before.canonical_key)
    if before.veto is None:
        screen.line(f"{shown} was not vetoed")
    else:
        screen.line(f"{shown} is no longer vetoed" + (": nothing else is known of it" if after is None else ""))


@contexts.command()
@store_option
@item_options
@yes_option
def forget(*, url: str, yes: bool, **which: Any) -> None:
    """Forget a history.

    Its veto too: the next delivery of the item is the first. Of an item that is done with the completion mark is
    forgotten: a duplicate of it would be handled again.
    """
    item = item_of(**which)
    with use(url) as store:
        summary = store.histories.get(item)
        if summary is None:
            raise _nothing(item)
        shown = safe(summary.canonical_key)
        confirm(f"Forget {shown} ({summary.state}, {summary.retry_count} failed)?", yes=yes)
        gone = store.histories.forget(item)
    click.echo(f"{shown} is forgotten" if gone else f"{shown} was gone already")


@contexts.command()
@store_option
@filters
@click.option(
    "--output",
    type=click.File("x", encoding="utf-8", lazy=True),
    default="-",
    metavar="FILE",
    help="Where to; a file that is not there yet. [default: standard output]",
)
def export(*, url: str, output: TextIO, **options: Any) -> None:
    """Write histories as JSON lines.

    A line for each, with the object that `show --json` prints.
    """
    with use(url) as store:
        for line in store.histories.export(_where(options)):
            click.echo(line, file=output)


@contexts.command()
@store_option
@click.option(
    "--older-than",
    metavar="TIME",
    callback=as_duration,
    help="Histories and tombstones too that nothing has happened to for so long: 30d.",
)
@click.option("--name", metavar="NAME", help="Only those of the template with this name.")
@click.option("--dry-run", is_flag=True, help="Count what would go, and change nothing.")
@yes_option
def prune(*, url: str, older_than: float | None, name: str | None, dry_run: bool, yes: bool) -> None:
    """Forget what is past its time.

    Completion marks and tombstones that are over, and histories past the time-to-live of their cache, by the store's
    clock. With --older-than also histories and tombstones that nothing has happened to for so long, except vetoed ones
    and those with an attempt under way. In small transactions: consumers go on meanwhile, and after Ctrl-C what was
    forgotten stays forgotten. Times-to-live of histories are known to the store alone: --dry-run and --name go by those
    of marks. A history past its time leaves a tombstone, from which its count goes on, as it would without this.
    """
    with use(url) as store:
        if not dry_run:
            confirm(_question(older_than, name), yes=yes)
        screen = Screen.here(store.histories.now())
        done = Pruned()

        def note(so_far: Pruned) -> None:
            nonlocal done
            done = so_far
            say(_progress(so_far))

        with screen.progress() as say:
            try:
                done = store.histories.prune(older_than=older_than, name=name, dry_run=dry_run, progress=note)
            except KeyboardInterrupt:
                click.echo(f"interrupted; {_outcome(done, dry_run=dry_run)}", err=True)
                sys.exit(_INTERRUPTED)
    click.echo(_outcome(done, dry_run=dry_run))


def _question(older_than: float | None, name: str | None) -> str:
    older = "" if older_than is None else f" and histories that nothing has happened to for {duration(older_than)}"
    return f"Forget what is past its time{older}{'' if name is None else f' of {safe(name)}'}?"


def _progress(done: Pruned) -> str:
    looked_at = f"{done.looked_at} looked at, " if done.looked_at else ""
    return f"{looked_at}{done.total} forgotten"


def _outcome(done: Pruned, *, dry_run: bool) -> str:
    verb = "would be forgotten" if dry_run else "forgotten"
    return f"{verb}: {done.expired} past their time, {done.older} older than asked"
