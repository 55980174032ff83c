"""What a subscription is asked for besides its destination: some messages only, and a name under which it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from retrykit.check import wrong_value
from retrykit.messaging.errors import NotSupportedError
from retrykit.messaging.stomp.places import misplaced
from retrykit.messaging.stomp.profiles import Profile

if TYPE_CHECKING:
    from retrykit.messaging.stomp.settings import StompSettings

_OF_EACH: Final = ("/topic/", "/exchange/")


def is_topic(destination: str) -> bool:
    """Whether every subscription gets every message."""
    return destination.startswith(_OF_EACH)


def is_shared_out(broker: StompSettings) -> bool:
    """Whether several sessions share the messages: not if each gets all of them, or only one may be there."""
    if not is_topic(broker.destination):
        return True
    return broker.durable is not None and broker.profile is not None and broker.profile.durable == "by name"


def check_durable(broker: StompSettings) -> None:
    """`ValueError` for what no broker of the kind can do, as far as the kind is known."""
    profile = broker.profile
    if broker.durable is not None and broker.destination and not is_topic(broker.destination):
        raise wrong_value("durable", "left out: a queue keeps its messages anyway", broker.durable)
    try:
        if profile is not None:
            check_supported(broker, profile)
    except NotSupportedError as error:
        raise ValueError(str(error)) from None
    by_name = profile is not None and profile.durable == "by name"
    if broker.durable is not None and broker.client_id is None and not by_name:
        raise ValueError("client_id: must be given with durable=, because the subscription belongs to it (ActiveMQ)")


def check_supported(broker: StompSettings, profile: Profile) -> None:
    """`NotSupportedError` for what this kind of broker would pass over in silence, or never accept."""
    if fault := misplaced(profile, broker.destination):
        raise NotSupportedError(broker=broker.name, reason=f"destination: {fault}")
    if broker.selector is not None and not profile.selectors:
        reason = f"brokers of the kind {profile.name!r} know no selectors, and would deliver everything"
        raise NotSupportedError(broker=broker.name, reason=f"selector: {reason}")
    if broker.durable is not None and profile.durable is None:
        reason = f"how brokers of the kind {profile.name!r} keep subscriptions is not known; say it by subscribe="
        raise NotSupportedError(broker=broker.name, reason=f"durable: {reason}")


def subscription_id(broker: StompSettings, profile: Profile) -> str | None:
    """The id that the subscription must have, where that is what it is known by."""
    return broker.durable if profile.durable == "by name" else None


def headers_for(broker: StompSettings, profile: Profile) -> dict[str, str]:
    """The headers of SUBSCRIBE that say what the options mean to this kind of broker."""
    headers = {**broker.declare, **broker.subscribe}
    if profile.prefetch_header is not None:
        headers[profile.prefetch_header] = str(broker.prefetch)
    if broker.selector is not None:
        headers["selector"] = broker.selector
    if broker.durable is not None:
        headers |= {"activemq.subscriptionName": broker.durable} if profile.durable == "by client" else _KEPT
    return headers


_KEPT: Final = {"durable": "true", "auto-delete": "false"}


def is_lost_when_given_back(broker: StompSettings, profile: Profile) -> bool:
    """Whether a message that is handed back to the broker comes to nobody: a topic delivers once.

    A topic of RabbitMQ is a queue of the subscription's own, and gives it again.
    """
    return is_topic(broker.destination) and profile.give_back != "nack"
