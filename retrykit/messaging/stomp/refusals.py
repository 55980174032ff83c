"""What a broker says when it refuses: its ERROR frames in one sentence, and which of them no later try would change."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from retrykit.messaging.errors import BrokerError, BrokerUnavailableError, SubscriptionRefusedError

if TYPE_CHECKING:
    from retrykit.messaging.stomp.profiles import Profile
    from retrykit.messaging.stomp.settings import StompSettings

_LONGEST: Final = 500
_MOST_LINES: Final = 10_000
# Java's: where it happened, and what was underneath.
_STACK: Final = re.compile(r"\n(?:[ \t]+at |Caused by:|[ \t]+\.\.\. \d).*", re.DOTALL)
_CLOSED: Final = "the connection was closed"


def whole_text(message: str, body: bytes) -> str:
    """All that an ERROR frame says, for whoever looks for more than a sentence."""
    text = body[:_MOST_LINES].decode("utf-8", "replace")
    return f"{message}\n{text}".strip()


def sentence(message: str, body: bytes) -> str:
    """The same in one line of at most 500 characters: without Java's stack, and nothing said twice."""
    detail = " ".join(_STACK.sub("", body[:_MOST_LINES].decode("utf-8", "replace")).split())
    message = " ".join(message.split())
    # RabbitMQ: not_found, and NOT_FOUND - no queue …
    if message.lower() in detail.lower():
        return detail[:_LONGEST]
    return f"{message}: {detail}"[:_LONGEST] if detail else message[:_LONGEST]


def unanswered(reason: str, *, encrypted: bool) -> str:
    """Why a server that was reached has not let us in; what only speaks TLS hangs up without a word."""
    if not encrypted and reason.startswith(_CLOSED):
        return f"{reason} (does it speak TLS? then the URL begins with stomp+ssl://)"
    return reason


def not_subscribed(broker: StompSettings, profile: Profile, error: BrokerError) -> BrokerError:
    """What a SUBSCRIBE that came to nothing means: to be tried again, or never to be accepted as it is."""
    facts = {"broker": broker.name, "answer": error.answer}
    reason = error.__dict__["reason"]
    for words, option in profile.wrong_subscriptions.items():
        if words in error.answer:
            return SubscriptionRefusedError(**facts, reason=f"{option}: {reason}")
    return BrokerUnavailableError(**facts, reason=reason)
