"""Refusing bad values when they are given, in one wording: the argument, what it must be, and the value."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, Union

if TYPE_CHECKING:
    from datetime import timedelta

Validator = Callable[[Any, Any, Any], None]
Seconds = Union[float, "timedelta"]


def shown(value: object) -> str:
    """The value in an error: its `repr`, bounded; what kind of thing it is, when it has no `repr`."""
    try:
        text = repr(value)
    except Exception as fault:  # noqa: BLE001 - any fault of a foreign __repr__ must not hide that the value is refused
        return f"<{type(value).__name__} whose repr() raised {type(fault).__name__}>"
    return text if len(text) <= 80 else text[:79] + "…"  # noqa: PLR2004 - a line's length


def wrong_type(name: str, wanted: str, value: object) -> TypeError:
    """The error for a value of the wrong kind."""
    return TypeError(f"{name}: must be {wanted}, not {type(value).__name__} {shown(value)}")


def wrong_value(name: str, wanted: str, value: object) -> ValueError:
    """The error for a value of the right kind that is out of range."""
    return ValueError(f"{name}: must be {wanted}, not {shown(value)}")


def seconds(name: str, value: object) -> float:
    """A duration in seconds from a number or a timedelta; finite."""
    if is_timedelta(value):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, "seconds (int, float) or a timedelta", value)
    if not is_finite(value):
        raise wrong_value(name, "finite", value)
    return float(value)


def is_timedelta(value: object) -> TypeGuard[timedelta]:
    """Whether the value is a timedelta.

    There is none before somebody has imported datetime, which costs more than this whole module.
    """
    datetime = sys.modules.get("datetime")
    return datetime is not None and isinstance(value, datetime.timedelta)


def is_finite(number: float) -> bool:
    """Whether a float can hold the number: no infinity, no NaN, no int beyond all bounds."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def as_seconds(value: Seconds) -> float:
    """An attrs converter: a duration becomes a float; what is none is left to the validator, which knows the field."""
    if is_timedelta(value):
        return value.total_seconds()
    return float(value) if type(value) is int and is_finite(value) else value  # type: ignore[return-value]


def as_seconds_or_none(value: Seconds | None) -> float | None:
    """As `as_seconds`, for a duration that may be None."""
    return None if value is None else as_seconds(value)


def at_least(bound: float) -> Validator:
    """An attrs validator: a finite number, `bound` or more; None is let through where the default is None."""

    def check(_instance: Any, field: Any, value: Any) -> None:
        if _is_number(field, value) and not (is_finite(value) and value >= bound):
            raise wrong_value(field.name, f"finite and at least {bound:g}", value)

    return check


def more_than(bound: float, *, optional: bool = False) -> Validator:
    """An attrs validator: a finite number above `bound`; None too if `optional`, or where the default is None."""

    def check(_instance: Any, field: Any, value: Any) -> None:
        if optional and value is None:
            return
        if _is_number(field, value) and not (is_finite(value) and value > bound):
            raise wrong_value(field.name, f"finite and more than {bound:g}", value)

    return check


def _is_number(field: Any, value: Any) -> bool:
    """Whether there is a number to look at; `TypeError` if there is anything else but the permitted None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return True
    if value is None and field.default is None:
        return False
    wanted = "a number" if field.converter is None else "seconds (int, float) or a timedelta"
    raise wrong_type(field.name, wanted, value)


def whole(bound: int, *, optional: bool = False) -> Validator:
    """An attrs validator: an int, `bound` or more; None too if `optional`."""

    def check(_instance: Any, field: Any, value: Any) -> None:
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(field.name, "an int" + (" or None" if optional else ""), value)
        if value < bound:
            raise wrong_value(field.name, f"at least {bound}", value)

    return check


def one_of(*allowed: Any) -> Validator:
    """An attrs validator: one of these very values (1 is not True here)."""

    def check(_instance: Any, field: Any, value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            wanted = "one of " + ", ".join(map(repr, allowed))
            known_type = any(type(value) is type(choice) for choice in allowed)
            raise (wrong_value if known_type else wrong_type)(field.name, wanted, value)

    return check


def is_callable(_instance: Any, field: Any, value: Any) -> None:
    """An attrs validator: something to call."""
    if not callable(value):
        raise wrong_type(field.name, "callable", value)


def is_callable_or_none(instance: Any, field: Any, value: Any) -> None:
    """An attrs validator: something to call, or None."""
    if value is not None:
        is_callable(instance, field, value)


def callable_with(*arguments: str) -> Validator:
    """An attrs validator: what can be called with so many arguments, or None.

    A class is refused: whoever gives one has forgotten to call it.
    """
    wanted = f"callable with ({', '.join(arguments)})"

    def check(_instance: Any, field: Any, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, type):
            raise TypeError(
                f"{field.name}: must be {wanted}, not the class {value.__name__}: {value.__name__}(…) is one"
            )
        if not callable(value) or not takes(value, arguments):
            raise wrong_type(field.name, wanted, value)

    return check


def takes(function: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    """Whether it can be called with so many arguments, as far as it tells."""
    from inspect import signature

    try:
        signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True  # a builtin that does not tell
    return True


def closes_without_commit(manager: object) -> bool:
    """Whether this is a Session or Connection of SQLAlchemy itself, in place of a transaction of it: what is done in it
    is rolled back when it is left.
    """
    if not hasattr(manager, "in_transaction"):
        return False
    leave = getattr(type(manager), "__exit__", None) or getattr(type(manager), "__aexit__", None)
    return str(getattr(leave, "__module__", "")).partition(".")[0] == "sqlalchemy"


def has(*methods: str, optional: bool = False) -> Validator:
    """An attrs validator: an object (not a class) with these methods; None too if `optional`."""

    def check(_instance: Any, field: Any, value: Any) -> None:
        if optional and value is None:
            return
        missing = [method for method in methods if not callable(getattr(value, method, None))]
        if missing or isinstance(value, type):
            wanted = "an object with " + ", ".join(f"{method}()" for method in missing or methods)
            raise wrong_type(field.name, wanted, value)

    return check


def as_types(value: type[Exception] | Iterable[type[Exception]]) -> tuple[type[Exception], ...]:
    """An attrs converter.

    One class, or several, as a tuple; what is neither is left to the validator, which knows the field.
    """
    given: Any = value
    several = hasattr(given, "__iter__") and not isinstance(given, type | str | bytes)
    return tuple(given) if several else (given,)


def are_error_types(_instance: Any, field: Any, value: Any) -> None:
    """An attrs validator: exception classes, as `as_types` gives them."""
    error_types(field.name, value)


def error_types(name: str, value: object) -> tuple[type[Exception], ...]:
    """Exception classes given as one class or an iterable of classes."""
    given = (value,) if isinstance(value, type) else value
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise wrong_type(name, "an exception class or a tuple of them", value)
    types = tuple(given)
    for one in types:
        if not isinstance(one, type) or not issubclass(one, BaseException):
            raise wrong_type(name, "an exception class or a tuple of them", one)
        if not issubclass(one, Exception):
            raise wrong_value(name, "exception classes under Exception (others are never retried)", one)
    return types
