"""From the options of the command to a run, and its display."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from retrykit.cli.demo.display import Lines, Live, Silence, show_report
from retrykit.cli.demo.ledger import Ledger
from retrykit.cli.demo.plan import PlanError, generated, make_plan, read_messages
from retrykit.cli.demo.report import Report
from retrykit.cli.demo.run import Settings, run_demo
from retrykit.messaging.stomp import StompBroker


class OptionError(ValueError):
    """An option that cannot be used: `option` is its name, the text says why."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(reason)
        self.option = option


def settings(
    *,
    messages: int | None,
    default: int,
    workers: int,
    seed: int,
    source: Path | None,
    broker: str | None,
    database: str | None,
) -> Settings:
    """What the options mean; `OptionError` for the first that is wrong. Nothing is started, connected or created."""
    if broker is not None:
        _check_broker(broker)
    if database is not None:
        _check_database(database)
    try:
        items = list(generated(messages or default, seed)) if source is None else read_messages(source, messages)
    except PlanError as error:
        raise OptionError("--input", str(error)) from error
    return Settings(plan=make_plan(items, seed), workers=workers, broker=broker, database=database)


def _check_broker(url: str) -> None:
    try:
        destination = StompBroker(url).destination
    except ValueError as error:
        raise OptionError("--broker", str(error)) from error
    if not destination.startswith("/queue/") or destination == "/queue/":
        raise OptionError("--broker", "the URL must end with the queue, such as /queue/demo")


def _check_database(url: str) -> None:
    try:
        Ledger.at(url).close()
    except ValueError as error:
        raise OptionError("--db", str(error)) from error


def shown_run(settings: Settings, console: Console | None) -> Report:
    """Run, and show it on the console, if there is one."""
    if console is None:
        return run_demo(settings, Silence())
    if console.is_terminal:
        with Live(console, len(settings.plan)) as display:
            report = run_demo(settings, display)
    else:
        report = run_demo(settings, Lines(console))
    show_report(console, report)
    return report
