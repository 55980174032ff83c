"""What becomes of a message whose retry has ended: `park`, `republish`, `discard`.

A recoverer is any callable `recover(message, context)`. It may return a settlement, which the container carries out in
one broker transaction with the acknowledgement; whatever else it returns, the message is acknowledged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

import attrs

from retrykit.check import wrong_type
from retrykit.failure import StoredError, message_of, type_name
from retrykit.key import key_to_json
from retrykit.message import EXPIRES_AT, Discard, Message, Park, Republish, is_nonempty_text
from retrykit.messaging.headers import escaped_size, line_size
from retrykit.messaging.identity import bounded
from retrykit.messaging.overflow import OTHER_HEADERS, as_json, split, whole

if TYPE_CHECKING:
    from retrykit.context import RetryContext

Recoverer = Callable[[Message, "RetryContext"], Any]

ID: Final = "retrykit-id"
"""The stable id: of the original in every copy, whatever id a broker gives the copy."""
NAME: Final = "retrykit-name"
"""Of the template; with the key it names the history."""
KEY: Final = "retrykit-key"
ATTEMPTS: Final = "retrykit-attempts"
FIRST_FAILED_AT: Final = "retrykit-first-failed-at"
LAST_FAILED_AT: Final = "retrykit-last-failed-at"
ERROR_TYPE: Final = "retrykit-error-type"
ERROR: Final = "retrykit-error"
REASON: Final = "retrykit-reason"
DESTINATION: Final = "retrykit-destination"
"""Where the original came from, and where it is sent back to."""
LEFT_OUT: Final = "retrykit-left-out"
"""A JSON object of the original's headers that no header can carry: their names, and how many bytes each takes."""
SENT_BACK: Final = "retrykit-sent-back"
"""In a message that an operator has sent back: what tells it from the one that was parked, to consumers that know
messages by what both of them have."""
COPY_OF: Final = "retrykit-copy-of"
"""In a copy that waits at the broker for the next attempt: which message it stands for."""

DEFAULT_HEADERS: Final = (
    "content-type",
    "content-encoding",
    "correlation-id",
    "reply-to",
    "type",
    "priority",
    "persistent",
    "traceparent",
    "tracestate",
)

_MAX_TEXT: Final = 1_000
_MAX_OTHER: Final = 8_000
# Of headers that are left out; with six bytes a letter they fit into a line, too.
_MAX_NAMES: Final = 20
_MAX_NAME: Final = 40
_MAX_SIZE: Final = 10**12
# Facts about one delivery or one frame: they say nothing about the message, so they are not kept even as text.
_OF_THE_FRAME: Final = frozenset(
    {"receipt", "transaction", "subscription", "ack", "content-length", "destination", "redelivered"}
)
# What is true of the original only: a copy that expired with it would be lost. RabbitMQ refuses a `user-id` that is not
# the sender's own, and a `message-id` altogether; ActiveMQ schedules nothing that has a `scheduledJobId`.
_OF_THE_ORIGINAL: Final = frozenset(
    {
        "message-id",
        "expires",
        "expiration",
        "timestamp",
        "original-destination",
        "user-id",
        "x-delivery-count",
        "scheduledJobId",
        COPY_OF,
    }
)
_NEVER: Final = _OF_THE_FRAME | _OF_THE_ORIGINAL
# Commands to the broker, which a handler may give, but no pattern of header names by accident: delays, and by what
# RabbitMQ makes a queue. Whole names: `exclusiveOffer` is somebody's own.
_DELAYS: Final = "AMQ_SCHEDULED_"
_QUEUE_ARGUMENTS: Final = frozenset(
    {
        "durable",
        "auto-delete",
        "exclusive",
        "x-queue-name",
        "x-queue-type",
        "x-message-ttl",
        "x-expires",
        "x-max-age",
        "x-max-length",
        "x-max-length-bytes",
        "x-max-priority",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-stream-max-segment-size-bytes",
    }
)


def _patterns(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise wrong_type("headers", "names or patterns of headers", value)
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise wrong_type("headers", "names or patterns of headers", pattern)
    return patterns


@attrs.frozen
class park:  # noqa: N801 - a verb to its users: `recover=park("/queue/orders.parked")`
    """Put the message aside in `destination` with its history in `retrykit-…` headers.

    `headers` are the names (or patterns such as "x-*") of the original's headers that travel as headers; the others are
    kept as JSON text in `retrykit-other-headers`, because brokers take some for commands (delays, expiry,
    transactions); those travel under no pattern. What is too long for one header goes on in
    `retrykit-other-headers-2`, and so on. Our own texts are bounded to 1,000 characters. A header of `headers` that is
    too long for the broker is left out: `retrykit-left-out` says so, and so does the log.
    """

    destination: str = attrs.field(validator=is_nonempty_text)
    headers: tuple[str, ...] = attrs.field(default=DEFAULT_HEADERS, converter=_patterns, kw_only=True)

    def __call__(self, message: Message, context: RetryContext) -> Park:
        """The settlement; nothing is sent yet."""
        reason = _reason(context)
        ours = _identity(message) | _history(context) | _others(message, self.headers) | {REASON: reason}
        if SENT_BACK in message.headers:
            ours[SENT_BACK] = bounded(message.headers[SENT_BACK])
        # What an earlier copy had kept is among the others of this one.
        travelling = {
            name: value
            for name, value in _travelling(message, self.headers).items()
            if not name.startswith(OTHER_HEADERS)
        }
        return Park(self.destination, headers=travelling | ours, reason=reason)


@attrs.frozen
class republish:  # noqa: N801 - as `park`
    """Send a copy on to `destination`, with its stable id (`retrykit-id`) and the listed `headers`, without history.

    The copy and the acknowledgement are one broker transaction; see `ListenerContainer` for what a crash between that
    and the database's repeats.
    """

    destination: str = attrs.field(validator=is_nonempty_text)
    headers: tuple[str, ...] = attrs.field(default=DEFAULT_HEADERS, converter=_patterns, kw_only=True)

    def __call__(self, message: Message, context: RetryContext) -> Republish:
        """The settlement; nothing is sent yet."""
        return Republish(self.destination, headers=_travelling(message, self.headers) | _identity(message))


@attrs.frozen
class discard:  # noqa: N801 - as `park`
    """Drop the message on purpose; `reason` is logged with its key."""

    reason: str = attrs.field(validator=is_nonempty_text)

    def __call__(self, message: Message, context: RetryContext) -> Discard:
        """The settlement."""
        return Discard(self.reason)


def misplaced_by(recover: Recoverer | None, broker: Any) -> str:
    """What is wrong with the destination of a recovery that says one, as a broker or its session sees it; "": nothing.

    Asked before anything is consumed: there would be no other answer when the first message is to be put there.
    """
    place, ask = getattr(recover, "destination", None), getattr(broker, "misplaced", None)
    return str(ask(place)) if ask is not None and isinstance(place, str) else ""


def may_travel(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers without those that belong to one frame, delivery or original, whoever asks for them."""
    return {name: value for name, value in headers.items() if name not in _NEVER}


def original_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a parked copy's headers: those that the original had, as far as another copy may have them."""
    own = {name: value for name, value in headers.items() if not name.startswith("retrykit-")}
    return {name: value for name, value in {**whole(headers), **own}.items() if _matches(name, ("*",))}


def stable_id(headers: Mapping[str, str], own: str | None) -> str | None:
    """By what the copies of a message are known: the id that it carries in `retrykit-id`, else its own."""
    carried = headers.get(ID)
    return bounded(carried) if carried else own


def in_copies(headers: Mapping[str, str], *, makes_queues: bool) -> dict[str, str]:
    """The headers of the message itself: for a copy that stands for it. No commands to the broker; `makes_queues`:
    whether the arguments of queues are such.
    """
    own = {
        name: value for name, value in may_travel(headers).items() if not (makes_queues and name in _QUEUE_ARGUMENTS)
    }
    if ID in own:
        own[ID] = bounded(own[ID])
    return {name: value for name, value in own.items() if name != EXPIRES_AT and not name.startswith(_DELAYS)}


def _travelling(message: Message, patterns: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in message.headers.items() if _matches(name, patterns)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    stays = name in _NEVER or name in _QUEUE_ARGUMENTS or name == EXPIRES_AT or name.startswith(_DELAYS)
    return not stays and any(fnmatchcase(name, pattern) for pattern in patterns)


def _others(message: Message, patterns: tuple[str, ...]) -> dict[str, str]:
    staying = {name: value for name, value in message.headers.items() if not _matches(name, patterns)}
    # What an earlier copy had kept stays kept, whatever travels now.
    earlier = {name: value for name, value in whole(message.headers).items() if name not in message.headers}
    kept = {
        name: value
        for name, value in {**earlier, **staying}.items()
        if name not in _OF_THE_FRAME and not name.startswith("retrykit-")
    }
    return {OTHER_HEADERS: as_json(kept)} if kept else {}


def fitting(headers: Mapping[str, str], longest: int | None) -> tuple[dict[str, str], tuple[str, ...]]:
    """The headers of a copy without those whose lines are longer than so many bytes (None: than any), and the names
    of these, which `retrykit-left-out` has as well. The JSON text of others is parted, not left out.
    """
    if longest is None:
        return dict(headers), ()
    parted, long = split(headers, longest)
    long |= {name: size for name, value in parted.items() if (size := line_size(name, value)) > longest}
    short = {name: value for name, value in parted.items() if name not in long}
    return with_left_out(short, long), tuple(sorted(long))


def with_left_out(headers: dict[str, str], sizes: Mapping[str, int]) -> dict[str, str]:
    """The headers of a copy, and which of the original's are not among them."""
    if not sizes:
        return headers
    known = left_out(headers) | {name[:_MAX_NAME]: size for name, size in sizes.items()}
    largest = sorted(known, key=lambda name: (-known[name], name))[:_MAX_NAMES]
    return headers | {LEFT_OUT: json.dumps({name: known[name] for name in sorted(largest)})}


def left_out(headers: Mapping[str, str]) -> dict[str, int]:
    """What `retrykit-left-out` says, as far as anything can be made of it; bounded, whoever has written it."""
    try:
        found = json.loads(headers.get(LEFT_OUT, "{}"))
    except (ValueError, RecursionError):
        return {}
    whole = found.items() if isinstance(found, dict) else ()
    return {name[:_MAX_NAME]: size for name, size in whole if type(size) is int and 0 < size < _MAX_SIZE}


def _identity(message: Message) -> dict[str, str]:
    stable = stable_id(message.headers, message.id)
    return {ID: stable, DESTINATION: message.destination} if stable else {DESTINATION: message.destination}


def _history(context: RetryContext) -> dict[str, str]:
    error = context.last_error
    facts = {
        NAME: one_line(context.name),
        KEY: _bounded(json.dumps(key_to_json(context.key))),
        ATTEMPTS: str(context.retry_count),
        FIRST_FAILED_AT: _instant(context.first_failed_at),
        LAST_FAILED_AT: _instant(context.last_failed_at),
        ERROR_TYPE: _type_of(error),
        ERROR: one_line("" if error is None else message_of(error)),
    }
    return {name: value for name, value in facts.items() if value}


def _bounded(text: str) -> str:
    return text if escaped_size(text) <= _MAX_OTHER else ""


def _reason(context: RetryContext) -> str:
    if context.veto_reason is not None:
        return one_line(f"vetoed: {context.veto_reason}")
    return one_line(context.decision.reason if context.decision is not None else "no further attempt is allowed")


def _type_of(error: BaseException | None) -> str:
    if error is None:
        return ""
    # An error loaded from a history is a stand-in that knows the name of the original's type.
    return error.type if isinstance(error, StoredError) else type_name(type(error))


def _instant(moment: datetime | None) -> str:
    return "" if moment is None else moment.isoformat(timespec="milliseconds")


def one_line(text: str) -> str:
    """`text` as a header can carry it on every broker: one line, no control characters, at most 1,000 characters."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 1] + "…"
