"""What a header of a message can carry, whoever sends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from retrykit.check import wrong_type

_DIGITS: Final = 19


def check_headers(headers: Mapping[str, str], given_as: str = "headers") -> None:
    """`ValueError` for what no header of a frame can carry: a NUL would end the frame, half a character is none."""
    for name, value in headers.items():
        if not name:
            raise ValueError(f"{given_as}: the name of a header must not be empty")
        if "\0" in name or "\0" in value:
            raise ValueError(f"{given_as}: {name!r} has a NUL in it, which cannot be sent over STOMP")
        try:
            f"{name}{value}".encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{given_as}: {name!r} cannot be sent as UTF-8: {error.reason}") from None


def given_headers(given_as: str, value: Any) -> dict[str, str]:
    """A mapping of names to texts that frames can carry; `TypeError` or `ValueError` for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for item in value.items() for text in item):
        raise wrong_type(given_as, "a mapping of str to str", value)
    check_headers(value, given_as)
    return dict(value)


def number_in(text: str | None) -> int:
    """The whole number that a header says; 0 for none, and for what anybody may have written there instead.

    Python refuses to read thousands of digits.
    """
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < _DIGITS else 0


def line_size(name: str, value: str) -> int:
    """How many bytes a header takes in a STOMP frame, without the end of its line."""
    return escaped_size(name) + 1 + escaped_size(value)


def escaped_size(text: str) -> int:
    """How many bytes a header's value takes in a STOMP frame; brokers bound the line (ActiveMQ: 10,241)."""
    return len(text.encode("utf-8", "surrogatepass")) + sum(text.count(mark) for mark in ":\\\r\n")
