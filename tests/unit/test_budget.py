"""Retries paid from a shared budget."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from retrykit import BudgetRetryPolicy, CompositeRetryPolicy, RetryBudget, RetryTemplate, SimpleRetryPolicy
from tests.doubles import Ears, Fails, pickled


def test_a_budget_begins_full_and_is_never_fuller():
    budget = RetryBudget(ratio=0.5, reserve=2)
    budget.deposit()
    assert budget.tokens == 2


def test_a_retry_takes_a_whole_token_and_a_call_pays_a_part_of_one():
    budget = RetryBudget(ratio=0.5, reserve=1)
    assert budget.take()
    assert not budget.take()
    budget.deposit()
    assert not budget.take()
    budget.deposit()
    assert budget.take()


@pytest.mark.parametrize("calls", [3, 5, 7, 10, 20, 30, 49])
def test_as_many_calls_as_the_ratio_says_pay_for_one_retry(calls):
    budget = RetryBudget(ratio=1 / calls, reserve=1)
    policy = BudgetRetryPolicy(budget)
    assert budget.take()
    for _ in range(3):
        for _ in range(calls):
            assert not policy.decide(SimpleNamespace(retry_count=1)).retry
            assert not budget.take()
            budget.deposit()
        assert policy.decide(SimpleNamespace(retry_count=1)).retry
        assert budget.take()
        assert budget.tokens >= 0


def test_threads_take_no_more_than_there_is():
    budget = RetryBudget(ratio=0, reserve=50)
    taken = []
    threads = [threading.Thread(target=lambda: taken.extend(budget.take() for _ in range(20))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 50


def test_a_pickled_budget_has_its_bounds_and_is_full():
    budget = RetryBudget(0.2, 3)
    budget.take()
    copy = pickled(budget)
    assert (copy.ratio, copy.reserve, copy.tokens) == (0.2, 3, 3)
    assert repr(copy) == "RetryBudget(ratio=0.2, reserve=3)"


def test_budgets_are_equal_only_to_themselves_because_they_are_shared():
    budget = RetryBudget()
    assert BudgetRetryPolicy(budget) == BudgetRetryPolicy(budget)
    assert BudgetRetryPolicy(budget) != BudgetRetryPolicy(RetryBudget())


def test_asking_takes_nothing():
    budget = RetryBudget(reserve=1)
    policy = BudgetRetryPolicy(budget)
    assert policy.decide(SimpleNamespace(retry_count=0)).reason == "BudgetRetryPolicy: the first attempt is free"
    for _ in range(3):
        assert policy.decide(SimpleNamespace(retry_count=1)).reason == "BudgetRetryPolicy: 1.0 of 1 tokens left"
    budget.take()
    assert not policy.decide(SimpleNamespace(retry_count=1)).retry


def test_every_call_pays_and_every_retry_costs():
    budget = RetryBudget(ratio=0.5, reserve=2)
    template = RetryTemplate(retry_policy=CompositeRetryPolicy([SimpleRetryPolicy(5), BudgetRetryPolicy(budget)]))
    callback = Fails(*[OSError(str(n)) for n in range(4)])
    with pytest.raises(OSError, match="2"):
        template.execute(callback)
    assert callback.calls == 3
    assert budget.tokens == 0
    template.execute(Fails())
    assert budget.tokens == 0.5


def test_when_another_call_takes_the_last_token_the_decision_is_no():
    budget = RetryBudget(ratio=0, reserve=1)

    class Greedy(BudgetRetryPolicy):
        def decide(self, context):
            decision = super().decide(context)
            budget.take()
            return decision

    ears = Ears()
    template = RetryTemplate(retry_policy=Greedy(budget), listeners=[ears])
    seen = []
    with pytest.raises(OSError, match="x"):
        template.execute(Fails(OSError("x")), None)
    assert [event[2] for event in ears.log if event[0] == "on_error"] == [False]
    budget = RetryBudget(ratio=0, reserve=1)
    template = RetryTemplate(retry_policy=Greedy(budget))
    template.execute(Fails(OSError("x")), lambda context: seen.append(context.decision.reason))
    assert seen == ["BudgetRetryPolicy: the last token was taken by another call"]


def test_one_budget_in_two_branches_is_paid_once():
    budget = RetryBudget(ratio=0, reserve=5)
    both = CompositeRetryPolicy([BudgetRetryPolicy(budget), BudgetRetryPolicy(budget)])
    RetryTemplate(retry_policy=both).execute(Fails(OSError()))
    assert budget.tokens == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ratio": -0.1}, ValueError),
        ({"ratio": "0.1"}, TypeError),
        ({"reserve": 0}, ValueError),
        ({"reserve": float("inf")}, ValueError),
    ],
    ids=str,
)
def test_bad_values_are_refused_at_once(options, error):
    (argument,) = options
    with pytest.raises(error, match=rf"^{argument}: must be"):
        RetryBudget(**options)
    with pytest.raises(TypeError, match=r"^budget: must be a RetryBudget"):
        BudgetRetryPolicy(RetryBudget)
