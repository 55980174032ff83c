"""Messages that a handler or recovery sends: their stable ids, and their form beside a completion mark.

The database commits before the broker does. With a mark in it the handler will not run again, so whatever it has sent
must be known there too: should the process die before the broker's commit, the next delivery sends it again, with the
same ids, and acknowledges. What the broker had taken after all is there twice then, under one id.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import attrs

from retrykit.message import is_nonempty_text
from retrykit.messaging.recoverers import ID, may_travel


@attrs.frozen
class Outgoing:
    """One message to send."""

    destination: str = attrs.field(validator=is_nonempty_text)
    body: bytes
    headers: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The JSON form; a body that is no text travels as base64."""
        facts: dict[str, Any] = {"destination": self.destination, "headers": dict(self.headers)}
        try:
            return facts | {"text": self.body.decode()}
        except UnicodeDecodeError:
            return facts | {"base64": base64.b64encode(self.body).decode("ascii")}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Outgoing:
        """What a JSON form stands for."""
        text = facts.get("text")
        body = base64.b64decode(facts["base64"]) if text is None else text.encode()
        return cls(facts["destination"], body, facts["headers"])


def identified(headers: Mapping[str, str], given: str | None, key: str, number: int) -> dict[str, str]:
    """The headers that may travel, with a stable id: the one given, or one that names the message that is handled and
    the place of this one among those that are sent for it.
    """
    kept = may_travel(headers)
    if given is not None:
        kept.setdefault(ID, given)
    if ID not in kept:
        kept[ID] = hashlib.blake2b(f"{number}:{key}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return kept
