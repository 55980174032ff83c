"""How far a step is, while it runs: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Final

import attrs

from retrykit.batch import AsyncChunkStep, ChunkStep, Report
from retrykit.cli.logs import through
from retrykit.cli.words import safe

_log = logging.getLogger("retrykit.batch")

EVERY: Final = 10.0


@attrs.frozen
class Bar:
    """`show` so many items, and a few words behind the name; `say` a line above that."""

    show: Callable[[int, str], None]
    say: Callable[[str], Any]


@attrs.frozen
class Shown:
    """Several processes: `tell` of items and attempts that were rolled back; `say` a line of theirs."""

    tell: Callable[[int, int], None]
    say: Callable[[str], Any]


@contextmanager
def progress(step: ChunkStep | AsyncChunkStep) -> Iterator[Callable[[Report], None]]:
    """Something to tell how far it is. What is logged stands above the bar."""
    with _bar(step.name, len(step.reader) if isinstance(step.reader, Sized) else None) as bar:
        logged = _Logged()

        def show(report: Report) -> None:
            counts = report.counts
            if bar is not None:
                bar.show(counts.read, f", {counts.all_skipped:,} skipped" if counts.all_skipped else "")
            elif logged.is_due():
                facts = (report.name, counts.read, counts.written, counts.all_skipped, counts.rollbacks)
                _log.info("%s: %d read, %d written, %d skipped, %d rolled back", *facts)

        yield show


@contextmanager
def progress_of_parts(name: str) -> Iterator[Shown]:
    """Where to tell what all processes have come to."""
    with _bar(name, None) as bar:
        logged = _Logged()

        def show(items: int, failures: int) -> None:
            if bar is not None:
                bar.show(items, f", {failures:,} rolled back" if failures else "")
            elif logged.is_due():
                _log.info("%s: %d read here, %d rolled back", name, items, failures)

        yield Shown(show, sys.stderr.write if bar is None else bar.say)


@contextmanager
def _bar(name: str, total: int | None) -> Iterator[Bar | None]:
    """None where there is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with through(console) as above, Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(safe(name), total=total)

        def show(items: int, words: str) -> None:
            shown.update(task, completed=items, description=f"{safe(name)}{words}")

        yield Bar(show, above.write)


class _Logged:
    """Whether it is time for a line in the log: every ten seconds."""

    def __init__(self) -> None:
        self._due = time.monotonic() + EVERY

    def is_due(self) -> bool:
        if time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + EVERY
        return True
