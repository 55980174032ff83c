"""The servers that these tests talk to."""

from __future__ import annotations

from tests.servers.fixtures import activemq, mariadb, postgresql, rabbitmq, redis_server

__all__ = ["activemq", "mariadb", "postgresql", "rabbitmq", "redis_server"]
