"""Topics: each subscription has a queue of its own, and a message becomes a copy in each of them.

Such a queue is called `/topic/NAME > whose`. One that is durable stays when its subscriber leaves, the others go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from retrykit.testing.stomp_server.queues import Message

TOPIC = "/topic/"
_OF = " > "
_DURABLE = "durable "


def is_topic(destination: str) -> bool:
    """Whether this is a topic, or a subscription's queue of one."""
    return destination.startswith(TOPIC)


def queue_name(topic: str, whose: str, *, durable: bool) -> str:
    """The name of a subscription's own queue."""
    return f"{topic}{_OF}{_DURABLE if durable else ''}{whose}"


def topic_of(name: str) -> str:
    """The topic that a queue belongs to; a name of any other kind is itself."""
    return name.partition(_OF)[0] if is_topic(name) else name


def is_durable(name: str) -> bool:
    """Whether the queue outlives its subscriber."""
    return not is_topic(name) or name.partition(_OF)[2].startswith(_DURABLE)


def spread(message: Message, queues: Iterable[str], numbers: Iterator[int]) -> list[Message]:
    """The message itself; of one to a topic a copy for each subscription's queue, numbered anew."""
    if not is_topic(message.destination) or _OF in message.destination:
        return [message]
    own = [name for name in queues if is_topic(name) and topic_of(name) == message.destination]
    return [_copy(message, name, next(numbers)) for name in own]


def _copy(message: Message, queue: str, number: int) -> Message:
    persistent = message.persistent and is_durable(queue)
    return replace(message, number=number, destination=queue, headers=dict(message.headers), persistent=persistent)
