"""What people write and read: durations, instants, keys; text that cannot take a terminal over."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from retrykit.key import Key, check_key, key_from_json

_UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_PART: Final = r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)"
_DURATION: Final = re.compile(rf"{_PART}(?:\s*{_PART})*", re.IGNORECASE)
_SCALE: Final = ((86_400, "d"), (3_600, "h"), (60, "min"))


def safe(text: str, *, lines: bool = False) -> str:
    """Text whose characters all show: what would command the terminal is written as an escape.

    `lines`: line ends and tabs are left as they are.
    """
    kept = "\n\t" if lines else ""
    return "".join(letter if letter.isprintable() or letter in kept else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def shown_body(body: bytes, limit: int) -> str:
    """A body as text if it is UTF-8 and all of it prints, else in hexadecimal; at most `limit` bytes of it."""
    part = body[:limit]
    try:
        text = part.decode("utf-8")
    except UnicodeDecodeError as error:
        # A letter that the limit cut through is no reason to call it binary.
        text = part[: error.start].decode("utf-8") if len(part) < len(body) and error.start > limit - 4 else "\0"
    if not all(letter.isprintable() or letter in "\r\n\t" for letter in text):
        text = part.hex(" ")
    more = f"\n… {len(body)} bytes in all" if len(body) > len(part) else ""
    return text.replace("\r\n", "\n").replace("\r", "\n") + more


def relative(instant: datetime, now: datetime) -> str:
    """How far from now: "12 s ago", "in 3 h"."""
    seconds = (instant - now).total_seconds()
    words = duration(abs(seconds))
    return f"in {words}" if seconds > 0 else f"{words} ago"


def duration(seconds: float) -> str:
    """A length of time in its largest unit: "12 s", "3 min", "5 h", "8 d"."""
    for size, unit in _SCALE:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# Callbacks of options.


def as_duration(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Seconds, written `90s`, `15m`, `2h`, `7d`, `1h30m`."""
    seconds = None if value is None else _seconds(value)
    if value is not None and (seconds is None or seconds >= timedelta.max.total_seconds()):
        unit = f": write {value}s for seconds" if value.isascii() and value.isdecimal() and int(value) else ""
        raise click.BadParameter(f"{value!r} is no duration such as 90s, 15m, 2h, 7d, 1h30m{unit}")
    if seconds == 0:
        raise click.BadParameter(f"must be more than 0, not {value!r}")
    return seconds


def as_instant(_ctx: click.Context, _param: click.Parameter, value: str | None) -> datetime | None:
    """A moment: how long ago (`2h`), or ISO 8601 (`2026-11-22`, `2026-11-22T06:00Z`); local time where none is said."""
    if value is None:
        return None
    try:
        ago = _seconds(value)
        if ago is not None:
            return datetime.now(UTC) - timedelta(seconds=ago)
        return datetime.fromisoformat(value).astimezone(UTC)
    except (ValueError, OverflowError, OSError) as error:
        wanted = "neither how long ago (2h, 7d) nor a date or time (2026-11-22T06:00Z)"
        raise click.BadParameter(f"{value!r} is {wanted}") from error


def as_key(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Key | None:
    """A key in its JSON form: 7, {"bytes": "6d31"}, ["/queue/orders", "ID:1"]."""
    if value is None:
        return None
    try:
        key: Any = key_from_json(json.loads(value))
        check_key(key)
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        wanted = '7, "m-1", {"bytes": "6d31"} or ["/queue/orders", "ID:1"]'
        raise click.BadParameter(f"{value!r} is no key in its JSON form, such as {wanted}") from error
    return key  # type: ignore[no-any-return]


def _seconds(text: str) -> float | None:
    if not _DURATION.fullmatch(text.strip()):
        return None
    return sum(float(number) * _UNITS[unit.lower()] for number, unit in re.findall(_PART, text, re.IGNORECASE))
