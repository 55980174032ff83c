"""What the headers of CONNECT and SUBSCRIBE ask for; StompError for what makes no sense, or is not to be had here."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping

from retrykit.testing.stomp_server.broker import StompError
from retrykit.testing.stomp_server.profiles import Profile

VERSIONS = ("1.2", "1.1", "1.0")
ACK_MODES = ("auto", "client", "client-individual")
_KNOWN = ("activemq.prefetchSize", "activemq.subscriptionName")


def version(headers: Mapping[str, str]) -> str:
    """The newest version that client and server speak."""
    wanted = [one.strip() for one in headers.get("accept-version", "1.0").split(",")]
    found = next((one for one in VERSIONS if one in wanted), None)
    if found is None:
        raise StompError(f"Invalid Protocol version{wanted}, supported versions are: {VERSIONS}", fatal=True)
    return found


def heart_beat(headers: Mapping[str, str]) -> tuple[int, int]:
    """What the client will send, and what it wants, in milliseconds."""
    text = headers.get("heart-beat", "0,0")
    match = re.fullmatch(r"\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*", text)
    if match is None:
        raise StompError(f"Invalid heart-beat header: {text}", fatal=True)
    return int(match[1]), int(match[2])


def knows(headers: Mapping[str, str], login: tuple[str, str] | None) -> bool:
    """Whether the client has the credentials; None lets everybody in."""
    given = f"{headers.get('login', '')}\n{headers.get('passcode', '')}"
    return login is None or hmac.compare_digest(given.encode(), "\n".join(login).encode())


def subscription_id(headers: Mapping[str, str], spoken: str | None) -> str:
    """The id that the client gives its subscription; version 1.0 needs none."""
    found = headers.get("id", headers.get("destination") if spoken == "1.0" else None)
    if found is None:
        raise StompError("SUBSCRIBE received without a subscription id!")
    if not headers.get("destination"):
        raise StompError("Invalid empty or 'null' Destination header")
    unknown = [name for name in headers if name == "selector" or name.startswith("activemq.")]
    if unknown := [name for name in unknown if name not in _KNOWN]:
        raise StompError(f"The embedded server has no subscriptions with {' '.join(unknown)}")
    return found


def mode(headers: Mapping[str, str]) -> str:
    """How the client acknowledges; what is no mode is the first one."""
    found = headers.get("ack", "auto")
    return found if found in ACK_MODES else "auto"


def prefetch(headers: Mapping[str, str], profile: Profile) -> int:
    """How many messages may be with the client at once."""
    text = headers.get(profile.prefetch_header)
    if text is None:
        return profile.default_prefetch
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise StompError(f"{profile.prefetch_header} must be a positive number: {text}")
    return int(text)
