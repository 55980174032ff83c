"""Brings recorded and replayed calls to one form, so that they are compared with `==`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

from . import facts
from .errors import TYPES
from .loader import Case, Json
from .run import has_listeners

Event = list[Any]

LISTENER_EVENTS: Final = ("open", "success", "error", "close")
DROPPED_FIELDS: Final[Mapping[str, str]] = {
    "stats": "StatisticsListener counts attempts and outcomes its own way, and has its own tests",
    "interrupted": "Python threads have no interrupt flag",
}
DROPPED_EVENTS: Final[Mapping[str, str]] = {
    "p_open": "a policy is a pure question: it is not opened",
    "p_close": "a policy is a pure question: it is not closed",
}
DROPPED_ATTRIBUTES: Final[Mapping[str, str]] = {
    "norec": "how spring-retry remembers between two lines that recovery is to be left out; the outcome shows it",
    "closed": "spring-retry marks a context whose history was dropped, retrykit one whose call is over",
}
LIBRARY_ERRORS: Final[Mapping[str, str]] = {
    "Retry exhausted after last attempt with no recovery path": "ExhaustedRetryException",
    "Exception in retry": "ExhaustedRetryException",
    "Thread interrupted while sleeping": "BackOffInterruptedException",
}
"""By what spring-retry says in its own errors: which of retrykit's errors says so, with a wording of its own.

Exhausted without any failure, which only a veto brings about here, is TerminatedRetryError.
"""
TOLERANCES: Final[Mapping[str, str]] = {
    "whole milliseconds": "spring-retry cuts an exponential interval to milliseconds, then multiplies it",
    "random pauses": "compared with the bounds that the scenario gives; the time after them is not",
    "pauses between deliveries": (
        "spring-retry sleeps before it rethrows, inside the caller's transaction; here whoever delivers again waits "
        "the same time, until context.not_before. On both sides the pause stands behind the execution's other events"
    ),
    "limits": (
        "max-attempts is compared where both mean the same: not in `open` (spring-retry notes it later), not where "
        "contexts are shared, not for never, classifier and optimistic policies, whose limit here is the true one"
    ),
    "exhausted": "compared in recoveries: spring-retry marks it when it acts on it, retrykit when it is decided",
    "kept histories": "the entry that only retrykit keeps (rule history-without-recovery) is not looked at",
    "close": (
        "spring-retry gives it the call's last failure, also after a recovery, and none if the call made no attempt; "
        "retrykit what leaves the call, and that is what is expected"
    ),
    "bound context": "looked at in attempts and recoveries; listeners are given the context, it is not bound for them",
    "no message": "a stored error's message is text: null and empty are one",
}


def recorded(case: Case, index: int, *, short_cut: bool) -> dict[str, Any]:
    """A call of the recording, without what retrykit deliberately does not offer, and what nobody recorded."""
    record = {name: value for name, value in case.trace["calls"][index].items() if name not in DROPPED_FIELDS}
    if "events" in record:
        events = _closed_with_outcome(case, index, record["events"])
        record["events"] = _pauses_last(case, index, [event for event in events if event[0] not in DROPPED_EVENTS])
        record["events"] = [event for event in record["events"] if _is_told(case, event, short_cut=short_cut)]
    return _alike(case, index, record)


def _closed_with_outcome(case: Case, index: int, events: list[Event]) -> list[Event]:
    """Gives each `close` event the exception that left its execution."""
    outcomes = {id(event): each.raised for each in case.call_executions(index) for event in each.named("close")}
    return [[*event[:4], outcomes[id(event)], event[5]] if event[0] == "close" else event for event in events]


def _is_told(case: Case, event: Event, *, short_cut: bool) -> bool:
    """Whether there is a listener to tell of an event, if it takes one."""
    template = case.scenario["templates"][event[1]]
    return event[0] not in LISTENER_EVENTS or has_listeners(template, short_cut=short_cut)


def replayed(case: Case, index: int, record: Json) -> dict[str, Any]:
    """A call as replayed, in the same form, without the histories that only retrykit keeps."""
    record = dict(record)
    if "cache" in record:
        record["cache"] = [_forgotten(case, index, owner, entries) for owner, entries in enumerate(record["cache"])]
    return _alike(case, index, record)


def _forgotten(case: Case, index: int, template: int, entries: Json) -> dict[str, Any]:
    owner = facts.cache_owner(case, template)
    kept = {str(key) for cache, key in facts.kept_histories(case)[0][index] if cache == owner}
    return {key: entry for key, entry in entries.items() if key not in kept}


def _alike(case: Case, index: int, record: dict[str, Any]) -> dict[str, Any]:
    """What is done to both sides: wording of library errors, bounds of random pauses."""
    record = {
        name: _worded(value) if name in {"events", "raised", "cache"} else value for name, value in record.items()
    }
    if "events" in record:
        record["events"] = [_event(event, told=facts.tells_limit(case, event[1])) for event in record["events"]]
    bounds = case.scenario.get("sleep_bounds")
    if bounds is not None and "events" in record:
        record["events"] = _within(record["events"], bounds[_sleeps_before(case, index) :])
        record.pop("now")
    return record


def _event(event: Event, *, told: bool) -> Event:
    *known, last = event
    if not isinstance(last, dict):
        return event
    dropped = {*DROPPED_ATTRIBUTES, *([] if told and event[0] != "open" else ["max"])}
    dropped |= set() if event[0] == "recover" else {"exhausted"}
    return [*known, {name: value for name, value in last.items() if name not in dropped}]


def _worded(value: Any) -> Any:
    """The same value, with the library's own errors without their wording, and null messages as empty ones."""
    if isinstance(value, dict):
        return {name: _worded(item) for name, item in value.items()}
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], str) and value[0] in TYPES:
        own = LIBRARY_ERRORS.get(value[1] or "")
        if own == "ExhaustedRetryException" and len(value) == 2:
            own = "TerminatedRetryException"
        return [own or value[0], "" if own else value[1] or "", *map(_worded, value[2:])]
    return [_worded(item) for item in value]


def _pauses_last(case: Case, index: int, events: list[Event]) -> list[Event]:
    """Puts each pause before a rethrow behind the `close` events of its execution."""
    stateful = {id(event) for each in case.call_executions(index) if each.state is not None for event in each.events}
    ordered: list[Event] = []
    pause: Event | None = None
    for event, following in pairwise([*events, ["end"]]):
        if event[0] == "sleep" and id(event) in stateful and following[:2] == ["close", event[1]]:
            pause = event
            continue
        ordered.append(event)
        if pause is not None and following[:2] != ["close", pause[1]]:
            ordered.append(pause)
            pause = None
    return ordered


def _sleeps_before(case: Case, index: int) -> int:
    """How many pauses were recorded before a call."""
    return sum(event[0] == "sleep" for call in range(index) for event in facts.flat_events(case, call))


def _within(events: list[Event], bounds: list[list[int]]) -> list[Event]:
    """Writes "within bounds" for the length of every random pause of which that is true."""
    left = iter(bounds)
    compared = []
    for event in events:
        low, high = next(left, (1, 0)) if event[0] == "sleep" else (1, 0)
        compared.append([*event[:2], "within bounds"] if event[0] == "sleep" and low <= event[2] <= high else event)
    return compared
