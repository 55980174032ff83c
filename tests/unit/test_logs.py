"""Log records as JSON lines: the facts of a decision are keys, and a line is a line whatever is in it."""

from __future__ import annotations

import json
import logging

import pytest

from retrykit import FixedBackOffPolicy, LoggingListener, RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.messaging import ListenerContainer, discard, park, republish
from retrykit.messaging.logs import JsonLines
from retrykit.messaging.memory import MemoryBroker

ORDERS = "/queue/orders"
PATIENCE = 20.0
VERDICT = {"name", "key", "attempt", "retry", "delay", "reason", "error"}


@pytest.fixture
def broker():
    return MemoryBroker(ORDERS)


@pytest.fixture
def lines(caplog):
    """What was logged so far, as a program reads it."""
    caplog.set_level(logging.INFO, "retrykit")
    caplog.handler.setFormatter(JsonLines())
    return lambda: [json.loads(line) for line in caplog.text.splitlines()]


def fail(message):
    raise ValueError("no\nnever")


def consume(broker, **options):
    template = RetryTemplate(
        name="orders", retry_policy=SimpleRetryPolicy(max_attempts=2), back_off_policy=FixedBackOffPolicy(0.01)
    )
    with ListenerContainer(broker, fail, template=template, **options):
        assert broker.wait_until_empty(PATIENCE)


@pytest.mark.parametrize(
    ("recover", "words"),
    [
        (park("/queue/parked"), "was parked in /queue/parked"),
        (republish("/queue/other"), "was sent on to /queue/other"),
        (discard("nobody wants it"), "was discarded: nobody wants it"),
        (lambda _message, _context: None, "was recovered"),
    ],
)
def test_each_decision_is_a_line_with_its_facts(broker, lines, recover, words):
    broker.publish("x", id="o-1")
    consume(broker, recover=recover)
    first, last = lines()
    assert {name: first[name] for name in VERDICT} == {
        "name": "orders",
        "key": [ORDERS, "o-1"],
        "attempt": 1,
        "retry": True,
        "delay": 0.01,
        "reason": "SimpleRetryPolicy: attempt 1 of 2 failed",
        "error": "builtins.ValueError",
    }
    assert first["level"] == "INFO"
    assert {name: last[name] for name in VERDICT} == {
        "name": "orders",
        "key": [ORDERS, "o-1"],
        "attempt": 2,
        "retry": False,
        "delay": 0.0,
        "reason": "SimpleRetryPolicy: attempt 2 of 2",
        "error": "builtins.ValueError",
    }
    assert last["level"] == "WARNING"
    assert words in last["message"]


def test_the_lines_of_a_logging_listener_have_the_facts_too(lines):
    template = RetryTemplate(name="jobs", listeners=(LoggingListener(),))

    def failing(context):
        raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        template.execute(failing, state=RetryState(key=b"m1"))
    (line,) = lines()
    assert {name: line[name] for name in ("name", "key", "attempt", "retry", "error")} == {
        "name": "jobs",
        "key": {"bytes": "6d31"},
        "attempt": 1,
        "retry": True,
        "error": "builtins.ConnectionError",
    }
    assert line["logger"] == "retrykit"


def test_any_record_is_one_line(lines):
    log = logging.getLogger("retrykit.test")
    log.info("two\nlines of %s", "\ud800 \x1b[2J ü")
    try:
        fail(None)
    except ValueError:
        log.exception("it failed")
    plain, failed = lines()
    assert plain["message"] == "two\nlines of \ud800 \x1b[2J ü"
    assert set(plain) == {"time", "level", "logger", "process", "thread", "message"}
    assert plain["time"].endswith("+00:00")
    assert failed["traceback"].startswith("Traceback")
    assert "ValueError: no" in failed["traceback"]
