"""Opening the broker that a URL names, for commands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import click

from retrykit.cli.words import safe

if TYPE_CHECKING:
    from retrykit.messaging.stomp import StompBroker

# RabbitMQ's words for a queue that is declared in another way than it was made.
_OTHERWISE: Final = re.compile(
    r"inequivalent arg '(?P<name>[^']+)'(?:.*? current is the value '(?P<value>[^']*)')?", re.DOTALL
)


def broker_at(url: str, destination: str = "", declare: Mapping[str, str] | None = None) -> StompBroker:
    """The broker at a URL without a destination; `click.BadParameter` says what is wrong with it."""
    try:
        from retrykit.messaging.stomp import StompBroker

        bare = StompBroker(url)
        broker = StompBroker(url, destination=destination, declare=declare or {}) if not bare.destination else bare
    except (ImportError, ValueError) as error:
        raise click.BadParameter(safe(str(error)), param_hint="--broker") from error
    if bare.destination:
        raise click.BadParameter("without a destination: that has an option of its own", param_hint="--broker")
    if ":***@" in url:
        words = "this URL was printed without its password: RETRYKIT_BROKER may have the whole one"
        raise click.BadParameter(words, param_hint="--broker")
    return broker


def destination_in(url: str | None) -> str:
    """The destination that a URL names; "" for none, and for what is no URL of a broker."""
    if url is None:
        return ""
    try:
        from retrykit.messaging.stomp import StompBroker

        return StompBroker(url).destination
    except (ImportError, ValueError):
        return ""


def told_of(error: Exception) -> str:
    """What has kept a message from being sent, and which option would mend it."""
    text = str(error)
    made = _OTHERWISE.search(text)
    if made is None:
        return safe(text)
    how = f"--declare {made['name']}={made['value']}" if made["value"] else f"without --declare {made['name']}=…"
    return safe(f"{text} (the queue was made otherwise: {how})")


def as_headers(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Headers, each written NAME=VALUE."""
    for value in values:
        if "=" not in value.strip("="):
            raise click.BadParameter(f"{value!r} is no NAME=VALUE, such as x-queue-type=quorum")
    return dict(value.split("=", 1) for value in values)
