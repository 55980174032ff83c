"""Fixtures that start real servers, at most one of each kind per test process, and none before a test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from retrykit.testing import StompServer
from tests.servers.activemq import ActiveMq, activemq_missing
from tests.servers.mariadb import MariaDb, mariadb_missing
from tests.servers.postgresql import PostgreSql, postgresql_missing
from tests.servers.process import ServerProcess
from tests.servers.rabbitmq import RabbitMq, rabbitmq_missing
from tests.servers.redis_server import RedisServer, redis_missing
from tests.servers.tls import Authority

Server = TypeVar("Server", bound=ServerProcess)

_ACTIVEMQ = pytest.StashKey[ActiveMq]()
_POSTGRESQL = pytest.StashKey[PostgreSql]()
_MARIADB = pytest.StashKey[MariaDb]()
_REDIS = pytest.StashKey[RedisServer]()
_RABBITMQ = pytest.StashKey[RabbitMq]()


@pytest.fixture(scope="session")
def activemq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ActiveMq:
    """A running ActiveMQ of this test process; tests use queue names of their own, and restart what they killed."""
    if (reason := activemq_missing()) is not None:
        pytest.skip(reason)
    # Several conftest files offer this fixture, and each would have a server of its own: the stash makes it one.
    config = request.config
    if _ACTIVEMQ not in config.stash:
        server = ActiveMq(tmp_path_factory.mktemp("activemq"), authority=Authority())
        config.add_cleanup(server.stop)
        server.start()
        config.stash[_ACTIVEMQ] = server
    return config.stash[_ACTIVEMQ]


@pytest.fixture(scope="session")
def postgresql(request: pytest.FixtureRequest) -> PostgreSql:
    """A running PostgreSQL; tests use `fresh_database`, and start servers of their own to kill."""
    return _of_this_process(request, _POSTGRESQL, PostgreSql, postgresql_missing())


@pytest.fixture(scope="session")
def mariadb(request: pytest.FixtureRequest) -> MariaDb:
    """A running MariaDB; tests use `fresh_database`, and start servers of their own to kill."""
    return _of_this_process(request, _MARIADB, MariaDb, mariadb_missing())


@pytest.fixture(scope="session")
def redis_server(request: pytest.FixtureRequest) -> RedisServer:
    """A running Redis or Valkey; tests use `fresh_database`, and start servers of their own to kill."""
    return _of_this_process(request, _REDIS, RedisServer, redis_missing())


@pytest.fixture(scope="session")
def rabbitmq(request: pytest.FixtureRequest) -> RabbitMq:
    """A running RabbitMQ; tests use queue names of their own, and restart what they killed."""
    return _of_this_process(request, _RABBITMQ, lambda: RabbitMq(authority=Authority()), rabbitmq_missing())


def _of_this_process(
    request: pytest.FixtureRequest, place: pytest.StashKey[Server], make: Callable[[], Server], missing: str | None
) -> Server:
    if missing is not None:
        pytest.skip(missing)
    config = request.config
    if place not in config.stash:
        server = make()
        config.add_cleanup(server.close)
        server.start()
        config.stash[place] = server
    return config.stash[place]


@pytest.fixture(scope="module")
def embedded() -> Iterator[StompServer]:
    """The embedded server, as an ActiveMQ."""
    with StompServer(profile="activemq") as server:
        yield server


@pytest.fixture(scope="module")
def embedded_rabbit() -> Iterator[StompServer]:
    """The embedded server, as a RabbitMQ."""
    with StompServer(profile="rabbitmq") as server:
        yield server
