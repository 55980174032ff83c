"""One call's view of its item: how often it failed, with what, what was decided; and how client code finds it.

A context is three stores until something happens: everything that a history remembers is kept in a `History` that is
made when a failure, a stored snapshot or the user's own attributes need it. A decorated function does not even make the
context: it binds a *frame*, a list `[template, started, outer]`, and `current_context()` turns that into a context when
somebody asks. After a failure there is a context, but still nobody else may have it: then the frame is `[context]`, and
is marked when somebody asks. What nobody has seen need not be tidied up.

The binding is a context variable, set and reset around each attempt: threads started through `contextvars.copy_context`
and tasks inherit it, and after the call it is what it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any

import attrs

from retrykit.check import Seconds, seconds, wrong_type, wrong_value
from retrykit.clock import SYSTEM_CLOCK
from retrykit.errors import CodecError, RetryError
from retrykit.failure import ErrorSummary, fade, from_faded, summary
from retrykit.history import MAX_ERRORS, Attributes, History, Tally
from retrykit.key import Key, key_from_json, key_to_json
from retrykit.state import RetryState

if TYPE_CHECKING:
    from datetime import datetime

    from retrykit.clock import Clock
    from retrykit.eviction import Eviction
    from retrykit.policy import RetryDecision

_bound: ContextVar[Any] = ContextVar("retrykit.context", default=None)


def current_context() -> RetryContext | None:
    """The context of the innermost attempt that is running around the caller, at any depth.

    None outside of every attempt.
    """
    return context_in(_bound.get())


def context_in(bound: Any) -> RetryContext | None:
    """The context that a binding stands for.

    Itself, or the one that its frame is turned into when it is first asked for.
    """
    if type(bound) is not list:
        # A RetryContext; or nothing: None, or what a token says of a variable that was not set.
        return None if bound is Token.MISSING else bound
    if isinstance(bound[0], RetryContext):
        if len(bound) == 1:
            bound.append(True)  # the mark of one that was asked for
        return bound[0]
    if len(bound) == 3:  # noqa: PLR2004 - template, started, outer
        # Two threads may ask at once: the first append wins, for both.
        bound.append(RetryContext(*bound))
    return bound[3]  # type: ignore[no-any-return]


def veto(reason: str = "vetoed by the client code", *, lasts: Seconds | None = None) -> None:
    """Forbid further attempts of the operation that is running around the caller; the present attempt goes on.

    Raises `RetryError` outside of every attempt. The veto is kept with the item's history, across deliveries and
    restarts; for `lasts` seconds, or (None) until somebody withdraws it.
    """
    context = current_context()
    if context is None:
        msg = f"there is no attempt to veto around this call (reason given: {reason!r})"
        raise RetryError(msg)
    context.veto(reason, lasts=lasts)


def until(lasts: Any, now: float) -> float | None:
    """The end of a veto that is to last so many seconds (or a `timedelta`) from now; None for one without end."""
    if lasts is None:
        return None
    length = seconds("lasts", lasts)
    if length <= 0:
        raise wrong_value("lasts", "more than 0 seconds", lasts)
    return now + length


class RetryContext:
    """What is known of the operation while it runs; given to callbacks, recoveries and listeners.

    It belongs to one call. When the call is over it keeps descriptions of the errors instead of the live exceptions,
    which would pin every frame that they passed through.
    """

    # Contexts are made on every call and most are never read: only what nearly every call stores is set when one is
    # made.
    _history: History | None = None
    attempt: int = 1
    closed: bool = False
    _wall: float | None = None
    _now: float = 0.0
    duplicate: bool = False
    lease_lost: bool = False
    """The lease of this attempt is over: others believe it dead, or may do so now, and what it does may not count."""
    on_veto: Callable[[], None] | None = None
    """Who is told, at once, that client code has vetoed: whoever makes the attempt may ask what it was busy with."""
    transaction: Any = None
    decision: RetryDecision | None = None
    fault: BaseException | None = None
    """Why the failure of this call could not be stored, if it could not.

    Whoever delivers the item again should wait.
    """

    _retracted: bool = False
    """This attempt is reserved no longer, though it may still run: its process ends (`retrykit.loops.retract`)."""

    def __init__(self, template: Any, started: float, outer: Any = None, state: RetryState | None = None) -> None:
        self._template = template
        self._started = started
        self._outer = outer
        self._state = state

    def __repr__(self) -> str:
        facts = {"attempt": self.attempt, "retry_count": self.retry_count, "max_attempts": self.max_attempts}
        shown = "".join(f" {fact}={value}" for fact, value in facts.items())
        return f"<RetryContext {self.name!r} key={self.key!r}{shown}>"

    # -- which item

    @property
    def name(self) -> str:
        """The template's name."""
        return self._template.name  # type: ignore[no-any-return]

    @property
    def key(self) -> Key | None:
        """The item's key; None in a stateless call."""
        return None if self._state is None else self._state.key

    @property
    def json_key(self) -> Any:
        """The key as snapshots have it."""
        return key_to_json(self.key)

    @property
    def parent(self) -> RetryContext | None:
        """The context of the attempt in whose course this call was made."""
        outer = self._outer
        return context_in(outer.old_value if type(outer) is Token else outer)

    @property
    def fence(self) -> int:
        """A number that grows with every attempt of the key, in every process: guard your own writes with it.

        It begins with the microseconds of the clock, so that it grows on when a history was settled and the key comes
        again.
        """
        if self.key is None:
            return self.attempt
        history = self._facts()
        if history.fence == 0:
            history.fence = first_fence(self._wall_of(self._started))
        return history.fence

    @property
    def has_history(self) -> bool:
        """Whether anything is known of the item, or noted to be stored: a failure, an attempt that runs, a veto."""
        return self._history is not None

    # -- counts and failures

    @property
    def retry_count(self) -> int:
        """Failed attempts so far, in all deliveries."""
        history = self._history
        return 0 if history is None else history.failures

    @property
    def crashes(self) -> int:
        """How many of the failed attempts never ended: their process died."""
        history = self._history
        return 0 if history is None else history.crashes

    @property
    def max_attempts(self) -> int | None:
        """The policy's limit, the first attempt included; None if it has none."""
        limit: int | None = getattr(self._template.retry_policy, "max_attempts", None)
        return limit

    @property
    def last_error(self) -> BaseException | None:
        """The last failure: the live exception, or a `StoredError` when it was loaded, or when the call is over."""
        history = self._history
        if history is None:
            return None
        if type(history.last_error) is tuple:
            history.last_error = from_faded(history.last_error)
        return history.last_error  # type: ignore[no-any-return]

    @property
    def errors(self) -> tuple[ErrorSummary, ...]:
        """The last ten failures, one line each, oldest first."""
        self._describe()
        return self._facts().errors

    # -- time

    @property
    def started_at(self) -> datetime:
        """When the first attempt of the item was begun."""
        started = self._facts().started_at
        return instant(self._wall_of(self._started) if started is None else started)

    @property
    def first_failed_at(self) -> datetime | None:
        """When the first failure was counted."""
        history = self._history
        if history is None or history.failures == 0:
            return None
        return instant(self._wall_of(self._first()) if history.first_failed_at is None else history.first_failed_at)

    @property
    def last_failed_at(self) -> datetime | None:
        """When the last failure was counted."""
        history = self._history
        if history is None or history.failures == 0:
            return None
        return instant(self._wall_of(self._now) if history.last_failed_at is None else history.last_failed_at)

    @property
    def not_before(self) -> datetime | None:
        """When the next attempt is due, if the back-off set a time."""
        history = self._history
        return None if history is None or history.not_before is None else instant(history.not_before)

    @property
    def elapsed(self) -> float:
        """Seconds from the beginning of the first attempt to the last event of this call."""
        history = self._history
        here = max(0.0, self._now - self._started)
        if history is None or history.started_at is None:
            return here
        return max(here, self._wall_of(self._now) - history.started_at)

    @property
    def tallies(self) -> Mapping[str, Tally]:
        """What the branches of a composed policy have counted."""
        history = self._history
        return {} if history is None else history.tallies

    @property
    def last_delay(self) -> float | None:
        """Seconds that the back-off gave last, if it gave any."""
        history = self._history
        return None if history is None else history.last_delay

    @property
    def pause(self) -> float:
        """Seconds that would be waited before the next attempt, proposed by the back-off.

        Policies with a deadline look at it.
        """
        history = self._history
        return 0.0 if history is None else history.pause

    # -- the verdict

    @property
    def vetoed(self) -> bool:
        """Whether further attempts were forbidden."""
        history = self._history
        return history is not None and history.veto is not None

    @property
    def veto_reason(self) -> str | None:
        """Why, as given to `veto`."""
        history = self._history
        return None if history is None else history.veto

    @property
    def exhausted(self) -> bool:
        """Whether it was decided that no further attempt is allowed."""
        history = self._history
        return history is not None and history.exhausted

    @property
    def recovered(self) -> bool:
        """Whether a recovery has produced the outcome."""
        history = self._history
        return history is not None and history.recovered

    @property
    def evicted(self) -> Eviction | None:
        """That the store has dropped the item's history, if it has: its failures count on, its errors are gone."""
        history = self._history
        return None if history is None else history.evicted

    @property
    def veto_until(self) -> datetime | None:
        """When the veto ends by itself, if it does."""
        history = self._history
        return None if history is None or history.veto_until is None else instant(history.veto_until)

    def veto(self, reason: str = "vetoed", *, lasts: Seconds | None = None) -> None:
        """Forbid further attempts, also in later deliveries and other processes: for `lasts` seconds, or for good.

        The present attempt goes on and may still succeed.
        """
        if not isinstance(reason, str):
            raise wrong_type("reason", "a str", reason)
        end = until(lasts, self._wall_of(self._now or self._started))
        self._facts().say(reason or "vetoed", end)
        if self.on_veto is not None:
            self.on_veto()

    def withdraw_veto(self) -> None:
        """Allow further attempts again, as far as the policy does."""
        self._facts().withdraw_veto()

    # -- the user's own facts, and the JSON form

    @property
    def attributes(self) -> Attributes:
        """The user's own JSON-able facts, kept across deliveries: `context.attributes["seen"] = 3`."""
        return self._facts().attributes

    @property
    def outbox(self) -> list[dict[str, Any]]:
        """JSON-able notes of what this attempt sends elsewhere, for whoever drives the template.

        Where the completion mark commits with the work they are stored in it, and dropped when the whole transaction is
        confirmed. A delivery that is answered as a duplicate finds in them what may never have been sent. Those of an
        attempt that fails are nowhere kept; whoever fills the list empties it before each attempt.
        """
        return self._facts().outbox

    def snapshot(self) -> dict[str, Any]:
        """The JSON form of what is remembered of the item, versioned (`format`); what caches store."""
        self._describe()
        return self._facts().to_json(self.name, self.json_key)

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any]) -> RetryContext:
        """A context with the facts of a snapshot, to look at. `CodecError` if it is damaged or of a later format."""
        history = History.from_json(snapshot)
        try:
            state = RetryState(key=key_from_json(snapshot.get("key")))
        except (TypeError, ValueError, KeyError) as error:
            raise CodecError(reason=f"the snapshot is damaged: its key is {snapshot.get('key')!r:.80}") from error
        context = cls(Detached(str(snapshot.get("name", "retry"))), 0.0, None, state)
        context._history = history
        context.attempt = max(1, history.failures)
        context.closed = True
        return context

    # -- for the flow and its drivers

    def _facts(self) -> History:
        history = self._history
        if history is None:
            history = self._history = History()
        return history

    def _wall_of(self, monotonic: float) -> float:
        """The instant that a monotonic time stands for.

        The distance of the two clocks is read once a call, so a jump cannot tear it.
        """
        if self._wall is None:
            template = self._template
            try:
                self._wall = template.time() - template.clock.monotonic()
            except Exception:  # noqa: BLE001 - a clock's fault changes no outcome; the machine's own will do
                self._wall = SYSTEM_CLOCK.time() - SYSTEM_CLOCK.monotonic()
        return self._wall + monotonic

    def _close(self) -> None:
        """Let go of everything alive: exceptions hold frames, and those frames hold this context."""
        self.closed = True
        self.transaction = None
        self._outer = None
        history = self._history
        if history is not None:
            last = history.last_error
            if last is not None:
                history.last_error = fade(last)
            if history.live is not None:
                history.live = [(n, fade(error), at) for n, error, at in history.live]

    def _first(self) -> float:
        """The monotonic time of the first failure that is still known."""
        live = self._facts().live
        return live[0][2] if live else self._now

    def _describe(self) -> None:
        """Put the live failures of this call into words, in the history's bounded list."""
        history = self._history
        if history is not None and history.live:
            words = (ErrorSummary(n, *summary(error), self._wall_of(at)) for n, error, at in history.live)
            history.errors = (*history.errors, *words)[-MAX_ERRORS:]
            history.live = None


@attrs.frozen
class Detached:
    """What stands for the template in a context that was read from a snapshot: only its name is known."""

    name: str
    retry_policy: Any = None
    clock: Clock = SYSTEM_CLOCK

    def time(self) -> float:
        """The time of day."""
        return self.clock.time()


def first_fence(now: float) -> int:
    """The fence of an attempt before which nothing is known of the key: the time, in microseconds."""
    return max(1, int(now * 1_000_000))


def instant(seconds: float) -> datetime:
    """Seconds since the epoch as an aware UTC datetime."""
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        # Beyond the calendar, before or after it: a back-off may be that patient.
        return datetime.max.replace(tzinfo=UTC) if seconds > 0 else datetime.min.replace(tzinfo=UTC)
