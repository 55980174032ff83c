"""Another run of a job in partitions: all of them begin anew at once, when each is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import attrs
from sqlalchemy import Connection, select, update

from retrykit.errors import JobError
from retrykit.sql.divisions import divided_otherwise, in_words, partition, parts_of
from retrykit.sql.job_rows import begun_anew, check_free, instance_of, instant_of
from retrykit.sql.tables import rk_job

_c = rk_job.c

Begun = Literal["begun", "joined", "done"]
"""Of partitions that are to run again: they begin anew; they are not all finished yet; they have been run again."""


@attrs.frozen(kw_only=True)
class Again:
    """The wish that all partitions run again. `before`: only if they were begun before it (epoch seconds)."""

    name: str
    parameters: Mapping[str, Any]
    parts: int
    before: float | None

    def look(self, connection: Connection) -> Begun | None:
        """What keeps them from beginning anew, as they stand; None if nothing does. `JobError` as `begin`."""
        return None if self._otherwise(connection) else self._answer(self._rows(connection, locked=False))

    def begin(self, connection: Connection, now: float) -> Begun:
        """Let all partitions begin anew, if each is finished, and those of another number of them with them.

        `JobRunningError` while somebody runs one of another number; `JobError` if a run that was begun before `before`
        is not finished, or one in another number was begun since.
        """
        # Under the locks of all rows, taken in one order: of several that come at once the second sees what the first
        # has begun. Those of another number come first: who has waited for these looks at ours after that.
        locked = [self._locked(connection, number) for number in self._otherwise(connection)]
        others = [row for row in locked if row.status != "new"]
        rows = self._rows(connection, locked=True)
        answer = None if others else self._answer(rows)
        if answer is not None:
            return answer
        for row in others:
            check_free(row, now, again=True)
            self._check_begun(row)
        for row in others + [row for row in rows if row is not None and row.status == "finished"]:
            connection.execute(update(rk_job).where(_c.id == row.id).values(begun_anew(row, now)))
        return "begun"

    def _otherwise(self, connection: Connection) -> list[int]:
        ours = partition(self.parameters, 1, self.parts)
        return [number for number, _ in divided_otherwise(connection, self.name, ours)]

    @staticmethod
    def _locked(connection: Connection, number: int) -> Any:
        return connection.execute(select(rk_job).where(_c.id == number).with_for_update()).one()

    def _rows(self, connection: Connection, *, locked: bool) -> list[Any]:
        """The row of each partition; None for one that was never begun."""
        return [self._row(connection, part, locked=locked) for part in range(1, self.parts + 1)]

    def _row(self, connection: Connection, part: int, *, locked: bool) -> Any:
        instance = instance_of(self.name, partition(self.parameters, part, self.parts))
        query = select(rk_job).where(_c.instance == instance)
        return connection.execute(query.with_for_update() if locked else query).first()

    def _answer(self, rows: list[Any]) -> Begun | None:
        begun = [row for row in rows if row is not None and row.status != "new"]
        finished = [row for row in begun if row.status == "finished"]
        first = min((row.started_at for row in begun), default=None)
        late = self.before is not None and first is not None and first < self.before
        if len(finished) == len(rows):
            return None if self.before is None or late else "done"
        if late:
            msg = (
                f"the run of {self.name} that was begun at {instant_of(first)} is not finished "
                f"({len(finished)} of {self.parts} partitions are): let it come to its end first"
            )
            raise JobError(msg)
        return "joined"

    def _check_begun(self, row: Any) -> None:
        if self.before is not None and row.started_at >= self.before:
            theirs = in_words(parts_of(json.loads(row.parameters)))
            raise JobError(f"the job {row.name} was begun {theirs} at {instant_of(row.started_at)} (number {row.id})")
