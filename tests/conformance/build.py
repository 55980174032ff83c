"""Makes retrykit's values from a scenario's: policies, back-offs, caches, states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from retrykit import (
    AlwaysRetryPolicy,
    BackOffPolicy,
    CompositeRetryPolicy,
    ExceptionClassifierRetryPolicy,
    ExponentialBackOffPolicy,
    FixedBackOffPolicy,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    NeverRetryPolicy,
    NoBackOffPolicy,
    PredicateRetryPolicy,
    RetryPolicy,
    RetryState,
    SimpleRetryPolicy,
    TimeoutRetryPolicy,
    UniformRandomBackOffPolicy,
)

from .clock import SECOND
from .errors import OWN, is_ordinary, lineage, links, python_type, value_of_snapshot
from .loader import Json
from .series import Exponential

DEFAULT_MAP: Final = {"Exception": True}


class Policies:
    """The policies of one scenario: each mention is a new one, but shared ones are made once."""

    def __init__(self, shared: Mapping[str, Json]) -> None:
        self._shared_specs = shared
        self._shared: dict[str, RetryPolicy] = {}
        self._makers: dict[str, Callable[[Json], RetryPolicy]] = {
            "never": lambda _: NeverRetryPolicy(),
            "always": lambda _: AlwaysRetryPolicy(),
            "simple": lambda spec: classifying(spec, max_attempts=spec["max"]),
            "max_attempts": lambda spec: MaxAttemptsRetryPolicy(spec["max"]),
            "timeout": lambda spec: TimeoutRetryPolicy(spec["ms"] / SECOND),
            "binary": lambda spec: classifying(spec, max_attempts=None),
            "predicate": lambda spec: PredicateRetryPolicy(
                lambda error: spec["contains"] in (getattr(error, "message", None) or "")
            ),
            "classifier": self._classifier,
            "composite": lambda spec: CompositeRetryPolicy(
                map(self.make, spec["policies"]), optimistic=spec.get("optimistic", False)
            ),
            "ref": self._ref,
        }

    def of_template(self, spec: Json) -> RetryPolicy:
        """The policy of a template; the library's default if it names none."""
        if "builder" in spec:
            return self._built(spec["builder"])
        return SimpleRetryPolicy() if spec.get("policy") is None else self.make(spec["policy"])

    def make(self, spec: Json) -> RetryPolicy:
        """The policy that a specification describes."""
        return self._makers[spec["type"]](spec)

    def _ref(self, spec: Json) -> RetryPolicy:
        name = spec["id"]
        if name not in self._shared:
            self._shared[name] = self.make(self._shared_specs[name])
        return self._shared[name]

    def _classifier(self, spec: Json) -> RetryPolicy:
        policies = {name: self.make(inner) for name, inner in spec["map"].items()}
        return ExceptionClassifierRetryPolicy(in_python(policies))

    def _built(self, operations: list[Any]) -> RetryPolicy:
        """What RetryTemplateBuilder makes: a limit and a classification, which must agree."""
        limit: RetryPolicy = MaxAttemptsRetryPolicy(3)
        which: RetryPolicy | None = None
        names: dict[str, bool] = {}
        traverse = False
        for operation, *arguments in operations:
            match operation:
                case "max_attempts":
                    limit = MaxAttemptsRetryPolicy(arguments[0])
                case "timeout":
                    limit = TimeoutRetryPolicy(arguments[0] / SECOND)
                case "infinite":
                    limit = AlwaysRetryPolicy()
                case "custom_policy":
                    limit = self.make(arguments[0])
                case "retry_on_message":
                    which = self.make({"type": "predicate", "contains": arguments[0]})
                case "retry_on" | "not_retry_on":
                    names[arguments[0]] = operation == "retry_on"
                case "traversing_causes":
                    traverse = True
        if which is None:
            spec = {"map": names or DEFAULT_MAP, "default": False in names.values(), "traverse": traverse}
            which = classifying(spec, max_attempts=None)
        return CompositeRetryPolicy((limit, which))


def in_python(classes: Mapping[str, Any]) -> dict[type[Exception], Any]:
    """A map by class names as one by classes, the same for every `Exception`.

    Throwable is the base of all, so that Exception stands for it, unless it is named itself. Classes beside Exception
    are left out: nothing under Exception is one of them. retrykit's own errors have the values of spring-retry's.
    """
    named = {"Exception": classes["Throwable"], **classes} if "Throwable" in classes else classes
    own = {cls: next((named[base] for base in lineage(name) if base in named), None) for cls, name in OWN.items()}
    return {
        **{python_type(name): value for name, value in named.items() if is_ordinary(name)},
        **{cls: value for cls, value in own.items() if value is not None},
    }


def classifying(spec: Json, *, max_attempts: int | None) -> SimpleRetryPolicy:
    """A policy with the classifier that `map`, `default` and `traverse` describe."""
    classes = in_python(DEFAULT_MAP if spec.get("map") is None else spec["map"])
    return SimpleRetryPolicy(
        max_attempts,
        [error_type for error_type, retry in classes.items() if retry],
        no_retry_for=[error_type for error_type, retry in classes.items() if not retry],
        traverse_causes=spec.get("traverse", False),
        default=spec.get("default", False),
        not_recoverable=[*in_python(dict.fromkeys(spec.get("not_recoverable", ()), True))],
    )


def _back_off_spec(template: Json) -> Json:
    """The back-off of a template as one of the schema's plain kinds: what the builders make is spelled out."""
    for operation, *arguments in template.get("builder", ()):
        match operation:
            case "fixed_backoff":
                return {"type": "fixed", "ms": arguments[0]}
            case "exponential_backoff":
                return dict(zip(("type", "initial", "multiplier", "max"), ("exponential", *arguments), strict=False))
            case "uniform_random_backoff":
                return {"type": "uniform_random", "min": arguments[0], "max": arguments[1]}
    spec: Json = template.get("backoff") or {"type": "none"}
    return _spelled_out(spec) if spec["type"] == "bo_builder" else spec


def _spelled_out(spec: Json) -> Json:
    """BackOffPolicyBuilder: exponential with a multiplier, random up to a higher max_delay, else fixed."""
    delay, longest, multiplier = spec.get("delay", 1000), spec.get("max_delay"), spec.get("multiplier")
    wider = longest is not None and longest > delay
    if multiplier is not None and multiplier > 0:
        return {"type": "exponential", "initial": delay, "multiplier": multiplier, "max": longest if wider else 30_000}
    return {"type": "uniform_random", "min": delay, "max": longest} if wider else {"type": "fixed", "ms": delay}


def series_of(template: Json) -> Exponential | None:
    """The exponential series of a template's back-off, clamped as spring-retry's setters do; None for other kinds."""
    spec = _back_off_spec(template)
    if spec["type"] != "exponential":
        return None
    return Exponential(max(1, spec["initial"]), max(1.0, spec["multiplier"]), max(1, spec["max"]))


def back_off_of(template: Json) -> BackOffPolicy:
    """The back-off of a template. Values out of range are clamped as spring-retry does; retrykit refuses them."""
    spec = _back_off_spec(template)
    series = series_of(template)
    if series is not None:
        return ExponentialBackOffPolicy(series.initial / SECOND, series.multiplier, series.longest / SECOND)
    if spec["type"] == "fixed":
        return FixedBackOffPolicy(max(1, spec["ms"]) / SECOND)
    if spec["type"] == "uniform_random":
        shortest = max(1, spec["min"])
        return UniformRandomBackOffPolicy(shortest / SECOND, max(shortest, spec["max"]) / SECOND)
    return NoBackOffPolicy()


def owner_of_cache(templates: list[Json], index: int) -> int:
    """The template whose cache, and so whose name, a template uses: histories are shared under one name only."""
    cache = templates[index].get("cache") or {}
    return owner_of_cache(templates, cache["share"]) if "share" in cache else index


def name_of(templates: list[Json], index: int) -> str:
    """The name of a template."""
    return f"template-{owner_of_cache(templates, index)}"


def caches_of(templates: list[Json]) -> list[MapRetryContextCache]:
    """The cache of each template; those that share have the same one."""
    own = [MapRetryContextCache(capacity=max(1, (spec.get("cache") or {}).get("capacity", 4096))) for spec in templates]
    return [own[owner_of_cache(templates, index)] for index in range(len(templates))]


def entries_of(cache: MapRetryContextCache) -> dict[str, list[Any]]:
    """What a trace shows of a cache: by key, the count, the last error, and whether there is a veto."""
    return {str(stored.snapshot["key"]): _entry(stored.snapshot) for _, stored in cache.items()}


def _entry(snapshot: Mapping[str, Any]) -> list[Any]:
    entry = [snapshot["retry_count"], value_of_snapshot(snapshot.get("last_error"))]
    return [*entry, "xo"] if snapshot.get("veto") else entry


def state_of(spec: Json | None) -> RetryState | None:
    """The state of a call; None if it is stateless."""
    if spec is None:
        return None
    return RetryState(
        key=spec["key"],
        fresh=spec.get("force", False),
        rollback_for=_rollback_for(spec.get("rollback")),
        journal="never",
    )


def _rollback_for(spec: bool | Json | None) -> Callable[[Exception], bool]:
    if spec is None or isinstance(spec, bool):
        return lambda _: spec is not False
    classes: dict[type, bool] = {**in_python(DEFAULT_MAP if spec.get("map") is None else spec["map"])}
    default = bool(spec.get("default", False))
    depth = None if spec.get("traverse", False) else 1

    def rollback_for(error: Exception) -> bool:
        found = (classes[base] for link in links(error)[:depth] for base in type(link).__mro__ if base in classes)
        return next(found, default)

    return rollback_for
