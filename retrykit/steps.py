"""What the flow asks of its drivers: data-only steps. Each says what is to be done; the driver does it and sends back
what came of it.

| step | done by the driver | sent back |
|---|---|---|
| `ATTEMPT` | call the user's function | None, or `(error, monotonic time)` |
| `RECOVER` | call the user's recovery | None, or `(error, monotonic time)` |
| `BEGIN` | open the transaction | None, or `(error, monotonic time)` |
| `COMMIT` | leave the transaction after a success | None, or `(error, monotonic time)` |
| `RollBack(error)` | leave the transaction after a failure | None |
| `JOIN` | see whether the cache can join the open transaction | True or False |
| `Load(key)` | load from the cache | `StoredContext`, None, or the fault |
| `Recent(key)` | ask the cache what this process stored last, without I/O | `StoredContext`, None, or the fault |
| `Save(key, snapshot, expected)` | compare-and-set | the new version, None, or the fault |
| `Remove(key, expected)` | remove | True, False, or the fault |
| `NOW` | read the clock | seconds since the epoch |
| `HOLD` | renew the lease of the present attempt until the call is over | None |
| `Probe(owner)` | see whether a call is still running | True, False, or None: nobody here can know |
| `Pause(seconds)` | spend the time: sleep, await, or hand it to whoever can wait | None, or what interrupted it |
| `Notify(listener, event, arguments)` | tell a listener; `VALUE` stands for the result | None (faults are logged) |
| `Take(budget)` | take a token | True or False |
| `Give(budget)` | deposit | None |
| `Report(what, fault)` | log a fault that nobody else will hear of | None |
| `Died(what, attempt, error, decision)` | log that an attempt (or the recovery after it) never ended | None |

The last step is the outcome: `RETURN` (the value of the last attempt or recovery), `ANSWER_NOTHING` (a duplicate:
None), or `Raise(error)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final


class Step:
    """What the driver is to do. Equality is identity: the steps without data are single objects."""

    __slots__ = ()

    def __repr__(self) -> str:
        names: tuple[str, ...] = self.__slots__
        fields = (f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({', '.join(fields)})"


class Simple(Step):
    """A step that has no data but its name."""

    __slots__ = ("name",)
    name: str

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return str(self.name)


ATTEMPT: Final = Simple("ATTEMPT")
RECOVER: Final = Simple("RECOVER")
BEGIN: Final = Simple("BEGIN")
COMMIT: Final = Simple("COMMIT")
JOIN: Final = Simple("JOIN")
NOW: Final = Simple("NOW")
HOLD: Final = Simple("HOLD")
RETURN: Final = Simple("RETURN")
ANSWER_NOTHING: Final = Simple("ANSWER_NOTHING")
VALUE: Final = Simple("VALUE")
"""Not a step: what stands in one for the result, which only the driver has."""


class RollBack(Step):
    """Leave the transaction: `error` is why."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


class Load(Step):
    """Read the history of a key; through the open transaction if `joined`."""

    __slots__ = ("joined", "key")

    def __init__(self, key: str, *, joined: bool = False) -> None:
        self.key = key
        self.joined = joined


class Recent(Step):
    """What this process stored last under a key, if the cache remembers."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key


class Save(Step):
    """Store a snapshot if the version is still `expected`."""

    __slots__ = ("expected", "joined", "key", "snapshot")

    def __init__(self, key: str, snapshot: Mapping[str, Any], expected: int | None, *, joined: bool = False) -> None:
        self.key = key
        self.snapshot = snapshot
        self.expected = expected
        self.joined = joined


class Remove(Step):
    """Forget a key, if the version is still `expected`."""

    __slots__ = ("expected", "joined", "key")

    def __init__(self, key: str, expected: int | None, *, joined: bool = False) -> None:
        self.key = key
        self.expected = expected
        self.joined = joined


class Probe(Step):
    """Is the call of this name still running?"""

    __slots__ = ("owner",)

    def __init__(self, owner: str) -> None:
        self.owner = owner


class Pause(Step):
    """Spend these seconds (more than 0)."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Notify(Step):
    """Tell one listener of one event."""

    __slots__ = ("arguments", "event", "listener")

    def __init__(self, listener: Any, event: str, arguments: tuple[Any, ...]) -> None:
        self.listener = listener
        self.event = event
        self.arguments = arguments


class Take(Step):
    """Take one token from a shared budget."""

    __slots__ = ("budget",)

    def __init__(self, budget: Any) -> None:
        self.budget = budget


class Give(Step):
    """Deposit into a shared budget."""

    __slots__ = ("budget",)

    def __init__(self, budget: Any) -> None:
        self.budget = budget


class Report(Step):
    """Log a fault; `what` says of which effort."""

    __slots__ = ("fault", "what")

    def __init__(self, what: str, fault: BaseException) -> None:
        self.what = what
        self.fault = fault


class Died(Step):
    """Log that an attempt, or the recovery after it, never ended: who made it cannot. `decision` is what follows."""

    __slots__ = ("attempt", "decision", "error", "what")

    def __init__(self, what: str, attempt: int, error: Any, decision: Any) -> None:
        self.what = what
        self.attempt = attempt
        self.error = error
        self.decision = decision


class Raise(Step):
    """The outcome: the user's own exception as the same object, or one of ours, chained to its cause."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error
