"""Sending parked items (`retrykit.sql.parked`) back to where they came from.

The order of effects, and what a crash after each leaves behind: the history of the item's key is forgotten (the item is
parked still, to be sent later); the row is deleted, in a transaction that stays open, so that nobody else can send it
too (undone); the message is sent, and the broker has confirmed it (sent and still parked); the transaction commits
(done). So an item is sent back at least once, never lost.

The history goes first: the copy may be delivered the moment it is sent, and a consumer that still found the old
history, or the mark that the item is done with, would not handle it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import attrs

from retrykit.errors import RetryError
from retrykit.histories import Histories
from retrykit.messaging.broker import Session
from retrykit.messaging.recoverers import DESTINATION, ID, SENT_BACK, fitting, may_travel, stable_id
from retrykit.sql.parked import ParkedItem, remove_parked_in

if TYPE_CHECKING:
    from sqlalchemy import Engine

_log: Final = logging.getLogger("retrykit.messaging")

# What was true of the first time only: how it failed then, and how long the broker was to keep it back.
_OF_THE_FIRST_TIME = ("retrykit-", "AMQ_SCHEDULED_")


class StillCompletedError(RetryError):
    """The item {key!r} is remembered as completed until {until}: consumers would drop it unread; forget that first"""


@attrs.frozen(eq=False)
class Requeuer:
    """Sends parked items back, one transaction each.

    `engine`: of the database where they are parked. `session`: of their broker (`broker.connect(consume=False)`), used
    by one thread; of no more use after a `BrokerError` or `CommitInDoubtError`. `histories`: where the item's history
    is. `keep_history`: leave it as it is, so that the count of its attempts goes on.
    """

    engine: Engine
    session: Session
    histories: Histories
    keep_history: bool = False

    def send(self, item: ParkedItem, to: str | None = None) -> bool:
        """Send an item back to its destination, or to another. False: somebody else was first.

        Body and headers are the original's; `retrykit-id` says what its id was, or that of the message that it was a
        copy of itself. A header that is too long for the broker is left out, which `retrykit-left-out` and the log say.
        Whatever is raised, the item is still parked; after `CommitInDoubtError`, or a database that
        does not commit, it may have been sent as well. `ValueError` for an item without a destination.
        """
        destination = to or item.destination
        if not destination:
            raise ValueError(f"item {item.id} does not say where it came from, so `to` must say where to")
        self._make_way(item)
        with self.engine.begin() as connection:
            if not remove_parked_in(connection, item.id):
                return False
            headers, long = fitting(headers_of(item), getattr(self.session, "longest_header", None))
            if long:
                text = "item %d is sent back without headers that are too long for the broker: %s"
                _log.warning(text, item.id, ", ".join(long))
            self.session.send(destination, item.payload, headers)
            self.session.commit()
        return True

    def _make_way(self, item: ParkedItem) -> None:
        if item.key is None:
            return
        if not self.keep_history:
            self.histories.forget(item.key)
            return
        found = self.histories.get(item.key)
        if found is not None and found.completed_at is not None and not found.over:
            raise StillCompletedError(key=item.key, until=found.expires_at)


def headers_of(item: ParkedItem) -> dict[str, str]:
    """The headers that the copy gets: the original's but for those about its first time, and its stable id."""
    headers = {
        name: value for name, value in may_travel(item.headers).items() if not name.startswith(_OF_THE_FIRST_TIME)
    }
    if item.content_type is not None:
        headers.setdefault("content-type", item.content_type)
    # Its history was forgotten under the key that it had: that is the key it is to have again.
    ours = {
        ID: stable_id(item.headers, item.message_id),
        DESTINATION: item.destination,
        SENT_BACK: item.headers.get(SENT_BACK),
    }
    return headers | {name: value for name, value in ours.items() if value}
