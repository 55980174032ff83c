"""What the limits of other systems mean in attempts: the one table for who comes from there.

| system | its option | means |
|---|---|---|
| `spring` | `maxAttempts=n` | attempts in all |
| `nameko` | `limit=n` of nameko-amqp-retry | retries; 0 is no limit |
| `zato-invoke` | `repeats=n` of `invoke`, everything in the foreground | calls in all |
| `zato-async-fallback` | `repeats=n`, `async_fallback=True` | one call in the foreground, then n in the background |
| `zato-invoke-async` | `repeats=n` of `invoke_async` | calls in the background in all |
| `pretry` | `maxRetry=n` | deliveries that the service makes |
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from retrykit.check import wrong_type, wrong_value

System = Literal["spring", "nameko", "zato-invoke", "zato-async-fallback", "zato-invoke-async", "pretry"]

SYSTEMS: Final[tuple[str, ...]] = get_args(System)
# Attempts that the option does not count: those before the first one that it calls a retry or a repeat.
_UNCOUNTED: Final = {"nameko": 1, "zato-async-fallback": 1}
_ZERO_IS_NO_LIMIT: Final = "nameko"


def max_attempts_of(system: System, limit: int) -> int | None:
    """The `max_attempts` that stands for another system's limit; None is no limit.

    `limit` is 1 or more, for `nameko` also 0. `TypeError` for what is no int, `ValueError` for an unknown system or a
    limit that the system has no sense for.
    """
    if not isinstance(system, str):
        raise wrong_type("system", "a str", system)
    if system not in SYSTEMS:
        raise wrong_value("system", f"one of {', '.join(map(repr, SYSTEMS))}", system)
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise wrong_type("limit", "an int", limit)
    least = 0 if system == _ZERO_IS_NO_LIMIT else 1
    if limit < least:
        raise wrong_value("limit", f"at least {least} for {system!r}", limit)
    return limit + _UNCOUNTED.get(system, 0) if limit else None
