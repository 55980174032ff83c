"""A first attempt in a transaction is made without the flow where that has nothing to say; nobody can tell."""

from __future__ import annotations

import gc
import traceback
import weakref
from contextlib import suppress
from copy import copy

import pytest

from retrykit import RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.errors import CommitInDoubtError
from retrykit.template import short_cut


class Transaction:
    """A transaction that fails, and says what is done with it; `failing`: by what is done, how often."""

    def __init__(self, events, failing):
        self.events = events
        self.failing = failing

    def does(self, what):
        self.events.append(what)
        error = self.failing.get(what, [None]).pop(0)
        if not self.failing.get(what):
            self.failing.pop(what, None)
        if error is not None:
            raise error

    def __enter__(self):
        self.does("begin")
        return "a transaction"

    def __exit__(self, kind, error, traceback):
        self.does("commit" if error is None else f"roll back from {error}")
        return True


class Awaitable(Transaction):
    """One whose end has to be awaited."""

    def __exit__(self, *error):
        super().__exit__(*error)
        return self

    def __await__(self):
        return iter(())


async def later():
    return True


FAILING = {
    "nothing": {},
    "the work": {"work": [ValueError("bad")]},
    "the work, as often as it may": {"work": [ValueError(number) for number in range(3)]},
    "beginning": {"begin": [OSError("gone")]},
    "beginning, as often as it may": {"begin": [OSError(number) for number in range(3)]},
    "committing": {"commit": [OSError("conflict")]},
    "committing, as often as it may": {"commit": [OSError(number) for number in range(3)]},
    "committing, as nobody can know": {"commit": [CommitInDoubtError(name="x", key=None)]},
    "beginning, as nobody can know": {"begin": [CommitInDoubtError(name="x", key=None)]},
    "rolling back": {"work": [ValueError("bad")], "roll back from bad": [OSError("gone")]},
    "one thing after the other": {"begin": [OSError("a")], "work": [ValueError("b")], "commit": [OSError("c")]},
}


STATES = {
    "no state": None,
    "a first delivery": {"recover_on_redelivery": False},
    "a first delivery, recovered at the next": {},
    "a first delivery, tried again in place": {"rollback_for": lambda _: False},
    "a first delivery without a key": {"key": None},
}


def story(failing, *, shortened, recover, kind=Transaction, state=None, vetoes=False):
    """All that can be seen of a call, in order."""
    events, seen = [], []
    given = None if state is None else RetryState(**{"key": ("orders", 7), "redelivered": False} | state)
    transaction = kind(events, {what: list(map(copy, errors)) for what, errors in failing.items()})

    def work(context):
        seen.append(context)
        events.append((context.transaction, context.attempt, context.retry_count, str(context.last_error)))
        if vetoes:
            context.veto("poison")
        transaction.does("work")
        return "done"

    def recovered(context):
        events.append(("recovered", str(context.last_error), context.retry_count))
        return "recovered"

    template = RetryTemplate(retry_policy=SimpleRetryPolicy(3))
    with short_cut(shortened):
        try:
            outcome = template.execute(
                work, recovered if recover else None, state=given, transaction=lambda: transaction
            )
        except (Exception, KeyboardInterrupt) as error:
            outcome = type(error), str(error), getattr(error, "__notes__", []), frames_of(error)
    left = [(context.closed, context.transaction, context.retry_count, context.exhausted) for context in seen]
    stored = [(key, timeless(kept.snapshot)) for key, kept in template.context_cache.items()]
    return events, outcome, left, stored


def frames_of(error):
    """Where the error comes from, but for the library's own steps."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]


def timeless(snapshot):
    """What is stored, but for times, and for the library's own steps in tracebacks."""
    times = {"started_at", "first_failed_at", "last_failed_at", "fence", "errors", "not_before"}
    kept = {name: value for name, value in snapshot.items() if name not in times}
    trace = kept.get("last_error", {}).pop("traceback", "")
    return kept, [line for line in trace.splitlines() if __file__ in line]


@pytest.mark.parametrize("vetoes", [False, True])
@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("what", FAILING)
def test_a_call_with_a_transaction_is_the_same_with_and_without_the_short_cut(what, state, recover, vetoes):
    options = {"recover": recover, "state": STATES[state], "vetoes": vetoes}
    events, *rest = story(FAILING[what], shortened=True, **options)
    assert (events, *rest) == story(FAILING[what], shortened=False, **options)
    assert events[0] == "begin"


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("moment", ["begin", "work", "commit"])
def test_a_call_that_is_interrupted_leaves_the_same_with_and_without_the_short_cut(moment, state):
    stories = [
        story({moment: [KeyboardInterrupt()]}, shortened=shortened, recover=True, state=STATES[state], vetoes=True)
        for shortened in (True, False)
    ]
    assert stories[0] == stories[1]
    assert stories[0][1][0] is KeyboardInterrupt


def test_a_commit_that_nobody_knows_of_is_not_tried_again():
    events, (kind, *_), *_ = story(FAILING["committing, as nobody can know"], shortened=True, recover=True)
    assert kind is CommitInDoubtError
    assert events.count("begin") == 1


@pytest.mark.parametrize("recover", [False, True])
def test_a_transaction_whose_end_would_have_to_be_awaited_is_refused_either_way(recover):
    stories = [story({}, shortened=shortened, recover=recover, kind=Awaitable) for shortened in (True, False)]
    assert stories[0] == stories[1]
    assert recover or "is asynchronous: use AsyncRetryTemplate" in str(stories[0][1])


@pytest.mark.parametrize("shortened", [True, False])
def test_work_that_would_have_to_be_awaited_is_refused_and_rolled_back(shortened):
    events = []
    transaction = Transaction(events, {})
    with short_cut(shortened), pytest.raises(TypeError, match="the function is asynchronous: use AsyncRetryTemplate"):
        RetryTemplate(retry_policy=SimpleRetryPolicy(1)).execute(lambda _: later(), transaction=lambda: transaction)
    assert [event.split()[0] for event in events] == ["begin", "roll"]


@pytest.mark.parametrize("wrong", [{"transaction": 5}, {"recover": 5, "transaction": list}])
def test_wrong_arguments_are_refused_before_anything_ran(wrong):
    ran = []
    with pytest.raises(TypeError, match="must be callable"):
        RetryTemplate().execute(ran.append, **wrong)
    assert ran == []


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("shortened", [True, False])
def test_a_failure_in_a_transaction_is_kept_alive_by_nothing(shortened, state):
    failures = []

    class Failure(Exception):
        pass

    def work(_context):
        failure = Failure("bad")
        failures.append(weakref.ref(failure))
        try:
            raise failure
        finally:
            del failure

    def deliver():
        given = None if STATES[state] is None else RetryState(**{"key": 7, "redelivered": False} | STATES[state])
        with short_cut(shortened), suppress(Failure):
            RetryTemplate(throw_last=True).execute(work, state=given, transaction=lambda: Transaction([], {}))

    gc.collect()
    gc.disable()
    try:
        deliver()
        assert failures
        assert [failure() for failure in failures] == [None] * len(failures)
    finally:
        gc.enable()
