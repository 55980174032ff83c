"""Jobs that are the partitions of one: their parameters, and what was begun in another number of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select

from retrykit.errors import JobError
from retrykit.sql.tables import rk_job

_c = rk_job.c


def partition(parameters: Mapping[str, Any], part: int, parts: int) -> dict[str, Any]:
    """The parameters of one of the jobs that a step is divided into; `part` counts from 1."""
    return {**parameters, "partition": f"{part}/{parts}"}


def parts_of(parameters: Mapping[str, Any]) -> int | None:
    """Into how many partitions the job is divided that has these; None if it is not."""
    part, _, parts = str(parameters.get("partition", "")).partition("/")
    return int(parts) if part.isdecimal() and parts.isdecimal() else None


def divided_otherwise(connection: Connection, name: str, parameters: Mapping[str, Any]) -> list[tuple[int, int | None]]:
    """The numbers of the jobs that were begun with the same input in another number of partitions, with that number
    (None: undivided).
    """
    parts = parts_of(parameters)
    whole = dict(parameters) if parts is None else _undivided(parameters)
    head, _, tail = json.dumps(partition(whole, 1, 1), sort_keys=True).partition("1/1")
    divided = _c.parameters.startswith(head, autoescape=True) & _c.parameters.endswith(tail, autoescape=True)
    alike = divided | (_c.parameters == json.dumps(whole, sort_keys=True))
    begun = select(_c.id, _c.parameters).where(_c.name == name, _c.status != "new", alike).order_by(_c.id)
    found = []
    for row in connection.execute(begun):
        theirs = json.loads(row.parameters)
        their_parts = parts_of(theirs)
        if their_parts != parts and (theirs if their_parts is None else _undivided(theirs)) == whole:
            found.append((row.id, their_parts))
    return found


def _undivided(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key != "partition"}


def check_division(connection: Connection, name: str, parameters: Mapping[str, Any]) -> None:
    """Another number of partitions would be other jobs: they would write again what is written."""
    for number, parts in divided_otherwise(connection, name, parameters):
        theirs, ours = map(in_words, (parts, parts_of(parameters)))
        msg = (
            f"the job {name} was begun {theirs} (number {number}), and is not run {ours}: what is written would be "
            "written again; let those jobs begin anew first if that is wanted"
        )
        raise JobError(msg)


def in_words(parts: int | None) -> str:
    """How a job was begun, in a sentence."""
    return "without partitions" if parts is None else f"in {parts} partitions"


def partitions_of(parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters of all jobs of the step that is divided as these say; none if it is not."""
    parts = parts_of(parameters)
    return [] if parts is None else [partition(parameters, part, parts) for part in range(1, parts + 1)]
