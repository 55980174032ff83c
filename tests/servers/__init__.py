"""Real servers that the tests start, own and end, and the small raw client that talks to them."""

from __future__ import annotations

from tests.servers.activemq import ActiveMq, activemq_missing
from tests.servers.wire import Frame, StompErrorFrame, Wire

__all__ = ["ActiveMq", "Frame", "StompErrorFrame", "Wire", "activemq_missing"]
