"""Where the log of a command goes: standard error, as text for people or as JSON lines for programs."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import click

from retrykit.cli.words import safe
from retrykit.messaging.logs import JsonLines

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("text", "json")


def log_options(command: F) -> F:
    """`--log-level` and `--log-format`."""
    level = click.option(
        "--log-level",
        type=click.Choice(LEVELS, case_sensitive=False),
        default="info",
        show_default=True,
        help="What goes to standard error.",
    )
    form = click.option(
        "--log-format",
        type=click.Choice(FORMATS),
        default="text",
        show_default=True,
        help="Lines for people, or a JSON object a line.",
    )
    return level(form(command))


class TextLines(logging.Formatter):
    """Formats a record as one line; a traceback follows below it. What would command a terminal is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
        line = f"{time}Z {record.levelname} {record.process} {record.name}: {safe(record.getMessage())}"
        if not record.exc_info:
            return line
        return f"{line}\n{safe(self.formatException(record.exc_info), lines=True)}"


def set_up(level: str, form: Literal["text", "json"]) -> None:
    """Send all records of `level` and above to standard error, warnings too, until the application says otherwise."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    if level != "debug":
        # What stomp.py has to say is in our own records.
        logging.getLogger("stomp.py").setLevel(logging.CRITICAL)
        logging.getLogger("psycopg").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """psycopg tells of a statement that has failed, and then, as a warning, that its pipeline ends with it."""
    return not str(record.msg).startswith("error ignored terminating")


@contextmanager
def through(console: Console) -> Iterator[io.TextIOBase]:
    """As long as this lasts, what goes to standard error stands above what the console shows there in place; and so
    does what is written to this.
    """
    above = _Above(console)
    ours = [one for one in logging.getLogger().handlers if getattr(one, "stream", None) is sys.stderr]
    handlers = [one for one in ours if isinstance(one, logging.StreamHandler)]
    before = [(handler, handler.setStream(above)) for handler in handlers]
    try:
        yield above
    finally:
        for handler, stream in before:
            handler.setStream(stream)


class _Above(io.TextIOBase):
    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> int:
        from rich.text import Text

        # As it is: a line that is cut is no JSON any more.
        self._console.print(Text(text.rstrip("\n")), soft_wrap=True)
        return len(text)
