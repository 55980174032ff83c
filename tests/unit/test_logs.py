"""Log records as JSON lines: the facts of a decision are keys, and a line is a line whatever is in it."""

from __future__ import annotations

import json
import logging

import pytest

from retrykit import (
    AsyncRetryTemplate,
    FixedBackOffPolicy,
    LoggingListener,
    MapRetryContextCache,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
)
from retrykit.key import canonical_key, key_to_json
from retrykit.messaging import ListenerContainer, Park, Parked, discard, park, republish
from retrykit.messaging.logs import JsonLines, in_a_line, not_stored
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
        (lambda _message, _context: Parked("failed", 7, reason="poison"), "was parked in failed as 7: poison"),
    ],
)
def test_each_decision_is_a_line_with_its_facts(broker, lines, recover, words):
    broker.publish("x", id="o-1")
    consume(broker, recover=recover)
    first, last = [line for line in lines() if "attempt" in line]
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
    assert f"{words}" in last["message"]
    assert last["message"].endswith("; its last attempt failed: ValueError: no")
    assert last["error_message"] == first["error_message"] == "no"
    assert ", in fail" in last["traceback"]
    assert "traceback" not in first


def test_a_parked_message_is_told_by_what_it_is_known_by_where_it_is_parked(broker, lines):
    broker.publish("x", id="o-1")
    park_as = Park("/queue/parked", headers={"retrykit-id": "abc"}, reason="poison")
    consume(broker, recover=lambda _message, _context: park_as)
    (line,) = [line for line in lines() if "parked_in" in line]
    text = f"message ({ORDERS!r}, 'o-1') was parked in /queue/parked as abc: poison"
    assert line["message"] == f"{text}; its last attempt failed: ValueError: no"
    assert (line["parked_in"], line["parked_as"]) == ("/queue/parked", "abc")


def test_of_what_a_handler_parks_by_itself_no_failure_is_told(broker, lines):
    broker.publish("x", id="o-1")
    template = RetryTemplate(name="orders")
    with ListenerContainer(broker, lambda _message: Park("/queue/parked", reason="odd"), template=template):
        assert broker.wait_until_empty(PATIENCE)
    (line,) = [line for line in lines() if "parked_in" in line]
    assert line["message"].endswith("was parked in /queue/parked: odd")
    assert "traceback" not in line


def test_a_failure_of_another_process_is_told_without_a_traceback(broker, lines):
    cache, key = Shared(), (ORDERS, "o-1")
    error = {"type": "shop.errors.Refused", "message": "x" * 1_000, "traceback": "Traceback of another process"}
    facts = {"format": 1, "name": "orders", "key": key_to_json(key), "retry_count": 2, "last_error": error}
    cache.save(canonical_key("orders", key), facts, None)
    broker.publish("x", id="o-1")
    consume_again(broker, RetryTemplate, fail, context_cache=cache, remember_completed=60)
    (line,) = [line for line in lines() if "parked_in" in line]
    assert line["message"].endswith("; its last attempt failed: Refused: " + "x" * 300)
    assert (line["error"], line["error_message"]) == ("shop.errors.Refused", "x" * 300)
    assert "traceback" not in line


def test_where_nobody_recovers_the_last_failure_has_its_traceback_once(broker, lines):
    broker.publish("x", id="o-1")
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=1))
    with ListenerContainer(broker, fail, template=template) as container:
        while container.counters.withheld < 2:
            container.wait(0.01)
    first, second = [line for line in lines() if "is withheld" in line["message"]][:2]
    assert ", in fail" in first["traceback"]
    assert "traceback" not in second


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_whoever_debugs_is_shown_where_a_handler_failed(broker, lines, caplog, level):
    caplog.set_level(level, "retrykit.messaging")
    broker.publish("x", id="o-1")
    consume(broker, recover=park("/queue/parked"))
    found = [line.get("traceback", "") for line in lines() if "attempt" in line]
    assert len(found) == 2
    shown = ["ValueError: no" in trace and ", in fail" in trace for trace in found]
    # The last failure has its traceback for everybody.
    assert shown == [level == logging.DEBUG, True]


def test_whoever_debugs_is_shown_where_a_recovery_failed(broker, lines, caplog):
    def unable(_message, _context):
        raise KeyError("shelf")

    caplog.set_level(logging.DEBUG, "retrykit.messaging")
    broker.publish("x", id="o-1")
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=1))
    with ListenerContainer(broker, fail, template=template, recover=unable) as container:
        while not container.counters.withheld:
            container.wait(0.01)
    withheld = next(line for line in lines() if "is withheld" in line["message"])
    assert "KeyError: 'shelf'" in withheld["traceback"]
    assert ", in unable" in withheld["traceback"]


# -- what only the log tells


async def handle_later(_message):
    pass


KINDS = pytest.mark.parametrize(
    ("kind", "handler"),
    [(RetryTemplate, lambda _message: None), (AsyncRetryTemplate, handle_later)],
    ids=["sync", "async"],
)


def consume_again(broker, kind, handler, **options):
    template = kind(name="orders", retry_policy=SimpleRetryPolicy(max_attempts=2), **options)
    with ListenerContainer(broker, handler, template=template, recover=park("/queue/parked")):
        assert broker.wait_until_empty(PATIENCE)


@KINDS
def test_a_duplicate_that_is_acknowledged_unread_is_told(broker, lines, kind, handler):
    cache = MapRetryContextCache()
    for _ in range(2):
        broker.publish("x", id="o-1")
        consume_again(broker, kind, handler, context_cache=cache, remember_completed=60)
    (line,) = [line for line in lines() if "unread" in line["message"]]
    assert (line["level"], line["name"], line["key"]) == ("INFO", "orders", [ORDERS, "o-1"])


@KINDS
def test_a_commit_in_doubt_is_told_with_its_message(broker, lines, kind, handler):
    broker.publish("x", id="o-1")
    broker.doubt_next_commit("done")
    consume_again(broker, kind, handler)
    (line,) = [line for line in lines() if "so nothing is counted" in line["message"]]
    assert (line["level"], line["name"], line["key"]) == ("WARNING", "orders", [ORDERS, "o-1"])


@KINDS
def test_whoever_debugs_can_follow_a_message(lines, caplog, kind, handler):
    caplog.set_level(logging.DEBUG, "retrykit.messaging")
    broker = MemoryBroker(ORDERS)
    broker.publish("x", id="o-1")
    consume_again(broker, kind, handler)
    told = [line["message"] for line in lines() if line.get("key") == [ORDERS, "o-1"]]
    assert told == [
        f"message ({ORDERS!r}, 'o-1'){did}" for did in (": attempt 1 begins", " is handled, and acknowledged")
    ]


class Shared(MapRetryContextCache):
    shared = True


@KINDS
def test_a_message_that_killed_its_process_is_told_when_it_comes_again(broker, lines, kind, handler):
    cache, key = Shared(), (ORDERS, "o-1")
    flight = {"fence": 1, "owner": "elsewhere/1/2/3", "since": 0.0, "until": 1.0}
    facts = {"format": 1, "name": "orders", "key": key_to_json(key), "retry_count": 0, "in_flight": [flight]}
    cache.save(canonical_key("orders", key), facts, None)
    broker.publish("x", id="o-1")
    consume_again(broker, kind, handler, context_cache=cache, remember_completed=60)
    (line,) = [line for line in lines() if "attempt" in line]
    assert {name: line[name] for name in VERDICT} == {
        "name": "orders",
        "key": [ORDERS, "o-1"],
        "attempt": 1,
        "retry": True,
        "delay": 0.0,
        "reason": "SimpleRetryPolicy: attempt 1 of 2 failed",
        "error": "retrykit.Crash",
    }
    assert line["level"] == "WARNING"
    assert "never ended; it was made by elsewhere/1/2/3" in line["message"]


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


def record(message, *values, error=None):
    trace = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("shop", logging.ERROR, "shop.py", 1, message, values, trace)


def test_any_record_is_one_line():
    wild = "\ud800 \x1b[2J ü"
    line = JsonLines().format(record("two\nlines of %s", wild))
    assert line.isascii()
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == f"two\nlines of {wild}"
    assert set(told) == {"time", "level", "logger", "process", "thread", "message"}
    assert told["time"].endswith("+00:00")


def test_the_traceback_of_an_error_is_in_its_line():
    try:
        fail(None)
    except ValueError as error:
        told = json.loads(JsonLines().format(record("it failed", error=error)))
    assert told["traceback"].startswith("Traceback")
    assert "ValueError: no" in told["traceback"]


def test_lines_for_people_command_no_terminal():
    logs = pytest.importorskip("retrykit.cli.logs")
    line = logs.TextLines().format(record("two\nlines of %s", "\x1b[2J"))
    assert line.endswith("shop: two\\nlines of \\x1b[2J")
    try:
        fail(None)
    except ValueError as error:
        first, *others = logs.TextLines().format(record("it failed", error=error)).splitlines()
    assert first.endswith(" shop: it failed")
    assert others[0].startswith("Traceback")


def test_a_failure_that_could_not_be_stored_is_told_in_few_words():
    def caused(error, cause):
        error.__cause__ = cause
        return error

    refused = ConnectionError("connection refused\n\tIs the server running?")
    fault = caused(LookupError("load failed"), refused)
    assert not_stored(fault, caused(RuntimeError("no database"), refused)) == "ConnectionError: connection refused"
    assert not_stored(fault, ValueError("no")) == "ConnectionError: connection refused; it was ValueError: no"
    # Causes that go round in a circle end.
    assert not_stored(caused(refused, fault), ValueError()) == "LookupError: load failed; it was ValueError"
    assert len(in_a_line(ValueError("x" * 1_000))) == 312
