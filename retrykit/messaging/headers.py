"""What a header of a message can carry, whoever sends it."""

from __future__ import annotations

from collections.abc import Mapping


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
