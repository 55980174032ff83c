"""Each verb as a request to the server: the script, what it is given, and what its answer means.

Sync and async caches send the same requests; nothing here talks to anybody.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, Generic, Literal, TypeVar

import attrs

from retrykit.cache import StoredContext
from retrykit.check import is_finite, seconds, wrong_type, wrong_value
from retrykit.clock import Clock
from retrykit.errors import CacheCapacityError, CodecError
from retrykit.redis.scripts import CHUNK, EVICTED, EXPIRE, GRAVES, LOAD, OPEN, PAGE, REMOVE, SAVE, VETOED, Script
from retrykit.tombstone import checked_tombstones, cuttable
from retrykit.value import Value

logger = logging.getLogger("retrykit.redis")

T = TypeVar("T")
OnFull = Literal["reject", "evict_oldest"]
Page = tuple[list[tuple[str, StoredContext]], str | None]
"""Some snapshots in the order of their keys, and the key after which the next page begins; None: these were the last.
"""

MAX_KEY: Final = 600
MAX_PREFIX: Final = 80
PAGE_SIZE: Final = 500
SWEEP_EVERY: Final = 100
SWEEP: Final = 200
"""Each hundredth save drops up to two hundred snapshots whose time is over: more go than come."""

MANY: Final = 100_000
"""So many tombstones are kept where there is no other bound."""

MOMENT: Final = 17
"""So many characters of every answer are the server's time."""
OUTCOME: Final = 18
"""The character behind it says what became of the request."""

# Escapes keep what no encoding can carry (lone surrogates) out of the text.
_encode = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


class Request(Generic[T]):
    """One verb on one key: what it is called in an error, what is sent, and how the answer is read."""

    __slots__ = ("arguments", "key", "operation", "read", "script", "writer")

    def __init__(  # noqa: PLR0917 - made for every verb: keywords would cost more than the rest
        self,
        operation: str,
        key: str,
        script: Script,
        arguments: tuple[Any, ...],
        read: Callable[[Any], T],
        writer: bytes | None = None,
    ) -> None:
        self.operation = operation
        self.key = key
        self.script = script
        self.arguments = arguments
        self.read = read
        self.writer = writer


class Writers:
    """Names for writes that are under way: no more than there were at once, used again and again."""

    def __init__(self, space: bytes) -> None:
        self._space = space
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._name = os.urandom(8).hex().encode()
        self._numbers = itertools.count()
        self._free: deque[bytes] = deque()

    def take(self) -> bytes:
        """A name that no other write has now."""
        if self._process != os.getpid():
            # A forked child must not write under its parent's names.
            self._begin()
        try:
            return self._free.pop()
        except IndexError:
            return b"%s%s.%d" % (self._space, self._name, next(self._numbers))

    def give(self, writer: bytes) -> None:
        """The write is over."""
        self._free.append(writer)


@attrs.frozen(eq=False, repr=False, kw_only=True)
class Requests(Value):
    """The verbs, and the rules of a full store."""

    prefix: str
    capacity: int | None
    on_full: OnFull
    time_to_live: float | None
    tombstones: int
    tombstone_time_to_live: float | None
    clock: Clock | None
    _space: bytes = attrs.field(init=False)
    _indexes: tuple[bytes, ...] = attrs.field(init=False)
    _writers: Writers = attrs.field(init=False, eq=False)
    _saves: Iterator[int] = attrs.field(init=False, eq=False, factory=lambda: itertools.count(1))

    @_space.default
    def _in_one_slot(self) -> bytes:
        # A cluster looks for the slot of a key at nothing but what is in the first braces.
        return b"{%s}:" % self.prefix.encode()

    @_indexes.default
    def _names_of_indexes(self) -> tuple[bytes, ...]:
        return tuple(self._space + name for name in (b"keys", b"stored", b"ends", b"graves"))

    @_writers.default
    def _named_writers(self) -> Writers:
        return Writers(self._space + b"w:")

    def load(self, key: str) -> Request[StoredContext | None]:
        """The snapshot and its version."""

        def read(answer: bytes) -> StoredContext | None:
            outcome = answer[MOMENT:OUTCOME]
            if outcome == b"+":
                return _stored(key, answer[OUTCOME:])
            if outcome == b"?":
                _tell_of_loss(key)
            return None

        return Request("load", key, LOAD, (5, self._record("load", key), *self._indexes), read)

    def save(self, key: str, snapshot: Mapping[str, Any], expected: int | None) -> Request[int | None]:
        """Compare and set; the new version, or None for the one who lost."""
        version, sweeps = _random(), next(self._saves) % SWEEP_EVERY == 0

        def read(answer: Any) -> int | None:
            return version if self._is_saved(key, answer) else None

        keys = (self._record("save", key), *self._indexes)
        values = (
            _version(version),
            _version(expected),
            _text(key, snapshot, cut=self.forgets and self.tombstones > 0),
            self._kind(snapshot),
            self._until(snapshot),
            LAST if snapshot.get("veto") else b"0",
            b"" if self.capacity is None else self.capacity,
            SWEEP if sweeps else b"0",
            self._given(),
            *self._burials(bounded=self.forgets or sweeps),
        )
        writer = self._writers.take()
        return Request("save", key, SAVE, (6, *keys, writer, *values), read, writer)

    def remove(self, key: str, expected: int | None) -> Request[bool]:
        """Whether there was something, of that version, to remove."""
        keys = (self._record("remove", key), *self._indexes)
        values = (_version(_random()), _version(expected))
        writer = self._writers.take()
        return Request("remove", key, REMOVE, (6, *keys, writer, *values), _is_done, writer)

    def page(self, prefix: str, after: str | None) -> Request[Page]:
        """The next snapshots by key."""
        begin = _encoded("items", prefix)
        behind = b"" if after is None else _encoded("items", after)
        first = b"[" + begin if after is None or behind < begin else b"(" + behind
        # No text has a byte FF: all that begin with the prefix come before it.
        values = (first, b"(" + begin + b"\xff", PAGE_SIZE)
        return Request("items", prefix, PAGE, (4, *self._indexes, *values), _page)

    def expire(self, now: float | None, limit: int | None) -> Request[tuple[int, bool]]:
        """Drop some snapshots whose time is over, at most `limit`, and tombstones of which there are too many.

        How many were over, and whether there may be more to do.
        """
        given = self._given() if now is None else _digits(seconds("now", now))
        most = CHUNK if limit is None else max(0, min(limit, CHUNK))
        values = (most, given, *self._burials(bounded=True))

        def read(answer: bytes) -> tuple[int, bool]:
            dropped = int(answer[OUTCOME:])
            return dropped, dropped == CHUNK != limit or answer[MOMENT:OUTCOME] == b"+"

        return Request("expire", "", EXPIRE, (4, *self._indexes, *values), read)

    def graves(self, prefix: str, cursor: bytes) -> Request[tuple[bytes, list[str]]]:
        """Some keys of tombstones in no order, maybe not for the first time, and where to go on (b"0": nowhere)."""
        given = (cursor, _encoded("evicted", prefix))
        return Request("evicted", prefix, GRAVES, (1, self._indexes[3], *given), _keys_from)

    def evicted(self, keys: list[str]) -> Request[list[tuple[str, StoredContext]]]:
        """The tombstones with these keys, as far as they still are."""

        def read(answer: list[bytes]) -> list[tuple[str, StoredContext]]:
            names = [keys[int(number) - 1] for number in answer[1::2]]
            return [(key, _stored(key, record)) for key, record in zip(names, answer[2::2], strict=True)]

        members = [_encoded("evicted", key) for key in keys]
        return Request("evicted", "", EVICTED, (2, self._indexes[0], self._indexes[3], *members), read)

    def open_keys(self, prefix: str, limit: int) -> Request[list[str] | None]:
        """The keys of histories and tombstones, if there are not too many."""
        given = (_encoded("open_keys", prefix), limit)
        keys, stored, _, graves = self._indexes
        return Request("open_keys", prefix, OPEN, (3, keys, stored, graves, *given), _keys_of)

    def vetoed(self, keys: Collection[str]) -> Request[dict[str, StoredContext]]:
        """Those of the keys that have a veto, as far as they can be read."""
        asked = list(keys)

        def read(answer: list[bytes]) -> dict[str, StoredContext]:
            names = [asked[int(number) - 1] for number in answer[1::2]]
            found = ((key, _readable(key, record)) for key, record in zip(names, answer[2::2], strict=True))
            return {key: stored for key, stored in found if stored is not None and stored.snapshot.get("veto")}

        records = [self._record("vetoed", key) for key in asked]
        return Request("vetoed", "", VETOED, (len(records), *records), read)

    def time(self) -> Request[None]:
        """Nothing but the server's time, which every answer has."""
        return Request("open", "", EXPIRE, (4, *self._indexes, 0, b"", b"", b""), _nothing)

    def give_back(self, writer: bytes) -> None:
        """Nothing more is going to be sent under this name."""
        self._writers.give(writer)

    def _record(self, operation: str, key: str) -> bytes:
        if len(key) > MAX_KEY:
            raise ValueError(f"key: must have at most {MAX_KEY} characters, not {len(key)}: {key[:40]!r}…")
        return self._space + b"h:" + _encoded(operation, key)

    @property
    def forgets(self) -> bool:
        """Whether a history can be dropped by these rules."""
        return self.on_full == "evict_oldest" or self.time_to_live is not None

    def _burials(self, *, bounded: bool) -> tuple[bytes | int, bytes]:
        """How many tombstones there may be (b"": nobody looks, 0: there are none), and for how many seconds."""
        lasts = self.tombstone_time_to_live
        most = self.tombstones if bounded or self.tombstones == 0 else b""
        return most, b"" if lasts is None else _digits(lasts)

    def _given(self) -> bytes:
        """The time of the clock that was given; without one the server goes by its own."""
        return b"" if self.clock is None else _digits(self.clock.time())

    def _kind(self, snapshot: Mapping[str, Any]) -> bytes:
        # Completion marks and the states of circuits take no place from histories.
        if snapshot.get("completed_at") is not None or "breaker" in snapshot:
            return b"mark"
        return b"evict" if self.on_full == "evict_oldest" else b"reject"

    def _until(self, snapshot: Mapping[str, Any]) -> bytes:
        """When it may be dropped: as it says itself, else so long after it was last touched, else after now ("+").

        While it is vetoed, never.
        """
        until = _number(snapshot.get("expires_at"))
        end = _number(snapshot.get("veto_until")) if snapshot.get("veto") else 0.0
        if until is not None or self.time_to_live is None or end is None:
            return b"" if until is None else _digits(until)
        touched = _number(snapshot.get("last_failed_at")) or _number(snapshot.get("started_at")) or end
        return _digits(max(touched + self.time_to_live, end)) if touched else b"+" + _digits(self.time_to_live)

    def _is_saved(self, key: str, answer: Any) -> bool:
        if type(answer) is list:
            answer, *evicted = answer
            for one in evicted:
                logger.warning(
                    "the context cache is full (%s histories): evicted the oldest, %r", self.capacity, one.decode()
                )
        if answer[MOMENT:] == b"!":
            raise CacheCapacityError(capacity=self.capacity, key=key)
        return _is_done(answer)


LAST: Final = b"10000000000"
"""So many seconds later a vetoed history seems to be stored than it was: a veto is to be kept, so those go last."""


def checked_requests(
    *, prefix: Any, capacity: Any, on_full: Any, time_to_live: Any, clock: Any, **tombstones: Any
) -> Requests:
    """The verbs, for rules that make sense."""
    _check_prefix(prefix)
    if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int)):
        raise wrong_type("capacity", "an int or None", capacity)
    if capacity is not None and capacity < 1:
        raise wrong_value("capacity", "at least 1", capacity)
    if on_full not in ("reject", "evict_oldest"):
        raise wrong_value("on_full", "one of 'reject', 'evict_oldest'", on_full)
    lifetime = None if time_to_live is None else seconds("time_to_live", time_to_live)
    if lifetime is not None and lifetime <= 0:
        raise wrong_value("time_to_live", "more than 0 seconds", time_to_live)
    if clock is not None and not isinstance(clock, Clock):
        raise wrong_type("clock", "a retrykit.Clock or None", clock)
    rules = checked_tombstones(**tombstones)
    if rules["tombstones"] is None:
        rules["tombstones"] = MANY if capacity is None else capacity
    return Requests(prefix=prefix, capacity=capacity, on_full=on_full, time_to_live=lifetime, clock=clock, **rules)


def _check_prefix(prefix: Any) -> None:
    if not isinstance(prefix, str):
        raise wrong_type("prefix", "a str", prefix)
    if not 0 < len(prefix) <= MAX_PREFIX or not prefix.isprintable() or "{" in prefix or "}" in prefix:
        raise wrong_value("prefix", f"1 to {MAX_PREFIX} printable characters, none of them a brace", prefix)


def _random() -> int:
    # Not from `random`: programs that seed it alike would make the same versions.
    return int.from_bytes(os.urandom(8)) >> 1


def _version(number: int | None) -> bytes:
    """As it stands in a record; a number that can be no version looks like none of them."""
    return b"" if number is None else b"%016x" % number


def _text(key: str, snapshot: Mapping[str, Any], *, cut: bool) -> bytes:
    try:
        return (cuttable(snapshot, _encode) if cut else _encode(snapshot)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"the snapshot of {key!r} cannot be kept as JSON: {error}"
        raise CodecError(msg, reason=str(error), key=key) from error


def _encoded(operation: str, key: str) -> bytes:
    try:
        return key.encode()
    except UnicodeEncodeError as error:
        msg = f"{operation} of {key!r}: the key is no text that can be stored: {error.reason}"
        raise CodecError(msg, reason=error.reason, operation=operation, key=key) from error


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    return float(value) if is_number else None  # type: ignore[arg-type] # narrowed by the line before


def _digits(number: float) -> bytes:
    return repr(number).encode()


def _stored(key: str, record: bytes) -> StoredContext:
    try:
        version, snapshot = int(record[:16], 16), json.loads(record[16:])
    except json.JSONDecodeError as error:
        raise CodecError(reason=f"the stored snapshot of {key!r} is no JSON: {error}", key=key) from error
    except ValueError:
        # Its message would show what is stored.
        raise CodecError(reason=f"what is stored for {key!r} is no record", key=key) from None
    if not isinstance(snapshot, dict):
        reason = f"the stored snapshot of {key!r} is no JSON object but {type(snapshot).__name__}"
        raise CodecError(reason=reason, key=key)
    return StoredContext(snapshot, version)


def _readable(key: str, record: bytes) -> StoredContext | None:
    try:
        return _stored(key, record)
    except CodecError as error:
        logger.warning("the veto of %r cannot be read, and forbids nothing: %s", key, error)
        return None


def _tell_of_loss(key: str) -> None:
    logger.warning("the history of %r is gone from Redis, and nobody who uses this cache removed it", key)


def _is_done(answer: bytes) -> bool:
    return answer[MOMENT:] == b"+"


def _keys_from(answer: list[Any]) -> tuple[bytes, list[str]]:
    return answer[1], [key.decode() for key in answer[2]]


def _nothing(_answer: bytes) -> None:
    return None


def _keys_of(answer: Any) -> list[str] | None:
    return [key.decode() for key in answer[1]] if type(answer) is list else None


def _page(answer: Any) -> Page:
    _, members, records = answer
    keys = [member.decode() for member in members]
    return list(_present(keys, records)), keys[-1] if len(keys) == PAGE_SIZE else None


def _present(keys: list[str], records: list[bytes | None]) -> Iterator[tuple[str, StoredContext]]:
    for key, record in zip(keys, records, strict=True):
        if record is None:
            _tell_of_loss(key)
        else:
            yield key, _stored(key, record)
