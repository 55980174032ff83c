"""Every broker passes the same contract; the STOMP servers as what they are, and as brokers that nobody knows."""

from __future__ import annotations

import uuid
from contextlib import closing, nullcontext
from typing import ClassVar

import pytest

from retrykit.errors import CommitInDoubtError
from retrykit.messaging import by_content
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker
from retrykit.testing.broker_contract import BrokerContract
from tests.servers import Wire


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


QUORUM = {"declare": {"x-queue-type": "quorum"}}


class TestEmbeddedRabbit(_StompContract):
    @pytest.fixture
    def server(self, embedded_rabbit):
        return embedded_rabbit


class TestEmbeddedRabbitQuorum(TestEmbeddedRabbit):
    options: ClassVar = QUORUM


class TestRabbitMq(_StompContract):
    @pytest.fixture
    def server(self, rabbitmq):
        return rabbitmq


class TestRabbitMqQuorum(TestRabbitMq):
    options: ClassVar = QUORUM


class TestRabbitMqAsAStranger(TestRabbitMq):
    options: ClassVar = {"profile": "generic", "host": "/"}


class TestRabbitMqByContent(TestRabbitMq):
    options: ClassVar = {"identify": by_content()}


def consumed(broker):
    """What lies in a queue, taken out."""
    with closing(broker.connect()) as session:
        found = []
        while (message := session.receive(0.3)) is not None:
            found.append(message.body)
            session.commit(message)
        return found


@pytest.mark.parametrize(
    ("kind", "profile", "atomic"),
    [
        ("embedded", "activemq", True),
        ("embedded", "generic", False),
        ("embedded_rabbit", "rabbitmq", False),
    ],
)
def test_sends_and_acknowledgement_are_one_or_the_sends_come_first_as_declared(request, kind, profile, atomic):
    server = request.getfixturevalue(kind)
    broker = StompBroker(server.url, destination=f"/queue/one.{uuid.uuid4().hex}", profile=profile)
    copies = StompBroker(server.url, destination=f"{broker.destination}.copies", profile=profile)
    with closing(broker.connect()) as session:
        assert session.capabilities.atomic_send_and_ack is atomic
        session.send(broker.destination, b"x", {})
        session.commit()
        message = session.receive(15.0)
        session.send(copies.destination, b"copy", {})
        # The connection goes when the first COMMIT is confirmed: of both, or of the sends.
        server.drop_after_receipt()
        with nullcontext() if atomic else pytest.raises(CommitInDoubtError):
            session.commit(message)
    assert consumed(copies) == [b"copy"]
    assert consumed(broker) == ([] if atomic else [b"x"])
