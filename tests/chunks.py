"""What steps are tested with: a table that commits, and items that fail."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, SkipPolicy


class Table:
    """Rows that appear when their transaction commits. `events`: what happened, in order."""

    def __init__(self):
        self.rows = []
        self.events = []
        self.open = None
        self.refuses = ()

    @contextmanager
    def begin(self):
        assert self.open is None, "one transaction at a time"
        self.open = []
        self.events.append("begin")
        try:
            yield self
            if any(row in self.refuses for row in self.open):
                raise LookupError("a constraint that is checked at the commit")
            self.rows += self.open
            self.events.append("commit")
        except BaseException:
            self.events.append("rollback")
            raise
        finally:
            self.open = None

    @asynccontextmanager
    async def async_begin(self):
        with self.begin():
            await asyncio.sleep(0)
            yield self

    def write(self, transaction, items):
        assert transaction is self
        self.open += items


def template(max_attempts=1, **options):
    return RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(max_attempts), **options)


def step(table, reader, **options):
    options = {"name": "load", "writer": table.write, "transaction": table.begin, "template": template()} | options
    return ChunkStep(reader=reader, **options)


def poison(*culprits, error=ValueError):
    """A processor that fails at these items."""

    def process(item):
        if item in culprits:
            raise error(f"item {item}")
        return item

    return process


def poisoned_write(table, *culprits, error=ValueError):
    """A writer that does not know which of its items it could not write."""

    def write(transaction, items):
        table.write(transaction, items)
        for item in items:
            if item in culprits:
                raise error(f"item {item}")

    return write


skip_values = SkipPolicy(skip_for=ValueError)
