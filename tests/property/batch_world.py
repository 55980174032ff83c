"""A database, a step that loads items of all fates into it, and a power cord that is pulled at any moment.

What is pulled is this process's connection to the database: from that moment on no statement and no commit of the run
gets through, whatever the code does to put things straight, so nothing is left of the run but what it had committed.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import sessionmaker

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, ItemError, SkipPolicy
from retrykit.sql import SqlJobStore, parked_items, stored_jobs

metadata = sa.MetaData()
parent = sa.Table("parent", metadata, sa.Column("id", sa.Integer, primary_key=True))
# Nothing is unique here: what is written twice shows.
row = sa.Table(
    "work",
    metadata,
    sa.Column("item", sa.Integer, nullable=False),
    sa.Column("checked", sa.Integer, sa.CheckConstraint("checked >= 0"), nullable=False),
    sa.Column("parent", sa.Integer, sa.ForeignKey("parent.id", deferrable=True, initially="DEFERRED")),
)

FATES = ("good", "filtered", "processor", "writer", "named", "check", "commit")
BAD = {
    "processor": "test.Refused",
    "writer": "test.Rejected",
    "named": "test.Named",
    "check": "sqlalchemy.exc.IntegrityError",
    "commit": "sqlalchemy.exc.IntegrityError",
    "vetoed": "nothing: somebody has forbidden it",
}


class Refused(ValueError):
    __module__ = "test"


class Rejected(ValueError):
    __module__ = "test"


class Named(ValueError):
    __module__ = "test"


class Pulled(BaseException):
    """The process is gone."""


class Hiccup(Exception):
    """No item's fault, and gone the next time."""


class Cord:
    """Counts what gets through, and is pulled at a number."""

    def __init__(self, engine):
        self.left = None
        self.pulled = False
        self.transactions = 0
        sa.event.listen(engine, "before_cursor_execute", lambda *_: self.pass_on())
        sa.event.listen(engine, "commit", lambda _: self.pass_on())

    def pass_on(self):
        if self.left is not None:
            self.left -= 1
            self.pulled = self.pulled or self.left < 0
        if self.pulled:
            self.end()

    def end(self):
        raise Pulled

    @contextmanager
    def pulled_after(self, number):
        self.left, self.pulled = number, False
        try:
            yield
        finally:
            self.left, self.pulled = None, False


class World:
    """`fates`: of each item. `hiccups`: the numbers of transactions that fail for no item's fault when they write;
    `doubts`: of those that commit and say that they have not. `skipping`: "in place" finds culprits between savepoints,
    "closing" has the recovery of every other one close its chunk.
    """

    def __init__(self, engine, fates, *, chunk_size, max_attempts=2, hiccups=(), doubts=(), skipping="between"):
        self.engine = engine
        self.fates = fates
        self.cord = Cord(engine)
        self.hiccups, self.doubts = set(hiccups), set(doubts)
        self.session = sessionmaker(engine)
        self.jobs = SqlJobStore(engine)
        template = RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(max_attempts))
        for item in self.expected("vetoed"):
            template.veto(item, "forbidden")
        self.step = ChunkStep(
            name="load",
            reader=range(len(fates)),
            processor=self.process,
            writer=self.write,
            transaction=self.transaction,
            chunk_size=chunk_size,
            template=template,
            key=(lambda item: item) if "vetoed" in fates else None,
            skip=SkipPolicy(skip_for=(ValueError, IntegrityError), limit=None),
            no_rollback_for=(ValueError, IntegrityError) if skipping == "in place" else (),
            on_skip=lambda _, skipped: skipped.number % 2 or None,
            none_closes_chunk=skipping == "closing",
            jobs=self.jobs,
        )

    @contextmanager
    def transaction(self):
        self.cord.transactions += 1
        number = self.cord.transactions
        with self.session.begin() as session:
            session.info["number"] = number
            yield session
        self.cord.pass_on()
        if number in self.doubts:
            raise Hiccup(f"the commit of transaction {number} was not confirmed")

    def process(self, item):
        if self.fates[item] == "processor":
            raise Refused(item)
        return None if self.fates[item] == "filtered" else item

    def write(self, session, items):
        rows = [
            {"item": item, "checked": -(self.fates[item] == "check"), "parent": int(self.fates[item] == "commit")}
            for item in items
        ]
        session.execute(sa.insert(row), rows)
        if session.info["number"] in self.hiccups:
            raise Hiccup
        for index, item in enumerate(items):
            if self.fates[item] == "named":
                raise ItemError(index) from Named(item)
        if any(self.fates[item] == "writer" for item in items):
            raise Rejected("one of them")

    def run(self, pulled_after=None):
        """Whether it came to its end."""
        try:
            if pulled_after is None:
                self.step.run()
            else:
                with self.cord.pulled_after(pulled_after):
                    self.step.run()
        except (Pulled, Hiccup):
            self.engine.dispose()
            return False
        return True

    # -- what has become of it

    def written(self):
        with self.engine.connect() as connection:
            return Counter(connection.scalars(sa.select(row.c.item)))

    def skipped(self):
        return {int(one.headers["retrykit-item"]) - 1: _cause(one) for one in parked_items(self.engine)}

    def parked(self):
        return len(list(parked_items(self.engine)))

    def counts(self):
        (job,) = stored_jobs(self.engine)
        return job.status, job.counts

    def expected(self, *fates):
        return {item for item, fate in enumerate(self.fates) if fate in fates}

    def check(self):
        """Every good item written once, every bad one recorded once with its own error, and the counts say so."""
        good, bad = self.expected("good"), self.expected(*BAD)
        assert self.written() == Counter(good)
        assert self.skipped() == {item: BAD[self.fates[item]] for item in bad}
        assert self.parked() == len(bad)
        status, counts = self.counts()
        assert status == "finished"
        assert counts["read"] == len(self.fates)
        assert counts["written"] == len(good)
        assert counts["filtered"] == len(self.expected("filtered"))
        assert sum(counts["skipped"].values()) == len(bad)


def _cause(parked):
    return parked.errors[-1]["type"] if parked.errors else BAD["vetoed"]


def make_tables(engine):
    metadata.drop_all(engine)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(parent), {"id": 0})
