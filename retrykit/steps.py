"""What the flow asks of its drivers: data-only steps.

Each says what is to be done; the driver does it and sends back what came of it.

| step | done by the driver | sent back |
|---|---|---|
| `ATTEMPT` | call the user's function | None, or `(error, monotonic time)` |
| `RECOVER` | call the user's recovery | None, or `(error, monotonic time)` |
| `BEGIN` | open the transaction | None, or `(error, monotonic time)` |
| `COMMIT` | leave the transaction after a success | None, or `(error, monotonic time)` |
| `RollBack(error)` | leave the transaction after a failure | None |
| `JOIN` | see whether the cache can join the open transaction | True or False |
| `Load(key)` | load from the cache | `StoredContext`, None, or the fault |
| `Save(key, snapshot, expected)` | compare-and-set | the new version, None, or the fault |
| `Remove(key, expected)` | remove | True, False, or the fault |
| `NOW` | read the clock | seconds since the epoch |
| `Probe(owner)` | see whether a process is certainly gone | True or False |
| `Pause(seconds)` | spend the time: sleep, await, or hand it to whoever can wait | None, or what interrupted it |
| `Notify(listener, event, arguments)` | tell a listener; `VALUE` stands for the result | None (faults are logged) |
| `Take(budget)` | take a token | True or False |
| `Give(budget)` | deposit | None |
| `Report(step, fault)` | log a fault that nobody else will hear of | None |

The last step is the outcome: `RETURN` (the value of the last attempt or recovery), `ANSWER_NOTHING` (a duplicate:
None), `Raise` or `RaiseFrom`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs


@attrs.define
class Simple:
    """A step that has no data."""

    name: str

    def __repr__(self) -> str:
        return self.name


ATTEMPT: Final = Simple("ATTEMPT")
RECOVER: Final = Simple("RECOVER")
BEGIN: Final = Simple("BEGIN")
COMMIT: Final = Simple("COMMIT")
JOIN: Final = Simple("JOIN")
NOW: Final = Simple("NOW")
RETURN: Final = Simple("RETURN")
ANSWER_NOTHING: Final = Simple("ANSWER_NOTHING")
VALUE: Final = Simple("VALUE")
"""Not a step: what stands in one for the result, which only the driver has."""


@attrs.define
class RollBack:
    """Leave the transaction: `error` is why."""

    error: BaseException


@attrs.define
class Load:
    """Read the history of a key; through the open transaction if `joined`."""

    key: str
    joined: bool = False


@attrs.define
class Save:
    """Store a snapshot if the version is still `expected`."""

    key: str
    snapshot: Mapping[str, Any]
    expected: int | None
    joined: bool = False


@attrs.define
class Remove:
    """Forget a key, if the version is still `expected`."""

    key: str
    expected: int | None
    joined: bool = False


@attrs.define
class Probe:
    """Is this process certainly gone?"""

    owner: str


@attrs.define
class Pause:
    """Spend these seconds (more than 0)."""

    seconds: float


@attrs.define
class Notify:
    """Tell one listener of one event."""

    listener: Any
    event: str
    arguments: tuple[Any, ...]


@attrs.define
class Take:
    """Take one token from a shared budget."""

    budget: Any


@attrs.define
class Give:
    """Deposit into a shared budget."""

    budget: Any


@attrs.define
class Report:
    """Log a fault; `step` says of what."""

    step: str
    fault: BaseException


@attrs.define
class Raise:
    """The outcome: this very exception of the user's."""

    error: BaseException


@attrs.define
class RaiseFrom:
    """The outcome: our error, chained to its cause."""

    error: BaseException
    cause: BaseException | None


Step = Simple | RollBack | Load | Save | Remove | Probe | Pause | Notify | Take | Give | Report | Raise | RaiseFrom
"""Everything that a flow may yield."""
