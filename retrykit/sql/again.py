"""Another run of a job in partitions: all of them begin anew at once, when each is finished."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from sqlalchemy import Connection, select, update

from retrykit.errors import JobError
from retrykit.sql.divisions import begun_otherwise, in_words, let_one_begin, partition, parts_in
from retrykit.sql.job_rows import begun_anew, instance_of, instant_of, supersede
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
        return None if self._otherwise(connection, locked=False) else self._answer(self._rows(connection, locked=False))

    def begin(self, connection: Connection, now: float) -> Begun:
        """Let all partitions begin anew, if each is finished, and those of another number of them with them.

        `JobRunningError` while somebody runs one of another number; `JobError` if those are not all finished, or were
        begun since `before`, or if a run that was begun before that is not finished.
        """
        # One after the other, and under the locks of all rows, taken in one order: of several that come at once the
        # second sees what the first has begun. Those of another number come first: who has waited for these looks at
        # ours after that.
        let_one_begin(connection)
        others = self._otherwise(connection, locked=True)
        rows = self._rows(connection, locked=True)
        answer = None if others else self._answer(rows)
        if answer is not None:
            return answer
        for row in others:
            self._check_begun(row)
        supersede(connection, others, now)
        for row in rows:
            if row is not None and row.status == "finished":
                connection.execute(update(rk_job).where(_c.id == row.id).values(begun_anew(row, now)))
        return "begun"

    def _otherwise(self, connection: Connection, *, locked: bool) -> list[Any]:
        ours = partition(self.parameters, 1, self.parts)
        return begun_otherwise(connection, self.name, ours, locked=locked)

    def _rows(self, connection: Connection, *, locked: bool) -> list[Any]:
        """The row of each partition; None for one that was never begun."""
        instances = [
            instance_of(self.name, partition(self.parameters, part, self.parts)) for part in range(1, self.parts + 1)
        ]
        query = select(rk_job)
        if locked:
            query = query.with_for_update()
            return [connection.execute(query.where(_c.instance == one)).first() for one in instances]
        # In one statement: else some would be from before another one lets them begin, and others from after it.
        found = {row.instance: row for row in connection.execute(query.where(_c.instance.in_(instances)))}
        return [found.get(one) for one in instances]

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
            theirs = in_words(parts_in(row))
            raise JobError(f"the job {row.name} was begun {theirs} at {instant_of(row.started_at)} (number {row.id})")
