"""Where a broker is: `stomp://user:password@host:port/queue/name` taken apart, its password never shown."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

import attrs

from retrykit.check import wrong_type

_PORT: Final = 61613


@attrs.frozen
class Address:
    """Host, port and credentials; `path` is the destination that the URL names, "" if none."""

    host: str
    port: int
    login: str | None = attrs.field(default=None, repr=False)
    passcode: str | None = attrs.field(default=None, repr=False)
    path: str = ""

    @property
    def name(self) -> str:
        """The address without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"stomp://{host}:{self.port}"


def parse_address(url: object) -> Address:
    """The address that a URL stands for; `ValueError` says what is wrong with it, without repeating it."""
    if not isinstance(url, str):
        raise wrong_type("url", "a str like 'stomp://user:password@host:61613'", url)
    parts = urlsplit(url)
    if parts.scheme != "stomp" or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"url: must look like 'stomp://user:password@host:61613/queue/name', not {redacted(url)!r}")
    return Address(parts.hostname, _port(parts), *_credentials(parts), path=parts.path.rstrip("/"))


def _port(parts: SplitResult) -> int:
    try:
        return parts.port or _PORT
    except ValueError as error:
        raise ValueError(f"url: the port of {parts.hostname!r} must be a number up to 65535") from error


def _credentials(parts: SplitResult) -> tuple[str | None, str | None]:
    login, passcode = (None if part is None else unquote(part) for part in (parts.username, parts.password))
    # A line break would end the header and begin another one: CONNECT frames have no escapes.
    if any(mark in f"{login}{passcode}" for mark in "\r\n\0"):
        raise ValueError("url: a user name or password with a line break or NUL cannot be sent")
    return login, passcode


def redacted(url: Any) -> str:
    """The URL with `***` for the password: for `repr` and messages, so it takes anything."""
    head, at, tail = str(url).rpartition("@")
    if not at:
        return tail
    scheme, slashes, credentials = head.rpartition("//")
    return f"{scheme}{slashes}{credentials.partition(':')[0]}:***@{tail}"
