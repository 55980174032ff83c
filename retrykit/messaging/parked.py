"""What `park` has put into a queue: looking at it, sending it back, dropping it.

Some brokers show a queue without taking anything out of it (`Profile.browses`). On the others everything that is looked
at is received, and given back unacknowledged when the connection ends: flagged as redelivered, and for as long as that
takes it is with nobody else.

Sending back is one transaction of the broker: the copy goes out and the parked one is acknowledged. Where the broker
has none for both, the copy is confirmed first: it is sent at least once, never lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import attrs

from retrykit.key import canonical_key, key_from_json
from retrykit.messaging import recoverers as header
from retrykit.messaging.headers import number_in
from retrykit.messaging.stomp.address import without_path
from retrykit.messaging.stomp.subscription import check_supported

if TYPE_CHECKING:
    from retrykit.message import Message
    from retrykit.messaging.broker import Session
    from retrykit.messaging.stomp import StompBroker
    from retrykit.messaging.stomp.profiles import Profile

# No broker says how many messages there are: what has not come by then is not waited for.
FIRST_SECONDS: Final = 2.0
NEXT_SECONDS: Final = 1.0
END_SECONDS: Final = 15.0
_QUEUE: Final = "/queue/"

_log: Final = logging.getLogger("retrykit.messaging")


@attrs.frozen(kw_only=True)
class ParkedMessage:
    """A message in a parking queue; the fields are those of a `retrykit.sql.ParkedItem`, as far as its headers tell.

    `id` is the stable id of the original, `message_id` the one that it was delivered under, and that its key and the
    log have; they are two where its sender gave it a `retrykit-id`. `errors` has the last failure only. `parked_at` is
    the broker's timestamp, or the time of the last failure where it sets none. `left_out` are the headers of the
    original that were too long for a copy, with their size in bytes. A message that `park` has not put there
    has an id and a body.
    """

    id: str
    name: str | None
    key: str | None
    message_id: str
    destination: str | None
    payload: bytes = attrs.field(repr=False)
    content_type: str | None
    headers: Mapping[str, str]
    reason: str
    attempts: int
    errors: tuple[Mapping[str, Any], ...]
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    parked_at: datetime | None
    left_out: Mapping[str, int] = attrs.field(factory=dict)

    @classmethod
    def of(cls, message: Message) -> ParkedMessage:
        """What a delivery tells."""
        headers = message.headers
        stable = str(message.id)
        last = _instant(headers.get(header.LAST_FAILED_AT))
        return cls(
            id=stable,
            name=headers.get(header.NAME),
            key=_canonical(headers),
            message_id=_delivered_as(headers) or stable,
            destination=headers.get(header.DESTINATION),
            payload=message.body,
            content_type=headers.get("content-type"),
            headers=header.original_headers(headers),
            reason=headers.get(header.REASON, ""),
            attempts=number_in(headers.get(header.ATTEMPTS)),
            errors=_errors(headers),
            first_failed_at=_instant(headers.get(header.FIRST_FAILED_AT)),
            last_failed_at=last,
            parked_at=_since_epoch(headers.get("timestamp")) or last,
            left_out=header.left_out(headers),
        )

    def answers_to(self, name: str) -> bool:
        """Whether it is called so: by one of its ids, by its history, or by its key as the log writes it."""
        return name in (self.id, self.message_id, self.key, repr((self.destination, self.message_id)))


@attrs.define
class InHand:
    """A parked message that this connection holds, with the further copies of it that a broker may have."""

    item: ParkedMessage
    deliveries: list[Message]


@attrs.frozen(eq=False)
class Hands:
    """The parked messages that one connection holds, the longest parked first. What is not settled goes back."""

    session: Session
    profile: Profile
    found: Sequence[InHand]

    def send_back(self, one: InHand, to: str | None = None, *, forgotten: bool = False) -> None:
        """Send a message to where it came from, or elsewhere, and take it out.

        `retrykit-id` says what its id was. It is a new message for its consumers: where the id is not the broker's, it
        gets one that follows from the old one and the time of its last failure, so that a copy that is sent twice is
        known for one. Consumers that know messages by something else (`identify`) tell it by `retrykit-sent-back` from
        the one that was parked, whose history or mark they would find; unless that is `forgotten`. Headers that were
        too long for a copy are missing, which the log says.

        Whatever is raised, it is still parked; after `CommitInDoubtError` it may have been sent as well, or, where the
        broker does both in one step, be gone. `ValueError` without a destination.
        """
        destination = to or one.item.destination
        if not destination:
            raise ValueError(f"message {one.item.id!r} does not say where it came from, so `to` must say where to")
        before = one.deliveries[0].headers.get(header.SENT_BACK)
        again = before if forgotten else _next_id(one.item)
        told = {header.SENT_BACK: again} if again else {}
        headers, long = header.fitting(self._headers(one.item) | told, getattr(self.session, "longest_header", None))
        if missing := sorted({*one.item.left_out, *long}):
            text = "message %r is sent back without headers that were too long for its copies: %s"
            _log.warning(text, one.item.id, ", ".join(header.one_line(name) for name in missing))
        self.session.send(destination, one.item.payload, headers)
        self.drop(one)

    def drop(self, one: InHand) -> None:
        """Take a message out, with what was sent before: an acknowledgement for each copy."""
        for delivery in one.deliveries:
            self.session.commit(delivery)

    def _headers(self, item: ParkedMessage) -> dict[str, str]:
        ours = {header.ID: item.id, header.DESTINATION: item.destination, "content-type": item.content_type}
        name = self.profile.id_of_sends
        if name is not None:
            ours[name] = _next_id(item)
        return {**item.headers, **{name: value for name, value in ours.items() if value}}


def browse(broker: StompBroker, limit: int) -> list[ParkedMessage]:
    """What lies in the broker's destination, the longest parked first, at most `limit`; everything stays there.

    `BrokerUnavailableError` when it cannot be reached, or has no such queue and would not make one.
    """
    profile = _profile_of(broker)
    more = {"browser": "true"} if profile.browses else {}
    with closing(_looking(broker, profile, limit, more).connect()) as session:
        return [ParkedMessage.of(message) for message in _deliveries(session, limit, browsing=profile.browses)]


@contextmanager
def taken(broker: StompBroker, limit: int) -> Iterator[Hands]:
    """Hold the first `limit` messages of the broker's destination; those that are not settled go back at the end."""
    profile = _profile_of(broker)
    with closing(_looking(broker, profile, limit, {}).connect()) as session:
        found: dict[Any, InHand] = {}
        for message in _deliveries(session, limit, browsing=False):
            item = ParkedMessage.of(message)
            # Copies of one parking: a broker without a transaction for both may have been given it twice.
            same = (item.id, item.attempts, item.last_failed_at)
            found.setdefault(same, InHand(item, [])).deliveries.append(message)
        yield Hands(session, profile, list(found.values()))


def _profile_of(broker: StompBroker) -> Profile:
    with closing(broker.connect(consume=False)) as session:
        check_supported(broker, session.profile)
        return session.profile


def _looking(broker: StompBroker, profile: Profile, limit: int, more: Mapping[str, str]) -> StompBroker:
    place, declared = broker.destination, {**broker.declare, **more}
    if place.startswith(_QUEUE):
        place = profile.made_queues + place.removeprefix(_QUEUE)
    given: dict[str, Any] = {"url": without_path(broker.url), "destination": place, "declare": declared}
    given["profile"] = profile
    return attrs.evolve(broker, **given, prefetch=limit, identify=_known_by)


def _known_by(headers: Mapping[str, str], _body: bytes) -> str:
    # Whoever looks must be shown what other hands have put there, too.
    return headers.get(header.ID) or headers.get("amqp-message-id") or headers.get("message-id") or "?"


def _deliveries(session: Session, limit: int, *, browsing: bool) -> Iterator[Message]:
    wait = END_SECONDS if browsing else FIRST_SECONDS
    while limit > 0 and (message := session.receive(wait)) is not None:
        if message.headers.get("browser") == "end":
            return
        yield message
        limit -= 1
        wait = END_SECONDS if browsing else NEXT_SECONDS


def _next_id(item: ParkedMessage) -> str:
    facts = f"{item.id}\n{item.attempts}\n{item.last_failed_at}"
    return hashlib.blake2b(facts.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# -- what stands in headers, which anybody may have written


def _canonical(headers: Mapping[str, str]) -> str | None:
    name = headers.get(header.NAME)
    try:
        key = key_from_json(json.loads(headers.get(header.KEY, "null")))
        return None if key is None or name is None else canonical_key(name, key)
    except (TypeError, ValueError, KeyError, RecursionError):
        return None


def _delivered_as(headers: Mapping[str, str]) -> str | None:
    """The id in the key: (destination, id), which may have been joined to a digest of the body."""
    try:
        key = json.loads(headers.get(header.KEY, "null"))
    except (ValueError, RecursionError):
        return None
    match key:
        case [[str(), str(stable)], str()] | [str(), str(stable)]:
            return stable
    return None


def _errors(headers: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
    kind = headers.get(header.ERROR_TYPE)
    if kind is None:
        return ()
    last = _instant(headers.get(header.LAST_FAILED_AT))
    at = {} if last is None else {"at": last.timestamp()}
    number = number_in(headers.get(header.ATTEMPTS))
    return ({"attempt": number, "type": kind, "message": headers.get(header.ERROR, ""), **at},)


def _instant(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _since_epoch(milliseconds: str | None) -> datetime | None:
    try:
        return datetime.fromtimestamp(since / 1_000, UTC) if (since := number_in(milliseconds)) else None
    except (ValueError, OverflowError, OSError):
        return None
