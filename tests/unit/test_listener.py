"""Being told what happens."""

from __future__ import annotations

import asyncio
import logging

import pytest

from retrykit import (
    AsyncRetryTemplate,
    LoggingListener,
    RetryListener,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    StatisticsListener,
)
from tests.doubles import AsyncEars, Ears, Fails, pickled

ERROR = OSError("broken")


def test_listeners_hear_of_everything_in_order():
    ears = Ears()
    RetryTemplate(listeners=[ears]).execute(Fails(ERROR))
    assert ears.log == [("open",), ("on_error", ERROR, True), ("on_success", "done"), ("close", None)]


def test_listeners_hear_of_a_recovery():
    ears = Ears()
    RetryTemplate(retry_policy=SimpleRetryPolicy(1), listeners=[ears]).execute(Fails(ERROR), lambda _: "instead")
    assert ears.log == [("open",), ("on_error", ERROR, False), ("on_recover", "instead"), ("close", None)]


def test_the_first_opens_first_and_closes_last():
    log = []
    RetryTemplate(listeners=[Ears(log, "a"), Ears(log, "b")]).execute(Fails(ERROR))
    assert [event[:2] for event in log] == [
        ("a", "open"),
        ("b", "open"),
        ("b", "on_error"),
        ("a", "on_error"),
        ("b", "on_success"),
        ("a", "on_success"),
        ("b", "close"),
        ("a", "close"),
    ]


def test_p9_close_is_told_of_an_interpreter_exit():
    ears = Ears()
    exit_ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        RetryTemplate(listeners=[ears]).execute(Fails(exit_))
    assert ears.log == [("open",), ("close", exit_)]


@pytest.mark.parametrize("event", ["open", "on_success", "on_error", "on_recover", "close"])
def test_p11_a_listener_that_raises_changes_nothing_and_is_logged(event, caplog):
    class Rude(RetryListener):
        pass

    def raises(self, *arguments):
        raise RuntimeError("rude")

    setattr(Rude, event, raises)
    ears = Ears()
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(2), listeners=[Rude(), ears])
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert template.execute(Fails(ERROR)) == "done"
        assert template.execute(Fails(ERROR, ERROR), lambda _: "instead") == "instead"
    assert f"fault in listener Rude.{event}" in caplog.text
    assert [event[0] for event in ears.log].count("close") == 2


def test_a_listener_can_veto_and_the_history_keeps_it():
    class Strict(RetryListener):
        def on_error(self, context, error, decision):
            context.veto("seen enough")

    template = RetryTemplate(listeners=[Strict()])
    callback = Fails(ERROR)
    with pytest.raises(OSError, match="broken"):
        template.execute(callback)
    assert callback.calls == 1
    with pytest.raises(OSError, match="broken"):
        template.execute(Fails(ERROR), state=RetryState(key="m-1"))
    assert template.history("m-1").veto_reason == "seen enough"


def test_asynchronous_listeners_are_awaited():
    ears = AsyncEars()
    asyncio.run(AsyncRetryTemplate(listeners=[ears]).execute(Fails(ERROR)))
    assert [event[0] for event in ears.log] == ["open", "on_error", "on_success", "close"]


def test_an_asynchronous_listener_of_a_sync_template_is_refused_in_the_log(caplog):
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert RetryTemplate(listeners=[AsyncEars()]).execute(Fails()) == "done"
    assert "is asynchronous: use AsyncRetryTemplate" in caplog.text


def test_statistics_count_per_name():
    statistics = StatisticsListener()
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(2), listeners=[statistics])
    template.execute(Fails(ERROR))
    template.execute(Fails(ERROR, ERROR), lambda _: None)
    with pytest.raises(OSError, match="broken"):
        template.execute(Fails(ERROR, ERROR))
    RetryTemplate(name="other", listeners=[statistics]).execute(Fails())
    assert statistics.snapshot("orders") == {"started": 3, "complete": 1, "recovered": 1, "errors": 5, "aborted": 1}
    assert statistics.snapshot()["other"]["complete"] == 1
    assert statistics.snapshot("nobody") == {"started": 0, "complete": 0, "recovered": 0, "errors": 0, "aborted": 0}


def test_a_snapshot_of_statistics_is_a_copy_and_a_pickled_listener_begins_anew():
    statistics = StatisticsListener()
    RetryTemplate(listeners=[statistics]).execute(Fails())
    statistics.snapshot("retry")["started"] = 7
    assert statistics.snapshot("retry")["started"] == 1
    assert pickled(statistics).snapshot() == {}


def test_the_logging_listener_says_who_what_and_why(caplog):
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(2), listeners=[LoggingListener()])
    with caplog.at_level(logging.INFO, "retrykit"):
        template.execute(Fails(ERROR, ERROR), lambda _: None, state=RetryState(key=None, rollback_for=lambda _: False))
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    first = "orders key=None attempt 1 failed: OSError: broken; "
    second = "orders key=None attempt 2 failed: OSError: broken; "
    assert said == [
        ("INFO", first + "retry at once (SimpleRetryPolicy: attempt 1 of 2 failed)"),
        ("WARNING", second + "give up (SimpleRetryPolicy: attempt 2 of 2)"),
        ("WARNING", "orders key=None recovered after 2 failed attempts"),
    ]


def test_the_logger_and_the_level_can_be_given(caplog):
    listener = LoggingListener(logging.getLogger("app.retries"), level=logging.ERROR)
    with caplog.at_level(logging.DEBUG, "app.retries"):
        RetryTemplate(listeners=[listener]).execute(Fails(ERROR))
    assert [(record.name, record.levelname) for record in caplog.records] == [("app.retries", "ERROR")]
    assert listener == LoggingListener(logging.getLogger("app.retries"), level=logging.ERROR)
    assert pickled(LoggingListener()) == LoggingListener()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"logger": "app"}, TypeError),
        ({"logger": 3}, TypeError),
        ({"level": "INFO"}, TypeError),
        ({"level": -1}, ValueError),
    ],
    ids=str,
)
def test_bad_values_are_refused_at_once(options, error):
    (argument,) = options
    with pytest.raises(error, match=rf"^{argument}: must be"):
        LoggingListener(**options)
