"""A tombstone: what is left of a history that a bound of its store has dropped, so that its count goes on.

It is the same snapshot without what only people read and users keep: the list of errors, the traceback of the last one,
the words of its causes, the attributes. Count, times, fence, veto, running attempts and the classes of the last error
and of each of its causes stay, so whoever finds it under the key goes on with it as with any history, and the policies
allow neither more attempts than they would have, nor fewer. (A predicate of the user's that reads what falls away may.)

Stores that cannot take JSON apart cut its text: `cuttable` puts what falls away at the end, behind `CUT` or `SEAM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from retrykit.check import seconds, wrong_type, wrong_value

Bound = Literal["capacity", "time_to_live"]

WEEK: Final = 7 * 86_400.0
CUT: Final = ",\n\t\n"
"""Where a text may be cut. To JSON it is a comma; no encoder writes it, nor does anybody who makes a text readable."""
CLOSING: Final = "}}"
"""What a text that was cut lacks: the end of the last error, and of the snapshot."""
SEAM: Final = ",\n\t\t\n"
"""Where a text may be cut of which nothing falls from the last error: it lacks no more than the end of the snapshot."""

_FALLS: Final = frozenset({"errors", "attributes", "outbox"})
_FALLS_OF_ERROR: Final = frozenset({"traceback", "cause"})
_STAYS_OF_CAUSE: Final = ("type", "classes", "crash")


def checked_tombstones(tombstones: Any, tombstone_time_to_live: Any) -> dict[str, Any]:
    """The arguments of a store about its tombstones, by name, if they make sense."""
    if tombstones is not None and (isinstance(tombstones, bool) or not isinstance(tombstones, int)):
        raise wrong_type("tombstones", "an int or None", tombstones)
    if tombstones is not None and tombstones < 0:
        raise wrong_value("tombstones", "0 or more", tombstones)
    given = tombstone_time_to_live
    lifetime = None if given is None else seconds("tombstone_time_to_live", given)
    if lifetime is not None and lifetime <= 0:
        raise wrong_value("tombstone_time_to_live", "more than 0 seconds", given)
    return {"tombstones": tombstones, "tombstone_time_to_live": lifetime}


def entombed(snapshot: Mapping[str, Any], at: float, by: Bound) -> dict[str, Any]:
    """The tombstone of a snapshot that is dropped `at` so many seconds since the epoch."""
    kept = {fact: value for fact, value in snapshot.items() if fact not in _FALLS}
    error = kept.get("last_error")
    if isinstance(error, Mapping):
        kept["last_error"] = _short(error)
    return {**kept, "evicted": {"at": at, "by": by}}


def _short(error: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in error.items() if field not in _FALLS_OF_ERROR} | _causes(error)


def _causes(error: Mapping[str, Any]) -> dict[str, Any]:
    """The chain of causes, as far as policies classify by it."""
    cause = error.get("cause")
    if not isinstance(cause, Mapping):
        return {}
    return {"cause": {field: cause[field] for field in _STAYS_OF_CAUSE if field in cause} | _causes(cause)}


def cuttable(snapshot: Mapping[str, Any], encode: Callable[[Any], str]) -> str:
    """The snapshot as JSON text, of which the part before the mark, with `CLOSING` for what follows, is its tombstone.

    Without a mark, where there is nothing that could fall away. `encode` gives compact JSON without line breaks. The
    causes stand there twice, first as they stay: of two facts with one name the last is read.
    """
    error = snapshot.get("last_error")
    if not isinstance(error, Mapping) or error == _short(error):
        return _seamed(snapshot, encode)
    stays = {fact: value for fact, value in snapshot.items() if fact not in _FALLS and fact != "last_error"}
    short = _short(error)
    rest = {field: value for field, value in error.items() if field not in short or short[field] != value}
    if not (stays and short and rest):
        return encode(snapshot)
    falls = {fact: value for fact, value in snapshot.items() if fact in _FALLS}
    last = "," + encode(falls)[1:] if falls else "}"
    return f'{encode(stays)[:-1]},"last_error":{encode(short)[:-1]}{CUT}{encode(rest)[1:]}{last}'


def _seamed(snapshot: Mapping[str, Any], encode: Callable[[Any], str]) -> str:
    falls = {fact: value for fact, value in snapshot.items() if fact in _FALLS}
    stays = {fact: value for fact, value in snapshot.items() if fact not in _FALLS}
    return f"{encode(stays)[:-1]}{SEAM}{encode(falls)[1:]}" if falls and stays else encode(snapshot)


def epitaph(at: float, by: Bound) -> str:
    """What a store adds to a text that it has cut, in place of the last brace."""
    return f',"evicted":{{"at":{at!r},"by":"{by}"}}}}'
