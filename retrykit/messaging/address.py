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
    parts = _split(url)
    if parts is None or parts.scheme != "stomp" or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"url: must look like 'stomp://user:password@host:61613/queue/name', not {redacted(url)!r}")
    if "@" in parts.path:
        # The password ended at its first slash, and what follows would be shown as a destination.
        raise ValueError(f"url: '@' after the host: write '/' in a password as %2F, not {redacted(url)!r}")
    return Address(parts.hostname, _port(parts), *_credentials(parts), path=parts.path.rstrip("/"))


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        parts.hostname  # noqa: B018 - some faults show here only
    except ValueError:
        return None  # what is wrong is told with parts of the URL, which may be the password's
    return parts


def _port(parts: SplitResult) -> int:
    try:
        return parts.port or _PORT
    except ValueError:
        # The cause quotes what it took for a port: the password, when that has a slash in it.
        msg = "url: the port must be a number up to 65535 (write '/' in a password as %2F)"
        raise ValueError(msg) from None


def _credentials(parts: SplitResult) -> tuple[str | None, str | None]:
    login, passcode = (None if part is None else unquote(part) for part in (parts.username, parts.password))
    # A line break would end the header and begin another one: CONNECT frames have no escapes.
    if any(mark in f"{login}{passcode}" for mark in "\r\n\0"):
        raise ValueError("url: a user name or password with a line break or NUL cannot be sent")
    return login, passcode


def redacted(url: Any) -> str:
    """The URL with `***` for the password: for `repr` and messages, so it takes anything, however it is written."""
    head, at, tail = str(url).rpartition("@")
    if not at:
        return tail
    scheme, slashes, credentials = head.partition("//")
    if not slashes:
        scheme, credentials = "", scheme
    login, colon, _ = credentials.partition(":")
    return f"{scheme}{slashes}{login if colon else ''}{colon}***@{tail}"
