"""What is remembered of a key between deliveries, and its JSON form.

A history is facts only: how often the item failed, with what, when it is due again, which attempts are running. Nobody
decides here. Its JSON form is all that a context cache ever sees; no object of the program survives in it, so any
process of any version can read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Self

import attrs

from retrykit.errors import CodecError
from retrykit.failure import ErrorSummary, error_from_json, error_to_json, stored

if TYPE_CHECKING:
    from retrykit.eviction import Eviction

FORMAT: Final = 1
MAX_ERRORS: Final = 10


@attrs.define
class Flight:
    """An attempt (or a recovery) that was started and has not ended: whose it is, and until when that is believed."""

    fence: int
    owner: str
    since: float
    until: float
    recovery: bool = False

    def to_json(self) -> dict[str, Any]:
        """The JSON form: the fields by name."""
        fields = {"fence": self.fence, "owner": self.owner, "since": self.since, "until": self.until}
        return {**fields, "recovery": True} if self.recovery else fields


@attrs.define
class Tally:
    """How often one branch of a composed policy was asked about a failure.

    `since`: seconds after the beginning of the operation, when it was first asked.
    """

    count: int = 0
    since: float = 0.0


class Attributes(dict[str, Any]):
    """The user's own facts about an item, kept across deliveries: text keys, JSON values, checked when they are set.

    `changed` are the names that this call has set or removed: when others store at the same time, these are its say.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.changed: set[str] = set()
        self.update(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        """Keep `value` under `name`; `CodecError` names the attribute that JSON cannot carry."""
        super().__setitem__(checked_attribute_name(name), checked_json(name, value))
        self.changed.add(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.changed.add(name)

    def pop(self, name: str, *default: Any) -> Any:
        """Remove and give the value of `name`."""
        value = super().pop(name, *default)
        self.changed.add(name)
        return value

    def popitem(self) -> tuple[str, Any]:
        """Remove and give the pair that was set last."""
        name, value = super().popitem()
        self.changed.add(name)
        return name, value

    def clear(self) -> None:
        """Remove all."""
        self.changed.update(self)
        super().clear()

    def say_to(self, others: Attributes) -> None:
        """Apply what this call has changed to what somebody else stored meanwhile."""
        for name in self.changed:
            if name in self:
                others[name] = self[name]
            else:
                others.pop(name, None)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Keep several; all are checked before any is kept."""
        checked = {
            checked_attribute_name(name): checked_json(name, value) for name, value in dict(*args, **kwargs).items()
        }
        super().update(checked)
        self.changed.update(checked)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """The value of `name`, kept as `default` if it was not there."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Self:  # type: ignore[override, misc]
        self.update(other)
        return self


def checked_attribute_name(name: object) -> str:
    """`name` if it is text: JSON has no other keys, and would turn 1 into "1" without a word."""
    if isinstance(name, str):
        return name
    msg = f"attribute {name!r}: the name must be a str, not {type(name).__name__}"
    raise CodecError(msg, reason="not a str", attribute=name)


def checked_json(name: object, value: Any) -> Any:
    """`value` if JSON carries it unchanged, else `CodecError` naming the attribute."""
    import json

    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"attribute {name!r}: JSON cannot carry {type(value).__name__} {value!r:.80}: {error}"
        raise CodecError(msg, reason=str(error), attribute=name) from error
    if not same:
        msg = f"attribute {name!r}: JSON would not give back the same value for {value!r:.80}"
        raise CodecError(msg, reason="changed by JSON", attribute=name)
    return value


class History:
    """The facts about one key. Instants are seconds since the epoch; the list of errors is bounded to the last ten.

    `live` are the failures of the present call that have not been put into words: (number, error, monotonic time).
    `pause` is what the back-off proposes, in seconds, while a decision is made. `veto` lasts until `veto_until` (None:
    until it is withdrawn). `own_veto`: what this call has said about the veto and nobody has stored: (the one it saw,
    its own or None, until when). `fingerprint` is that of the item's content, where the source gives one. `evicted`:
    the store has dropped it once, and what is counted here begins with its tombstone.
    """

    # One is made at every first failure, and most end with the call: only what every failure stores is set when one is
    # made.
    crashes: int = 0
    recovery_failures: int = 0
    started_at: float | None = None
    first_failed_at: float | None = None
    last_failed_at: float | None = None
    not_before: float | None = None
    last_delay: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    veto: str | None = None
    veto_until: float | None = None
    own_veto: tuple[str | None, str | None, float | None] | None = None
    fingerprint: str | None = None
    errors: tuple[ErrorSummary, ...] = ()
    in_flight: tuple[Flight, ...] = ()
    evicted: Eviction | None = None
    exhausted: bool = False
    recovered: bool = False
    reason: str = ""
    pause: float = 0.0
    _outbox: list[dict[str, Any]] | None = None
    _attributes: Attributes | None = None
    _tallies: dict[str, Tally] | None = None

    def __init__(self, **facts: Any) -> None:
        self.failures: int = 0
        self.fence: int = 0
        self.last_error: Any = None
        self.live: list[tuple[int, Any, float]] | None = None
        if facts:
            for fact, value in facts.items():
                setattr(self, fact, value)

    @property
    def attributes(self) -> Attributes:
        """The user's own facts."""
        if self._attributes is None:
            self._attributes = Attributes()
        return self._attributes

    @property
    def outbox(self) -> list[dict[str, Any]]:
        """What is to be sent when the item is completed: kept with its mark, and nowhere else, until it has been."""
        if self._outbox is None:
            self._outbox = []
        return self._outbox

    @property
    def tallies(self) -> dict[str, Tally]:
        """The counts of a composed policy's branches."""
        if self._tallies is None:
            self._tallies = {}
        return self._tallies

    def withdraw_veto(self) -> None:
        """Allow further attempts again; whether there are any left, the policy is asked anew."""
        if self.veto is not None:
            self.say(None)
            self.exhausted = False

    def say(self, veto: str | None, until: float | None = None) -> None:
        """Set or withdraw the veto, knowing which one was there before this call said anything."""
        seen = self.veto if self.own_veto is None else self.own_veto[0]
        self.own_veto = None if seen == veto and self.veto_until == until else (seen, veto, until)
        self.veto, self.veto_until = veto, until

    def lapse(self, now: float) -> None:
        """Forget a veto whose time is over: then the policy alone decides, as after a withdrawal."""
        if self.veto is not None and self.veto_until is not None and self.veto_until <= now:
            self.veto = self.veto_until = None
            self.exhausted = False

    def flight(self, fence: int) -> Flight | None:
        """The running attempt with this fence, if it is still believed to run."""
        return next((flight for flight in self.in_flight if flight.fence == fence), None)

    def land(self, fence: int) -> None:
        """Forget that the attempt with this fence is running."""
        self.in_flight = tuple(flight for flight in self.in_flight if flight.fence != fence)

    def to_json(self, name: str, key: Any) -> dict[str, Any]:
        """The snapshot that caches store. Empty facts are left out."""
        facts: dict[str, Any] = {"format": FORMAT, "name": name, "key": key, "retry_count": self.failures}
        # What is a default of the class has nothing to tell.
        facts |= {fact: value for fact, value in self.__dict__.items() if value and fact in _PLAIN}
        if self.last_error is not None:
            facts["last_error"] = error_to_json(stored(self.last_error))
        if self.errors:
            facts["errors"] = [error.to_json() for error in self.errors]
        if self.in_flight:
            facts["in_flight"] = [flight.to_json() for flight in self.in_flight]
        if self.evicted is not None:
            facts["evicted"] = self.evicted.to_json()
        if self._tallies:
            facts["tallies"] = {label: [tally.count, tally.since] for label, tally in self._tallies.items()}
        if self._attributes:
            facts["attributes"] = dict(self._attributes)
        if self._outbox and self.completed_at is not None:
            facts["outbox"] = list(self._outbox)
        return facts

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> History:
        """The history that a snapshot tells of. `CodecError` if it is of a later format, or no snapshot at all."""
        check_format(facts)
        count = facts.get("retry_count")
        if type(count) is not int or count < 0:
            raise CodecError(reason=f"the snapshot is damaged: retry_count is {count!r:.80}")
        try:
            return cls._from_json(facts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CodecError(reason=f"the snapshot is damaged: {error!r}") from error

    @classmethod
    def _from_json(cls, facts: Mapping[str, Any]) -> History:
        plain = {fact: _sound(fact, facts[fact]) for fact in _PLAIN if fact in facts}
        last = facts.get("last_error")
        attributes = Attributes()
        dict.update(attributes, facts.get("attributes", {}))
        return cls(
            failures=facts["retry_count"],
            last_error=error_from_json(last) if last else None,
            errors=tuple(ErrorSummary(**error) for error in facts.get("errors", ())),
            in_flight=tuple(Flight(**_sound_flight(flight)) for flight in facts.get("in_flight", ())),
            evicted=_eviction(facts) if facts.get("evicted") else None,
            _tallies={label: Tally(*tally) for label, tally in facts.get("tallies", {}).items()},
            _attributes=attributes,
            _outbox=list(facts.get("outbox", ())),
            **plain,
        )


def _eviction(facts: Mapping[str, Any]) -> Eviction:
    from retrykit.eviction import Eviction  # few items have been evicted

    return Eviction.from_json(facts["evicted"], facts["retry_count"])


_PLAIN: Final = dict.fromkeys(
    (
        "crashes",
        "fence",
        "started_at",
        "first_failed_at",
        "last_failed_at",
        "not_before",
        "last_delay",
        "veto",
        "veto_until",
        "fingerprint",
        "exhausted",
        "recovered",
        "recovery_failures",
        "reason",
        "completed_at",
        "expires_at",
    )
)


_TEXTS: Final = frozenset({"veto", "reason", "fingerprint"})
_FLAGS: Final = frozenset({"exhausted", "recovered"})


def _sound(fact: str, value: Any) -> Any:
    """A plain fact of a snapshot, if it is of its kind."""
    kinds = str if fact in _TEXTS else bool if fact in _FLAGS else int | float
    if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and fact not in _FLAGS)):
        msg = f"{fact} is {value!r:.80}"
        raise ValueError(msg)
    return value


def _sound_flight(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a flight, if its numbers are numbers."""
    for fact in ("fence", "since", "until"):
        if not isinstance(fields[fact], int | float):
            msg = f"{fact} of a flight is {fields[fact]!r:.80}"
            raise TypeError(msg)
    return fields


def check_format(facts: Mapping[str, Any]) -> None:
    """Refuse what a later retrykit wrote: reading it half would forget the other half."""
    found = facts.get("format") if isinstance(facts, Mapping) else None
    if not isinstance(found, int) or found < 1:
        raise CodecError(reason=f"no snapshot of a history: {facts!r:.80}")
    if found > FORMAT:
        raise CodecError(reason=f"the snapshot has format {found}; this retrykit reads up to {FORMAT}: upgrade it")
