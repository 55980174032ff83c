"""What distinguishes STOMP brokers: the id that is stable, how a message is given back, how far the broker's word goes.

STOMP leaves redelivery to the server, and servers differ: ABORT gives nothing back on any of them, NACK means the dead
letter queue on one and an immediate requeue on another. A profile is a value; `rabbitmq` will be a third.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.messaging.broker import Capabilities
from retrykit.messaging.recoverers import ID


@attrs.frozen(kw_only=True)
class Profile:
    """One kind of STOMP broker.

    `give_back`: "resubscribe" leaves the subscription and makes a new one, which hands back everything that was
    delivered to the old one; "reconnect" drops the connection, which works everywhere.
    """

    name: str
    server: str
    """What the `server` header of CONNECTED begins with, in lower case; "" for every server."""
    capabilities: Capabilities
    give_back: Literal["resubscribe", "reconnect"]
    id_header: str
    """The header that is the same at every delivery of a message."""
    remedy: str
    """What to do about a message without one."""
    prefetch_header: str | None = None
    """The header of SUBSCRIBE that bounds how many deliveries are on their way at once."""
    text_headers: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    """What marks the body of a SEND as text, for peers that tell text from bytes."""


ACTIVEMQ: Final = Profile(
    name="activemq",
    server="activemq",
    capabilities=Capabilities(atomic_send_and_ack=True, stable_ids=True, flags_while_connected=True),
    give_back="resubscribe",
    id_header="message-id",
    remedy="ActiveMQ gives every message one; is this an ActiveMQ?",
    prefetch_header="activemq.prefetchSize",
    # JMS takes a body with a content-length for bytes, unless it is told.
    text_headers={"amq-msg-type": "text"},
)

GENERIC: Final = Profile(
    name="generic",
    server="",
    capabilities=Capabilities(),
    give_back="reconnect",
    id_header=ID,
    remedy=f"its producer must set the header {ID!r}, or give the broker the id_header that it does set",
)

# In the order in which the server header is compared: the last one fits every server.
PROFILES: Final = (ACTIVEMQ, GENERIC)


def profile_for(server: str) -> Profile:
    """The profile of the broker that calls itself `server` (such as "ActiveMQ/5.17.2")."""
    return next(profile for profile in PROFILES if server.lower().startswith(profile.server))


def to_profile(value: Profile | str | None) -> Profile | None:
    """A profile given by itself or by its name; None: to be taken from the server's own words."""
    if value is None or isinstance(value, Profile):
        return value
    if not isinstance(value, str):
        raise wrong_type("profile", "a name, a Profile or None", value)
    for profile in PROFILES:
        if profile.name == value:
            return profile
    raise wrong_value("profile", f"one of {', '.join(repr(profile.name) for profile in PROFILES)}", value)
