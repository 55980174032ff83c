"""What a container may consume, and where it may not park: refused when it is made."""

from __future__ import annotations

import pytest

from retrykit.messaging import Consumers, ListenerContainer, park, republish
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.template import AsyncRetryTemplate, RetryTemplate

ORDERS = "/queue/orders"
OWN = {"template": RetryTemplate(name="shop")}


def handle(message):
    """A handler that does nothing."""


async def handle_later(message):
    """Another one."""


def test_a_container_whose_broker_names_no_destination_is_refused():
    with pytest.raises(ValueError, match=r"broker: must name what is consumed .*, and stomp://host:61613 does not"):
        ListenerContainer(StompBroker("stomp://user:secret@host"), handle, **OWN)
    with pytest.raises(ValueError, match="broker: must name what is consumed"):
        Consumers("stomp://host", **OWN).add("", handle)


@pytest.mark.parametrize(
    ("broker", "place"),
    [
        (StompBroker("stomp://host", destination=ORDERS), ORDERS),
        (StompBroker("stomp://host/queue/orders"), ORDERS),
        (StompBroker("stomp://host/amq/queue/orders"), ORDERS),
        (StompBroker("stomp://host/queue/orders"), "/amq/queue/orders"),
        (StompBroker("stomp://host/topic/prices"), "/topic/prices"),
        (MemoryBroker(ORDERS), ORDERS),
    ],
)
def test_nothing_is_parked_where_it_would_be_consumed_again(broker, place):
    with pytest.raises(ValueError, match=f"recover: must not park in '{place}', which is consumed here"):
        ListenerContainer(broker, handle, recover=park(place), **OWN)
    with pytest.raises(ValueError, match="recover: must not park"):
        ListenerContainer(broker, handle_later, recover=park(place), template=AsyncRetryTemplate(name="shop"))


def test_a_consumer_that_would_park_in_its_own_queue_is_refused_where_it_is_registered():
    consumers = Consumers("stomp://host", recover=park(ORDERS), **OWN)
    with pytest.raises(ValueError, match="recover: must not park in '/queue/orders'"):
        consumers.add(ORDERS, handle)
    consumers.add("/queue/bills", handle)


def test_what_is_sent_on_may_go_to_the_queue_that_it_came_from():
    broker = StompBroker("stomp://host", destination=ORDERS)
    assert ListenerContainer(broker, handle, recover=republish(ORDERS), **OWN).recover == republish(ORDERS)
    assert ListenerContainer(broker, handle, recover=park("/queue/orders.parked"), **OWN).recover is not None
