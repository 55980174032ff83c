"""How many statements a message costs, counted, not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import attrs
from stores_places import OURS, Sent, Store
from stores_work import FAILURE, NAME, OPERATIONS, Contender, Ours, Subject, UnequalWorkError

from retrykit import FrontContextCache, RetryState
from retrykit.cache import canonical_key

REPEATS = 5


@attrs.frozen
class Message:
    """What becomes of one, and what that may cost: `within` the user's transaction and outside of it."""

    name: str
    failures: int = 0
    succeeds: bool = True
    marked: bool = False
    fronted: bool = False
    at_most: int | None = None


MESSAGES = (
    Message("first delivery succeeds", at_most=0),
    Message("first delivery succeeds, completion mark", marked=True, at_most=1),
    Message("first delivery fails", succeeds=False, at_most=2),
    Message("redelivery fails", failures=1, succeeds=False),
    Message("redelivery succeeds", failures=1),
    Message("redelivery succeeds, completion mark", failures=1, marked=True),
    Message("redelivery fails, behind FrontContextCache", failures=1, succeeds=False, fronted=True),
    Message("redelivery succeeds, behind FrontContextCache", failures=1, fronted=True),
)


@attrs.frozen
class Counted:
    """One message on one store, some times over."""

    message: Message
    sent: list[Sent]
    joins: bool
    """Whether the user's transaction can be joined at all."""

    @property
    def outside(self) -> int:
        """The most that was sent outside of the user's transaction."""
        return max(len(each.statements) - each.within for each in self.sent)

    @property
    def counts(self) -> list[int]:
        return [len(each.statements) for each in self.sent]


def check_same_statements(store: Store, contenders: Sequence[Contender]) -> None:
    """Who works by hand sends as many statements of the same kinds. Beneath bare SQL drivers nobody can look."""
    with store.counting() as take, ExitStack() as stack:
        sent = {
            each.name: _lives(each, each.worker(stack), take)
            for each in contenders
            if each.by_hand or each.name == OURS
        }
    for name, statements in sent.items():
        if any(statements) and statements != sent[OURS]:
            raise UnequalWorkError(f"{name}: sends {statements}, not {sent[OURS]}")


def _lives(contender: Contender, subject: Subject, take: Callable[[], Sent]) -> list[list[str]]:
    """The statements of each operation on a message; not the first message, with which some things are found out."""
    statements: list[list[str]] = []
    for number in range(2):
        key = f"{contender.name} {number}"
        statements.clear()
        for operation in OPERATIONS:
            take()
            subject.actions[operation](canonical_key(NAME, key) if contender.by_hand else key)
            statements.append([statement.split()[0] for statement in take().statements])
    return statements


def counted(store: Store) -> list[Counted]:
    """All messages; the first of each kind, which finds out where it is, is left out."""
    place = store.place()
    cache = store.cache(place)
    with store.counting() as take:
        return [_counted(store, cache, message, take) for message in MESSAGES]


def _counted(store: Store, cache: Any, message: Message, take: Callable[[], Sent]) -> Counted:
    remember = {"remember_completed": 3_600} if message.marked else {}
    ours = Ours(FrontContextCache(cache) if message.fronted else cache, **remember)
    transaction = store.transaction(cache) if message.marked else None
    counts = []
    for number in range(REPEATS + 1):
        key = f"{message.name} {number}"
        for failure in range(message.failures):
            _deliver(ours, key, redelivered=failure > 0, call=_fail)
        take()
        call = store.do_work if transaction else _nothing
        call = _working(call) if message.succeeds else _fail
        _deliver(ours, key, redelivered=message.failures > 0, call=call, transaction=transaction)
        counts.append(take())
    return Counted(message, counts[1:], joins=transaction is not None)


def _deliver(ours: Ours, key: str, *, redelivered: bool, call: Callable[[Any], Any], transaction: Any = None) -> None:
    try:
        ours.template.execute(call, state=RetryState(key=key, redelivered=redelivered), transaction=transaction)
    except FAILURE:
        assert call is _fail


def _working(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda context: work(context.transaction)


def _nothing(_transaction: Any) -> None:
    pass


def _fail(_context: Any) -> None:
    raise FAILURE("connection refused")
