"""Destinations that cannot be meant: a prefix that no such broker knows (`/quene/orders`), or no name behind it."""

from __future__ import annotations

from typing import Final

from retrykit.messaging.stomp.profiles import Profile

_QUEUE: Final = "/queue/"
_MADE: Final = "/amq/queue/"


def misplaced(profile: Profile, destination: str) -> str:
    """What is wrong with a destination at this kind of broker; "" where nothing is, as far as is known."""
    if not profile.places or not destination.startswith("/"):
        return ""
    if not destination.startswith(profile.places):
        return f"{destination!r} begins neither with /queue/ nor with /topic/, and {_outcome(profile, destination)}"
    if destination in profile.places:
        return f"{destination!r} has no name behind the last slash"
    return ""


def of_one_name(destination: str) -> str:
    """The destination by the name that all who mean it share: RabbitMQ knows a queue by two."""
    return _QUEUE + destination.removeprefix(_MADE) if destination.startswith(_MADE) else destination


def _outcome(profile: Profile, destination: str) -> str:
    if profile.makes_any_place:
        whole = f"take it for a queue of that whole name (which is '/queue/{destination}')"
        return f"brokers of the kind {profile.name!r} would {whole}"
    return f"brokers of the kind {profile.name!r} refuse what they do not know, and close the connection"
