"""Jobs that are the partitions of one: their parameters, and what was begun in another number of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, select

from retrykit.errors import JobError
from retrykit.sql.tables import rk_job, rk_schema

_c = rk_job.c


def partition(parameters: Mapping[str, Any], part: int, parts: int) -> dict[str, Any]:
    """The parameters of one of the jobs that a step is divided into; `part` counts from 1."""
    return {**parameters, "partition": f"{part}/{parts}"}


def parts_of(parameters: Mapping[str, Any]) -> int | None:
    """Into how many partitions the job is divided that has these; None if it is not."""
    part, _, parts = str(parameters.get("partition", "")).partition("/")
    return int(parts) if part.isdecimal() and parts.isdecimal() else None


def begun_otherwise(connection: Connection, name: str, parameters: Mapping[str, Any], *, locked: bool) -> list[Any]:
    """The rows of the jobs that were begun with the same input in another number of partitions, in one order."""
    parts = parts_of(parameters)
    whole = dict(parameters) if parts is None else _undivided(parameters)
    # Whatever the other parameters say, they do not say this.
    here = uuid4().hex
    head, _, tail = json.dumps({**whole, "partition": here}, sort_keys=True).partition(here)
    divided = _c.parameters.startswith(head, autoescape=True) & _c.parameters.endswith(tail, autoescape=True)
    alike = divided | (_c.parameters == json.dumps(whole, sort_keys=True))
    begun = select(_c.id, _c.parameters).where(_c.name == name, _c.status != "new", alike).order_by(_c.id)
    numbers = [row.id for row in connection.execute(begun) if _is_other(json.loads(row.parameters), parts, whole)]
    query = select(rk_job).with_for_update() if locked else select(rk_job)
    rows = [connection.execute(query.where(_c.id == number)).first() for number in numbers]
    return [row for row in rows if row is not None and row.status != "new"]


def _is_other(theirs: Mapping[str, Any], parts: int | None, whole: Mapping[str, Any]) -> bool:
    their_parts = parts_of(theirs)
    return their_parts != parts and (theirs if their_parts is None else _undivided(theirs)) == whole


def parts_in(row: Any) -> int | None:
    """Into how many partitions the job of a row is divided."""
    return parts_of(json.loads(row.parameters))


def _undivided(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != "partition"}


def let_one_begin(connection: Connection) -> None:
    """Wait for all others that let a job begin, and have them wait for this transaction.

    So two that begin in different numbers of partitions see each other: the rows of the one are not yet there when the
    other one looks.
    """
    connection.execute(select(rk_schema.c.value).where(rk_schema.c.name == "version").with_for_update())


def check_division(connection: Connection, name: str, parameters: Mapping[str, Any]) -> None:
    """Another number of partitions would be other jobs: they would write again what is written."""
    for row in begun_otherwise(connection, name, parameters, locked=False):
        theirs, ours = map(in_words, (parts_in(row), parts_of(parameters)))
        msg = (
            f"the job {name} was begun {theirs} (number {row.id}), and is not run {ours}: what is written would be "
            "written again; let those jobs begin anew first if that is wanted"
        )
        raise JobError(msg)


def check_finished(rows: Sequence[Any]) -> None:
    """What was begun in another number of partitions begins anew in this one when it is at its end, and not before."""
    finished = Counter(parts_in(row) for row in rows if row.status == "finished")
    for row in rows:
        parts = parts_in(row)
        if finished[parts] < (parts or 1):
            there = "" if parts is None else f" ({finished[parts]} of {parts} partitions are)"
            msg = (
                f"the job {row.name} was begun {in_words(parts)} (number {row.id}), and is not finished{there}: bring "
                "it to its end first, or let those jobs begin anew"
            )
            raise JobError(msg)


def in_words(parts: int | None) -> str:
    """How a job was begun, in a sentence."""
    return "without partitions" if parts is None else f"in {parts} partitions"


def partitions_of(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of all jobs of the step that is divided as these say; none if it is not."""
    parts = parts_of(parameters)
    return [] if parts is None else [partition(parameters, part, parts) for part in range(1, parts + 1)]
