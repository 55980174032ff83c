"""How many histories are kept. Completion marks have an end of their own and do not count.

On SQLite the number is exact: triggers keep a counter, and the INSERT itself looks at it (`CountedByTheDatabase`).

On servers a counter row would make concurrent writers wait for each other, and the work's transactions for all of them.
There each process keeps its own account (`CountedByTheProcess`) and from time to time asks the database, which counts
over an index: when it has inserted `capacity // 100` histories since it last asked, when its account says full, and
once a minute while it inserts; while the database itself says full, once a second. So a process alone never exceeds the
capacity, and each further one may by that hundredth.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final, Literal

from sqlalchemy import Connection

from retrykit.lock import lock_of
from retrykit.sql.prepared import Prepared
from retrykit.sql.statements import COUNTER, HISTORIES, INSERT_IF_ROOM, UPDATE, UPDATE_IF_ROOM

OnFull = Literal["reject", "evict_oldest"]

MINUTE: Final = 60.0
SECOND: Final = 1.0


class Room(ABC):
    """Where new histories go, as long as there is place."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity

    @abstractmethod
    def insert(self, connection: Connection, statement: Prepared, row: Mapping[str, Any]) -> Any:
        """Insert a history. The row that came of it; None if there is no place for it, or the key is there already."""

    @abstractmethod
    def revive(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        """Make a history of a tombstone. False if there is no place for it, or it has another version."""

    @abstractmethod
    def surplus(self, connection: Connection) -> int:
        """How many histories must go before one can come."""

    @abstractmethod
    def freed(self, histories: int) -> None:
        """So many histories are gone, or changed into completion marks."""

    @abstractmethod
    def taken(self) -> None:
        """A completion mark became a history: its key is known, so it finds place always."""

    @abstractmethod
    def lost_sight(self) -> None:
        """Something was removed, nobody knows what."""

    @property
    @abstractmethod
    def may_look(self) -> bool:
        """Whether it is time to look for what may go."""


class CountedByTheDatabase(Room):
    """SQLite: exact, for any number of processes."""

    def insert(self, connection: Connection, statement: Prepared, row: Mapping[str, Any]) -> Any:
        """Insert a history if there is room, in one statement."""
        return INSERT_IF_ROOM.on(connection, {**row, "capacity": self.capacity}).first()

    def revive(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        """Update a tombstone if there is room, in one statement."""
        return UPDATE_IF_ROOM.on(connection, {**values, "capacity": self.capacity}).rowcount > 0

    def surplus(self, connection: Connection) -> int:
        """By the counter."""
        return int(COUNTER.on(connection, {}).first()[0]) - (self.capacity or 0) + 1

    def freed(self, histories: int) -> None:
        """The triggers see that."""

    def taken(self) -> None:
        """The triggers see that."""

    def lost_sight(self) -> None:
        """The triggers do not."""

    @property
    def may_look(self) -> bool:
        """Always."""
        return True


class CountedByTheProcess(Room):
    """Servers: an account that is set right by counting.

    Its lock is never held while the database is asked: in an event loop, who waits for a lock stops who holds it.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._limit = capacity
        self._allowance = max(1, capacity // 100)
        self._lock = lock_of(self)
        # What is there and what is about to be; None: not counted yet.
        self._held: int | None = None
        self._full = False  # the database said so itself
        self._unsure = True  # something went that the account does not know
        self._pending = 0
        self._begun = 0
        self._inserted = 0
        self._counted_at = 0.0

    def insert(self, connection: Connection, statement: Prepared, row: Mapping[str, Any]) -> Any:
        """Reserve a place, insert, and give the place back if it was not needed."""
        if not self._reserve(connection):
            return None
        made = None
        try:
            made = statement.on(connection, row).first()
            made = made if made is not None and made.token == row["token"] else None
        finally:
            self._settle(used=made is not None)
        return made

    def revive(self, connection: Connection, values: Mapping[str, Any]) -> bool:
        """Reserve a place, update, and give the place back if it was not needed."""
        if not self._reserve(connection):
            return False
        revived = False
        try:
            revived = UPDATE.on(connection, values).rowcount > 0
        finally:
            self._settle(used=revived)
        return revived

    def surplus(self, connection: Connection) -> int:
        """By the account."""
        return (self._limit if self._held is None else self._held) - self._limit + 1

    def freed(self, histories: int) -> None:
        """The account goes down."""
        with self._lock:
            if self._held is not None:
                self._held = max(0, self._held - histories)

    def taken(self) -> None:
        """The account goes up."""
        self.freed(-1)

    def lost_sight(self) -> None:
        """The next time that there seems to be no place, look."""
        self._unsure = True

    @property
    def may_look(self) -> bool:
        """Once a second."""
        return self._is_due(time.monotonic())

    def _reserve(self, connection: Connection) -> bool:
        if self._is_due(time.monotonic()):
            self._count(connection)
        with self._lock:
            if self._held is None or self._held >= self._limit:
                return False
            self._held += 1
            self._pending += 1
            self._begun += 1
            self._inserted += 1
            return True

    def _settle(self, *, used: bool) -> None:
        with self._lock:
            self._pending -= 1
            if not used and self._held is not None:
                self._held -= 1

    def _is_due(self, now: float) -> bool:
        if self._held is None or self._inserted >= self._allowance or now - self._counted_at >= MINUTE:
            return True
        if self._held < self._limit:
            return False
        return self._unsure or not self._full or now - self._counted_at >= SECOND

    def _count(self, connection: Connection) -> None:
        with self._lock:
            self._unsure = False
            pending, begun = self._pending, self._begun
            self._inserted, self._counted_at = 0, time.monotonic()
        counted = int(HISTORIES.on(connection, {}).first()[0])
        with self._lock:
            # Of inserts that overlap the count nobody knows whether they are in it: the account knows them all.
            overlapping = pending + self._begun - begun
            known = counted + overlapping if self._held is None else min(self._held, counted + overlapping)
            self._held = max(counted, known)
            self._full = counted >= self._limit


def room_of(capacity: int | None, *, by_the_process: bool) -> Room:
    """The room for so many histories."""
    return CountedByTheProcess(capacity) if by_the_process and capacity is not None else CountedByTheDatabase(capacity)
