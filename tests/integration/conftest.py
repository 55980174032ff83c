"""The servers that these tests talk to, real ones and doubles."""

from __future__ import annotations

import uuid

import pytest

from tests.servers.databases import DATABASES, empty_database
from tests.servers.fixtures import activemq, embedded, embedded_rabbit, mariadb, postgresql, rabbitmq, redis_server

__all__ = ["activemq", "embedded", "embedded_rabbit", "mariadb", "postgresql", "rabbitmq", "redis_server"]


@pytest.fixture(params=["embedded", "activemq", "embedded_rabbit", "rabbitmq"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["embedded_rabbit", "rabbitmq"])
def rabbit(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["embedded", "embedded_rabbit"])
def double(request):
    """A server that can be told to fail at a moment of our choice."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=DATABASES)
def url(request):
    """The URL of an empty database, of each kind."""
    return empty_database(request, request.param)


@pytest.fixture
def queue():
    return f"/queue/orders.{uuid.uuid4().hex[:12]}"
