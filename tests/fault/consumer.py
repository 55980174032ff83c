"""A consumer that kills itself once, before a step of a message: `consumer.py URL QUEUE FOLDER STEP NUMBER JOURNAL`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Column, Integer, MetaData, String, Table, insert
from sqlalchemy.orm import sessionmaker

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.messaging import ListenerContainer, park
from retrykit.messaging.stomp import StompBroker
from retrykit.policy import SimpleRetryPolicy
from retrykit.sql import SqlRetryContextCache, sqlite_engine
from retrykit.template import RetryTemplate

# One more than the flaky messages need: a kill uses one up.
MAX_ATTEMPTS = 4
STEPS = ("handler", "flush", "database", "acknowledge", "settle")

metadata = MetaData()
effects = Table("effects", metadata, Column("number", Integer, primary_key=True), Column("body", String))


def open_database(directory):
    engine = sqlite_engine(f"sqlite:///{directory}/job.db")
    metadata.create_all(engine)
    return engine


def die_once(directory):
    """SIGKILL, unless another process has had it already."""
    try:
        (directory / "died").touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Consumer:
    """Numbers that divide by 5 fail twice, those by 7 always. SIGKILL comes before `step` of `number`, once."""

    def __init__(self, url, queue, directory, *, step, number, journal):
        self.broker = StompBroker(url, destination=queue)
        self.queue, self.directory, self.step, self.number = queue, Path(directory), step, int(number)
        self.journal = journal
        self.engine = open_database(directory)
        self.begin = sessionmaker(self.engine).begin
        self.current = 0

    def run(self):
        ListenerContainer(
            self,
            self.handle,
            template=RetryTemplate(
                name="orders",
                retry_policy=SimpleRetryPolicy(max_attempts=MAX_ATTEMPTS),
                context_cache=SqlRetryContextCache(self.engine),
                remember_completed=3600,
            ),
            transaction=self.transaction,
            recover=park(f"{self.queue}.parked"),
            journal=self.journal,
            reconnect=ExponentialBackOffPolicy(initial=0.01, max_interval=0.2),
        ).run()

    def handle(self, message, context):
        self.current = int(message.text)
        with (self.directory / "attempts").open("a") as log:
            log.write(f"{message.text}\n")
        context.transaction.execute(insert(effects).values(body=message.text))
        self.die_before("handler")
        if self.current % 7 == 0 or (self.current % 5 == 0 and context.attempt < 3):
            raise ConnectionError(message.text)

    @contextmanager
    def transaction(self):
        with self.begin() as session:
            yield session
            self.die_before("database")

    def die_before(self, step):
        if (step, self.current) != (self.step, self.number):
            return
        die_once(self.directory)

    # -- the broker, with a session that dies

    @property
    def name(self):
        return self.broker.name

    def connect(self, *, consume=True):
        session = self.broker.connect(consume=consume)
        flush, commit = session.flush, session.commit

        def deadly_flush():
            self.die_before("flush")
            flush()

        def deadly_commit(message=None):
            self.die_before("acknowledge")
            commit(message)
            self.die_before("settle")

        session.flush, session.commit = deadly_flush, deadly_commit
        return session


if __name__ == "__main__":
    Consumer(*sys.argv[1:4], step=sys.argv[4], number=sys.argv[5], journal=sys.argv[6]).run()
