"""Every broker passes the same contract; the STOMP servers as what they are, and as brokers that nobody knows."""

from __future__ import annotations

from typing import ClassVar

import pytest

from retrykit.messaging import by_content
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.testing import StompServer
from retrykit.testing.broker_contract import BrokerContract
from tests.servers import Wire


@pytest.fixture(scope="module")
def embedded():
    with StompServer(profile="activemq") as server:
        yield server


class TestMemoryBroker(BrokerContract):
    silence = 0.05

    @pytest.fixture
    def server(self):
        return MemoryBroker("/queue/any")

    def make_broker(self, server, destination):
        return server.at(destination)


class _StompContract(BrokerContract):
    options: ClassVar = {}

    def make_broker(self, server, destination):
        return StompBroker(server.url, destination=destination, **self.options)

    def send_without_id(self, server, destination, body):
        with Wire(server.host, server.port, virtual_host=None) as wire:
            wire.publish(destination, body, **self.options.get("declare", {}))


class TestEmbeddedServer(_StompContract):
    @pytest.fixture
    def server(self, embedded):
        return embedded


class TestEmbeddedServerAsAStranger(TestEmbeddedServer):
    options: ClassVar = {"profile": "generic"}


class TestActiveMq(_StompContract):
    @pytest.fixture
    def server(self, activemq):
        return activemq


class TestActiveMqAsAStranger(TestActiveMq):
    options: ClassVar = {"profile": "generic"}


@pytest.fixture(scope="module")
def embedded_rabbit():
    with StompServer(profile="rabbitmq") as server:
        yield server


QUORUM = {"declare": {"x-queue-type": "quorum"}}


class TestEmbeddedRabbit(_StompContract):
    @pytest.fixture
    def server(self, embedded_rabbit):
        return embedded_rabbit


class TestRabbitMq(_StompContract):
    @pytest.fixture
    def server(self, rabbitmq):
        return rabbitmq


class TestRabbitMqQuorum(TestRabbitMq):
    options = QUORUM


class TestRabbitMqAsAStranger(TestRabbitMq):
    options: ClassVar = {"profile": "generic", "host": "/"}


class TestRabbitMqByContent(TestRabbitMq):
    options: ClassVar = {"identify": by_content()}
