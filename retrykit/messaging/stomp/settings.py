"""What one says of a STOMP broker, checked: `StompSettings`."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from retrykit.check import as_seconds, callable_with, more_than, whole, wrong_type, wrong_value
from retrykit.messaging.headers import check_headers, given_headers
from retrykit.messaging.identity import Identify
from retrykit.messaging.stomp.address import Servers, can_be_sent, located, parse_servers, redacted
from retrykit.messaging.stomp.failover import Rota
from retrykit.messaging.stomp.places import misplaced, of_one_name
from retrykit.messaging.stomp.profiles import Profile, to_profile

Credentials = Callable[[], tuple[str, str]]

# What the session says itself, and by which option.
_RESERVED: Final = {
    "id": "the session's own",
    "ack": "always client-individual",
    "receipt": "the session's own",
    "transaction": "the session's own",
    "destination": "destination=",
    "activemq.prefetchSize": "prefetch=",
    "prefetch-count": "prefetch=",
    "selector": "selector=",
    "activemq.subscriptionName": "durable=",
}


def _subscribe_headers(value: Any) -> dict[str, str]:
    """An attrs converter: headers of SUBSCRIBE, without those that are said otherwise."""
    given = given_headers("subscribe", value)
    for name in given:
        if name in _RESERVED:
            raise ValueError(f"subscribe: {name!r} is reserved: {_RESERVED[name]}")
    return given


def _declared(value: Any) -> dict[str, str]:
    return given_headers("declare", value)


def _is_text(_instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise wrong_type(field.name, "a str", value)


def _is_filled_text_or_none(instance: Any, field: Any, value: Any) -> None:
    if value is None:
        return
    _is_text(instance, field, value)
    if not value.strip() or not can_be_sent(value):
        raise wrong_value(field.name, "a text of one line, or None", value)


def _is_context_or_none(_instance: Any, field: Any, value: Any) -> None:
    if value is not None and not isinstance(value, ssl.SSLContext):
        raise wrong_type(field.name, "an ssl.SSLContext", value)


def _gives_credentials(_instance: Any, field: Any, value: Any) -> None:
    if value is not None and (not callable(value) or inspect.iscoroutinefunction(value)):
        # Not shown: it may be what it should give.
        wanted = "a plain function that gives (login, passcode)"
        raise TypeError(f"{field.name}: must be {wanted}, not {type(value).__name__}")


@attrs.frozen
class StompSettings:
    """A STOMP broker and a destination there, as `retrykit.messaging.stomp.StompBroker` explains them."""

    url: str = attrs.field(repr=redacted)
    destination: str = attrs.field(default="", kw_only=True, validator=_is_text)
    prefetch: int = attrs.field(default=1, kw_only=True, validator=whole(1))
    profile: Profile | None = attrs.field(default=None, kw_only=True, converter=to_profile)
    identify: Identify | None = attrs.field(default=None, kw_only=True, validator=callable_with("headers", "body"))
    credentials: Credentials | None = attrs.field(default=None, kw_only=True, repr=False, validator=_gives_credentials)
    ssl_context: ssl.SSLContext | None = attrs.field(default=None, kw_only=True, validator=_is_context_or_none)
    declare: Mapping[str, str] = attrs.field(factory=dict, kw_only=True, converter=_declared, hash=False)
    subscribe: Mapping[str, str] = attrs.field(factory=dict, kw_only=True, converter=_subscribe_headers, hash=False)
    selector: str | None = attrs.field(default=None, kw_only=True, validator=_is_filled_text_or_none)
    durable: str | None = attrs.field(default=None, kw_only=True, validator=_is_filled_text_or_none)
    client_id: str | None = attrs.field(default=None, kw_only=True, validator=_is_filled_text_or_none)
    host: str | None = attrs.field(default=None, kw_only=True, validator=_is_filled_text_or_none)
    heart_beat: float = attrs.field(default=10.0, kw_only=True, converter=as_seconds, validator=more_than(0))
    connect_timeout: float = attrs.field(default=10.0, kw_only=True, converter=as_seconds, validator=more_than(0))
    receipt_timeout: float = attrs.field(default=15.0, kw_only=True, converter=as_seconds, validator=more_than(0))
    send_timeout: float = attrs.field(default=15.0, kw_only=True, converter=as_seconds, validator=more_than(0))
    servers: Servers = attrs.field(init=False, repr=False, eq=False)
    rota: Rota = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        servers = parse_servers(self.url)
        if self.destination and servers.path not in ("", self.destination):
            raise wrong_value("destination", f"the path of the URL ({servers.path!r}) or left out", self.destination)
        object.__setattr__(self, "servers", servers)
        object.__setattr__(self, "rota", Rota(servers))
        object.__setattr__(self, "destination", self.destination or servers.path)
        check_headers({"destination": self.destination}, "destination")
        self._check_secrets()

    def _check_secrets(self) -> None:
        addresses = self.servers.addresses
        if self.ssl_context is not None and not any(address.tls for address in addresses):
            raise ValueError("ssl_context: is of no use without stomp+ssl:// in the URL: nothing would be encrypted")
        if self.credentials is not None and any(address.login or address.passcode for address in addresses):
            raise ValueError("credentials: are given twice, by the URL too: leave one of them out")

    def misplaced(self, destination: str) -> str:
        """Why nothing can be sent to a destination, as far as the profile was given; "" for nothing that is known."""
        return "" if self.profile is None else misplaced(self.profile, destination)

    def reads(self, destination: str) -> bool:
        """Whether what is sent to a destination comes to those who consume here, as far as names tell."""
        return of_one_name(destination) == of_one_name(self.destination)

    @property
    def name(self) -> str:
        """How logs and errors call it; without credentials."""
        return located(self.servers.name, self.destination)
