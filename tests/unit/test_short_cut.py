"""A first attempt in a transaction is made without the flow where that has nothing to say; nobody can tell."""

from __future__ import annotations

import pytest

from retrykit import RetryTemplate, SimpleRetryPolicy
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


def story(failing, *, shortened, recover, kind=Transaction):
    """All that can be seen of a call, in order."""
    events, seen = [], []
    transaction = kind(events, {what: list(errors) for what, errors in failing.items()})

    def work(context):
        seen.append(context)
        events.append((context.transaction, context.attempt, context.retry_count, str(context.last_error)))
        transaction.does("work")
        return "done"

    def recovered(context):
        events.append(("recovered", str(context.last_error), context.retry_count))
        return "recovered"

    template = RetryTemplate(retry_policy=SimpleRetryPolicy(3))
    with short_cut(shortened):
        try:
            outcome = template.execute(work, recovered if recover else None, transaction=lambda: transaction)
        except Exception as error:
            outcome = type(error), str(error), getattr(error, "__notes__", [])
    left = [(context.closed, context.transaction, context.retry_count, context.exhausted) for context in seen]
    return events, outcome, left


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("what", FAILING)
def test_a_call_with_a_transaction_is_the_same_with_and_without_the_short_cut(what, recover):
    events, outcome, left = story(FAILING[what], shortened=True, recover=recover)
    assert (events, outcome, left) == story(FAILING[what], shortened=False, recover=recover)
    assert events[0] == "begin"


def test_a_commit_that_nobody_knows_of_is_not_tried_again():
    events, (kind, *_), _ = story(FAILING["committing, as nobody can know"], shortened=True, recover=True)
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
