"""Which server is tried next, where a URL names several."""

from __future__ import annotations

import random
import threading

from retrykit.messaging.stomp.address import Address, Servers


class Rota:
    """The order in which servers are tried, and what is known of them: shared by all sessions of one broker.

    In the order of the URL it begins with the one that was used last, and after it is lost with the next. In any other
    order the one that was lost comes last. Nobody goes back to an earlier server while a later one does.
    """

    def __init__(self, servers: Servers) -> None:
        self._addresses = servers.addresses
        self._randomize = servers.randomize
        self._lock = threading.Lock()
        self._first = 0
        self._lost: Address | None = None

    def order(self) -> tuple[Address, ...]:
        """All of them, the one to try first at the front."""
        with self._lock:
            first, lost = self._first, self._lost
        if not self._randomize:
            return self._addresses[first:] + self._addresses[:first]
        mixed = random.sample(self._addresses, len(self._addresses))
        return tuple(sorted(mixed, key=lambda address: address is lost))

    def used(self, address: Address) -> None:
        """A session is open there."""
        with self._lock:
            self._first = self._place(address)
            if address is self._lost:
                self._lost = None

    def lost(self, address: Address) -> None:
        """A session there has ended, and not because somebody here wanted it to."""
        with self._lock:
            self._lost = address
            place = self._place(address)
            # Of several sessions that were lost with one server, only the first goes on to the next.
            if place == self._first:
                self._first = (place + 1) % len(self._addresses)

    def _place(self, address: Address) -> int:
        return next(place for place, own in enumerate(self._addresses) if own is address)
