"""Where a command shows things: tables and local time on a terminal, tab-separated lines and UTC elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import attrs
import click
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from retrykit.cli.words import relative, safe

_WIDEST: Final = 40

Cell = str | int | datetime | None


@attrs.frozen
class Screen:
    """Standard output. `console`: the terminal, None where there is none; `now`: what relative times count from."""

    console: Console | None
    now: datetime

    @classmethod
    def here(cls, now: float) -> Screen:
        """This process's standard output."""
        console = Console(highlight=False)
        return cls(console if console.is_terminal else None, datetime.fromtimestamp(now, UTC))

    def when(self, instant: datetime) -> str:
        """An instant: local and relative on a terminal, ISO 8601 in UTC elsewhere."""
        if self.console is None:
            return instant.astimezone(UTC).isoformat(timespec="milliseconds")
        local = _local(instant)
        same_day = local.date() == _local(self.now).date()
        return f"{local:{'%H:%M:%S' if same_day else '%Y-%m-%d %H:%M'}} ({relative(instant, self.now)})"

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Rows under titles. On a terminal the last two columns, which are words, stand below their row."""
        texts = [[self._text(cell) for cell in row] for row in (titles, *rows)]
        if self.console is None:
            for row in texts:
                self.line("\t".join(row))
            return
        widths = [min(_WIDEST, max(map(cell_len, column))) for column in zip(*texts, strict=True)][:-2]
        for number, row in enumerate(texts):
            self._print(_columns(row, widths), "" if number else "bold")
            for words in filter(None, row[-2:] if number else ()):
                self._print(f"    {words}", "dim")

    def _print(self, text: str, style: str) -> None:
        assert self.console is not None  # noqa: S101 - only tables on terminals have styles
        # What one copies into the next command must not be cut off.
        self.console.print(Text(self._known(text), style), soft_wrap=True)

    def facts(self, facts: Iterable[tuple[str, Cell]]) -> None:
        """One line for each fact that there is; those of several lines are indented below their name."""
        shown = [(name, self._text(value, lines=True)) for name, value in facts if value is not None and value != ""]
        width = max((len(name) for name, _ in shown), default=0)
        for name, text in shown:
            if "\n" in text:
                self.line(f"{name}:\n" + "\n".join(f"    {line}" for line in text.splitlines()))
            else:
                self.line(f"{name + ':':<{width + 1}} {text}")

    def line(self, text: str) -> None:
        """A line, as it is."""
        click.echo(self._known(text))

    def _text(self, cell: Cell, *, lines: bool = False) -> str:
        if isinstance(cell, datetime):
            return self.when(cell)
        return "" if cell is None else safe(str(cell), lines=lines)

    def _known(self, text: str) -> str:
        """The terminal may have no letters for it."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str], None]]:
        """On a terminal, a line that says how far something is; the callable changes what it says."""
        if self.console is None:
            yield lambda _text: None
            return
        with self.console.status("") as status:
            yield lambda text: status.update(Text(text))


def _columns(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=False))
    return "  ".join(cells).rstrip()


def _local(instant: datetime) -> datetime:
    try:
        return instant.astimezone()
    except (OverflowError, ValueError, OSError):  # at the ends of the calendar
        return instant


def say_json(value: Any) -> None:
    """One JSON document on one line."""
    click.echo(json.dumps(value))


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is lost. Without a terminal nobody can answer: then `--yes` must have been said."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask on: say --yes.")
    click.confirm(question, abort=True)
