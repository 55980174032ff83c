"""What `stores.py` asks of a store that it starts, fills and measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, ClassVar, Self

import attrs
from stores_work import Contender, Look

OURS, FRONTED, ON_ENGINE = "retrykit", "retrykit behind FrontContextCache", "retrykit on the work's engine"
LOOP, BARE_LOOP = "loop by hand, SQLAlchemy Core or redis-py", "loop by hand, bare driver"
# Their rows were made beforehand: nothing but the statements.
BY_HAND, BARE = "statements only, SQLAlchemy Core or redis-py", "statements only, bare driver"


@attrs.frozen
class Sent:
    """Statements, in their order, and how many of them in the user's own transaction."""

    statements: list[str]
    within: int = 0


class Store(ABC):
    """One kind of store, durable as its users would have it. A place is an empty database with what retrykit needs."""

    title: ClassVar[str]

    def __init__(self) -> None:
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            starting.enter_context(self.stack)
            self.start()
            starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Why it cannot be started here."""

    @abstractmethod
    def start(self) -> None:
        """Start it; what ends it goes on the stack."""

    @property
    @abstractmethod
    def version(self) -> str:
        """The server's."""

    @abstractmethod
    def place(self) -> str:
        """The URL of a new place."""

    @abstractmethod
    def cache(self, place: str, **options: Any) -> Any:
        """retrykit's cache there, made from the URL; it lives as long as the store."""

    @abstractmethod
    def contenders(self, place: str) -> Sequence[Contender]:
        """All who do the same work there."""

    @abstractmethod
    def look(self, place: str) -> Look:
        """What tells of the histories there."""

    @abstractmethod
    def fill(self, place: str, first: int, last: int) -> None:
        """Store histories with these numbers, both included, such as retrykit stores after two failures; in bulk."""

    @abstractmethod
    def settled(self, place: str) -> None:
        """After a filling: wait for what the store still does about it, and take stock."""

    @abstractmethod
    def key(self, number: int) -> str:
        """The key of a history that `fill` stored: scattered, as those of real messages may be."""

    @abstractmethod
    def size(self, place: str) -> int:
        """Bytes that the histories there take, with their indexes."""

    @abstractmethod
    def counting(self) -> AbstractContextManager[Callable[[], Sent]]:
        """What counts the statements since it was asked last."""

    @abstractmethod
    def transaction(self, cache: Any) -> Callable[[], Any] | None:
        """The user's own transactions in the same database; None where there are none."""

    @abstractmethod
    def do_work(self, transaction: Any) -> None:
        """One statement of the user's own."""
