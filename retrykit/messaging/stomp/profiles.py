"""What distinguishes STOMP brokers: the id that is stable, how a message is given back, how far the broker's word goes.

STOMP leaves redelivery to the server, and servers differ: ABORT gives nothing back on any of them, NACK means the dead
letter queue on one and an immediate requeue on another. A profile is a value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.messaging.broker import Capabilities
from retrykit.messaging.identity import Identify, by_header
from retrykit.messaging.recoverers import ID


@attrs.frozen(kw_only=True)
class Profile:
    """One kind of STOMP broker.

    `give_back`: "resubscribe" leaves the subscription and makes a new one, which hands back everything that was
    delivered to the old one; "nack" says NACK, outside of any transaction; "reconnect" drops the connection, which
    works everywhere.

    `commit`: "together" puts sends and acknowledgement into one transaction, and believes the receipts within it;
    "sends first" commits the sends, waits until each is confirmed, and acknowledges then: what is lost in between is
    delivered and sent again, never lost.
    """

    name: str
    server: str
    """What the `server` header of CONNECTED begins with, in lower case; "" for every server."""
    capabilities: Capabilities
    give_back: Literal["resubscribe", "nack", "reconnect"]
    commit: Literal["together", "sends first"]
    identify: Identify
    """What is the same at every delivery of a message."""
    remedy: str
    """What to do about a message without that."""
    id_of_sends: str | None = None
    """The header that gives what is sent its id, where the broker gives none itself."""
    longest_header: int | None = None
    """How many bytes the line of a header may have, escaped, without its end; None: as many as anybody sends."""
    prefetch_header: str | None = None
    """The header of SUBSCRIBE that bounds how many deliveries are on their way at once."""
    text_headers: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    """What marks the body of a SEND as text, for peers that tell text from bytes; text is then written as Java does."""
    names_virtual_hosts: bool = False
    """CONNECT's `host` header is a virtual host of the broker: left out where none is named."""
    tells_routes: bool = False
    """MESSAGE's `destination` header is the route by which it came this time, not the queue."""
    counting_queues: bool = False
    """Quorum queues count deliveries in the header `x-delivery-count`."""
    browses: bool = False
    """SUBSCRIBE with the header `browser` shows what lies in a queue, and takes nothing."""
    places: tuple[str, ...] = ()
    """How a destination with a slash in front must begin; empty: nothing is known of that."""
    makes_any_place: bool = False
    """Any other one would silently be a queue of that name, and is no error."""
    made_queues: str = "/queue/"
    """How a destination begins that is to be found, not made, where those are told apart."""
    delays: Literal["scheduler", "queues"] | None = None
    """How the broker keeps a message back: its scheduler does, or a queue whose messages go on after a while."""
    longest_delay: float = 0.0
    """Seconds; longer delays are kept in several turns."""
    selectors: bool = False
    """SUBSCRIBE's `selector` is obeyed."""
    durable: Literal["by client", "by name"] | None = None
    """Whose a durable subscription is: of one client's id and a name, or of all that use its name."""
    expiry: Literal["expires", "expiration"] | None = None
    """The header that ends a message: `expires` at an instant, `expiration` after a time; in milliseconds."""
    wrong_subscriptions: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    """Words in the ERROR that answers a SUBSCRIBE which is wrong for good, and what of it is."""
    not_refusals: tuple[str, ...] = ()
    """How the `message` header of an ERROR begins that is about the connection, not about what was sent on it."""


ACTIVEMQ: Final = Profile(
    name="activemq",
    # With its slash: Artemis calls itself ActiveMQ-Artemis, and is another one.
    server="activemq/",
    capabilities=Capabilities(
        atomic_send_and_ack=True, stable_ids=True, flags_while_connected=True, delayed_copies=True
    ),
    give_back="resubscribe",
    commit="together",
    identify=by_header("message-id"),
    remedy="ActiveMQ gives every message one; is this an ActiveMQ?",
    # Measured: what is longer is answered with an ERROR, and the connection closed.
    longest_header=10_241,
    prefetch_header="activemq.prefetchSize",
    # JMS takes a body with a content-length for bytes, unless it is told.
    text_headers={"amq-msg-type": "text"},
    selectors=True,
    durable="by client",
    wrong_subscriptions={"InvalidSelectorException": "selector"},
    expiry="expires",
    browses=True,
    places=("/queue/", "/topic/", "/temp-queue/", "/temp-topic/", "/remote-temp-queue/", "/remote-temp-topic/"),
    makes_any_place=True,
    delays="scheduler",
    longest_delay=365 * 86_400.0,
)

AMQP_ID: Final = "amqp-message-id"

RABBITMQ: Final = Profile(
    name="rabbitmq",
    server="rabbitmq",
    # 30 minutes is its `consumer_timeout`, where nobody has set another one.
    capabilities=Capabilities(delayed_copies=True, longest_hold=1_800.0),
    give_back="nack",
    # A transaction there is a list of frames that are carried out one by one at COMMIT, whatever becomes of the others;
    # the receipts of its sends come after that of the COMMIT.
    commit="sends first",
    # Never `message-id`: that is a handle of one delivery.
    identify=by_header(AMQP_ID, ID),
    remedy=(
        f"its producer must set the header {AMQP_ID!r} (in AMQP the property message_id); or choose by what else to "
        "know it: StompBroker(identify=by_header(…)) or, with care, by_content()"
    ),
    id_of_sends=AMQP_ID,
    # The bound of its newer versions.
    longest_header=102_400,
    prefetch_header="prefetch-count",
    names_virtual_hosts=True,
    tells_routes=True,
    counting_queues=True,
    durable="by name",
    expiry="expiration",
    delays="queues",
    # The arguments of queues are milliseconds in 32 bits.
    longest_delay=30 * 86_400.0,
    made_queues="/amq/queue/",
    places=("/queue/", "/topic/", "/exchange/", "/amq/queue/", "/temp-queue/", "/reply-queue/"),
    wrong_subscriptions={
        "Unknown destination": "destination",
        "PRECONDITION_FAILED": "declare has to say how the queue was made",
    },
    not_refusals=(
        "AMQP channel died",
        "Server cancelled subscription",
        "connection_forced",
        "internal_error",
        "resource_error",
    ),
)

# Before 3.12 it bounds nothing (measured with 3.10: a header of 1 MB).
_UNBOUNDED_RABBITMQ: Final = attrs.evolve(RABBITMQ, longest_header=None)
_BOUNDED_SINCE: Final = (3, 12)

GENERIC: Final = Profile(
    name="generic",
    server="",
    capabilities=Capabilities(),
    give_back="reconnect",
    commit="sends first",
    identify=by_header(ID),
    remedy=f"its producer must set the header {ID!r}; or say which one it sets: StompBroker(identify=by_header(…))",
    id_of_sends=ID,
    # The least that is known of any: copies keep to it, and nothing is refused for it.
    longest_header=10_240,
)

# In the order in which the server header is compared: the last one fits every server.
PROFILES: Final = (ACTIVEMQ, RABBITMQ, GENERIC)


def profile_for(server: str) -> Profile:
    """The profile of the broker that calls itself `server` (such as "ActiveMQ/5.17.2")."""
    found = next(profile for profile in PROFILES if server.lower().startswith(profile.server))
    return _UNBOUNDED_RABBITMQ if found is RABBITMQ and _is_older(server) else found


def _is_older(server: str) -> bool:
    version = re.search(r"/(\d{1,6})\.(\d{1,6})", server)
    return version is not None and (int(version[1]), int(version[2])) < _BOUNDED_SINCE


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
