"""The servers that these tests talk to."""

from __future__ import annotations

from tests.servers.fixtures import activemq

__all__ = ["activemq"]
