"""Retry that survives the rollback: see `RetryTemplate`, `retryable` and `RetryState`.

The table of contents. A name's module is imported when the name is first asked for (PEP 562), so a program pays for
what it uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrykit.backoff import (
        BackOffPolicy,
        ErrorHintBackOffPolicy,
        ExponentialBackOffPolicy,
        FixedBackOffPolicy,
        NoBackOffPolicy,
        ScheduleBackOffPolicy,
        UniformRandomBackOffPolicy,
    )
    from retrykit.breaker import CircuitBreakerRetryPolicy
    from retrykit.budget import BudgetRetryPolicy, RetryBudget
    from retrykit.cache import MapRetryContextCache, RetryContextCache
    from retrykit.clock import Clock, SystemClock
    from retrykit.context import RetryContext, current_context, veto
    from retrykit.decorators import circuit_breaker, retryable
    from retrykit.errors import (
        BackOffInterruptedError,
        CacheCapacityError,
        CodecError,
        ContextCacheError,
        ExhaustedRetryError,
        InconsistentKeyError,
        RecoveryFailedError,
        RetryError,
        TerminatedRetryError,
    )
    from retrykit.front import FrontContextCache
    from retrykit.listener import LoggingListener, RetryListener, StatisticsListener
    from retrykit.policy import (
        AlwaysRetryPolicy,
        CompositeRetryPolicy,
        ExceptionClassifierRetryPolicy,
        MaxAttemptsRetryPolicy,
        NeverRetryPolicy,
        PredicateRetryPolicy,
        RetryDecision,
        RetryPolicy,
        SimpleRetryPolicy,
        TimeoutRetryPolicy,
    )
    from retrykit.state import RetryState
    from retrykit.template import AsyncRetryTemplate, RetryTemplate

__all__ = [
    "AlwaysRetryPolicy",
    "AsyncRetryTemplate",
    "BackOffInterruptedError",
    "BackOffPolicy",
    "BudgetRetryPolicy",
    "CacheCapacityError",
    "CircuitBreakerRetryPolicy",
    "Clock",
    "CodecError",
    "CompositeRetryPolicy",
    "ContextCacheError",
    "ErrorHintBackOffPolicy",
    "ExceptionClassifierRetryPolicy",
    "ExhaustedRetryError",
    "ExponentialBackOffPolicy",
    "FixedBackOffPolicy",
    "FrontContextCache",
    "InconsistentKeyError",
    "LoggingListener",
    "MapRetryContextCache",
    "MaxAttemptsRetryPolicy",
    "NeverRetryPolicy",
    "NoBackOffPolicy",
    "PredicateRetryPolicy",
    "RecoveryFailedError",
    "RetryBudget",
    "RetryContext",
    "RetryContextCache",
    "RetryDecision",
    "RetryError",
    "RetryListener",
    "RetryPolicy",
    "RetryState",
    "RetryTemplate",
    "ScheduleBackOffPolicy",
    "SimpleRetryPolicy",
    "StatisticsListener",
    "SystemClock",
    "TerminatedRetryError",
    "TimeoutRetryPolicy",
    "UniformRandomBackOffPolicy",
    "circuit_breaker",
    "current_context",
    "retryable",
    "veto",
]

_HOMES = {
    "AlwaysRetryPolicy": "policy",
    "AsyncRetryTemplate": "template",
    "BackOffInterruptedError": "errors",
    "BackOffPolicy": "backoff",
    "BudgetRetryPolicy": "budget",
    "CacheCapacityError": "errors",
    "CircuitBreakerRetryPolicy": "breaker",
    "Clock": "clock",
    "CodecError": "errors",
    "CompositeRetryPolicy": "policy",
    "ContextCacheError": "errors",
    "ErrorHintBackOffPolicy": "backoff",
    "ExceptionClassifierRetryPolicy": "policy",
    "ExhaustedRetryError": "errors",
    "ExponentialBackOffPolicy": "backoff",
    "FixedBackOffPolicy": "backoff",
    "FrontContextCache": "front",
    "InconsistentKeyError": "errors",
    "LoggingListener": "listener",
    "MapRetryContextCache": "cache",
    "MaxAttemptsRetryPolicy": "policy",
    "NeverRetryPolicy": "policy",
    "NoBackOffPolicy": "backoff",
    "PredicateRetryPolicy": "policy",
    "RecoveryFailedError": "errors",
    "RetryBudget": "budget",
    "RetryContext": "context",
    "RetryContextCache": "cache",
    "RetryDecision": "policy",
    "RetryError": "errors",
    "RetryListener": "listener",
    "RetryPolicy": "policy",
    "RetryState": "state",
    "RetryTemplate": "template",
    "ScheduleBackOffPolicy": "backoff",
    "SimpleRetryPolicy": "policy",
    "StatisticsListener": "listener",
    "SystemClock": "clock",
    "TerminatedRetryError": "errors",
    "TimeoutRetryPolicy": "policy",
    "UniformRandomBackOffPolicy": "backoff",
    "circuit_breaker": "decorators",
    "current_context": "context",
    "retryable": "decorators",
    "veto": "context",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    value = globals()[name] = getattr(import_module(f"retrykit.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
