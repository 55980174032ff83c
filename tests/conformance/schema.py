"""The words of the scenarios' schema: a scenario with any other word is counted as `unknown-feature`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from .errors import MARKERS, TYPES

_CLASSIFIER: Final = {"map", "default", "traverse"}
_FIELDS: Final[Mapping[str, Collection[str]]] = {
    "scenario": {"id", "tags", "note", "shared", "templates", "calls", "sleep_bounds"},
    "template": {"policy", "backoff", "listeners", "throw_last", "cache", "stats", "trace_policy", "builder"},
    "listener": {"open", "error", "success", "close"},
    "cache": {"type", "capacity", "share", "put_faults"},
    "call": {"t", "advance", "state", "recovery", "outcomes", "external"},
    "external": {"evict", "advance"},
    "state": {"key", "force", "rollback"},
    "action": {"advance", "mutate_key", "set", "exhaust", "exhaust_parent", "call", "swallow", "throw", "ok"},
}
_POLICIES: Final[Mapping[str, Collection[str]]] = {
    "never": (),
    "always": (),
    "simple": {"max", *_CLASSIFIER, "not_recoverable"},
    "max_attempts": {"max"},
    "timeout": {"ms"},
    "binary": _CLASSIFIER,
    "predicate": {"contains"},
    "classifier": {"map"},
    "composite": {"optimistic", "policies"},
    "circuit": {"delegate", "open_timeout", "reset_timeout"},
    "ref": {"id"},
    "faulty": {"delegate", "open", "close", "register"},
}
_BACK_OFFS: Final[Mapping[str, Collection[str]]] = {
    "none": (),
    "fixed": {"ms"},
    "exponential": {"initial", "multiplier", "max"},
    "exponential_random": {"initial", "multiplier", "max"},
    "uniform_random": {"min", "max"},
    "bo_builder": {"delay", "max_delay", "multiplier", "random"},
}
_BUILDER: Final = {
    "max_attempts",
    "timeout",
    "infinite",
    "custom_policy",
    "retry_on",
    "not_retry_on",
    "retry_on_message",
    "traversing_causes",
    "fixed_backoff",
    "exponential_backoff",
    "uniform_random_backoff",
    "no_backoff",
}
_EVENTS: Final = {"open", "attempt", "success", "error", "sleep", "recover", "close", "ret", "p_open", "p_close"}


class UnknownWordError(Exception):
    """A scenario uses a word that this adapter does not know."""


MALFORMED: Final = (UnknownWordError, AttributeError, KeyError, TypeError, ValueError, IndexError)
"""What reading a scenario raises that has another shape than the schema's."""


def check(scenario: Mapping[str, Any], trace: Mapping[str, Any]) -> None:
    """Raise one of `MALFORMED` unless a scenario and its trace use the schema's words only, in its shape."""
    _check_scenario(scenario)
    _check_trace(trace, len(scenario["calls"]))


def _check(words: Collection[Any], known: Collection[Any]) -> None:
    if strange := set(words) - set(known):
        raise UnknownWordError(*sorted(strange))


def _check_scenario(scenario: Mapping[str, Any]) -> None:
    _check(scenario, _FIELDS["scenario"])
    shared, templates = scenario.get("shared", {}), range(len(scenario["templates"]))
    for policy in shared.values():
        _check_policy(policy, shared)
    for template in scenario["templates"]:
        _check_template(template, shared)
        _check([(template.get("cache") or {}).get("share", 0)], templates)
    for call in scenario["calls"]:
        _check_call(call, templates)


def _check_template(template: Mapping[str, Any], shared: Collection[str]) -> None:
    _check(template, _FIELDS["template"])
    _check(template.get("cache") or {}, _FIELDS["cache"])
    _check([(template.get("cache") or {}).get("type", "soft")], {"soft", "inconsistent"})
    for listener in template.get("listeners", ()):
        _check(listener, _FIELDS["listener"])
    for operation, *arguments in template.get("builder", ()):
        _check([operation], _BUILDER)
        if operation == "custom_policy":
            _check_policy(arguments[0], shared)
        if operation in {"retry_on", "not_retry_on"}:
            _check(arguments, TYPES)
    _check_policy(template.get("policy"), shared)
    _check_back_off(template.get("backoff"))


def _check_policy(policy: Mapping[str, Any] | None, shared: Collection[str]) -> None:
    if policy is None:
        return
    _check([policy["type"]], _POLICIES)
    _check(policy, {"type", *_POLICIES[policy["type"]]})
    _check([policy["id"]] if policy["type"] == "ref" else (), shared)
    _check([*(policy.get("map") or ()), *policy.get("not_recoverable", ())], {*TYPES, *MARKERS})
    nested = policy["map"].values() if policy["type"] == "classifier" else ()
    for child in (*nested, *policy.get("policies", ()), policy.get("delegate")):
        _check_policy(child, shared)


def _check_back_off(spec: Mapping[str, Any] | None) -> None:
    if spec is not None:
        _check([spec["type"]], _BACK_OFFS)
        _check(spec, {"type", "faults", *_BACK_OFFS[spec["type"]]})


def _check_call(call: Mapping[str, Any], templates: Collection[int]) -> None:
    _check(call, _FIELDS["call"])
    _check([call.get("t", 0)], templates)
    _check(call.get("external", ()), _FIELDS["external"])
    state = call.get("state") or {}
    _check(state, _FIELDS["state"])
    if isinstance(state.get("rollback"), Mapping):
        _check(state["rollback"], _CLASSIFIER)
        _check(state["rollback"].get("map") or (), {*TYPES, *MARKERS})
    recovery = [call["recovery"]] if "recovery" in call else []
    for action in (*call.get("outcomes", ()), *recovery):
        _check_action(action, templates)


def _check_action(action: Mapping[str, Any], templates: Collection[int]) -> None:
    _check(action, _FIELDS["action"])
    if "throw" in action:
        _check_error(action["throw"])
    if "call" in action:
        _check_call(action["call"], templates)


def _check_error(value: list[Any]) -> None:
    _check(value[:1], TYPES)
    if len(value) > 2:
        _check_error(value[2])


def _check_trace(trace: Mapping[str, Any], calls: int) -> None:
    records = trace.get("calls", ())
    _check([len(records)], [0 if "build_error" in trace else calls])
    for record in records:
        _check([event[0] for event in record.get("events", ())], _EVENTS)
