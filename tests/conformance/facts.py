"""Questions about a recording that the rules ask: which features a template has, what occurred in a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

from .errors import TYPES, chain, is_a, is_ordinary
from .loader import Case, Execution, Json

Event = list[Any]
History = tuple[int, Any]


def template(case: Case, execution: Execution) -> Json:
    """The template that made this execution."""
    found: Json = case.scenario["templates"][execution.template]
    return found


def policies(case: Case, spec: Json) -> Iterator[Json]:
    """All policies of a template, composed and shared ones included."""
    yield from (
        {"type": "timeout", "ms": arguments[0]} for name, *arguments in spec.get("builder", ()) if name == "timeout"
    )
    custom = [
        argument for _, *arguments in spec.get("builder", ()) for argument in arguments if isinstance(argument, dict)
    ]
    for policy in (spec.get("policy"), *custom):
        yield from _policy_tree(case, policy)


def _policy_tree(case: Case, policy: Json | None) -> Iterator[Json]:
    if policy is None:
        return
    if policy["type"] == "ref":
        yield from _policy_tree(case, case.scenario["shared"][policy["id"]])
        return
    yield policy
    for child in children(policy):
        yield from _policy_tree(case, child)


def children(policy: Json) -> Iterator[Json]:
    """The policies directly inside one."""
    yield from policy.get("policies", ())
    if policy["type"] == "classifier":
        yield from policy["map"].values()
    if "delegate" in policy:
        yield policy["delegate"]


def flat_events(case: Case, index: int) -> list[Event]:
    """All events of a call in the order of time, those of nested executions included."""
    events: list[Event] = case.trace["calls"][index].get("events", [])
    return events


def listener_actions(case: Case) -> Iterator[tuple[int, str, Any]]:
    """Every scripted act of a listener that was done: (call index, event kind, action), in the order of time."""
    done: Counter[tuple[str, int, int]] = Counter()
    for index in range(len(case.executions)):
        for event in flat_events(case, index):
            if event[0] not in ("open", "success", "error", "close"):
                continue
            kind, owner, position = event[:3]
            script = case.scenario["templates"][owner]["listeners"][position].get(kind, ())
            if kind == "success":
                yield index, kind, script.get(event[4]) if script else None
                continue
            turn = done[kind, owner, position]
            done[kind, owner, position] += 1
            yield index, kind, script[turn] if turn < len(script) else None


def failed_pauses(case: Case) -> Iterator[int]:
    """The indices of the calls in which a pause was made to fail, other than by an interrupt in a stateless call."""
    slept: Counter[int] = Counter()
    for index in range(len(case.executions)):
        stateful = {
            id(event) for each in case.call_executions(index) if each.state is not None for event in each.events
        }
        for event in flat_events(case, index):
            if event[0] == "sleep":
                spec = case.scenario["templates"][event[1]].get("backoff") or {}
                fault = spec.get("faults", {}).get(str(slept[event[1]]))
                slept[event[1]] += 1
                if fault is not None and (fault != "interrupt" or id(event) in stateful):
                    yield index


def slept_past_deadline(case: Case, index: int) -> bool:
    """Whether a pause was slept, no attempt followed it in the call, and a deadline may have passed during it."""
    return any(
        _slept_without_retry(execution) and (execution.state is None or _may_be_late(case, index, execution))
        for execution in case.call_executions(index)
    )


def _slept_without_retry(execution: Execution) -> bool:
    kinds = [event[0] for event in execution.events]
    interrupted = execution.raised is not None and execution.raised[0] == "BackOffInterruptedException"
    alone = any(kind == "sleep" and following != "attempt" for kind, following in pairwise([*kinds, "end"]))
    return alone and not interrupted


def _may_be_late(case: Case, index: int, execution: Execution) -> bool:
    """Whether at the end of the call more time had passed, since the history began, than a policy allows."""
    timeouts = [policy["ms"] for policy in policies(case, template(case, execution)) if policy["type"] == "timeout"]
    began = next((call for call in range(index, 0, -1) if not _is_cached(case, call - 1, execution)), 0)
    started = case.trace["calls"][began - 1]["now"] if began else 0
    elapsed: int = case.trace["calls"][index]["now"] - started
    return any(elapsed > timeout for timeout in timeouts)


def _is_cached(case: Case, index: int, execution: Execution) -> bool:
    """Whether the history of an execution's key was in its cache after a call."""
    return key_text(execution) in case.trace["calls"][index]["cache"][execution.template]


def is_kept(execution: Execution) -> bool:
    """Whether the execution has a key, and so a history."""
    return execution.state is not None and execution.state["key"] is not None


def is_exhausted(execution: Execution) -> bool:
    """Whether it ended because no attempt was allowed any more."""
    if any(event[5].get("exhausted") for event in execution.named("close")):
        return True
    return is_wrapped(execution) or not execution.named("attempt")


def is_wrapped(execution: Execution) -> bool:
    """Whether ExhaustedRetryException left it."""
    return execution.raised is not None and execution.raised[0] == "ExhaustedRetryException"


def kept_histories(case: Case) -> tuple[list[set[History]], int | None]:
    """Histories that spring-retry drops, because an exhausted call had no recovery, and retrykit keeps.

    What is kept so after each call, and the index of the first call in which that could be told otherwise than by
    looking into the cache: the key comes again (unless it starts anew), or the cache is bounded and the history takes
    another one's place.
    """
    kept: set[History] = set()
    after: list[set[History]] = []
    for index in range(len(case.executions)):
        kept.discard(_evicted(case, index))
        for execution in case.call_executions(index):
            if _feels(case, execution, kept):
                return after, index
            if is_kept(execution):
                _note(case, index, execution, kept)
        after.append(set(kept))
    return after, None


def _evicted(case: Case, index: int) -> History:
    call = case.scenario["calls"][index]
    return cache_owner(case, call.get("t", 0)), (call.get("external") or {}).get("evict")


def _feels(case: Case, execution: Execution, kept: set[History]) -> bool:
    """Whether a kept history makes a difference to this execution."""
    owner, key = history_of(case, execution)
    if not is_kept(execution) or execution.call["state"].get("force", False):
        return False
    bounded = "capacity" in (case.scenario["templates"][owner].get("cache") or {})
    return (owner, key) in kept or (bounded and any(cache == owner for cache, _ in kept))


def _note(case: Case, index: int, execution: Execution, kept: set[History]) -> None:
    mine = history_of(case, execution)
    kept.discard(mine)
    given_up = is_exhausted(execution) or not _is_cached(case, index, execution)
    if given_up and execution.raised is not None and not execution.named("recover"):
        kept.add(mine)


def key_text(execution: Execution) -> str:
    """The key of an execution as traces write it in caches."""
    return str((execution.state or {}).get("key"))


def history_of(case: Case, execution: Execution) -> History:
    """Which history an execution is about: whose cache, and the key."""
    key = (execution.state or {}).get("key")
    return cache_owner(case, execution.template), str(key) if isinstance(key, dict) else key


def foreign_history(case: Case) -> int | None:
    """The first call in which a template takes up a history of another one, and more than counts is remembered."""
    began: dict[History, int] = {}
    for index in range(len(case.executions)):
        for execution in filter(is_kept, case.call_executions(index)):
            history = history_of(case, execution)
            if execution.call["state"].get("force", False):
                began[history] = execution.template
            first = began.setdefault(history, execution.template)
            if first != execution.template and not (
                _only_counts(case, first) and _only_counts(case, execution.template)
            ):
                return index
        cached = case.trace["calls"][index]["cache"]
        began = {(owner, key): first for (owner, key), first in began.items() if str(key) in cached[owner]}
    return None


def _only_counts(case: Case, index: int) -> bool:
    """Whether a template keeps nothing in a context but its count and last error."""
    spec = case.scenario["templates"][index]
    kinds = {policy["type"] for policy in policies(case, spec)}
    pauses = (spec.get("backoff") or {"type": "none"})["type"] != "none"
    return "builder" not in spec and not pauses and kinds.isdisjoint({"timeout", "classifier", "composite"})


def shares_key(case: Case, execution: Execution) -> bool:
    """Whether an execution around this one has the same key in the same cache."""
    mine = history_of(case, execution)
    return is_kept(execution) and any(
        is_kept(outer) and history_of(case, outer) == mine for outer in execution.ancestors
    )


def cache_owner(case: Case, index: int) -> int:
    """The template whose cache a template uses: itself, or the one that it shares with."""
    cache = case.scenario["templates"][index].get("cache") or {}
    return cache_owner(case, cache["share"]) if "share" in cache else index


def mentions(error: list[Any] | None, names: Collection[str]) -> bool:
    """Whether an error, or a cause of it, is of one of these classes."""
    return any(is_a(link[0], name) for link in chain(error) for name in names)


def raised_names(case: Case, index: int) -> set[str]:
    """The type names of all exceptions in a call's record."""
    return {error[0] for error in _shown(case, index)}


def beyond_exception(case: Case, index: int) -> bool:
    """Whether a call's record shows anything raised that is not an `Exception` in Python."""
    return not all(map(is_ordinary, raised_names(case, index)))


def cache_failed(case: Case, index: int) -> bool:
    """Whether a scripted fault of a cache came to light in a call."""
    caches = (spec.get("cache") or {} for spec in case.scenario["templates"])
    faults = [fault for cache in caches for fault in cache.get("put_faults", ()) if fault is not None]
    shown = list(_shown(case, index))
    return any(fault in shown for fault in faults)


def _shown(case: Case, index: int) -> Iterator[list[Any]]:
    """All exception values in a call's record, causes included."""
    record = case.trace["calls"][index]
    return _errors([record.get("events"), record.get("raised")])


def _errors(value: Any) -> Iterator[list[Any]]:
    items = value if isinstance(value, list) else []
    if items and isinstance(items[0], str) and items[0] in TYPES:
        yield items
    for item in items:
        yield from _errors(item)


def tells_limit(case: Case, index: int) -> bool:
    """Whether the `max` of a template's contexts means the same on both sides.

    spring-retry notes it once per context, whichever template came first; `never` has none; a classifier has that of
    the last failure's policy, an optimistic composite the lowest one.
    """
    templates = case.scenario["templates"]
    if any("share" in (spec.get("cache") or {}) for spec in templates):
        return False
    return not any(
        policy["type"] in ("never", "classifier") or policy.get("optimistic", False)
        for policy in policies(case, templates[index])
    )
