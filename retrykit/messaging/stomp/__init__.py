"""STOMP brokers: ActiveMQ, RabbitMQ and others. Needs stomp.py, the extra `stomp`."""

from __future__ import annotations

from retrykit.messaging.stomp.broker import StompBroker

__all__ = ["StompBroker"]
