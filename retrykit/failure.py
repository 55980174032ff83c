"""What a history keeps of an exception: its type, words, rendered traceback and causes, but none of its frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

MAX_MESSAGE: Final = 2_000
MAX_TRACEBACK: Final = 8_000
MAX_CAUSES: Final = 10
_MAX_LINES: Final = 400


def type_name(cls: type) -> str:
    """The name that a class has in histories: `module.qualname`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def message_of(error: BaseException) -> str:
    """`str(error)`, bounded, and never raising: the item's own exception may have a broken `__str__`."""
    try:
        text = str(error)
    except Exception as fault:  # noqa: BLE001 - any fault of a user's __str__ must not hide the error it belongs to
        return f"<no message: str() raised {type(fault).__name__}>"
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


class StoredError(Exception):
    """An exception as a history keeps it: its type's name, message, rendered traceback and causes, but none of its
    frames.

    `classes` are the names of its type and all its bases, so that policies classify it as they would the live one.
    """

    def __init__(
        self,
        type: str,  # noqa: A002 - the field's name in the JSON form and in every log
        message: str,
        *,
        classes: tuple[str, ...] = (),
        traceback: str = "",
        cause: StoredError | None = None,
        crash: bool = False,
    ) -> None:
        super().__init__(message)
        self.type = type
        self.message = message
        self.classes = classes or (type,)
        self.traceback = traceback
        self.crash = crash
        self.__cause__ = cause

    def __repr__(self) -> str:
        return f"StoredError({self.type!r}, {self.message!r})"

    def __eq__(self, other: object) -> bool:
        """Equal to a stored error of the same type, message and causes."""
        if not isinstance(other, StoredError):
            return NotImplemented
        mine = (self.type, self.message, self.__cause__)
        return mine == (other.type, other.message, other.__cause__)

    def __hash__(self) -> int:
        return hash((self.type, self.message))

    def __reduce__(self) -> tuple[Any, ...]:
        return error_from_json, (error_to_json(self),)

    @classmethod
    def of(cls, error: BaseException, *, rendered: bool = False) -> StoredError:
        """Describe `error` and its causes; with `rendered`, its traceback too (the last 8,000 characters)."""
        chain: list[BaseException] = []
        link: BaseException | None = error
        while link is not None and len(chain) < MAX_CAUSES and not any(link is seen for seen in chain):
            chain.append(link)
            link = link.__cause__
        inner: StoredError | None = None
        for link in reversed(chain):
            inner = cls._one(link, inner, rendered=rendered and link is error)
        assert inner is not None  # noqa: S101 - the chain has at least the error itself
        return inner

    @classmethod
    def _one(cls, error: BaseException, cause: StoredError | None, *, rendered: bool) -> StoredError:
        if isinstance(error, StoredError):
            return error
        return cls(
            type_name(type(error)),
            message_of(error),
            classes=tuple(type_name(base) for base in type(error).__mro__[:-1]),
            traceback=render(error) if rendered else "",
            cause=cause,
        )

    @classmethod
    def of_crash(cls, fence: int, owner: str, what: str = "attempt") -> StoredError:
        """What is known of an attempt (or recovery) that was started and never ended: who made it."""
        return cls("retrykit.Crash", f"{what} with fence {fence} never ended; it was made by {owner}", crash=True)


Faded = tuple[type[BaseException], str, BaseException | None]


def fade(error: BaseException) -> Faded | BaseException:
    """What to keep of an error when its call is over: enough for words, nothing that pins a frame."""
    if isinstance(error, StoredError):
        return error
    cause = error.__cause__
    return type(error), message_of(error), None if cause is None else StoredError.of(cause)


def from_faded(faded: Faded) -> StoredError:
    """The description of an error that has faded."""
    error_type, message, cause = faded
    classes = tuple(type_name(base) for base in error_type.__mro__[:-1])
    return StoredError(
        type_name(error_type), message, classes=classes, cause=cause if isinstance(cause, StoredError) else None
    )


def stored(error: Any) -> StoredError:
    """The description of an error as a history stores it, its traceback rendered if it still has one."""
    return from_faded(error) if type(error) is tuple else StoredError.of(error, rendered=True)


def summary(error: Any) -> tuple[str, str]:
    """Type and message of an error, live or faded, in one line's length."""
    error_type, message = error[:2] if type(error) is tuple else (type(error), message_of(error))
    if isinstance(error, StoredError):
        return error.type, message[:500]
    return type_name(error_type), message[:500]


def render(error: BaseException) -> str:
    """The traceback of `error` as text, its end kept when it is too long: that is where it happened."""
    try:
        text = _rendered(error) if _is_plain(error) else _rendered_in_full(error)
    except Exception as fault:  # noqa: BLE001 - as in `message_of`
        return f"<no traceback: rendering it raised {type(fault).__name__}>"
    return text if len(text) <= MAX_TRACEBACK else "…" + text[1 - MAX_TRACEBACK :]


def _is_plain(error: BaseException) -> bool:
    """Whether nothing but its own frames and words belongs to it: most failures are of this kind."""
    chained = error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__)
    return not (chained or isinstance(error, BaseExceptionGroup | SyntaxError) or hasattr(error, "__notes__"))


def _rendered_in_full(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def _rendered(error: BaseException) -> str:
    """As the standard library words it, without its marks below the lines: it looks for each source file on the disk
    again, every time, and every failure is stored before anybody hears of it.
    """
    from linecache import getline

    lines = ["Traceback (most recent call last):\n"]
    trace = error.__traceback__
    while trace is not None:
        code, number = trace.tb_frame.f_code, trace.tb_lineno
        lines.append(f'  File "{code.co_filename}", line {number}, in {code.co_name}\n')
        source = getline(code.co_filename, number).strip()
        if source:
            lines.append(f"    {source}\n")
        if len(lines) > _MAX_LINES:
            # A recursion: its beginning and its end say enough.
            del lines[_MAX_LINES // 2 : -_MAX_LINES // 4]
        trace = trace.tb_next
    words = message_of(error)
    kind = type(error)
    named = kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else type_name(kind)
    lines.append(f"{named}: {words}\n" if words else f"{named}\n")
    return "".join(lines)


def error_to_json(error: StoredError) -> dict[str, Any]:
    """The JSON form of a stored error; empty fields are left out."""
    cause = error.__cause__
    fields = {
        "type": error.type,
        "message": error.message,
        "classes": list(error.classes),
        "traceback": error.traceback,
        "cause": error_to_json(cause) if isinstance(cause, StoredError) else None,
        "crash": error.crash,
    }
    return {name: value for name, value in fields.items() if value}


def error_from_json(fields: Mapping[str, Any]) -> StoredError:
    """A stored error from its JSON form."""
    cause = fields.get("cause")
    return StoredError(
        fields.get("type", "?"),
        fields.get("message", ""),
        classes=tuple(fields.get("classes", ())),
        traceback=fields.get("traceback", ""),
        cause=error_from_json(cause) if cause else None,
        crash=fields.get("crash", False),
    )


@attrs.frozen
class ErrorSummary:
    """One failed attempt in a line: `attempt` counts from 1, `at` is seconds since the epoch."""

    attempt: int
    type: str
    message: str
    at: float | None

    def __str__(self) -> str:
        return f"{self.type.rpartition('.')[2]}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """The JSON form: the fields by name."""
        return {"attempt": self.attempt, "type": self.type, "message": self.message, "at": self.at}
