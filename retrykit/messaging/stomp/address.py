"""Where a broker is: `stomp://user:password@host:port/queue/name` taken apart, its password never shown.

`stomp+ssl://` (or `stomps://`) is the same over TLS; `failover:(stomp://a,stomp://b)` are several servers, of which one
at a time is used.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import attrs

from retrykit.check import shown, wrong_type

# Over TLS or not, and the port where none is named: ActiveMQ and RabbitMQ agree on both.
_SCHEMES: Final = {"stomp": (False, 61613), "stomp+ssl": (True, 61614), "stomps": (True, 61614)}
_LOOKS_LIKE: Final = "'stomp://user:password@host:61613/queue/name' or 'stomp+ssl://…'"
_FAILOVER: Final = re.compile(r"failover:(?://)?\((?P<servers>.*)\)(?:\?(?P<options>[^()]*))?", re.DOTALL)
_SWITCH: Final = {"true": True, "false": False}


@attrs.frozen
class Address:
    """Host, port and credentials; `path` is the destination that the URL names, "" if none."""

    host: str
    port: int
    login: str | None = attrs.field(default=None, repr=False)
    passcode: str | None = attrs.field(default=None, repr=False)
    path: str = ""
    tls: bool = False

    @property
    def name(self) -> str:
        """The address without credentials."""
        return self._written("")

    @property
    def redacted(self) -> str:
        """The URL with `***` for the password."""
        login = "" if self.login is None else self.login
        return self._written(f"{login}:***@" if self.passcode is not None else f"{login}@" if login else "") + self.path

    def _written(self, credentials: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'stomp+ssl' if self.tls else 'stomp'}://{credentials}{host}:{self.port}"


@attrs.frozen
class Servers:
    """The addresses of a URL: one, or those of `failover:(…)`; `randomize` takes them in any order."""

    addresses: tuple[Address, ...]
    randomize: bool = False

    @property
    def name(self) -> str:
        """The addresses without credentials."""
        names = [address.name for address in self.addresses]
        return names[0] if len(names) == 1 else f"failover:({','.join(names)})"

    @property
    def redacted(self) -> str:
        """The URL with `***` for each password."""
        urls = [address.redacted for address in self.addresses]
        return f"failover:({','.join(urls)})?randomize={str(self.randomize).lower()}"

    @property
    def path(self) -> str:
        """The destination that is named, "" if none is."""
        return next((address.path for address in self.addresses if address.path), "")


def parse_servers(url: object) -> Servers:
    """The addresses that a URL stands for; `ValueError` says what is wrong with it, without repeating a password."""
    if not isinstance(url, str):
        raise wrong_type("url", "a str like 'stomp://user:password@host:61613'", url)
    if not url.startswith("failover:"):
        return Servers((parse_address(url),))
    found = _FAILOVER.fullmatch(url)
    if found is None:
        wanted = "'failover:(stomp://a:61613,stomp://b:61613)?randomize=false'"
        raise ValueError(f"url: must look like {wanted}, not {_masked(url)!r}")
    # A comma in a password would end the address, and what is quoted of the rest would be the password's.
    addresses = tuple(parse_address(one.strip(), part_of=url) for one in found["servers"].split(","))
    if len({address.path for address in addresses} - {""}) > 1:
        raise ValueError(f"url: its addresses must name one destination, not several: {_masked(url)!r}")
    if len({address.tls for address in addresses}) > 1:
        # Whoever can keep a server from answering would be told the password in clear by the next one.
        raise ValueError(f"url: its addresses must all be encrypted, or none of them: {_masked(url)!r}")
    return Servers(addresses, _randomize(found["options"] or ""))


def without_path(url: str) -> str:
    """The URL, of one server or several, that names no destination."""
    path = parse_servers(url).path
    # Where an address ends: a host may be called as its queue is.
    return re.sub(rf"(?<!/){re.escape(path)}/*(?=\s*(?:[,)]|$))", "", url) if path else url


def _randomize(options: str) -> bool:
    given = dict(parse_qsl(options, keep_blank_values=True))
    for name in given:
        if name != "randomize":
            known = "only the option randomize is known here; the pauses between rounds are the container's `reconnect`"
            raise ValueError(f"url: {known}, not {shown(name)}")
    value = given.get("randomize", "true")
    if value not in _SWITCH:
        raise ValueError(f"url: randomize must be true or false, not {shown(value)}")
    return _SWITCH[value]


def parse_address(url: object, *, part_of: str | None = None) -> Address:
    """The address that a URL stands for; `ValueError` says what is wrong with it, without repeating it.

    `part_of`: the URL that is shown, where this is a part of another one.
    """
    if not isinstance(url, str):
        raise wrong_type("url", "a str like 'stomp://user:password@host:61613'", url)
    told = _masked(url if part_of is None else part_of)
    parts = _split(url)
    if parts is None or parts.scheme not in _SCHEMES or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"url: must look like {_LOOKS_LIKE}, not {told!r}")
    if "@" in parts.path:
        # The password ended at its first slash, and what follows would be shown as a destination.
        raise ValueError(f"url: '@' after the host: write '/' in a password as %2F, not {told!r}")
    tls, port = _SCHEMES[parts.scheme]
    return Address(parts.hostname, _port(parts) or port, *_credentials(parts), path=parts.path.rstrip("/"), tls=tls)


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        parts.hostname  # noqa: B018 - some faults show here only
    except ValueError:
        return None  # what is wrong is told with parts of the URL, which may be the password's
    return parts


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:
        # The cause quotes what it took for a port: the password, when that has a slash in it.
        msg = "url: the port must be a number up to 65535 (write '/' in a password as %2F, ',' as %2C)"
        raise ValueError(msg) from None


def _credentials(parts: SplitResult) -> tuple[str | None, str | None]:
    login, passcode = (None if part is None else unquote(part) for part in (parts.username, parts.password))
    if not can_be_sent(login, passcode):
        raise ValueError("url: a user name or password with a line break or NUL cannot be sent")
    return login, passcode


def can_be_sent(*texts: str | None) -> bool:
    """Whether CONNECT, whose frame has no escapes, can carry these: a line break would begin another header."""
    return not any(mark in f"{text}" for text in texts for mark in "\r\n\0")


def redacted(url: Any) -> str:
    """The URL with `***` for the password: for `repr` and messages, so it takes anything, however it is written."""
    text = str(url)
    if text.startswith("failover:"):
        try:
            return parse_servers(text).redacted
        except ValueError:
            return _masked(text)
    return _masked(text)


def located(servers: str, destination: str) -> str:
    """A destination at its servers, for logs and errors: as in a URL, where it can stand in one."""
    return f"{servers}{destination}" if destination.startswith("/") or not destination else f"{servers} {destination}"


def _masked(url: str) -> str:
    """Everything between the first colon and the last '@' is masked: it may be a password, or several."""
    head, at, tail = url.rpartition("@")
    if not at:
        return tail
    scheme, slashes, credentials = head.partition("//")
    if not slashes:
        scheme, credentials = "", scheme
    login, colon, _ = credentials.partition(":")
    return f"{scheme}{slashes}{login if colon else ''}{colon}***@{tail}"
