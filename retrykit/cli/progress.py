"""How far a step is, while it runs: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Final

from retrykit.batch import AsyncChunkStep, ChunkStep, Report
from retrykit.cli.logs import through
from retrykit.cli.words import safe

_log = logging.getLogger("retrykit.batch")

EVERY: Final = 10.0


@contextmanager
def progress(step: ChunkStep | AsyncChunkStep) -> Iterator[Callable[[Report], None]]:
    """Something to tell how far it is. What is logged stands above the bar."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Logged()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with through(console), Progress(*columns, console=console, transient=True) as bar:
        total = len(step.reader) if isinstance(step.reader, Sized) else None
        task = bar.add_task(safe(step.name), total=total)

        def show(report: Report) -> None:
            skipped = f", {report.counts.all_skipped:,} skipped" if report.counts.all_skipped else ""
            bar.update(task, completed=report.counts.read, description=f"{safe(step.name)}{skipped}")

        yield show


class _Logged:
    """Progress in the log, every ten seconds."""

    def __init__(self) -> None:
        self._due = time.monotonic() + EVERY

    def __call__(self, report: Report) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY
        counts = report.counts
        facts = (report.name, counts.read, counts.written, counts.all_skipped, counts.rollbacks)
        _log.info("%s: %d read, %d written, %d skipped, %d rolled back", *facts)
