"""What a container makes of sessions that confirm an acknowledgement later, and of those that only seem to."""

from __future__ import annotations

import attrs
import pytest

from retrykit.backoff import FixedBackOffPolicy
from retrykit.messaging import ConnectionLostError, ListenerContainer
from retrykit.messaging.memory import MemoryBroker, MemorySession
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import RetryTemplate
from tests import waiting
from tests.doubles import ManualClock

ORDERS = "/queue/orders"
PATIENCE = 20.0


class Late(MemorySession):
    """Has one acknowledgement unconfirmed, and loses its connection instead of confirming it, `losses` times."""

    losses = 0
    unconfirmed = None

    def acknowledge(self, message, told):
        self.confirm()
        self.unconfirmed = message, told

    def confirm(self):
        if self.unconfirmed is None:
            return
        (message, told), self.unconfirmed = self.unconfirmed, None
        if Late.losses:
            Late.losses -= 1
            self.lose("nothing was confirmed")
            told(ConnectionLostError(broker="memory", reason="nothing was confirmed"))
        else:
            super().commit(message)
            told(None)

    def receive(self, timeout=None):
        self.confirm()
        message = super().receive(timeout)
        # The broker does not know it: what is flagged has a history, and that waits for the confirmation.
        return None if message is None else attrs.evolve(message, redelivered=False)

    def close(self, *, wait=True):
        if wait:
            self.confirm()
        super().close(wait=wait)


class Itself(MemorySession):
    """Has a method of the same name for something else."""

    def acknowledge(self, message):
        raise AssertionError(f"nobody was to call this with {message!r}")


class Brokering(MemoryBroker):
    """Gives sessions of another class."""

    kind = Late

    def connect(self, *, consume=True):
        session = super().connect(consume=consume)
        session.__class__ = self.kind
        return session


@pytest.mark.parametrize(("losses", "pauses"), [(1, [60.0]), (2, [60.0, 60.0])])
def test_a_connection_on_which_nothing_was_confirmed_has_come_to_nothing(monkeypatch, losses, pauses, caplog):
    monkeypatch.setattr(Late, "losses", losses)
    broker, clock, handled = Brokering(ORDERS), ManualClock(), []
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=3), clock=clock)
    made = ListenerContainer(broker, handled.append, template=template, reconnect=FixedBackOffPolicy(60.0))
    broker.publish("x")
    with made:
        assert broker.wait_until_empty(PATIENCE)
    assert clock.slept == pauses
    assert len(handled) == losses + 1
    assert (made.counters.in_doubt, made.counters.acknowledged) == (losses, 1)
    assert caplog.text.count("deliveries settled before that: 0") == losses


def test_a_method_that_only_has_the_name_is_not_called(monkeypatch):
    monkeypatch.setattr(Brokering, "kind", Itself)
    broker, handled = Brokering(ORDERS), []
    made = ListenerContainer(broker, handled.append, template=RetryTemplate(name="orders"))
    broker.publish("x")
    with made:
        waiting.until(lambda: made.counters.acknowledged == 1, PATIENCE, lambda: str(made.counters))
    assert len(handled) == 1
