"""A consumer that kills itself once, at a moment of a copy: `delaying_consumer.py URL QUEUE DIRECTORY MOMENT`."""

from __future__ import annotations

import sys
from pathlib import Path

from sqlalchemy import insert
from sqlalchemy.orm import sessionmaker

from retrykit.backoff import ExponentialBackOffPolicy, FixedBackOffPolicy
from retrykit.messaging import ListenerContainer, park
from retrykit.messaging.stomp import StompBroker
from retrykit.policy import SimpleRetryPolicy
from retrykit.sql import SqlRetryContextCache
from retrykit.template import RetryTemplate
from tests.fault.consumer import die_once, effects, open_database

MAX_ATTEMPTS = 3
PAUSE = 0.3
MOMENTS = ("before the copy", "before the acknowledgement", "after it")


class Consumer:
    """Numbers that divide by 5 fail once, those by 7 always. SIGKILL comes at a moment of the first copy."""

    def __init__(self, url, queue, directory, moment):
        self.broker = StompBroker(url, destination=queue)
        self.queue, self.directory, self.moment = queue, Path(directory), moment
        self.engine = open_database(directory)

    def run(self):
        ListenerContainer(
            self,
            self.handle,
            template=RetryTemplate(
                name="orders",
                retry_policy=SimpleRetryPolicy(max_attempts=MAX_ATTEMPTS),
                back_off_policy=FixedBackOffPolicy(PAUSE),
                context_cache=SqlRetryContextCache(self.engine),
                remember_completed=3600,
            ),
            transaction=sessionmaker(self.engine).begin,
            recover=park(f"{self.queue}.parked"),
            delay="schedule",
            reconnect=ExponentialBackOffPolicy(initial=0.01, max_interval=0.2),
        ).run()

    def handle(self, message, context):
        number = int(message.text)
        with (self.directory / "attempts").open("a") as log:
            log.write(f"{number}\n")
        context.transaction.execute(insert(effects).values(body=message.text))
        if number % 7 == 0 or (number % 5 == 0 and context.attempt < 2):
            raise ConnectionError(message.text)

    def die_at(self, moment):
        if moment == self.moment:
            die_once(self.directory)

    # -- the broker, with a session that dies

    @property
    def name(self):
        return self.broker.name

    def connect(self, *, consume=True):
        session = self.broker.connect(consume=consume)
        put_off, commit = session.put_off, session.commit

        def deadly_put_off(message, delay):
            self.die_at("before the copy")
            # `put_off` acknowledges by `commit`, when the copy is confirmed.
            session.commit = deadly_commit
            put_off(message, delay)
            session.commit = commit
            self.die_at("after it")

        def deadly_commit(message=None):
            self.die_at("before the acknowledgement")
            commit(message)

        session.put_off = deadly_put_off
        return session


if __name__ == "__main__":
    Consumer(*sys.argv[1:5]).run()
