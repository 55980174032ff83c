"""What a MESSAGE frame says, as a `Message`: where it lay, by what it is known again, whether it came before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from retrykit.message import Message, delivered
from retrykit.messaging.delays import origin_of
from retrykit.messaging.errors import NoStableIdError
from retrykit.messaging.headers import number_in
from retrykit.messaging.identity import bounded, identified_by
from retrykit.messaging.recoverers import ID, SENT_BACK
from retrykit.messaging.stomp.delays import as_original
from retrykit.messaging.stomp.java_text import from_java

if TYPE_CHECKING:
    from retrykit.messaging.stomp.frames import Frame
    from retrykit.messaging.stomp.profiles import Profile
    from retrykit.messaging.stomp.settings import StompSettings

_LENGTH: Final = "content-length"


class Incoming:
    """Makes messages of the frames of one session."""

    def __init__(self, broker: StompSettings, profile: Profile) -> None:
        self._broker = broker
        self._profile = profile
        self._routed = profile.tells_routes and broker.destination.startswith(("/queue/", "/amq/queue/"))
        self.counts = profile.counting_queues and broker.declare.get("x-queue-type") == "quorum"
        """Whether the broker counts the deliveries of each message."""

    def message(self, frame: Frame, handle: object) -> Message:
        """The message; `NoStableIdError` if nothing says by what it is known again."""
        headers = frame.headers
        subscribed = self._broker.destination
        destination = subscribed if self._routed else headers.get("destination", subscribed)
        body = from_java(frame.body) if self._profile.text_headers and _LENGTH not in headers else frame.body
        origin = origin_of(headers, destination)
        stable = self._identified(headers, body, destination) if origin is None else origin.id
        return delivered(
            destination=destination,
            body=body,
            headers=headers if origin is None else as_original(headers, origin),
            id=stable,
            key=(destination, stable),
            # A copy is sent after a failed attempt only. What a redelivery policy of the broker brings says so too.
            redelivered=origin is not None or headers.get("redelivered") == "true" or "redeliveryDelay" in headers,
            delivery_count=number_in(headers.get("x-delivery-count")) + 1 if self.counts else None,
            handle=handle,
        )

    def _identified(self, headers: Mapping[str, str], body: bytes, destination: str) -> str:
        """By what the message is known at its next delivery."""
        identify = self._broker.identify
        try:
            stable = identified_by(identify or self._profile.identify, headers, body)
        except ValueError as error:
            remedy = self._profile.remedy if identify is None else str(error)
            raise NoStableIdError(destination=destination, broker=self._broker.name, remedy=remedy) from error.__cause__
        again = headers.get(SENT_BACK)
        if again and (identify is not None or stable == headers.get(ID)):
            # What an operator has sent back is not the one that was parked, although it has its id.
            return bounded(f"{stable}~{again}")
        return bounded(stable)
