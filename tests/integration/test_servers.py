"""The servers that the tests start: they answer, keep what they confirmed, and are gone at the end."""

from __future__ import annotations

import os
import socket
import uuid
from contextlib import closing

import pytest
import sqlalchemy as sa

from tests.servers import (
    MariaDb,
    PostgreSql,
    RabbitMq,
    RedisServer,
    Wire,
    mariadb_missing,
    postgresql_missing,
    rabbitmq_missing,
    redis_missing,
)


class Relational:
    """A number in a table of a fresh database."""

    def __init__(self, server):
        self.server = server
        self.url = server.fresh_database()

    def ask(self, *statements):
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            results = [connection.execute(sa.text(statement)) for statement in statements]
            return results[-1].scalar() if results[-1].returns_rows else None

    def keep(self, number):
        self.ask("CREATE TABLE kept (number INTEGER)", f"INSERT INTO kept SELECT {number}")

    def kept(self):
        return self.ask("SELECT number FROM kept")


class Keyed:
    """A number under a key of a fresh database."""

    def __init__(self, server):
        import redis

        self.server = server
        self.url = server.fresh_database()
        self.client = lambda: closing(redis.Redis.from_url(self.url))

    def keep(self, number):
        with self.client() as client:
            client.set("kept", number)

    def kept(self):
        with self.client() as client:
            value = client.get("kept")
        return None if value is None else int(value)


class Queued:
    """A number in a queue."""

    def __init__(self, server):
        self.server = server
        self.queue = f"/queue/kept.{uuid.uuid4().hex}"
        self.connect = lambda: Wire(server.host, server.port, virtual_host=None)

    def keep(self, number):
        with self.connect() as wire:
            wire.publish(self.queue, str(number).encode())
        # A RabbitMQ that is killed may forget a queue that it made a moment before.
        self.server.keep_queues()

    def kept(self):
        with self.connect() as wire:
            wire.subscribe(self.queue)
            return int(wire.message().body)


KINDS = [
    pytest.param(PostgreSql, Relational, postgresql_missing, id="postgresql"),
    pytest.param(MariaDb, Relational, mariadb_missing, id="mariadb"),
    pytest.param(RedisServer, Keyed, redis_missing, id="redis"),
    pytest.param(RabbitMq, Queued, rabbitmq_missing, id="rabbitmq"),
]


@pytest.mark.parametrize(("kind", "client", "missing"), KINDS)
def test_a_server_keeps_what_it_confirmed_through_a_kill_and_a_restart(kind, client, missing):
    if reason := missing():
        pytest.skip(reason)
    with kind() as server:
        one, other = client(server), client(server)
        one.keep(1)
        server.kill()
        with pytest.raises(Exception, match=r"(?i)refused|can't connect"):
            one.kept()
        server.start()
        assert one.kept() == 1
        other.keep(2)
        server.restart()
        assert (one.kept(), other.kept()) == (1, 2), "databases of two tests are not apart"
        pid = server.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not server.base.exists()


@pytest.mark.parametrize(("kind", "client", "missing"), KINDS)
def test_a_server_that_cannot_start_says_why_and_leaves_nothing(kind, client, missing):
    if reason := missing():
        pytest.skip(reason)
    server = kind()
    with socket.socket() as squatter:
        squatter.bind((server.host, server.port))
        with pytest.raises(RuntimeError, match=r"did not start:\n(?s:.*)(?i:in ?use)"), server:
            pass
    assert not server.base.exists()
