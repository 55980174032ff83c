"""The scenarios' exception classes, and how traces write exceptions: `[type, message]` or `[type, message, cause]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import retrykit.errors
from retrykit.failure import StoredError, error_from_json, type_name

_TREE: Final = """
Throwable
  CustomThrowable
  Error
    VirtualMachineError
      OutOfMemoryError
    AssertionError
  Exception
    IOException
      SocketException
        ConnectException
      FileNotFoundException
    TimeoutException
    InterruptedException
    CheckedAppException
      CheckedTransientException Transient
    RuntimeException
      IllegalStateException
      IllegalArgumentException
        NumberFormatException
      UnsupportedOperationException
      ArithmeticException
      UndeclaredThrowableException
      NullPointerException
      ClassCastException
      AppException
        RetryableAppException
        FatalAppException
          DoomAppException
        TransientAppException Transient
          MixedAppException Permanent
        FlakyAppException VeryTransient
      RetryException
        TerminatedRetryException
        ExhaustedRetryException
        BackOffInterruptedException
        RetryCacheCapacityExceededException
"""


class Scripted(BaseException):
    """An exception that a scenario raises; `message` may be None."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(*([] if message is None else [message]))
        self.message = message


class Transient:
    """Marker interface."""


class VeryTransient(Transient):
    """Marker interface."""


class Permanent:
    """Marker interface."""


MARKERS: Final[dict[str, type]] = {cls.__name__: cls for cls in (Transient, VeryTransient, Permanent)}


def _grow(tree: str) -> Iterator[tuple[str, type[BaseException]]]:
    """Makes a class of every line, below the class of the nearest line above that is indented less."""
    path: list[type[BaseException]] = [Scripted]
    for line in tree.strip().splitlines():
        name, *markers = line.split()
        depth = (len(line) - len(line.lstrip())) // 2 + 1
        bases: tuple[type, ...] = (path[depth - 1], *(MARKERS[marker] for marker in markers))
        if name == "Exception":
            bases = (*bases, Exception)
        cls = type(name, bases, {"__module__": __name__, "__doc__": f"`{name}` of a scenario."})
        del path[depth:]
        path.append(cls)
        yield name, cls


TYPES: Final[dict[str, type[BaseException]]] = dict(_grow(_TREE))


def python_type(name: str) -> type[Exception]:
    """What stands for a class in policies: Exception is Python's own, the base of retrykit's errors too."""
    return Exception if name == "Exception" else TYPES[name]  # type: ignore[return-value]


def is_ordinary(name: str) -> bool:
    """Whether a scenario's exception of that name is an `Exception` in Python."""
    return name in TYPES and issubclass(TYPES[name], Exception)


def lineage(name: str) -> list[str]:
    """A class and its bases below Exception, nearest first."""
    return [
        base.__name__ for base in TYPES[name].__mro__ if is_ordinary(base.__name__) and base.__name__ != "Exception"
    ]


def is_a(name: str, base: str) -> bool:
    """Whether class `name` is `base` or below it."""
    return name in TYPES and base in TYPES and issubclass(TYPES[name], TYPES[base])


def make(value: list[Any]) -> BaseException:
    """A new exception from its value, with its causes."""
    error = TYPES[value[0]](value[1])
    if len(value) > 2:
        error.__cause__ = make(value[2])
    return error


def chain(value: list[Any] | None) -> Iterator[list[Any]]:
    """An exception value and its causes."""
    while value is not None:
        yield value
        value = value[2] if len(value) > 2 else None


OWN: Final[dict[type[Exception], str]] = {
    retrykit.errors.ExhaustedRetryError: "ExhaustedRetryException",
    retrykit.errors.TerminatedRetryError: "TerminatedRetryException",
    retrykit.errors.BackOffInterruptedError: "BackOffInterruptedException",
    retrykit.errors.CacheCapacityError: "RetryCacheCapacityExceededException",
    retrykit.errors.RetryError: "RetryException",
}
"""retrykit's errors under spring-retry's names."""


OWN_NAMES: Final = {type_name(cls): name for cls, name in OWN.items()}


def describe(error: BaseException | None) -> list[Any] | None:
    """The value of an exception as raised, or as a history keeps it; the wording of retrykit's own is left empty."""
    if error is None:
        return None
    stored = error.type if isinstance(error, StoredError) else type_name(type(error))
    message = error.message or "" if isinstance(error, Scripted | StoredError) else ""
    value = [OWN_NAMES[stored], ""] if stored in OWN_NAMES else [stored.rpartition(".")[2], message]
    cause = describe(error.__cause__)
    return value if cause is None else [*value, cause]


def links(error: BaseException) -> list[BaseException]:
    """An exception and its causes."""
    return [error] if error.__cause__ is None else [error, *links(error.__cause__)]


def value_of_snapshot(stored: Mapping[str, Any] | None) -> list[Any] | None:
    """The value of an exception as the JSON form of a history has it."""
    return None if stored is None else describe(error_from_json(stored))
