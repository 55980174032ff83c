"""What is sent, in the words of one kind of broker: its id, its end, its length, what marks it as text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from retrykit.message import EXPIRES_AT
from retrykit.messaging.headers import check_headers, line_size
from retrykit.messaging.recoverers import COPY_OF, ID
from retrykit.messaging.stomp.java_text import is_text, to_java
from retrykit.messaging.stomp.places import misplaced

if TYPE_CHECKING:
    from retrykit.messaging.stomp.profiles import Profile
    from retrykit.messaging.stomp.settings import StompSettings

_LENGTH: Final = "content-length"
_SHOWN: Final = 60


def outgoing(
    destination: str, body: bytes, headers: Mapping[str, str], *, broker: StompSettings, profile: Profile
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a SEND, persistent unless the headers say otherwise, and with a stable id.

    `ValueError` for what cannot be said to this kind of broker.
    """
    check_headers({"destination": destination, **headers})
    if fault := misplaced(profile, destination):
        raise ValueError(f"destination: {fault}")
    special = _name(profile, headers) | _expiry(profile, headers)
    marks = profile.text_headers if is_text(headers, body) else {}
    ours = {"destination": destination}
    if marks:
        body = to_java(body)
    else:
        ours[_LENGTH] = str(len(body))
    declared = broker.declare if destination.startswith("/queue/") else {}
    full = {"persistent": "true", **declared, **headers, **special, **marks, **ours}
    # Headers that were a copy's: what is sent here is a message of its own, and would be taken for the original.
    full.pop(COPY_OF, None)
    if full["persistent"] == "false":
        # Nothing says the same everywhere; "false" makes RabbitMQ want a queue that goes with this connection.
        del full["persistent"]
    _check_length(full, profile)
    return full, body


def _check_length(headers: Mapping[str, str], profile: Profile) -> None:
    """`ValueError` for a header with which the broker would refuse the message, and many of them the connection."""
    if profile.longest_header is None or not profile.server:
        # Of servers of no kind in particular nothing is known for certain.
        return
    for name, value in headers.items():
        if (size := line_size(name, value)) > profile.longest_header:
            what = "destination" if name == "destination" else f"headers: {name[:_SHOWN]!r}"
            limit = f"brokers of the kind {profile.name!r} take lines of at most {profile.longest_header} bytes"
            raise ValueError(f"{what} is too long to be sent: {size} bytes with its name and escapes; {limit}")


def _name(profile: Profile, headers: Mapping[str, str]) -> dict[str, str]:
    """The id of what is sent, where it is not the broker's to give."""
    name = profile.id_of_sends
    return {} if name is None or headers.get(name) else {name: headers.get(ID) or uuid.uuid4().hex}


def _expiry(profile: Profile, headers: Mapping[str, str]) -> dict[str, str]:
    """When the message is to be dropped, in the broker's own words."""
    at = headers.get(EXPIRES_AT)
    if at is None:
        return {}
    match profile.expiry:
        case "expires":
            return {"expires": at}
        case "expiration":
            return {"expiration": str(max(0, int(at) - time.time_ns() // 1_000_000))}
        case _:
            raise ValueError(f"expires_in: how brokers of the kind {profile.name!r} let messages expire is not known")
