"""What a test of code that uses retrykit needs."""

from __future__ import annotations

from retrykit.testing.stomp_server import QueuedMessage, StompServer, StompServerProcess

__all__ = ["QueuedMessage", "StompServer", "StompServerProcess"]
