"""The flow's dealings with a store that others write to as well, and with one that joins the work's transaction."""

from __future__ import annotations

import logging

import attrs
import pytest

from retrykit import (
    ExhaustedRetryError,
    MapRetryContextCache,
    RetryContext,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    TerminatedRetryError,
)
from retrykit.errors import CodecError, ContextCacheError
from tests.doubles import EPOCH, Fails, ManualClock, Transaction

ERROR = OSError("broken")
KEY = "retry/m-1"


class Exits(BaseException):
    pass


class View:
    """A cache as it is seen through a transaction; what goes through it is written down."""

    def __init__(self, cache):
        self.cache = cache

    def load(self, key):
        self.cache.log.append("joined load")
        return self.cache.load(key)

    def save(self, key, snapshot, expected):
        self.cache.log.append("joined save")
        return self.cache.save(key, snapshot, expected)

    def remove(self, key, expected=None):
        self.cache.log.append("joined remove")
        if self.cache.fault is not None:
            raise self.cache.fault
        return self.cache.remove(key, expected)


class Joinable(MapRetryContextCache):
    """A cache that joins transactions, unless it is told that they are of another database."""

    def __init__(self, log, *, elsewhere=False, fault=None, on_full="reject"):
        super().__init__(on_full=on_full)
        self.log, self.elsewhere, self.fault = log, elsewhere, fault

    def joined(self, transaction):
        assert transaction == "session"
        return None if self.elsewhere else View(self)


class Contended(MapRetryContextCache):
    """A cache in which others write just before a save."""

    def __init__(self, *others):
        super().__init__()
        self.others = list(others)

    def save(self, key, snapshot, expected):
        if self.others:
            self.others.pop(0)(self)
        return super().save(key, snapshot, expected)


def deliver(template, callback, recover=None, *, transaction=None, **state):
    try:
        return template.execute(callback, recover, state=RetryState(key="m-1", **state), transaction=transaction)
    except Exception as error:
        return error


def joined(**options):
    log = []
    return log, RetryTemplate(context_cache=Joinable(log, **options))


def during(action, outcome=None):
    """A callback in the course of which somebody else does something."""

    def callback(context):
        action()
        if outcome is not None:
            raise outcome
        return "done"

    return callback


def mark(template, **facts):
    """Somebody else stores a history in place of ours."""
    stored = template.context_cache.load(KEY)
    snapshot = {"format": 1, "name": "retry", "key": "m-1", "retry_count": 1} | facts
    assert template.context_cache.save(KEY, snapshot, None if stored is None else stored.version)


# -- joined


def test_a_history_is_settled_within_the_works_own_transaction():
    log, template = joined()
    deliver(template, Fails(ERROR))
    assert deliver(template, Fails(), transaction=Transaction(log)) == "done"
    assert log == ["begin", "joined remove", "commit"]
    assert len(template.context_cache) == 0


def test_a_completion_mark_is_stored_within_it():
    log = []
    template = RetryTemplate(context_cache=Joinable(log), remember_completed=60)
    assert deliver(template, Fails(), transaction=Transaction(log)) == "done"
    assert log == ["begin", "joined save", "commit"]
    assert deliver(template, Fails(), transaction=Transaction(log)) is None


def test_what_recovery_does_is_settled_with_it():
    log, template = joined()
    transaction = Transaction(log)
    options = {"transaction": transaction, "recover_on_redelivery": False}
    single = RetryTemplate(context_cache=template.context_cache, retry_policy=SimpleRetryPolicy(1))
    assert deliver(single, Fails(ERROR), lambda _: "parked", **options) == "parked"
    assert log == ["begin", "roll back", "begin", "joined remove", "commit"]


def test_a_transaction_on_another_database_is_not_joined():
    log, template = joined(elsewhere=True)
    deliver(template, Fails(ERROR))
    assert deliver(template, Fails(), transaction=Transaction(log)) == "done"
    assert log == ["begin", "commit"]
    assert len(template.context_cache) == 0


@pytest.mark.parametrize("worded", [True, False])
def test_transaction_that_fails_while_the_history_is_settled_in_it_is_a_failed_attempt(worded):
    fault = RuntimeError("current transaction is aborted")
    told = ContextCacheError("remove failed") if worded else fault
    if worded:
        told.__cause__ = fault
    log, template = joined(fault=told)
    deliver(template, Fails(ERROR))
    assert deliver(template, Fails(), transaction=Transaction(log)) is fault
    assert log == ["begin", "joined remove", "roll back"]
    assert template.history("m-1").retry_count == 2


def test_attempts_whose_transaction_always_fails_come_to_an_end():
    log, template = joined(fault=RuntimeError("current transaction is aborted"))
    outcomes = [deliver(template, Fails(), transaction=Transaction(log)) for _ in range(4)]
    assert [type(outcome) for outcome in outcomes] == [*[RuntimeError] * 3, ExhaustedRetryError]


def test_an_item_that_somebody_else_completed_meanwhile_is_a_duplicate():
    log, template = joined()
    complete = during(lambda: mark(template, completed_at=1.0, expires_at=9e9))
    assert deliver(template, complete, transaction=Transaction(log)) is None
    assert log == ["begin", "joined remove", "joined load", "roll back"]


def test_work_whose_history_may_have_been_evicted_meanwhile_is_committed():
    log, template = joined(on_full="evict_oldest")
    forget = during(lambda: template.forget("m-1"))
    assert deliver(template, forget, transaction=Transaction(log)) == "done"
    assert log[-1] == "commit"


def test_work_whose_history_was_settled_by_somebody_else_meanwhile_is_rolled_back():
    log, template = joined()
    settle = during(lambda: template.forget("m-1"))
    error = deliver(template, settle, transaction=Transaction(log))
    assert type(error) is TerminatedRetryError
    assert "settled or forgotten" in str(error)
    assert log[-1] == "roll back"


def test_work_whose_mark_is_to_be_kept_is_committed_when_its_history_was_forgotten():
    log, template = joined()
    template = attrs.evolve(template, remember_completed=60.0)
    forget = during(lambda: template.forget("m-1"))
    assert deliver(template, forget, transaction=Transaction(log)) == "done"
    assert log[-1] == "commit"
    assert template.context_cache.load(KEY).snapshot["completed_at"] is not None


def test_work_that_was_believed_dead_and_overtaken_is_rolled_back():
    log, template = joined()
    overtake = during(lambda: mark(template))
    error = deliver(template, overtake, transaction=Transaction(log))
    assert type(error) is TerminatedRetryError
    assert "believed dead" in str(error)
    assert log[-1] == "roll back"


def test_a_history_that_was_only_touched_is_settled_all_the_same():
    log, template = joined()
    touch = during(lambda: template.veto("m-1", "poison"))
    assert deliver(template, touch, transaction=Transaction(log)) == "done"
    assert log == ["begin", "joined remove", "joined load", "joined remove", "commit"]
    assert len(template.context_cache) == 0


def test_a_history_that_cannot_be_read_any_more_is_left_alone_and_the_work_rolled_back():
    log, template = joined()
    damage = during(lambda: mark(template, format=99))
    assert type(deliver(template, damage, transaction=Transaction(log))) is CodecError
    assert log[-1] == "roll back"
    assert template.context_cache.load(KEY).snapshot["format"] == 99


# -- others write at the same time


@pytest.mark.parametrize("forgotten", [True, False], ids=["forgotten", "vetoed"])
def test_p2_a_success_settles_whatever_others_did_meanwhile(forgotten):
    template = RetryTemplate()
    act = during(lambda: template.forget("m-1") if forgotten else template.veto("m-1", "poison"))
    assert deliver(template, act) == "done"
    assert len(template.context_cache) == 0


def test_a_failure_is_added_to_what_others_stored_meanwhile():
    template = RetryTemplate()

    def callback(context):
        context.attributes["seen"] = 1
        template.veto("m-1", "poison")
        raise ERROR

    assert deliver(template, callback) is ERROR
    history = template.history("m-1")
    assert (history.retry_count, history.veto_reason, history.attributes) == (1, "poison", {"seen": 1})


def test_a_withdrawal_leaves_what_others_stored_meanwhile():
    template = RetryTemplate()
    with pytest.raises(Exits):
        deliver(template, during(lambda: template.veto("m-1", "poison"), Exits()))
    snapshot = template.context_cache.load(KEY).snapshot
    assert (snapshot["veto"], snapshot.get("in_flight")) == ("poison", None)


def test_a_withdrawal_of_what_others_forgot_is_done():
    template = RetryTemplate()
    with pytest.raises(Exits):
        deliver(template, during(lambda: template.forget("m-1"), Exits()))
    assert len(template.context_cache) == 0


def test_a_claim_that_came_second_is_made_again():
    cache = Contended()
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(1))
    deliver(template, Fails(ERROR))
    cache.others.append(lambda _: template.veto("m-1", "poison"))
    assert deliver(template, Fails(), lambda _: "parked") == "parked"
    assert len(cache) == 0


def test_p3_an_item_that_somebody_else_recovered_meanwhile_is_a_duplicate():
    cache = Contended()
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(1))
    deliver(template, Fails(ERROR))
    cache.others.append(lambda _: template.forget("m-1"))
    park = Fails()
    assert deliver(template, Fails(), park) is None
    assert park.calls == 0


def test_a_due_time_without_a_delay_is_waited_for():
    clock = ManualClock()
    template = RetryTemplate(clock=clock)
    mark(template, not_before=EPOCH + 4)
    assert deliver(template, Fails()) == "done"
    assert clock.slept == [4]


def test_a_snapshot_that_cannot_be_made_hides_nothing(monkeypatch, caplog):
    def broken(context):
        raise ValueError("no snapshot")

    monkeypatch.setattr(RetryContext, "snapshot", broken)
    with caplog.at_level(logging.ERROR, "retrykit"):
        assert deliver(RetryTemplate(), Fails(ERROR), journal="never") is ERROR
    assert "fault in store" in caplog.text


class Undone(Joinable):
    """A cache of which the transaction that joined it is rolled back: what was removed in it is still there."""

    def joined(self, transaction):
        view = super().joined(transaction)
        view.remove = lambda key, expected: self.load(key).version == expected
        return view


def test_failure_that_others_stored_survives_a_commit_that_fails_after_the_history_was_settled_in_it():
    log = []
    template = RetryTemplate(context_cache=Undone(log))

    def somebody_else_fails():
        mark(template, in_flight=template.context_cache.load(KEY).snapshot["in_flight"])

    error = deliver(template, during(somebody_else_fails), transaction=Transaction(log, commit=ERROR))
    assert error is ERROR
    assert template.context_cache.load(KEY).snapshot["retry_count"] == 2


def test_veto_of_an_item_that_was_not_looked_up_rolls_its_work_back_where_it_is_found_in_time():
    log, template = joined()
    template = attrs.evolve(template, remember_completed=60.0)
    template.veto("m-1", "poison")
    error = deliver(template, Fails(), transaction=Transaction(log), redelivered=False)
    assert type(error) is TerminatedRetryError
    assert "poison" in str(error)
    assert log[-1] == "roll back"
    assert template.history("m-1").veto_reason == "poison"
