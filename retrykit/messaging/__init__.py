"""Consuming messages with retry: the listener container, the broker protocol, and what becomes of poison messages.

Brokers: `retrykit.messaging.memory.MemoryBroker`, `retrykit.messaging.stomp.StompBroker` (extra `stomp`).
"""

from __future__ import annotations

from retrykit.message import Ack, Discard, Message, Park, Parked, Redeliver, Republish, Settlement
from retrykit.messaging.broker import Broker, Capabilities, Session
from retrykit.messaging.container import ListenerContainer
from retrykit.messaging.counters import Counters
from retrykit.messaging.errors import (
    BrokerError,
    BrokerRefusedError,
    BrokerUnavailableError,
    ConnectionLostError,
    CredentialsError,
    DelayUnavailableError,
    HandlerExitError,
    LoginRefusedError,
    NoStableIdError,
    NotSupportedError,
    SendInDoubtError,
    SubscriptionRefusedError,
)
from retrykit.messaging.group import ContainerGroup
from retrykit.messaging.identity import Identify, by_content, by_header
from retrykit.messaging.publisher import OutgoingMessage, Publisher
from retrykit.messaging.readiness import ConsumerHealth, Health
from retrykit.messaging.recoverers import Recoverer, discard, park, republish
from retrykit.messaging.registry import Consumers

__all__ = [
    "Ack",
    "Broker",
    "BrokerError",
    "BrokerRefusedError",
    "BrokerUnavailableError",
    "Capabilities",
    "ConnectionLostError",
    "ConsumerHealth",
    "Consumers",
    "ContainerGroup",
    "Counters",
    "CredentialsError",
    "DelayUnavailableError",
    "Discard",
    "HandlerExitError",
    "Health",
    "Identify",
    "ListenerContainer",
    "LoginRefusedError",
    "Message",
    "NoStableIdError",
    "NotSupportedError",
    "OutgoingMessage",
    "Park",
    "Parked",
    "Publisher",
    "Recoverer",
    "Redeliver",
    "Republish",
    "SendInDoubtError",
    "Session",
    "Settlement",
    "SubscriptionRefusedError",
    "by_content",
    "by_header",
    "discard",
    "park",
    "republish",
]
