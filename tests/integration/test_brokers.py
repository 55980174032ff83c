"""Every broker passes the same contract; the STOMP servers as what they are, and as brokers that nobody knows."""

from __future__ import annotations

import pytest

from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.testing import StompServer
from retrykit.testing.broker_contract import BrokerContract


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
    profile = None

    def make_broker(self, server, destination):
        return StompBroker(server.url, destination=destination, profile=self.profile)


class TestEmbeddedServer(_StompContract):
    @pytest.fixture
    def server(self, embedded):
        return embedded


class TestEmbeddedServerAsAStranger(TestEmbeddedServer):
    profile = "generic"


class TestActiveMq(_StompContract):
    @pytest.fixture
    def server(self, activemq):
        return activemq


class TestActiveMqAsAStranger(TestActiveMq):
    profile = "generic"
