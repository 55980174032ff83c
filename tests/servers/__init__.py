"""Real servers that the tests start, own and end, and the small raw client that talks to them."""

from __future__ import annotations

from tests.servers.activemq import ActiveMq, activemq_missing
from tests.servers.mariadb import MariaDb, mariadb_missing
from tests.servers.postgresql import PostgreSql, postgresql_missing
from tests.servers.rabbitmq import RabbitMq, is_rabbit, rabbitmq_missing
from tests.servers.redis_server import RedisServer, redis_missing
from tests.servers.tls import Authority
from tests.servers.wire import Frame, StompErrorFrame, Wire

__all__ = [
    "ActiveMq",
    "Authority",
    "Frame",
    "MariaDb",
    "PostgreSql",
    "RabbitMq",
    "RedisServer",
    "StompErrorFrame",
    "Wire",
    "activemq_missing",
    "is_rabbit",
    "mariadb_missing",
    "postgresql_missing",
    "rabbitmq_missing",
    "redis_missing",
]
