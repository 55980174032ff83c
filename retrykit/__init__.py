"""Retry that survives the rollback: see `RetryTemplate`, `retryable` and `RetryState`."""

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
from retrykit.context import RetryContext, RetryState, current_context, veto
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
