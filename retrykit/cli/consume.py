"""`retrykit consume …`: a container or registry as a service: processes, signals, health, logs."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs
import click
from click.core import ParameterSource

from retrykit.cli.channel import Answers, LastWord
from retrykit.cli.logs import log_options, set_up
from retrykit.cli.processes import ProcessEndedError, Processes
from retrykit.cli.target import LoadingError, TargetError, check, load
from retrykit.cli.tracebacks import of_the_user
from retrykit.cli.words import as_duration
from retrykit.errors import RetryError
from retrykit.messaging.lifetime import run
from retrykit.messaging.readiness import Health
from retrykit.messaging.worker import MISCONFIGURED

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from retrykit.messaging import ContainerGroup, Counters, ListenerContainer
    from retrykit.messaging.readiness import Observed

MAX_PROCESSES: Final = 256
_MARGIN: Final = 5.0
_FINISHED: Final = {True: 0, False: 1}

_log = logging.getLogger("retrykit.consume")


@attrs.frozen(kw_only=True)
class Options:
    """What was asked for."""

    target: str
    concurrency: int | None
    processes: int | None
    health: int | None
    health_host: str
    grace: float
    log_level: str
    log_format: Literal["text", "json"]
    supervised: int | None

    def command(self) -> Sequence[str]:
        """The arguments with which an interpreter does the same in one process."""
        workers = () if self.concurrency is None else ("--concurrency", str(self.concurrency))
        logs = ("--log-level", self.log_level, "--log-format", self.log_format)
        grace = ("--grace", f"{self.grace:f}s")
        return ("-m", "retrykit.cli", "consume", self.target, *workers, *logs, *grace)


@click.command()
@click.argument("target", metavar="MODULE:NAME")
@click.option(
    "--concurrency", type=click.IntRange(1), metavar="N", help="Workers of each consumer, whatever the code says."
)
@click.option(
    "--processes",
    type=click.IntRange(1, MAX_PROCESSES),
    metavar="N",
    help="Run N processes, each with all consumers, and replace those that die.",
)
@click.option("--health", type=click.IntRange(0, 65_535), metavar="PORT", help="Answer for health there; 0: any port.")
@click.option("--health-host", default="127.0.0.1", show_default=True, metavar="HOST", help="The address for --health.")
@click.option(
    "--grace",
    default="25s",
    show_default=True,
    metavar="TIME",
    callback=as_duration,
    help="How long the messages in hand may take when it is to stop.",
)
@log_options
@click.option("--supervised", type=click.IntRange(1), hidden=True)
def consume(**options: Any) -> None:
    """Consume messages until told to stop.

    MODULE:NAME is a ListenerContainer, a Consumers registry, or a function without arguments that makes one; the
    current directory is importable: `retrykit consume shop.orders:consumers --processes 4 --health 8080`.

    SIGTERM or SIGINT (Ctrl-C): the messages in hand are finished, no other is taken, and it ends. After --grace, or
    another signal a second or more later, it ends at once: what was in hand goes back to the broker.

    With --processes a process that dies is replaced, after a pause that grows while it dies soon after its start. One
    that gives up for a reason that each would have (messages have no stable id, say) ends them all. So does a module
    that none of them can load when they are first started; a later one that cannot is replaced, too.

    --health serves /health/live, /health/ready (503 while a worker is not connected) and /health/counters.

    Exit status: 0 when it was told to stop and everything in hand was finished. 1 when not, or when it gave up or could
    not begin; the log says why. 2 when the command cannot be understood, or MODULE:NAME is not there or nothing that
    can consume.
    """
    asked = Options(**options)
    context = click.get_current_context()
    if asked.health is None and context.get_parameter_source("health_host") == ParameterSource.COMMANDLINE:
        raise click.UsageError("--health-host needs a --health PORT.")
    set_up(asked.log_level.lower(), asked.log_format)
    sys.exit(_status(asked))


def _status(asked: Options) -> int:
    if asked.supervised is not None:
        return _supervised(asked, asked.supervised)
    return _alone(asked) if asked.processes is None else _in_processes(asked, asked.processes)


def _alone(asked: Options) -> int:
    """Consume in this process; the exit status."""
    with _told():
        check(asked.target)
    place = _Place()
    with _health(place, asked):
        return _consume(place, asked, lambda _word: None)


def _supervised(asked: Options, number: int) -> int:
    """Consume in this process, which is the supervisor's process `number`; the exit status.

    What its end means is said to the supervisor: the status alone would be that of whatever else can end a process.
    """
    place = _Place()
    answers = Answers(place, _supervisor_is_gone)
    answers.start()
    try:
        with _told():
            check(asked.target)
        return _consume(place, asked, answers.say, number)
    except click.UsageError:
        answers.say(LastWord.NOT_UNDERSTOOD)
        raise


def _consume(place: _Place, asked: Options, say: Callable[[LastWord], None], number: int | None = None) -> int:
    consumer = place.consumer = _loaded(asked, say)
    _check_sharing(consumer, number or 1)
    _announce(consumer, shared=number is not None)
    try:
        # Who is supervised may be told twice, by the supervisor and by the system: it sees to the end.
        finished = run(consumer, grace=asked.grace, heed_repeated=number is None)
    except Exception:
        if consumer.error is None:
            raise
        # The container has logged what made it give up.
        if isinstance(consumer.error, MISCONFIGURED):
            say(LastWord.GAVE_UP)
        return 1
    _log.info("ended%s: %s", "" if finished else " at once", _counted(consumer.counters))
    if finished:
        say(LastWord.DRAINED)
    return _FINISHED[finished]


@attrs.define
class _Place:
    """Who consumes, and what is said before that is known: loading an application may take its time."""

    consumer: ListenerContainer | ContainerGroup | None = None

    def health(self) -> Health:
        return Health((), ("is starting",)) if self.consumer is None else self.consumer.health()


def _in_processes(asked: Options, count: int) -> int:
    """Have processes consume; the exit status."""
    with _told():
        check(asked.target)
    processes = Processes(asked.command(), count)
    with _health(processes, asked):
        try:
            # They keep to the grace by themselves: this is for one that cannot.
            finished = run(processes, grace=asked.grace + _MARGIN)
        except ProcessEndedError as error:
            return click.UsageError.exit_code if error.word is LastWord.NOT_UNDERSTOOD else 1
        processes.wait(_MARGIN)
    return _FINISHED[finished and not processes.disorderly]


def _supervisor_is_gone() -> None:
    _log.warning("the supervisor is gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)


def _loaded(asked: Options, say: Callable[[LastWord], None]) -> ListenerContainer | ContainerGroup:
    try:
        with _told():
            return load(asked.target, concurrency=asked.concurrency)
    except LoadingError as error:
        _log.critical("%s", error, exc_info=_detail(error.__cause__))
        say(LastWord.NOT_LOADED)
        sys.exit(1)


def _detail(cause: BaseException | None) -> BaseException | None:
    """What of the user's error is logged with a traceback; how it was reached in here only for debugging."""
    if cause is None or isinstance(cause, RetryError):
        return None
    return cause if _log.isEnabledFor(logging.DEBUG) else cause.with_traceback(of_the_user(cause))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except TargetError as error:
        raise click.BadParameter(str(error), param_hint="MODULE:NAME") from error


def _health(observed: Observed, asked: Options) -> AbstractContextManager[object]:
    from retrykit.messaging.health import HealthServer

    if asked.health is None:
        return nullcontext()
    server = HealthServer(observed, port=asked.health, host=asked.health_host)
    try:
        server.start()
    except OSError as error:
        raise click.ClickException(f"--health: {asked.health_host} port {asked.health}: {error}") from error
    _log.info("health is at %s/live, /ready and /counters", server.url)
    return closing(server)


def _counted(counters: Counters) -> str:
    """What there was of each kind, as far as there was any."""
    words = {name: name.replace("_", " ") for name in attrs.asdict(counters)} | {"generations": "connections"}
    found = [f"{words[name]} {number}" for name, number in attrs.asdict(counters).items() if number]
    return ", ".join(found) or "nothing was received"


def _containers(consumer: ListenerContainer | ContainerGroup) -> Any:
    return getattr(consumer, "containers", (consumer,))


def _check_sharing(consumer: ListenerContainer | ContainerGroup, number: int) -> None:
    """Refuse the process `number` (from 1) if it would be given the messages of those before it too, or none."""
    for one in _containers(consumer):
        at_most = getattr(one.broker, "sessions_at_most", None)
        if at_most is not None and number > at_most:
            wanted = f"must be at most {at_most}: processes would not share the messages of {one.broker.name}"
            raise click.BadParameter(wanted, param_hint="--processes")


def _announce(consumer: ListenerContainer | ContainerGroup, *, shared: bool) -> None:
    """Say who consumes what; a warning for what other processes should share, and cannot."""
    for one in consumer.health().consumers:
        _log.info("%s consumes %s with %d worker%s", one.name, one.destination, one.workers, "s"[: one.workers != 1])
    for one in _containers(consumer):
        if one.recover is None:
            words = "%s has no recover=: a message that may not be tried again stays, and holds up one worker"
            _log.warning(words, one.template.name)
    for one in _containers(consumer) if shared else ():
        if not getattr(one.template.context_cache, "shared", True):
            name = one.template.name
            _log.warning("%s keeps its histories in the memory of this process: each process counts for itself", name)
