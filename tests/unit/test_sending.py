"""What a handler may say of a message that it sends: its kind, its importance, its end."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from retrykit.message import EXPIRES_AT, Message
from retrykit.messaging import ListenerContainer, park, republish
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.recoverers import may_travel
from retrykit.template import RetryTemplate


class Outbox(list):
    """A message whose sends are kept."""

    def message(self, **headers):
        return Message(destination="/queue/a", id="m-1", headers=headers, sender=self._keep)

    def _keep(self, destination, body, headers, id_):
        self.append((destination, body, headers, id_))


@pytest.fixture
def sent():
    return Outbox()


def test_text_is_called_text_unless_the_headers_say_what_it_is(sent):
    message = sent.message()
    message.send("/queue/b", "grün")
    message.send("/queue/b", "{}", {"content-type": "application/json"})
    message.send("/queue/b", b"\xff")
    assert [(body, headers) for _, body, headers, _ in sent] == [
        ("grün".encode(), {"content-type": "text/plain; charset=utf-8"}),
        (b"{}", {"content-type": "application/json"}),
        (b"\xff", {}),
    ]


@pytest.mark.parametrize("length", [60, 60.0, timedelta(minutes=1)])
def test_the_end_is_an_instant_from_now_on(sent, length):
    before = time.time()
    sent.message().send("/queue/b", b"", expires_in=length, priority=0)
    ((_, _, headers, _),) = sent
    assert before + 59.9 < int(headers[EXPIRES_AT]) / 1000 <= time.time() + 60
    assert headers["priority"] == "0"


def test_an_answer_has_a_priority_and_an_end_too(sent):
    sent.message(**{"reply-to": "/queue/answers", "correlation-id": "c-1"}).reply(b"", priority=9, expires_in=1)
    ((destination, _, headers, _),) = sent
    assert destination == "/queue/answers"
    assert set(headers) == {"correlation-id", "priority", EXPIRES_AT}


@pytest.mark.parametrize(
    ("arguments", "options", "names"),
    [
        ((7,), {}, "body"),
        (({"id": 7},), {}, "body"),
        ((b"", {"a": 1}), {}, "headers"),
        ((b"", "a"), {}, "headers"),
        ((b"",), {"priority": 10}, "priority"),
        ((b"",), {"priority": 1.5}, "priority"),
        ((b"",), {"expires_in": -1}, "expires_in"),
        ((b"",), {"expires_in": True}, "expires_in"),
    ],
)
def test_a_wrong_argument_is_refused_by_name_and_nothing_is_sent(sent, arguments, options, names):
    with pytest.raises((ValueError, TypeError), match=names):
        sent.message().send("/queue/b", *arguments, **options)
    assert sent == []


@pytest.mark.parametrize("recoverer", [park("/queue/p", headers=("*",)), republish("/queue/p", headers=("*",))])
def test_a_copy_does_not_end_with_its_original(recoverer):
    broker = MemoryBroker("/queue/a")
    broker.publish(b"x", {EXPIRES_AT: str(int((time.time() + 600) * 1000)), "x-tenant": "blue"})

    def handler(message):
        raise ConnectionError

    with ListenerContainer(broker, handler, template=RetryTemplate(name="orders"), recover=recoverer):
        assert broker.wait_until_empty()
    (copy,) = broker.at("/queue/p").messages()
    assert copy.headers["x-tenant"] == "blue"
    assert EXPIRES_AT not in copy.headers


def test_what_a_handler_says_of_the_end_is_not_taken_for_the_originals():
    assert may_travel({EXPIRES_AT: "1", "expires": "1", "expiration": "1"}) == {EXPIRES_AT: "1"}


def test_what_a_handler_sends_expires():
    broker = MemoryBroker("/queue/a")
    broker.publish(b"x")

    def handler(message):
        message.send("/queue/b", b"old", expires_in=0.001)
        message.send("/queue/b", b"new", expires_in=600)

    with ListenerContainer(broker, handler, template=RetryTemplate(name="orders")):
        assert broker.wait_until_empty()
    end = time.monotonic() + 0.002
    while time.monotonic() < end:
        pass
    session = broker.at("/queue/b").connect()
    assert session.receive(1).body == b"new"
    assert session.receive(0) is None
    session.close()
