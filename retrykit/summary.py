"""What operators see of a stored history: `HistorySummary`, made from a snapshot, its documented JSON form, and which
ones they want to see: `HistoryFilter`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final, Literal

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.context import instant
from retrykit.errors import CodecError
from retrykit.eviction import Eviction
from retrykit.failure import ErrorSummary, StoredError, error_to_json
from retrykit.history import Flight, History
from retrykit.key import Key, key_from_json, key_to_json, namespace
from retrykit.owner import is_running

FORMAT: Final = 1
"""The version of the JSON form. Keys may be added to it; one that changes its meaning makes it 2."""

State = Literal["unreadable", "completed", "vetoed", "exhausted", "running", "waiting", "due"]
STATES: Final[tuple[State, ...]] = ("unreadable", "completed", "vetoed", "exhausted", "running", "waiting", "due")


@attrs.frozen(kw_only=True)
class RunningAttempt:
    """An attempt (or a recovery) that was started and has not ended, as far as the store knows.

    `owner` names the call that makes it: `host/boot/namespace/pid/start/call`. `until`: when its lease is over.
    `alive`: whether the call is running, None where nobody on this machine can know. `believed`: whether it is still
    taken for running; if not, the next delivery of the item counts it as a crash.
    """

    fence: int
    owner: str
    since: datetime
    until: datetime
    recovery: bool
    alive: bool | None
    believed: bool

    @classmethod
    def of(cls, flight: Flight, now: float) -> RunningAttempt:
        """As the store knows it, and this machine's processes."""
        alive = is_running(flight.owner)
        return cls(
            fence=flight.fence,
            owner=flight.owner,
            since=instant(flight.since),
            until=instant(flight.until),
            recovery=flight.recovery,
            alive=alive,
            believed=alive is True or (alive is None and flight.until > now),
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON form: the fields by name, instants in ISO 8601 (UTC)."""
        return attrs.asdict(self, value_serializer=_serialized)


@attrs.frozen(kw_only=True)
class Veto:
    """The reason that was given, and until when it holds (None: until it is withdrawn)."""

    reason: str
    until: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON form: the fields by name."""
        return attrs.asdict(self, value_serializer=_serialized)


@attrs.frozen(kw_only=True)
class HistorySummary:
    """What is stored about one item, at one moment (`seen_at`, by the store's clock).

    `canonical_key` is the text under which the store has it, `name` the template's, `key` the item's own. `why` is the
    reason of the last decision ("SimpleRetryPolicy: attempt 3 of 3"). `errors` are the last ten failures, a line each,
    oldest first; `last_error` is the last one with its traceback and causes. `next_attempt_at`: when the back-off lets
    the item be tried again. `completed_at` marks an item that is done with, whose duplicates are answered until
    `expires_at`; `unsent` is how many messages its handler has sent that no broker is known to have. `evicted`: a bound
    of the store has dropped the history, and its count goes on from the tombstone. `fingerprint` is that of the item's
    content, `version` the store's. `fault` says why a snapshot cannot be read: then all other facts
    are missing.
    """

    canonical_key: str
    name: str
    key: Key | None
    seen_at: datetime
    version: int
    retry_count: int = 0
    crashes: int = 0
    recovery_failures: int = 0
    exhausted: bool = False
    recovered: bool = False
    why: str = ""
    fence: int = 0
    fingerprint: str | None = None
    started_at: datetime | None = None
    first_failed_at: datetime | None = None
    last_failed_at: datetime | None = None
    next_attempt_at: datetime | None = None
    completed_at: datetime | None = None
    expires_at: datetime | None = None
    errors: tuple[ErrorSummary, ...] = ()
    last_error: StoredError | None = None
    running: tuple[RunningAttempt, ...] = ()
    veto: Veto | None = None
    unsent: int = 0
    evicted: Eviction | None = None
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    fault: str | None = None

    @classmethod
    def of(cls, text: str, snapshot: Mapping[str, Any], version: int, now: float) -> HistorySummary:
        """What a snapshot says; a damaged one, or one of a later format, makes a summary with a `fault`."""
        identity: dict[str, Any] = {"canonical_key": text, "version": version, "seen_at": instant(now)}
        try:
            history = History.from_json(snapshot)
            key = key_from_json(snapshot.get("key"))
        except (CodecError, TypeError, ValueError, KeyError) as error:
            return cls(**identity, name="", key=None, fault=str(error))
        return cls(
            **identity,
            name=str(snapshot.get("name", "")),
            key=key,
            **_facts(history, now),
        )

    @property
    def state(self) -> State:
        """What is going to happen to the item, in a word; of several that are true, the first of `STATES`.

        "due": its next delivery makes an attempt at once.
        """
        facts = (
            self.fault is not None,
            self.completed_at is not None,
            self.vetoed,
            self.exhausted,
            self.is_running,
            self.waiting,
            True,
        )
        return STATES[facts.index(True)]

    @property
    def vetoed(self) -> bool:
        """Whether a veto holds."""
        return self.veto is not None

    @property
    def is_running(self) -> bool:
        """Whether an attempt or a recovery is believed to run."""
        return any(attempt.believed for attempt in self.running)

    @property
    def waiting(self) -> bool:
        """Whether another attempt will be made, but not yet."""
        ended = self.exhausted or self.vetoed or self.completed_at is not None
        return not ended and self.next_attempt_at is not None and self.next_attempt_at > self.seen_at

    @property
    def over(self) -> bool:
        """Whether the time is over for which it is kept."""
        return self.expires_at is not None and self.expires_at <= self.seen_at

    @property
    def touched_at(self) -> datetime | None:
        """When something last happened to it: the last failure, else the beginning of its first attempt."""
        return self.last_failed_at or self.started_at

    @property
    def shown_key(self) -> str:
        """The key in one readable line: a text as it is, everything else in its JSON form."""
        return self.key if isinstance(self.key, str) else json.dumps(key_to_json(self.key), ensure_ascii=False)

    def is_error(self, type_name: str) -> bool:
        """Whether the last failure is of that class or of one derived from it.

        `type_name` is the full name, or what follows its last dot.
        """
        classes = () if self.last_error is None else self.last_error.classes
        return any(type_name in (name, name.rpartition(".")[2]) for name in classes)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form: every field by name, `format` and `state`; instants in ISO 8601 (UTC)."""
        fields = {field.name: _as_json(getattr(self, field.name)) for field in attrs.fields(type(self))}
        return {"format": FORMAT, **fields, "key": key_to_json(self.key), "state": self.state}


def _facts(history: History, now: float) -> dict[str, Any]:
    # A veto whose time is over is none, whether or not a delivery has noticed it.
    history.lapse(now)
    return {
        **_instants(history),
        "retry_count": history.failures,
        "crashes": history.crashes,
        "recovery_failures": history.recovery_failures,
        "recovered": history.recovered,
        "fence": history.fence,
        "fingerprint": history.fingerprint,
        "errors": history.errors,
        "last_error": history.last_error,
        "attributes": dict(history.attributes),
        "veto": None if history.veto is None else Veto(reason=history.veto, until=_instant(history.veto_until)),
        "exhausted": history.exhausted,
        "why": history.reason,
        "unsent": len(history.outbox),
        "evicted": history.evicted,
        "running": tuple(RunningAttempt.of(flight, now) for flight in history.in_flight),
    }


def _instants(history: History) -> dict[str, datetime | None]:
    seconds = {
        "started_at": history.started_at,
        "first_failed_at": history.first_failed_at,
        "last_failed_at": history.last_failed_at,
        "next_attempt_at": history.not_before,
        "completed_at": history.completed_at,
        "expires_at": history.expires_at,
    }
    return {name: _instant(value) for name, value in seconds.items()}


def _instant(seconds: float | None) -> datetime | None:
    return None if seconds is None else instant(seconds)


def _as_json(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat()
        case StoredError():
            return error_to_json(value)
        case ErrorSummary(at=at):
            return {**value.to_json(), "at": _as_json(_instant(at))}
        case RunningAttempt() | Veto() | Eviction():
            return attrs.asdict(value, value_serializer=_serialized)
        case tuple():
            return [_as_json(part) for part in value]
    return value


def _serialized(_owner: Any, _field: Any, value: Any) -> Any:
    return _as_json(value)


# What may stand between a name and its keys; "@" is the state of a circuit, which is no history.
_MARKS: Final = ("!", "#", "(", "/", "=", "~")


def _an_instant(_instance: Any, field: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, datetime):
        raise wrong_type(field.name, "an aware datetime or None", value)
    if value.tzinfo is None:
        raise wrong_value(field.name, "an aware datetime (a naive one names no instant)", value)


@attrs.frozen(kw_only=True)
class HistoryFilter:
    """Which histories: those for which everything that is given holds.

    `name`: the template's. `key_prefix`: what keys that are texts begin with. `vetoed`, `exhausted`, `running` (an
    attempt is believed to run), `waiting` (another attempt will be made, but not yet): True or False; None: either.
    `completed`: True for the marks of items that are done with, False (the default) for all others, None for both.
    `evicted`: True for tombstones, what is left of histories that a bound of the store has dropped; False for all but
    these; None (the default) for these too where `vetoed` is True, because their vetoes hold.
    `failed_since`, `failed_before`: the last failure was then or later; before then. `error_type`: the last failure is
    of this class or of one derived from it, by its full name or by what follows the last dot.
    """

    name: str | None = None
    key_prefix: str = ""
    vetoed: bool | None = None
    exhausted: bool | None = None
    running: bool | None = None
    waiting: bool | None = None
    completed: bool | None = False
    evicted: bool | None = None
    failed_since: datetime | None = attrs.field(default=None, validator=_an_instant)
    failed_before: datetime | None = attrs.field(default=None, validator=_an_instant)
    error_type: str | None = None

    def __call__(self, summary: HistorySummary) -> bool:
        """Whether a history is one of them."""
        return self._is_of(summary) and self._is_so(summary) and self._failed_then(summary)

    def _is_of(self, summary: HistorySummary) -> bool:
        key = summary.key
        named = self.name is None or summary.name == self.name
        return named and (not self.key_prefix or (isinstance(key, str) and key.startswith(self.key_prefix)))

    def _is_so(self, summary: HistorySummary) -> bool:
        pairs = (
            (self.vetoed, summary.vetoed),
            (self.exhausted, summary.exhausted),
            (self.running, summary.is_running),
            (self.waiting, summary.waiting),
            (self.completed, summary.completed_at is not None),
        )
        same = all(wanted is None or wanted is found for wanted, found in pairs)
        return same and (self.error_type is None or summary.is_error(self.error_type))

    def _failed_then(self, summary: HistorySummary) -> bool:
        at, since, before = summary.last_failed_at, self.failed_since, self.failed_before
        if at is None:
            return since is None and before is None
        return (since is None or at >= since) and (before is None or at < before)

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verbs of a context cache that give what is to be looked through."""
        if self.evicted is None:
            return ("items", "evicted") if self.vetoed else ("items",)
        return ("evicted",) if self.evicted else ("items",)

    def prefixes(self, after: str | None) -> Iterator[str]:
        """The ranges of canonical keys to look through, in order, without those that end before `after`."""
        for prefix in self._ranges():
            if after is None or prefix > after or after.startswith(prefix):
                yield prefix

    def _ranges(self) -> Iterator[str]:
        if self.name is None:
            return iter(("",))
        space = namespace(self.name)
        if not self.key_prefix:
            return (space + mark for mark in _MARKS)
        # Keys of several lines, and very long ones, are stored under a text that does not begin as they do.
        return iter((f"{space}!", f"{space}/{self.key_prefix}", f"{space}~"))
