"""retrykit's consumers of `stomp.py`: a listener container, alone and with a database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from stomp_databases import INSERT_WORK, MARKS, NAME, WEEK, Place, by_hand
from stomp_work import Contender, Course, Seat
from stores_sql import SqlStore

from retrykit import ExponentialBackOffPolicy, RetryTemplate, SimpleRetryPolicy
from retrykit.messaging import ListenerContainer
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import SqlRetryContextCache

OURS = "retrykit"


def with_database(store: SqlStore, *, marks: bool) -> str:
    return f"retrykit, {store.title}{MARKS[marks]}"


def _broker(seat: Seat) -> StompBroker:
    kind = seat.server.kind
    return StompBroker(
        seat.server.url, destination=seat.destination, prefetch=seat.prefetch, profile=kind.profile, heart_beat=10
    )


def _template(**fields: Any) -> RetryTemplate:
    back_off = ExponentialBackOffPolicy(initial=0.2, max_interval=10, jitter="full")
    return RetryTemplate(name=NAME, retry_policy=SimpleRetryPolicy(max_attempts=5), back_off_policy=back_off, **fields)


@contextmanager
def _alone(seat: Seat, course: Course) -> Iterator[None]:
    def handle(message: Any) -> None:
        course.handle(message.body)

    with ListenerContainer(_broker(seat), handle, template=_template()):
        yield


@contextmanager
def _consuming(seat: Seat, course: Course, *, store: SqlStore, marks: bool) -> Iterator[None]:
    place = Place.new(store)

    def handle(message: Any, context: Any) -> None:
        context.transaction.execute(INSERT_WORK)
        course.handle(message.body)

    cache = SqlRetryContextCache(place.engine)
    template = _template(context_cache=cache, remember_completed=WEEK if marks else None)
    with ListenerContainer(_broker(seat), handle, template=template, transaction=place.begin):
        yield


ALONE = Contender(OURS, OURS, _alone)


def contenders(store: SqlStore) -> list[Contender]:
    return [
        Contender(
            with_database(store, marks=marks),
            OURS,
            partial(_consuming, store=store, marks=marks),
            like=by_hand(store, marks=marks),
        )
        for marks in MARKS
    ]
