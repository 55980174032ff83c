"""What a source delivers, and what it is told of it: `Message` and the settlements."""

from __future__ import annotations

import codecs
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, Final

import attrs

from retrykit.check import Seconds, at_least, seconds, wrong_type, wrong_value
from retrykit.key import Key

Sender = Callable[[str, bytes, dict[str, str], "str | None"], None]
"""Sends `(destination, body, headers, id)`."""

EXPIRES_AT: Final = "retrykit-expires-at"
"""The header that says when a message is to be dropped, in epoch milliseconds; a session tells its broker so."""

_HIGHEST_PRIORITY: Final = 9
_STR: Final = {str}
_CHARSET = re.compile(r""";\s*charset\s*=\s*(?:"([^"]*)"|([^\s;"]+))""", re.IGNORECASE)


def is_nonempty_text(_instance: Any, field: Any, value: Any) -> None:
    """An attrs validator: a str with something in it."""
    if not isinstance(value, str):
        raise wrong_type(field.name, "a str", value)
    if not value:
        raise wrong_value(field.name, "a non-empty text", value)


def _body(_instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, bytes):
        raise wrong_type(field.name, "bytes", value)


def _delay(value: Any) -> float:
    return seconds("delay", value)


def _headers(value: Any) -> dict[str, str]:
    # Most headers come from a frame; these need no look at each of them.
    if value.__class__ is dict and {*map(type, value), *map(type, value.values())} <= _STR:
        return value.copy()
    if not isinstance(value, Mapping):
        raise wrong_type("headers", "a mapping of str to str", value)
    for name, content in value.items():
        if not isinstance(name, str) or not isinstance(content, str):
            raise wrong_type("headers", "a mapping of str to str", {name: content})
    return dict(value)


def as_sent(
    body: bytes | str,
    headers: Mapping[str, str] | None = None,
    *,
    priority: int | None = None,
    expires_in: Seconds | None = None,
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a message that is sent now; `TypeError` or `ValueError` names what is wrong.

    The end of another message, whose headers these were, is not this one's.
    """
    if not isinstance(body, bytes | str):
        raise wrong_type("body", "bytes or a str", body)
    full = _headers({} if headers is None else headers)
    full.pop(EXPIRES_AT, None)
    if isinstance(body, str):
        full.setdefault("content-type", "text/plain; charset=utf-8")
    if priority is not None:
        full["priority"] = _priority(priority)
    if expires_in is not None:
        full[EXPIRES_AT] = _deadline(expires_in)
    return body.encode() if isinstance(body, str) else body, full


def _priority(value: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type("priority", "an int", value)
    if not 0 <= value <= _HIGHEST_PRIORITY:
        raise wrong_value("priority", f"from 0 to {_HIGHEST_PRIORITY}", value)
    return str(value)


def _deadline(expires_in: Seconds) -> str:
    length = seconds("expires_in", expires_in)
    if length <= 0:
        raise wrong_value("expires_in", "more than 0", expires_in)
    return str(int((time.time() + length) * 1000))


@attrs.frozen(kw_only=True)
class Message:
    """One delivery of a message by its source.

    `id` is the stable id by which the source knows the message across deliveries, None where it has none; `key` is what
    its history is kept under. `redelivered` is what the source says, a hint (brokers forget it and invent it).
    `delivery_count` is the number of this delivery, from 1, None where the source does not count. `handle` is the
    source's own, for settling this delivery.
    """

    destination: str = attrs.field(validator=is_nonempty_text)
    body: bytes = attrs.field(default=b"", validator=_body)
    headers: Mapping[str, str] = attrs.field(factory=dict, converter=_headers, hash=False)
    id: str | None = None
    key: Key | None = None
    redelivered: bool = False
    delivery_count: int | None = None
    handle: object = attrs.field(default=None, eq=False, repr=False)
    sender: Sender | None = attrs.field(default=None, eq=False, repr=False)
    """What `send` sends with: given by whoever hands the message to its handler."""

    def send(
        self,
        destination: str,
        body: bytes | str,
        headers: Mapping[str, str] | None = None,
        *,
        id: str | None = None,  # noqa: A002 - the header's own word
        priority: int | None = None,
        expires_in: Seconds | None = None,
    ) -> None:
        """Send a message, in the transaction in which this one is acknowledged: both happen, or neither.

        Persistent, and with a stable id (`retrykit-id`): `id`, else one that is the same whenever this message is
        handled again and sends as many before it, so that receivers can tell a repetition. A str is sent as UTF-8, and
        called text/plain unless the headers say what it is. `priority` is a number from 0 to 9, 4 where none is given;
        after `expires_in` seconds nobody gets the message any more. `RuntimeError` outside of a handler or recovery.
        """
        if self.sender is None:
            raise RuntimeError("a message can send while it is handled by a container, not before or after")
        self.sender(destination, *as_sent(body, headers, priority=priority, expires_in=expires_in), id)

    def reply(
        self,
        body: bytes | str,
        headers: Mapping[str, str] | None = None,
        *,
        id: str | None = None,  # noqa: A002 - as in `send`
        priority: int | None = None,
        expires_in: Seconds | None = None,
    ) -> None:
        """Send an answer to where this message wants it (`reply-to`), with its `correlation-id`; else as `send`.

        `ValueError` when it says no place.
        """
        destination = self.headers.get("reply-to")
        if not destination:
            raise ValueError(f"message {self.id!r} has no header 'reply-to': nobody waits for an answer")
        correlation = self.headers.get("correlation-id") or self.headers.get("message-id")
        named = {"correlation-id": correlation} if correlation else {}
        self.send(destination, body, {**named, **(headers or {})}, id=id, priority=priority, expires_in=expires_in)

    @property
    def content_type(self) -> str:
        """The media type in lower case, without its parameters; "" when the message has none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def charset(self) -> str:
        """The charset that the content type names, else "utf-8". An unknown one is a `ValueError` naming it."""
        found = _CHARSET.search(self.headers.get("content-type", ""))
        name = (found.group(1) or found.group(2) or "utf-8") if found else "utf-8"
        try:
            return codecs.lookup(name).name
        except LookupError as error:
            raise ValueError(f"unknown charset {name!r} in the content type of message {self.id!r}") from error

    @property
    def text(self) -> str:
        """The body as text; `UnicodeDecodeError` when the body is not what its content type says."""
        return self.body.decode(self.charset)

    def fingerprint(self) -> str:
        """A digest of the body: it tells apart two messages that were given one key."""
        # Few programs need it, and none before something has failed.
        import hashlib

        return hashlib.blake2b(self.body, digest_size=16).hexdigest()

    def json(self) -> Any:
        """The body as JSON, whatever the content type says it is; `ValueError` when it is not."""
        return json.loads(self.text)


def delivered(**facts: Any) -> Message:
    """A message of a session that knows all about it: every field but `sender`, each of its right type."""
    return _made((*map(facts.__getitem__, _DELIVERED), None))


def with_sender(message: Message, sender: Sender) -> Message:
    """The same message, and it can send."""
    return _made((*_values_of(message)[:-1], sender))


# Two are made for every delivery, of what has been checked before: to do that again would cost as much as all else
# that happens between a frame and its handler.
def _made(values: Iterable[Any]) -> Message:
    made = object.__new__(Message)
    for put, value in zip(_SETTERS.values(), values, strict=True):
        put(made, value)
    return made


_SETTERS: Final = {field.name: getattr(Message, field.name).__set__ for field in attrs.fields(Message)}
_DELIVERED: Final = [name for name in _SETTERS if name != "sender"]
_values_of: Final = attrgetter(*_SETTERS)


@attrs.frozen
class Ack:
    """The message is done with."""


@attrs.frozen
class Redeliver:
    """The message goes back to its source and comes again, after at least `delay` seconds."""

    delay: float = attrs.field(default=0.0, converter=_delay, validator=at_least(0))


@attrs.frozen
class Park:
    """The message is put aside in `destination`, for a person to look at; a copy with these `headers` goes there.

    Returned by a handler that also writes to a database: the two commits are not one, so after a crash between them the
    handler runs again, with completion marks or without.
    """

    destination: str = attrs.field(validator=is_nonempty_text)
    headers: Mapping[str, str] = attrs.field(factory=dict, converter=_headers, hash=False, kw_only=True)
    reason: str = attrs.field(default="", kw_only=True)


@attrs.frozen
class Republish:
    """A copy of the message with these `headers` goes to `destination`; the original is done with.

    With a handler's own writes to a database it is not one commit: see `Park`.
    """

    destination: str = attrs.field(validator=is_nonempty_text)
    headers: Mapping[str, str] = attrs.field(factory=dict, converter=_headers, hash=False, kw_only=True)


@attrs.frozen
class Discard:
    """The message is dropped on purpose; `reason` is logged."""

    reason: str = attrs.field(validator=is_nonempty_text)


@attrs.frozen
class Parked:
    """The message has been put aside, in the transaction that ends now: in `place` (a table, say), under `id` there.

    `park_in_transaction` gives one. A recovery of your own that does so gives one to be counted, and logged, as parked.
    """

    place: str = attrs.field(validator=is_nonempty_text)
    id: int | str
    reason: str = attrs.field(default="", kw_only=True)


Settlement = Ack | Redeliver | Park | Parked | Republish | Discard
SETTLEMENTS: Final = (Ack, Redeliver, Park, Parked, Republish, Discard)
