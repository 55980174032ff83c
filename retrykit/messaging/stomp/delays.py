"""How STOMP brokers keep a message back: what a copy is sent with, what it looks like when it comes, and whether the
broker can do it at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from retrykit.message import EXPIRES_AT
from retrykit.messaging.delays import Origin, Way, delay_queue, origin_of
from retrykit.messaging.headers import number_in
from retrykit.messaging.recoverers import COPY_OF, fitting, in_copies
from retrykit.messaging.stomp.java_text import to_java

if TYPE_CHECKING:
    from retrykit.message import Message
    from retrykit.messaging.stomp.profiles import Profile

DELAY: Final = "AMQ_SCHEDULED_DELAY"
JOB: Final = "scheduledJobId"
"""What ActiveMQ's scheduler adds; a message that has it is not kept back again."""

_QUEUES: Final = ("/queue/", "/amq/queue/")
# How a copy came to wait, which is over when it comes.
_OF_THE_WAIT: Final = frozenset(
    {
        COPY_OF,
        DELAY,
        JOB,
        "x-message-ttl",
        "x-expires",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
    }
)
# RabbitMQ tells of the first queue that a message died in, and from version 4 of the last one.
_DEATHS: Final = ("x-first-death-", "x-last-death-")
_PROBE: Final = "/temp-queue/retrykit-probe"


def queue_of(destination: str) -> str:
    """The name of the queue that a destination stands for; "" for what is no queue, such as a topic."""
    return next((destination.removeprefix(start) for start in _QUEUES if destination.startswith(start)), "")


def lack_of(profile: Profile, destination: str, way: Way, delays_are_ignored: Callable[[], bool]) -> str:
    """What a broker lacks to keep back messages of `destination` in this way; "" for nothing."""
    if profile.delays is None or (way == "redeliver" and profile.delays != "scheduler"):
        if profile.delays == "queues":
            return f"brokers of the kind {profile.name!r} can keep back copies only (delay='schedule')"
        return f"nothing is known of the profile {profile.name!r} by which it would keep messages back"
    if destination and not queue_of(destination):
        return f"a copy of a message from {destination!r}, which is no queue, would go to every subscriber"
    if profile.delays == "scheduler" and delays_are_ignored():
        return 'its scheduler is off (schedulerSupport="true" turns it on), so it would deliver at once'
    return ""


def copy_headers(profile: Profile, message: Message, delay: float) -> dict[str, str]:
    """The headers of the SEND that has a copy come to the message's own queue after `delay` seconds.

    Persistent, whatever the original is: it waits long enough to meet a restart. `ValueError` for a message that cannot
    be copied.
    """
    bounded = min(delay, profile.longest_delay)
    queue = queue_of(message.destination)
    if not queue:
        msg = f"{message.destination!r} is no queue"
        raise ValueError(msg)
    end = end_of(message)
    known_by = message.headers.get("message-id", "")
    origin = Origin(message.destination, message.id or "", known_by, early=bounded < delay, end=end)
    ours = {"persistent": "true", COPY_OF: origin.to_header()}
    if profile.delays == "scheduler":
        wait = max(1, round(bounded * 1000))
        ours |= {"destination": message.destination, DELAY: str(wait)}
        if end > wait:
            # The scheduler adds the time that it kept the message.
            ours["expires"] = str(end - wait)
    else:
        waiting = delay_queue(unquote(queue), bounded, time.time())
        ours |= {name: str(value) for name, value in waiting.arguments.items()}
        ours["destination"] = f"/queue/{queue}{waiting.name.removeprefix(unquote(queue))}"
    headers = in_copies(message.headers, makes_queues=profile.delays == "queues") | ours | _form(profile, message)
    # Nothing may be left out: the next attempt is to see the message that this one saw.
    _, long = fitting(headers, profile.longest_header)
    if long:
        msg = f"a header is longer than the {profile.longest_header} bytes that the broker takes: {', '.join(long)}"
        raise ValueError(msg)
    return headers


def end_of(message: Message) -> int:
    """When a message, or the one that it is a copy of, expires: epoch milliseconds; 0 for never.

    Each broker says it otherwise, RabbitMQ by the time that is left when it is sent: there only our own word is known.
    """
    origin = origin_of(message.headers, message.destination)
    if origin is not None:
        return origin.end
    return number_in(message.headers.get("expires") or message.headers.get(EXPIRES_AT))


def has_ended(message: Message) -> bool:
    """Whether it is a copy that has come too late: brokers add the time of the wait, or know no end of what waits."""
    return COPY_OF in message.headers and 0 < end_of(message) <= time.time() * 1000


def _form(profile: Profile, message: Message) -> dict[str, str]:
    """What makes the body the same kind of body: text, for peers that tell it from bytes, or bytes."""
    if profile.text_headers and "content-length" not in message.headers and b"\0" not in to_java(message.body):
        return dict(profile.text_headers)
    return {"content-length": str(len(message.body))}


def as_original(headers: Mapping[str, str], origin: Origin) -> dict[str, str]:
    """The headers of a copy as those of the original; what it says of itself stays."""
    kept = {name: value for name, value in headers.items() if name not in _OF_THE_WAIT}
    waited = f"{unquote(queue_of(origin.destination))}.retry."
    for death in _DEATHS:
        # One that the original died before it came is a fact about it.
        if kept.get(f"{death}queue", "").startswith(waited):
            kept = {name: value for name, value in kept.items() if not name.startswith(death)}
    known = {"message-id": origin.message_id} if origin.message_id else {}
    if "expires" in headers and origin.end:
        known["expires"] = str(origin.end)
    return kept | known | {COPY_OF: headers[COPY_OF]}


def delays_are_ignored(wire: Any, timeout: float) -> bool:
    """Whether ActiveMQ runs without its scheduler: it then delivers at once, with the header that it did not heed.

    Asked with a message to a temporary queue, on a connection that is used for nothing else.
    """
    wire.put("SUBSCRIBE", {"id": "probe", "destination": _PROBE, "ack": "auto"})
    wire.put_confirmed("SEND", {"destination": _PROBE, DELAY: "1"}, b"retrykit asks whether there is a scheduler")
    wire.settle(timeout)
    delivery = wire.delivery(timeout)
    # None: it is being kept back for longer than was asked.
    return delivery is not None and DELAY in delivery.headers
