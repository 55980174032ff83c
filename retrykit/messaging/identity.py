"""By what a message is known again at its next delivery: `by_header`, `by_content`.

A broker that gives each message an id of its own for good (ActiveMQ's `message-id`) needs neither. On others the id is
the producer's to set, and what is not there cannot be made up for without a price: which one is the user's choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.failure import message_of

Identify = Callable[[Mapping[str, str], bytes], str | None]
"""Headers and body of a delivery: the id of its message, or None (or "") when it has none."""

_DIGEST_BYTES: Final = 20
LONGEST: Final = 512
"""Characters of an id; copies and parked messages carry it in headers, whose length brokers bound."""


def _names(value: tuple[Any, ...]) -> tuple[str, ...]:
    for name in value:
        if not isinstance(name, str):
            raise wrong_type("headers", "names of headers", name)
        if not name:
            raise wrong_value("headers", "non-empty names of headers", name)
    return value


@attrs.frozen(init=False)
class by_header:  # noqa: N801 - reads as a phrase: `identify=by_header("order-id")`
    """The id is the value of the first of these headers that a message has; its producer sets it.

    Two messages with one value are one message to retrykit: they share their count of attempts, and where completed
    messages are remembered the second is acknowledged unread.
    """

    headers: tuple[str, ...]

    def __init__(self, first: str, *others: str) -> None:
        self.__attrs_init__(_names((first, *others)))

    def __call__(self, headers: Mapping[str, str], body: bytes) -> str | None:
        """The id."""
        return next((value for name in self.headers if (value := headers.get(name))), None)

    def __str__(self) -> str:
        return " or ".join(repr(name) for name in self.headers)


@attrs.frozen(init=False)
class by_content:  # noqa: N801 - reads as a phrase: `identify=by_content()`
    """The id is a digest of the body, its content type, and whatever headers are named: for producers that set no id.

    Two messages with the same content are one message to retrykit, whether they were sent twice by mistake or on
    purpose: they share their count of attempts, and where completed messages are remembered (`remember_completed`) the
    second is acknowledged unread. Name headers that tell them apart, such as a timestamp of the producer's; they must
    be the same at every delivery.

    The digest is BLAKE2b (20 bytes, in hex) over content type, named headers and body. Each part is preceded by its
    length and a colon; a header's value by "=", and one that is absent is an empty part: `11:=text/plain2:=11:a`.
    """

    headers: tuple[str, ...]

    def __init__(self, *headers: str) -> None:
        self.__attrs_init__(_names(headers))

    def __call__(self, headers: Mapping[str, str], body: bytes) -> str:
        """The id."""
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for name in ("content-type", *self.headers):
            value = headers.get(name)
            # A header that is absent is not one that is empty.
            _add(digest, b"" if value is None else b"=" + value.encode("utf-8", "surrogatepass"))
        _add(digest, body)
        return f"content:{digest.hexdigest()}"


def identified_by(identify: Identify, headers: Mapping[str, str], body: bytes) -> str:
    """The id that `identify` finds. `ValueError` says why there is none; its cause is what `identify` raised."""
    try:
        stable: object = identify(headers, body)
    except Exception as error:
        raise ValueError(f"identify= ({identify!r}) raised {type(error).__name__}: {message_of(error)}") from error
    if stable is not None and not isinstance(stable, str):
        raise ValueError(f"identify= ({identify!r}) gave {stable!r:.80}, which is no str")
    if not stable:
        is_named = isinstance(identify, by_header)
        raise ValueError(f"it has no header {identify}" if is_named else f"identify= ({identify!r}) found none")
    return stable


def bounded(stable: str) -> str:
    """The id itself, or a digest in the place of one that is longer than 512 characters: anybody may have set it."""
    if len(stable) <= LONGEST:
        return stable
    return f"digest:{hashlib.blake2b(stable.encode('utf-8', 'surrogatepass'), digest_size=_DIGEST_BYTES).hexdigest()}"


def _add(digest: hashlib.blake2b, part: bytes) -> None:
    digest.update(b"%d:" % len(part))
    digest.update(part)
