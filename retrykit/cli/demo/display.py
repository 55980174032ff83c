"""Showing a run: live on a terminal, line by line elsewhere, not at all when only the report is wanted."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from retrykit.cli.demo.progress import Progress
from retrykit.cli.demo.report import Report

_NAMED = 5


class Display(Protocol):
    """What is shown while a run goes on."""

    def line(self, text: str) -> None:
        """Show that something happened."""

    def update(self, progress: Progress) -> None:
        """Show the totals."""


class Silence:
    """Shows nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def update(self, progress: Progress) -> None:
        """Nothing."""


class Lines:
    """Prints what happened, and the totals whenever another tenth is done."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tenths = 0

    def line(self, text: str) -> None:
        """Print it."""
        _print(self._console, text)

    def update(self, progress: Progress) -> None:
        """Print the totals, now and then."""
        tenths = 10 * len(progress.finished) // progress.total
        if tenths > self._tenths:
            self._tenths = tenths
            self.line(f"-- {len(progress.finished)} of {progress.total}: {_totals(progress)}")


class Live:
    """A bar that grows, while what happens scrolls by above it."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = Bar(
            TextColumn("messages"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[totals]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("messages", total=total, totals="")

    def line(self, text: str) -> None:
        """Print it above the bar."""
        _print(self._bar.console, text)

    def update(self, progress: Progress) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=len(progress.finished), totals=_totals(progress))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _print(console: Console, text: str) -> None:
    """Ids come from anywhere: nothing in them is markup, and the terminal may have no letters for them."""
    known = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(escape(known), highlight=False, soft_wrap=True)


def _totals(progress: Progress) -> str:
    attempts = sum(progress.attempts.values())
    counts = f"{attempts} attempts, {progress.rollbacks} rolled back, {progress.parked} parked"
    return f"{counts}, {progress.deaths} dead processes"


def show_report(console: Console, report: Report) -> None:
    """The table, the promises, the verdict."""
    console.print(_table(report))
    for promise in report.promises:
        _print(console, f"{'broken' if promise.broken_by else 'kept':>6}  {promise.text}")
        for what in promise.broken_by[:_NAMED]:
            _print(console, f"          {what}")
        if len(promise.broken_by) > _NAMED:
            _print(console, f"          and {len(promise.broken_by) - _NAMED} more")
    _print(console, _verdict(report))


def _table(report: Report) -> Table:
    table = Table()
    table.add_column("messages that are")
    for title in ("messages", "attempts", "effects", "parked"):
        table.add_column(title, justify="right")
    for row in report.rows:
        if row.messages:
            table.add_row(row.kind, *map(str, (row.messages, row.attempts, row.effects, row.parked)))
    return table


def _verdict(report: Report) -> str:
    counts = (
        f"{report.messages} messages",
        f"{report.effects} effects",
        f"{report.duplicate_effects} duplicates",
        f"{report.lost} lost",
        f"{report.parked} parked",
        f"{report.recovered} recovered after failures",
        f"at most {report.max_attempts_seen} attempts each",
        f"{report.process_deaths} dead processes",
        f"in {report.seconds:g} s",
    )
    return f"{'every promise was kept' if report.kept else 'PROMISES WERE BROKEN'}: {', '.join(counts)}"
