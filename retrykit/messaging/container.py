"""The listener container: workers that take messages through a template, and connect again when they must."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from retrykit.backoff import BackOffPolicy, ExponentialBackOffPolicy, is_back_off
from retrykit.check import callable_with, is_callable_or_none, one_of, whole, wrong_type, wrong_value
from retrykit.failure import message_of, type_name
from retrykit.messaging.broker import Broker, Session, is_broker
from retrykit.messaging.connecting import forget
from retrykit.messaging.counters import Counters, Tally
from retrykit.messaging.delays import WAYS, Delays, Way
from retrykit.messaging.delivery import Delivery
from retrykit.messaging.errors import BrokerUnavailableError, CutShortError, LoopEndedError
from retrykit.messaging.handler import Handler, calls_with, refuse_coroutines, refuse_generators
from retrykit.messaging.lifetime import Ending, Lifespan, Lifetime
from retrykit.messaging.logs import ATTRIBUTE, in_detail
from retrykit.messaging.patience import Patience
from retrykit.messaging.readiness import ConsumerHealth, Health, State
from retrykit.messaging.recoverers import Recoverer, misplaced_by, park
from retrykit.messaging.retraction import Retraction
from retrykit.messaging.unit_of_work import Transaction
from retrykit.messaging.work import Work
from retrykit.messaging.worker import MISCONFIGURED, Worker
from retrykit.template import AsyncRetryTemplate, RetryTemplate

if TYPE_CHECKING:
    from retrykit.messaging.coroutines.desk import Desk
    from retrykit.messaging.coroutines.loop import HandlerLoop
    from retrykit.messaging.handler import Template

_log = logging.getLogger("retrykit.messaging")

FAREWELL: Final = 2.0
RECONNECT: Final = ExponentialBackOffPolicy(initial=0.1, multiplier=2.0, max_interval=15.0, jitter="full")


def _is_template(_instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, RetryTemplate | AsyncRetryTemplate):
        raise wrong_type(field.name, "a RetryTemplate or an AsyncRetryTemplate", value)


def _names_a_destination(_instance: Any, field: Any, value: Any) -> None:
    if getattr(value, "destination", None) == "":
        raise ValueError(
            f"{field.name}: must name what is consumed (destination='/queue/…'), and {value.name} does not"
        )


def _parks_in_what_is_read(recover: Any, broker: Any) -> bool:
    if not isinstance(recover, park):
        return False
    reads = getattr(broker, "reads", None)
    place = recover.destination
    return bool(place == getattr(broker, "destination", None) if reads is None else reads(place))


def _shares_messages(container: Any, field: Any, value: int) -> None:
    at_most: int | None = getattr(container.broker, "sessions_at_most", None)
    if at_most is not None and value > at_most:
        wanted = f"at most {at_most} (several sessions would not share the messages of {container.broker.name})"
        raise wrong_value(field.name, wanted, value)


def _new_loop() -> HandlerLoop:
    # Here, since `import retrykit.messaging` must not cost what asyncio costs.
    from retrykit.messaging.coroutines.loop import HandlerLoop

    return HandlerLoop()


def _deliveries(template: Template) -> type[Delivery]:
    if not template.asynchronous:
        return Delivery
    from retrykit.messaging.coroutines.delivery import AsyncDelivery

    return AsyncDelivery


@attrs.define(eq=False)
class ListenerContainer(Lifetime):
    """Consume a destination: each message is a stateful call of `template`, redelivered until success or recovery.

    `handler(message)` or `handler(message, context)` runs in `transaction`, any callable that gives a context manager
    (`Session.begin`); what that gives is `context.transaction`. It commits before the message is acknowledged.
    `recover(message, context)` ends a message that may not be tried again (`park("…")`, `republish("…")`,
    `discard("…")`, or your own); without it such a message stays at the broker, and holds up one consumer, with growing
    pauses and an error in the log, until somebody acts. So does one whose recovery fails, and one whose failure cannot
    be stored (the context cache is full or cannot be reached): none is counted, so it is not recovered either.

    A handler may send too (`message.send`, `message.reply`, or by returning `Republish` or `Park`), in the transaction
    that acknowledges its message. Where completed messages are remembered (`remember_completed`) in the handler's own
    database, what it sends is kept with the mark until the broker has confirmed: a process that dies between the two
    commits repeats neither the handler nor loses what it sent. Elsewhere the handler runs again, and sends again under
    the same ids. So does a recovery.

    `journal`: with "redelivered" nothing is stored before the first attempt of a message that has surely not been
    delivered before; should that attempt kill its process, it is not counted. "always" stores it first, at the price of
    one write a message. "never" counts neither crashes nor attempts that run at the same time. In a history that this
    process keeps for itself no crash can be found: there, of two deliveries of one message, the second one waits.

    `delay` says where a message waits for its next attempt. "hold": in a session. With a prefetch above 1 it stays in
    hand and others go on; else whoever is delivered it next waits, and takes no other. "schedule": at the broker, which
    is sent a copy to keep back (by the scheduler of ActiveMQ, in queues on RabbitMQ), and then the message is
    acknowledged. "redeliver": where it came from, as the source's own redelivery policy says (the plug-in of ActiveMQ;
    `MemoryBroker`, which does so anyway). A broker that cannot is a `DelayUnavailableError` at the start. Which it is
    and what it means is logged.

    `concurrency` is the number of workers: each has a thread and a connection of its own. Lost connections are made
    again, with the pauses of `reconnect`, which messages that are held up take too. A container is used once:
    `with container: container.wait()`, or `container.run()`.

    With an `AsyncRetryTemplate` the handler is a coroutine function, what `transaction` gives may be an asynchronous
    context manager (`async_sessionmaker(engine).begin`), and `recover` may be a coroutine function. All coroutines of a
    container, or of a `ContainerGroup`, run on one event loop in a thread of its own, so they can share an engine or a
    client; it is asyncio's, trio has no part in it. A handler that blocks holds up the others, and the log says so when
    it has done so for more than a second. When the loop ends by itself, as when a lifespan's TaskGroup fails or
    something on it exits, its containers give up with the reason. What a handler sends is put into the connection when
    it has returned, not before.

    `lifespan` is for what belongs to that loop: any callable that gives an asynchronous context manager, which is
    entered before anything is consumed and left at the end (once for all containers of a group that name it). When
    entering it fails, the container gives up.
    """

    broker: Broker = attrs.field(validator=[is_broker, _names_a_destination])
    handler: Handler
    template: RetryTemplate | AsyncRetryTemplate = attrs.field(kw_only=True, validator=_is_template)
    transaction: Transaction | None = attrs.field(default=None, kw_only=True, validator=is_callable_or_none)
    recover: Recoverer | None = attrs.field(default=None, kw_only=True, validator=callable_with("message", "context"))
    journal: Literal["redelivered", "always", "never"] = attrs.field(
        default="redelivered", kw_only=True, validator=one_of("redelivered", "always", "never")
    )
    delay: Way = attrs.field(default="hold", kw_only=True, validator=one_of(*WAYS))
    concurrency: int = attrs.field(default=1, kw_only=True, validator=[whole(1), _shares_messages])
    reconnect: BackOffPolicy = attrs.field(default=RECONNECT, kw_only=True, validator=is_back_off)
    lifespan: Lifespan | None = attrs.field(default=None, kw_only=True, validator=is_callable_or_none)
    _tally: Tally = attrs.field(factory=Tally, init=False, repr=False)
    _stopping: threading.Event = attrs.field(factory=threading.Event, init=False, repr=False)
    _ending: Ending = attrs.field(factory=Ending, init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)
    _retraction: Retraction = attrs.field(factory=Retraction, init=False, repr=False)
    _sessions: list[Session] = attrs.field(factory=list, init=False, repr=False)
    _threads: list[threading.Thread] = attrs.field(factory=list, init=False, repr=False)
    loop: HandlerLoop | None = attrs.field(default=None, init=False, repr=False)
    """Where coroutines run. Those of other containers may run there too; to be set before `start`."""
    _desks: list[Desk] = attrs.field(factory=list, init=False, repr=False)
    _doors: list[Desk] = attrs.field(factory=list, init=False, repr=False)
    _running: int = attrs.field(default=0, init=False, repr=False)
    _failure: str = attrs.field(default="", init=False, repr=False)
    _reasons: list[tuple[type, str]] = attrs.field(factory=list, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        # Refuses what is no handler, before anything runs.
        calls_with(self.handler, self.template)
        refuse_generators("recover", self.recover)
        if fault := misplaced_by(self.recover, self.broker):
            raise ValueError(f"recover: {fault}")
        if _parks_in_what_is_read(self.recover, self.broker):
            place = f"{getattr(self.recover, 'destination', '')!r}, which is consumed here"
            raise ValueError(f"recover: must not park in {place}: what is parked would come again at once, for ever")
        if self.template.asynchronous:
            self.loop = _new_loop()
            return
        refuse_coroutines("recover", self.recover)
        if self.lifespan is not None:
            raise ValueError("lifespan: only with an AsyncRetryTemplate is there an event loop to enter it on")

    # -- lifetime

    def start(self) -> None:
        """Start the workers and return; they connect by themselves. `RuntimeError` at the second time."""
        with self._lock:
            if self._threads:
                raise RuntimeError("this container was started before: a container is used once")
            work = self._prepared()
            self._threads = [self._thread(work, number) for number in range(1, self.concurrency + 1)]
            self._running = len(self._threads)
        if self.loop is not None:
            self.loop.join(self._give_up)
        for thread in self._threads:
            thread.start()

    def stop(self, *, now: bool = False) -> None:
        """Ask the workers to finish the message in hand and leave; returns at once.

        `now` takes their connections away, and cancels handlers that are coroutines: what they have in hand is rolled
        back and delivered again, and counts neither as a failed attempt nor as a crash. That plain handlers have
        attempts running is taken back in their histories; if the store hangs, `stop` returns after two seconds. May be
        called from any thread, and again.
        """
        self._stopping.set()
        if now and self.loop is None:
            # First: whoever is then given a message looks into its history.
            self._retraction.withdraw()
        with self._lock:
            sessions = list(self._sessions)
            started = bool(self._threads)
        if not started:
            self._ending.finish()
        for session in sessions:
            session.close(wait=False) if now else session.interrupt()
        # Nothing is in hand where the lifespan is still being entered.
        for door in self._doors:
            door.cancel()
        # Now that nothing can be committed any more.
        for desk in self._desks if now else ():
            desk.cancel()
        if now and self.loop is None:
            # What was begun meanwhile.
            self._retraction.withdraw()
            self._retraction.finish()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all workers have left; False after `timeout` seconds.

        Raises what made the container give up, such as `NoStableIdError`, TypeError for a `transaction` that would
        never commit (a Session itself), or what a `lifespan` raised, to the first who asks. Installs no signal
        handlers: `run` does.
        """
        return super().wait(timeout)

    @property
    def farewell(self) -> float:
        """As `Lifetime.farewell`: coroutines are cancelled."""
        return FAREWELL if self.template.asynchronous else 0.0

    # -- what observers see

    @property
    def counters(self) -> Counters:
        """The totals at this moment."""
        now = self._tally.snapshot()
        with self._lock:
            stale = sum(session.stale_frames for session in self._sessions)
        return attrs.evolve(now, stale_frames=now.stale_frames + stale)

    @property
    def connected(self) -> int:
        """How many workers have a connection."""
        with self._lock:
            return len(self._sessions)

    def health(self) -> Health:
        """How it is at this moment."""
        counters = self.counters
        with self._lock:
            state, connected = self._state(), len(self._sessions)
        own = ConsumerHealth(
            name=self.template.name,
            destination=getattr(self.broker, "destination", self.broker.name),
            state=state,
            workers=self.concurrency,
            connected=connected,
            counters=counters,
            error="" if self.error is None else type(self.error).__name__,
            failure="" if connected == self.concurrency else self._failure,
        )
        return Health((own,))

    def _state(self) -> State:
        if self.error is not None:
            return "failed"
        if self._ending.finished:
            return "finished"
        if self._stopping.is_set():
            return "stopping"
        return "running" if self._threads else "new"

    # -- inside

    def _prepared(self) -> Work:
        call = calls_with(self.handler, self.template)
        patience = Patience(self.reconnect)
        return Work(
            self.template,
            call,
            self.recover,
            self.transaction,
            self._tally,
            patience,
            _deliveries(self.template),
            journal=self.journal,
            delays=Delays(self.delay),
            retraction=self._retraction,
        )

    def _thread(self, work: Work, number: int) -> threading.Thread:
        # Daemons: a handler that hangs must not keep the interpreter when `run` was told to stop at once.
        name = f"retrykit-{self.template.name}-{number}"
        desk = door = None
        if self.loop is not None:
            desk, door = self.loop.desk(), self.loop.desk()
            self._desks.append(desk)
            self._doors.append(door)
        worker = Worker(self.broker, work, self.reconnect, self._stopping, self._enlist, self._heard, desk)
        return threading.Thread(target=self._work, args=(worker, door), name=name, daemon=True)

    def _work(self, worker: Worker, door: Desk | None) -> None:
        try:
            if self.loop is not None and door is not None:
                self.loop.enter(self.lifespan, door)
            worker.run()
        except LoopEndedError as ended:
            self._give_up(ended.__cause__ or ended)
        except CutShortError:
            _log.info("the container stops before its lifespan was entered")
        except BaseException as error:  # noqa: BLE001 - a thread ends here; `wait` and `run` raise it to the owner
            self._give_up(error)
        finally:
            self._leave()

    @contextmanager
    def _enlist(self, session: Session) -> Iterator[Session]:
        with self._lock:
            self._sessions.append(session)
        self._tally.add(generations=1)
        # `stop` may have come between connecting and being on the list.
        if self._stopping.is_set():
            session.interrupt()
        try:
            yield session
        finally:
            with self._lock:
                self._sessions.remove(session)
            session.close()
            self._tally.add(stale_frames=session.stale_frames)

    def _heard(self, error: Exception) -> None:
        # Of an OSError the class says more than that there is no connection.
        cause = error.__cause__ if isinstance(error, BrokerUnavailableError) else None
        self._failure = type(cause if isinstance(cause, OSError) else error).__name__

    def _give_up(self, error: BaseException) -> None:
        reason = type(error), message_of(error)
        with self._lock:
            known = reason in self._reasons
            self._reasons.append(reason)
        # Several workers may have the same one, or each one of its own that says the same.
        if not known:
            # What is to be changed is said in a sentence; where in here it was noticed helps nobody.
            traceback = in_detail(error.__cause__) if isinstance(error, MISCONFIGURED) else error
            name, facts = self.template.name, {"name": self.template.name, "error": type_name(type(error))}
            _log.critical("%s: the container gives up: %s", name, error, exc_info=traceback, extra={ATTRIBUTE: facts})
            self._ending.fail(error)
            self.stop()

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1
            last = self._running == 0
        if last:
            forget(self.broker)
            self._leave_loop()
            self._ending.finish()

    def _leave_loop(self) -> None:
        try:
            if self.loop is not None:
                self.loop.leave(self._give_up)
        except BaseException as error:  # noqa: BLE001 - as in `_work`
            self._give_up(error)
