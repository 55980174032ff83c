"""The servers that these tests talk to, and the chance that faults happen by."""

from __future__ import annotations

import os
import random

import pytest

from tests.servers.fixtures import activemq, embedded, embedded_rabbit, mariadb, postgresql, rabbitmq, redis_server

__all__ = ["activemq", "embedded", "embedded_rabbit", "mariadb", "postgresql", "rabbitmq", "redis_server"]


@pytest.fixture
def seed():
    """Another one in each run, unless RETRYKIT_FAULT_SEED says which; printed when the test fails."""
    seed = int(os.environ.get("RETRYKIT_FAULT_SEED", random.randrange(1_000_000)))
    print(f"RETRYKIT_FAULT_SEED={seed}")
    return seed
