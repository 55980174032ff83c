"""The commands and their options: checked here, before anything starts."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console

from retrykit.errors import RetryError

if TYPE_CHECKING:
    from retrykit.cli.demo.report import Report

MESSAGES: Final = 200
MAX_WORKERS: Final = 32
INTERRUPTED: Final = 128 + signal.SIGINT


# Each group, and each longer command, is in a module of its own, which is imported when it is needed.
GROUPS: Final = {
    "batch": "retrykit.cli.batch",
    "consume": "retrykit.cli.consume",
    "contexts": "retrykit.cli.contexts",
    "db": "retrykit.cli.db",
    "jobs": "retrykit.cli.jobs",
    "parked": "retrykit.cli.parked",
}


class _Commands(click.Group):
    """The commands of this module, and those that have modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *GROUPS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = GROUPS.get(cmd_name)
        if home is None:
            return super().get_command(ctx, cmd_name)
        group: click.Command = getattr(importlib.import_module(home), cmd_name)
        return group


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="retrykit", prog_name="retrykit")
def retrykit() -> None:
    """Retry that survives the rollback.

    retrykit is a Python library: a message that fails is tried again when it is delivered again, up to a limit that
    holds across roll-backs, processes and crashes; then it is parked with its history. See it work:

    \b
        retrykit demo                               200 messages, two workers, ten seconds

    Run your own consumers:

    \b
        retrykit consume shop.orders:consumers --processes 2 --health 8080

    Look after what they keep in their database, which --store or RETRYKIT_STORE names:

    \b
        export RETRYKIT_STORE=sqlite:///orders.db
        retrykit contexts list --exhausted          what has failed for good, and why
        retrykit contexts veto orders/m-7 --reason "the customer has cancelled" --for 2h
        retrykit parked list --name orders          what was put aside
        retrykit parked requeue 17 --broker stomp://user:password@host:61613
    """  # noqa: D301 - click wants the control character itself: what follows keeps its lines


@retrykit.command()
@click.option(
    "--messages",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help=f"How many messages. [default: {MESSAGES}, or all of FILE]",
)
@click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    default=2,
    show_default=True,
    metavar="N",
    help="How many consumer processes.",
)
@click.option(
    "--seed", type=int, default=1, show_default=True, metavar="N", help="Decides which messages meet which fate."
)
@click.option(
    "--input",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.jsonl",
    help='Your own messages: a JSON object with an "id" on each line.',
)
@click.option(
    "--broker", metavar="URL", help="Your own broker and an empty queue: stomp://user:password@host:port/queue/name."
)
@click.option("--db", "database", metavar="URL", help="Your own database (sqlite:///FILE), in which the rows stay.")
@click.option("--json", "as_json", is_flag=True, help="Print nothing but the report, as one JSON object.")
def demo(*, as_json: bool, **options: Any) -> None:
    """Watch poison messages survive crashes and roll-backs, then count what really happened.

    Messages go through a STOMP broker to consumer processes, whose handlers write rows in a database transaction. Most
    messages are fine. Some fail at first, some always; some let the commit fail instead; two kill their process with
    SIGKILL, one of them at every attempt. Dead processes are replaced. Each failed attempt is shown with the decision
    that followed and its reason.

    At the end the database is counted, not the library asked: nothing lost, every effect once, no message attempted
    more than four times, every poison message parked once with its history.

    Without --broker and --db the demo brings its own, for as long as it runs: a small STOMP server on the loopback
    interface and a SQLite file in a temporary directory.

    Exit status: 0 when every promise was kept, 1 when one was broken, 2 for options that cannot be used, 130 after
    Ctrl-C.
    """
    try:
        report = _report(options, None if as_json else Console())
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    sys.exit(0 if report.kept else 1)


def _report(options: Mapping[str, Any], console: Console | None) -> Report:
    with _needs_extras():
        from retrykit.cli.demo.options import OptionError, settings, shown_run
        from retrykit.cli.demo.run import UnusableError
        from retrykit.cli.demo.supervisor import WorkerFailedError
    try:
        with _ended_by_sigterm():
            return shown_run(settings(**options, default=MESSAGES), console)
    except OptionError as error:
        raise click.BadParameter(str(error), param_hint=error.option) from error
    except UnusableError as error:
        raise click.UsageError(str(error)) from error
    except (WorkerFailedError, RetryError) as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def _needs_extras() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in {"sqlalchemy", "stomp"}:
            raise
        raise click.ClickException(f'the demo needs {error.name}: pip install "retrykit[cli,sql,stomp]"') from error


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: everything that was started is ended, and put away."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
