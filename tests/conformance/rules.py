"""What is not compared with spring-retry, and why: the table of rules.

A rule says from which call on a scenario is not compared: the first one in which its feature is used or its difference
occurs. The calls before it are compared. Rules look at the recording alone, never at what retrykit does, so they cannot
hide a mismatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import attrs

from . import facts
from .loader import Case, Execution, Json
from .schema import MALFORMED

Kind = Literal["deliberate difference", "java only"]
FirstCall = Callable[[Case], int | None]


@attrs.frozen
class Rule:
    """`first_call(case)` is the index of the first call that is not compared, None if all are."""

    name: str
    kind: Kind
    first_call: FirstCall
    reason: str


def _case(holds: Callable[[Case], bool]) -> FirstCall:
    """For what spoils a scenario from its first call on."""
    return lambda case: 0 if holds(case) else None


def _call(holds: Callable[[Case, int], bool]) -> FirstCall:
    """For what occurs in a call."""
    return lambda case: next((index for index in range(len(case.executions)) if holds(case, index)), None)


def _execution(holds: Callable[[Case, Execution], bool]) -> FirstCall:
    """For what occurs in one `execute()`, nested ones included."""
    return _call(lambda case, index: any(holds(case, execution) for execution in case.call_executions(index)))


def _policy(holds: Callable[[Json], bool]) -> FirstCall:
    """For the first use of a template whose policies include such a one."""
    return _execution(lambda case, execution: any(map(holds, facts.policies(case, facts.template(case, execution)))))


def _listener(kinds: tuple[str, ...], holds: Callable[[object], bool]) -> FirstCall:
    """For the first such act of a listener."""
    return lambda case: next(
        (index for index, kind, act in facts.listener_actions(case) if kind in kinds and holds(act)), None
    )


def _is_refused(policy: Json) -> bool:
    return bool(policy.get("max", 1) < 1 or policy.get("ms", 1) <= 0 or policy.get("policies", [None]) == [])


def _jitter_is_one_sided(case: Case, execution: Execution) -> bool:
    spec = facts.template(case, execution).get("backoff") or {}
    return spec.get("type") == "exponential_random" or (spec.get("random") is True and "multiplier" in spec)


def _recovery_raises(_: Case, execution: Execution) -> bool:
    return execution.raised is not None and bool(execution.named("recover"))


def _recovers_unrecoverable(case: Case, execution: Execution) -> bool:
    spec = facts.template(case, execution)
    inner = (policy for policy in facts.policies(case, spec) if policy is not spec.get("policy"))
    names = {name for policy in inner for name in policy.get("not_recoverable", ())}
    exhausted = execution.raised if facts.is_wrapped(execution) else None
    return any(
        facts.mentions(error, names) for error in (exhausted, *(event[3] for event in execution.named("recover")))
    )


def _is_unsynced(case: Case, index: int) -> bool:
    events = facts.flat_events(case, index)
    astray = any(
        (event[0] == "ret" and not event[4]) or (isinstance(event[-1], dict) and event[-1].get("ns", False))
        for event in events
    )
    return astray or "leak" in case.trace["calls"][index]


def _overflows(case: Case, index: int) -> bool:
    return "RetryCacheCapacityExceededException" in facts.raised_names(case, index)


UNKNOWN: Final = Rule(
    "unknown-feature",
    "java only",
    _case(lambda case: not case.known),
    "the recording uses something that the schema, or this adapter, does not name",
)
RULES: Final = (
    UNKNOWN,
    Rule(
        "builder-validation",
        "java only",
        _case(lambda case: "build_error" in case.trace),
        "the calls of RetryTemplateBuilder can contradict each other; keyword arguments cannot",
    ),
    Rule(
        "java-platform",
        "java only",
        _case(lambda case: "java_specific" in case.scenario["tags"]),
        "64-bit overflow of the clock, or UndeclaredThrowableException: neither exists in Python",
    ),
    Rule(
        "java-runtime-error",
        "java only",
        _call(
            lambda case, index: bool({"NullPointerException", "ClassCastException"} & facts.raised_names(case, index))
        ),
        "the library trips over a null or a cast of its own",
    ),
    Rule(
        "marker-interfaces",
        "java only",
        _case(lambda case: "interfaces" in case.scenario["tags"]),
        "types are matched by Python's method resolution order; Java interfaces have an order of their own",
    ),
    Rule(
        "beyond-exception",
        "deliberate difference",
        _call(facts.beyond_exception),
        "anything outside Exception is never retried and never counted",
    ),
    Rule(
        "mutable-key",
        "java only",
        _execution(lambda _, execution: isinstance((execution.state or {}).get("key"), dict)),
        "a key is text, a number, bytes or a tuple of these: it cannot change",
    ),
    Rule(
        "user-cache-that-lies",
        "java only",
        _execution(
            lambda case, execution: (facts.template(case, execution).get("cache") or {}).get("type") == "inconsistent"
        ),
        "a context cache has no separate `contains()` and `get()` that could disagree: ask once, then act",
    ),
    Rule(
        "policy-lifecycle",
        "java only",
        _policy(lambda policy: policy["type"] == "faulty"),
        "a policy is a pure question without open, close and register, so these cannot fail",
    ),
    Rule(
        "circuit-breaker",
        "deliberate difference",
        _policy(lambda policy: policy["type"] == "circuit"),
        "closed, open, half-open with a gate; success closes; the state is shared through the cache",
    ),
    Rule(
        "refused-at-construction",
        "deliberate difference",
        _policy(_is_refused),
        "a limit below one attempt, a timeout of 0 or less, a composite of nothing: refused when given, not obeyed",
    ),
    Rule(
        "one-sided-jitter",
        "deliberate difference",
        _execution(_jitter_is_one_sided),
        "jitter is full, equal, decorrelated or a symmetric fraction; cap first, jitter after",
    ),
    Rule(
        "veto-by-listener",
        "deliberate difference",
        _listener(("open",), lambda act: act is False),
        "a listener cannot veto by what it returns: the only veto is context.veto(reason), and it keeps the history",
    ),
    Rule(
        "raising-listener",
        "deliberate difference",
        _listener(("open", "success", "error", "close"), lambda act: isinstance(act, list)),
        "listeners are isolated: what they raise is logged and never changes an outcome",
    ),
    Rule(
        "failing-cache",
        "deliberate difference",
        _call(facts.cache_failed),
        "a cache's fault never hides the user's exception",
    ),
    Rule(
        "full-cache",
        "deliberate difference",
        _call(_overflows),
        "a full cache never makes a known key forget and never hides the user's exception",
    ),
    Rule(
        "foreign-history",
        "deliberate difference",
        facts.foreign_history,
        "templates that share histories each ask their own policies; spring-retry goes on with the first one's objects",
    ),
    Rule(
        "same-key-inside",
        "deliberate difference",
        _execution(facts.shares_key),
        "an execution inside another one of the same key does not corrupt its history: the count is exact",
    ),
    Rule(
        "thread-bound-context",
        "deliberate difference",
        _call(_is_unsynced),
        "the current context is always restored; spring-retry binds closed or foreign contexts, and calls them parents",
    ),
    Rule(
        "interrupted-pause",
        "deliberate difference",
        lambda case: next(facts.failed_pauses(case), None),
        "any fault of a pause is BackOffInterruptedError; a stateful failure is rethrown without one, and still due",
    ),
    Rule(
        "slept-past-deadline",
        "deliberate difference",
        _call(facts.slept_past_deadline),
        "a pause that would pass the deadline is not begun: the operation is given up at once",
    ),
    Rule(
        "recovers-unrecoverable",
        "deliberate difference",
        _execution(_recovers_unrecoverable),
        "not_recoverable is seen through every composition of policies",
    ),
    Rule(
        "failing-recovery",
        "deliberate difference",
        _execution(_recovery_raises),
        "history is dropped only after recovery succeeded; recovery is retried on its own, without the callback",
    ),
    Rule(
        "history-without-recovery",
        "deliberate difference",
        lambda case: facts.kept_histories(case)[1],
        "an exhausted history without recovery is kept until there is a confirmed outcome: it does not start anew",
    ),
)
"""A scenario is counted under the rule with the earliest call, under the first of these if there are several."""


def first_difference(case: Case) -> tuple[int, Rule] | None:
    """From which call on a case is not compared, and by which rule; None if it is compared whole."""
    if not case.known:
        return 0, UNKNOWN
    try:
        found = [(call, position) for position, rule in enumerate(RULES) if (call := rule.first_call(case)) is not None]
    except MALFORMED:
        # The tests see to it that none of the recorded scenarios gets here: it would be a fault of a rule.
        return 0, UNKNOWN
    if not found:
        return None
    call, position = min(found)
    return call, RULES[position]
