"""Performing what the flow asks for, step by step; `retrykit.loops` runs whole calls."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isawaitable
from math import isfinite
from time import time
from types import CoroutineType
from typing import Any

from retrykit.call import Call
from retrykit.context import RetryContext
from retrykit.flight import renew
from retrykit.lease import hold
from retrykit.outage import heard, is_of_a_store, known, log_store_fault
from retrykit.owner import end, is_running
from retrykit.steps import (
    BEGIN,
    COMMIT,
    HOLD,
    JOIN,
    NOW,
    VALUE,
    Died,
    Give,
    Load,
    Notify,
    Probe,
    Recent,
    Remove,
    Report,
    RollBack,
    Save,
    Take,
)


class Driver(Call):
    """A call, and what performing it needs: the functions, the open transaction, the value so far. `perform` does what
    a step says.

    It does each thing once and the same way for both loops: where something may be asynchronous it returns the
    awaitable.
    """

    manager: Any = None
    releasing: Any = None
    awaits_store: bool = False
    opening: Any = None
    view: Any = None
    value: Any = None

    def __init__(  # noqa: PLR0917 - made at every first failure: keywords would cost more than the rest
        self,
        template: Any,
        context: RetryContext,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        recover: Callable[[RetryContext], Any] | None = None,
        transaction: Callable[[], Any] | None = None,
    ) -> None:
        self.plan = template.plan
        self.context = context
        self.state = context._state
        self.template = template
        self.binding: Any = context
        self.function = function
        self.arguments = arguments
        self.keywords = keywords
        self.first: tuple[Exception, float] | None = None
        self.recover = recover
        self.transaction = transaction
        if recover is not None:
            self.recovers = getattr(recover, "retrykit_handles", _always)
        if transaction is not None:
            self.transactional = True

    def spell_key(self) -> None:
        """Know under which text the history is kept. Not before it is needed: that costs more than most of a call."""
        state = self.state
        if state is not None and state.key is not None:
            self.key = self.template.spelled(state.key)

    def perform(self, step: Any) -> Any:
        """Do what the step says: the answer, or an awaitable of it."""
        simple = _SIMPLE.get(step)
        return _PERFORMERS[type(step)](self, step) if simple is None else simple(self)

    # -- time

    def now(self) -> float:
        """The monotonic time."""
        return (self.plan.now or self.guarded_now)()

    def guarded_now(self) -> float:
        """The monotonic time of the template's own clock; the last known one when the clock fails."""
        try:
            return readable(self.template.clock.monotonic())
        except Exception as fault:  # noqa: BLE001 - a clock's fault changes no outcome
            log_fault(self, "clock", fault)
            return max(self.context._now, self.context._started)

    def wall(self) -> float:
        """The time of day, the store's if it has a clock; worked out from the last known one when the clock fails."""
        context = self.context
        monotonic = context._now = self.now()
        try:
            wall = readable(self.template.time())
        except Exception as fault:  # noqa: BLE001 - as in `now`
            log_fault(self, "clock", fault)
            wall = time() if context._wall is None else monotonic + context._wall
        context._wall = wall - monotonic
        return wall

    # -- stores

    def load(self, step: Load) -> Any:
        """Read from the cache, or through the open transaction."""
        found = self._store(step).load(step.key)
        return heard(self, "reading", found) if known else found

    def look_back(self, step: Recent) -> Any:
        """What this process stored last, as the cache remembers it."""
        return self.template.context_cache.recent(step.key)

    def hold(self) -> None:
        """Have the lease of the present attempt renewed until `done`."""
        self.release()
        # At each third of it: one renewal may fail, and the next is still in time.
        store = self.template.context_cache
        self.releasing = hold(self, store, self.plan.lease / 3, asynchronous=self.awaits_store)

    def release(self) -> None:
        """The lease need not be renewed any longer."""
        releasing, self.releasing = self.releasing, None
        if releasing is not None:
            releasing()

    def renew(self) -> bool:
        """Renew the lease, beside the attempt: nothing of the call is touched but what the flow itself says."""
        flow, answer = renew(self), None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as over:
                return self._believed(over.value)
            answer = self._beside(step)

    async def async_renew(self) -> bool:
        """As `renew`, awaiting the store."""
        flow, answer = renew(self), None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as over:
                return self._believed(over.value)
            answer = self._beside(step)
            if isawaitable(answer):
                try:
                    answer = await answer
                except Exception as fault:  # noqa: BLE001 - the flow decides what a fault means
                    answer = fault

    def _beside(self, step: Any) -> Any:
        try:
            # The call's own reading of the clock is left alone: it is in the middle of something.
            return self.template.time() if step is NOW else self.perform(step)
        except Exception as fault:  # noqa: BLE001 - the flow decides what a fault means
            return fault

    def _believed(self, answer: bool | None) -> bool:  # noqa: FBT001 - the flow's last word
        if self.context._retracted:
            return False
        # One that was late, and was not overtaken meanwhile, is believed again.
        before, self.context.lease_lost = self.context.lease_lost, not answer
        if not answer and not before:
            log_lost_lease(self)
        return answer is not False

    def save(self, step: Save) -> Any:
        """Compare-and-set."""
        saved = self._store(step).save(step.key, step.snapshot, step.expected)
        self.awaits_store = saved.__class__ is CoroutineType
        return heard(self, "writing", saved) if known else saved

    def remove(self, step: Remove) -> Any:
        """Forget."""
        removed = self._store(step).remove(step.key, step.expected)
        return heard(self, "writing", removed) if known else removed

    def _store(self, step: Load | Save | Remove) -> Any:
        return self.view if step.joined else self.template.context_cache

    def join(self) -> Any:
        """See the cache through the open transaction, if it is on the same database."""
        join = getattr(self.template.context_cache, "joined", None)
        view = None if join is None else join(self.context.transaction)
        return self._join_later(view) if isawaitable(view) else self._join(view)

    def _join(self, view: Any) -> bool:
        self.view = view
        return view is not None

    async def _join_later(self, view: Any) -> bool:
        return self._join(await view)

    # -- the transaction

    def begin(self) -> Any:
        """Open the transaction; what it gives becomes `context.transaction`."""
        assert self.transaction is not None  # noqa: S101 - the flow asks only in transactional calls
        self.opening = manager = self.transaction()
        asynchronous = self.template.asynchronous
        entering = None if asynchronous else getattr(manager, "__enter__", None)
        if entering is None:
            entering = self._method(manager, "__aenter__", "__enter__")
            if asynchronous and hasattr(manager, "__aenter__"):
                return entering()
        # In one statement: between a call that has returned and the next one no signal is handled.
        self.manager, self.context.transaction = manager, entering()
        return None

    def is_open(self) -> bool:
        """Whether a transaction is to be left when the call is interrupted.

        One that was open when it was interrupted in `__enter__`, or in `__exit__` before it was closed, is seen by its
        generator, which stands where the work should be done: nobody else would leave it, before it is garbage.
        """
        if self.manager is None and self.opening is not None:
            generator = getattr(self.opening, "gen", None)
            if getattr(generator, "gi_suspended", False) or getattr(generator, "ag_frame", None) is not None:
                self.manager = self.opening
        return self.manager is not None

    def _method(self, manager: Any, later: str, now: str) -> Callable[..., Any]:
        """Entering or leaving a context manager: asynchronously where this template can and the manager does."""
        method = getattr(manager, later, None) if self.template.asynchronous else None
        method = method or getattr(manager, now, None)
        if method is None:
            asynchronous = " an asynchronous one needs an AsyncRetryTemplate;" if hasattr(manager, "__aenter__") else ""
            msg = f"transaction: must give a context manager;{asynchronous} got {type(manager).__name__}"
            raise TypeError(msg)
        return method  # type: ignore[no-any-return]

    def leave(self, error: BaseException | None = None) -> Any:
        """Leave the transaction: commit without an error, roll back with one."""
        leaving = None if self.template.asynchronous else getattr(self.manager, "__exit__", None)
        if leaving is None:
            leaving = self._method(self.manager, "__aexit__", "__exit__")
        self.context.transaction = None
        try:
            left = leaving(None, None, None) if error is None else leaving(type(error), error, error.__traceback__)
        except BaseException:
            self.manager = None
            raise
        # What it gives says whether to swallow an error: nobody asks. Most give False or nothing.
        if left and isawaitable(left):
            return self._left(left)
        self.manager = None
        return None

    async def _left(self, left: Any) -> None:
        try:
            # As in `begin`.
            _, self.manager = await left, None
        except BaseException:
            self.manager = None
            raise

    def notify(self, step: Notify) -> Any:
        """Tell a listener."""
        arguments = tuple(self.value if argument is VALUE else argument for argument in step.arguments)
        return getattr(step.listener, step.event)(*arguments)

    def done(self) -> None:
        """Let go of everything alive; what nobody else has seen goes as a whole, without being put into words."""
        if self.named:
            self.release()
            end(self.named)
        if type(self.binding) is list and len(self.binding) == 1:
            self.context._history = None
        else:
            self.context._close()


def _always(error: BaseException | None) -> bool:  # noqa: ARG001 - asked as `recover.retrykit_handles(error)` is
    return True


# The steps that have no data.
_SIMPLE: dict[Any, Callable[[Driver], Any]] = {
    NOW: Driver.wall,
    HOLD: Driver.hold,
    JOIN: Driver.join,
    BEGIN: Driver.begin,
    COMMIT: Driver.leave,
}

_PERFORMERS: dict[type, Callable[[Driver, Any], Any]] = {
    Load: Driver.load,
    Recent: Driver.look_back,
    Save: Driver.save,
    Remove: Driver.remove,
    RollBack: lambda driver, step: driver.leave(step.error),
    Notify: Driver.notify,
    Probe: lambda _, step: is_running(step.owner),
    Take: lambda _, step: step.budget.take(),
    Give: lambda _, step: step.budget.deposit(),
    Report: lambda driver, step: _log_report(driver, step.what, step.fault),
    Died: lambda driver, step: log_death(driver.context, step),
}

# Steps whose failure is a failure of the attempt; of all others the fault itself is the answer.
_ATTEMPTED = (BEGIN, COMMIT)
# Steps whose fault nobody asks for: it is logged, and the answer is None.
_TOLD = (Notify, RollBack, Give, Report, Died)


def answer_to(driver: Driver, step: Any, fault: BaseException) -> Any:
    """What the flow is sent when performing a step raised."""
    if step in _ATTEMPTED:
        return (fault, driver.now())
    if isinstance(step, _TOLD):
        # A context manager that raises the very error it was given has done its work.
        if not (isinstance(step, RollBack) and fault is step.error):
            log_fault(driver, described(step), fault)
        return None
    return fault


def described(step: Any) -> str:
    """What a step is called in logs and errors."""
    return f"listener {type(step.listener).__name__}.{step.event}" if isinstance(step, Notify) else type(step).__name__


def readable(instant: Any) -> float:
    """The instant that a clock gave, if it is one."""
    if isinstance(instant, int | float) and isfinite(instant):
        return float(instant)
    msg = f"a clock gave {instant!r:.80}"
    raise ValueError(msg)


def log_fault(call: Call, what: str, fault: BaseException) -> None:
    """A fault that changes no outcome is not hidden either."""
    import logging

    logger = logging.getLogger("retrykit")
    logger.error(
        "%s key=%r: fault in %s, the operation goes on", call.plan.name, call.context.key, what, exc_info=fault
    )


def _log_report(driver: Driver, what: str, fault: BaseException) -> None:
    (log_store_fault if is_of_a_store(fault) else log_fault)(driver, what, fault)


def log_lost_lease(call: Call) -> None:
    """Somebody believed a running attempt dead: whoever reads the log has to know before its work is rolled back."""
    import logging

    logging.getLogger("retrykit").warning(
        "%s key=%r: the lease of attempt %s (fence %s) is lost: it is believed dead, and what it does may not count",
        call.plan.name,
        call.context.key,
        call.context.attempt,
        call.flight,
    )


_DEATHS = {
    "attempt": "%s key=%r attempt %d failed: %s: %s; %s",
    "recovery": "%s key=%r attempt %d was the last one, and the recovery after it failed: %s: %s; %s",
}


def log_death(context: RetryContext, step: Died) -> None:
    """As `LoggingListener` words a failure: this one was nobody's to report when it happened."""
    import logging

    facts = (context.name, context.key, step.attempt, step.error.type, step.error, step.decision)
    logging.getLogger("retrykit").warning(_DEATHS[step.what], *facts)
