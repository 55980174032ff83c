"""Whether an operation may be tried again, and why."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit import (
    AlwaysRetryPolicy,
    BudgetRetryPolicy,
    CircuitBreakerRetryPolicy,
    CompositeRetryPolicy,
    ExceptionClassifierRetryPolicy,
    MaxAttemptsRetryPolicy,
    NeverRetryPolicy,
    PredicateRetryPolicy,
    RetryBudget,
    RetryDecision,
    RetryListener,
    RetryPolicy,
    RetryTemplate,
    SimpleRetryPolicy,
    TimeoutRetryPolicy,
)
from retrykit.failure import StoredError
from retrykit.history import Tally
from retrykit.policy import every, nearest
from tests.doubles import Fails, ManualClock, pickled


def is_os_error(error):
    return isinstance(error, OSError)


class Stubborn(SimpleRetryPolicy):
    """A user's own kind."""


KINDS = [
    SimpleRetryPolicy(3, ConnectionError, no_retry_for=ConnectionResetError),
    MaxAttemptsRetryPolicy(3),
    TimeoutRetryPolicy(1.5),
    AlwaysRetryPolicy(),
    NeverRetryPolicy(),
    PredicateRetryPolicy(is_os_error),
    ExceptionClassifierRetryPolicy({OSError: MaxAttemptsRetryPolicy(3), KeyError: MaxAttemptsRetryPolicy(2)}),
    CompositeRetryPolicy([MaxAttemptsRetryPolicy(3), TimeoutRetryPolicy(2)]),
    CompositeRetryPolicy([MaxAttemptsRetryPolicy(3), PredicateRetryPolicy(is_os_error)], optimistic=True),
    CircuitBreakerRetryPolicy(MaxAttemptsRetryPolicy(2)),
]
kinds = pytest.mark.parametrize("policy", KINDS, ids=lambda policy: type(policy).__name__ + str(KINDS.index(policy)))


def after(failures, error=None, *, elapsed=0.0, pause=0.0, tallies=None, exhausted=False):
    """A context as a policy sees it."""
    return SimpleNamespace(
        retry_count=failures,
        last_error=error,
        elapsed=elapsed,
        pause=pause,
        tallies=tallies or {},
        max_attempts=None,
        exhausted=exhausted,
    )


def run(policy, *errors):
    """Attempts that a stateless call makes when it fails with these errors in turn, and the last decision."""
    callback = Fails(*errors)
    try:
        RetryTemplate(retry_policy=policy, clock=ManualClock()).execute(callback)
    except Exception as error:
        return callback.calls, error
    return callback.calls, None


@kinds
def test_every_kind_is_a_value(policy):
    assert isinstance(policy, RetryPolicy)
    assert policy == attrs.evolve(policy)
    assert hash(policy) == hash(attrs.evolve(policy))
    assert pickled(policy) == policy
    assert repr(policy).startswith(type(policy).__name__ + "(")
    assert len(repr(policy)) < 400


ERRORS = st.sampled_from([None, OSError("x"), ConnectionResetError("x"), KeyError("x"), StoredError.of_crash(1, "o")])


@kinds
@given(failures=st.integers(0, 5), error=ERRORS, elapsed=st.floats(0, 5), pause=st.floats(0, 5))
def test_asking_twice_gives_the_same_answer_and_changes_nothing(policy, *, failures, error, elapsed, pause):
    context = after(failures, error, elapsed=elapsed, pause=pause, tallies={"/builtins.OSError": Tally(failures, 0.0)})
    before = attrs.evolve(policy), dict(vars(context))
    one, other = policy.decide(context), policy.decide(context)
    assert (one, one.reason) == (other, other.reason)
    assert (policy, vars(context)) == before
    assert one.reason


# -- decisions


def test_a_decision_words_itself():
    assert str(RetryDecision(retry=True, delay=1.5, reason="so")) == "retry in 1.5 s (so)"
    assert str(RetryDecision(retry=True, reason="so")) == "retry at once (so)"
    assert str(RetryDecision(retry=False, reason="so")) == "give up (so)"


def test_a_decision_is_a_value_whose_reason_is_worded_when_it_is_read():
    worded = []
    decision = RetryDecision(retry=True, reason=lambda: worded.append(1) or "late")
    assert worded == []
    assert decision == RetryDecision(retry=True, reason="other")
    assert hash(decision) == hash(RetryDecision(retry=True))
    assert decision.reason == "late"
    assert "reason" not in repr(decision)


def test_a_decision_keeps_its_reason_when_it_is_pickled():
    inner = RetryDecision(retry=False, reason=lambda: "inner")
    decision = RetryDecision(retry=False, reason=lambda: "late", clauses=(inner,), recoverable=False)
    copy = pickled(decision)
    assert copy == decision
    assert (copy.reason, copy.clauses[0].reason, copy.recoverable) == ("late", "inner", False)
    assert attrs.evolve(copy, delay=2.0).delay == 2.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"retry": "yes"}, TypeError),
        ({"retry": None}, TypeError),
        ({"delay": None}, TypeError),
        ({"delay": True}, TypeError),
        ({"delay": -1}, ValueError),
        ({"delay": float("nan")}, ValueError),
        ({"delay": float("inf")}, ValueError),
        ({"recoverable": 1}, TypeError),
    ],
    ids=str,
)
def test_a_decision_that_is_none_is_refused(options, error):
    (argument,) = options
    with pytest.raises(error, match=rf"^{argument}: must be"):
        RetryDecision(**{"retry": True} | options)


def test_the_delay_of_a_decision_may_be_a_timedelta():
    assert RetryDecision(True, timedelta(minutes=1)) == RetryDecision(True, 60)
    assert type(RetryDecision(True, 60).delay) is float


# -- SimpleRetryPolicy


def test_a_subclass_stays_one_when_it_is_pickled():
    policy = Stubborn(4, OSError)
    assert type(pickled(policy)) is Stubborn
    assert pickled(policy) == policy


def test_the_first_attempt_is_counted_in():
    policy = SimpleRetryPolicy(3)
    assert [policy.decide(after(n, OSError())).retry for n in range(4)] == [True, True, True, False]
    assert policy.decide(after(3, OSError())).reason == "SimpleRetryPolicy: attempt 3 of 3"
    assert policy.decide(after(2, OSError())).reason == "SimpleRetryPolicy: attempt 2 of 3 failed"


def test_no_limit_is_none():
    decision = SimpleRetryPolicy(None).decide(after(10_000, OSError()))
    assert decision.retry
    assert "of unlimited" in decision.reason


@pytest.mark.parametrize(
    ("policy", "error", "retry"),
    [
        (SimpleRetryPolicy(), ValueError(), True),
        (SimpleRetryPolicy(retry_for=OSError), ValueError(), False),
        (SimpleRetryPolicy(retry_for=OSError), ConnectionResetError(), True),
        (SimpleRetryPolicy(retry_for=OSError, no_retry_for=ConnectionError), ConnectionResetError(), False),
        (SimpleRetryPolicy(retry_for=(OSError, ConnectionResetError), no_retry_for=ConnectionError), OSError(), True),
        (
            SimpleRetryPolicy(retry_for=(OSError, ConnectionResetError), no_retry_for=ConnectionError),
            ConnectionResetError(),
            True,
        ),
        (SimpleRetryPolicy(no_retry_for=KeyError), ValueError(), True),
        (SimpleRetryPolicy(no_retry_for=KeyError), KeyError(), False),
        (SimpleRetryPolicy(retry_for=OSError, default=True), ValueError(), True),
        (SimpleRetryPolicy(no_retry_for=OSError, default=False), ValueError(), True),
        (SimpleRetryPolicy(retry_for=(), no_retry_for=OSError, default=False), ValueError(), False),
        (SimpleRetryPolicy(retry_for=OSError), StoredError.of(ConnectionResetError()), True),
        (SimpleRetryPolicy(retry_for=OSError), StoredError.of(ValueError()), False),
        (SimpleRetryPolicy(retry_for=OSError), StoredError.of_crash(1, "owner"), True),
        (SimpleRetryPolicy(retry_for=OSError), None, True),
    ],
)
def test_the_nearest_class_decides(policy, error, retry):
    decision = policy.decide(after(1, error))
    assert decision.retry is retry
    if not retry:
        assert decision.reason.endswith("is not retryable")


def caused(error, cause):
    error.__cause__ = cause
    return error


def test_causes_classify_only_when_asked_to():
    error = caused(RuntimeError(), OSError())
    assert not SimpleRetryPolicy(retry_for=OSError).decide(after(1, error)).retry
    assert SimpleRetryPolicy(retry_for=OSError, traverse_causes=True).decide(after(1, error)).retry
    assert not SimpleRetryPolicy(no_retry_for=OSError, traverse_causes=True).decide(after(1, error)).retry
    assert not SimpleRetryPolicy(retry_for=OSError, traverse_causes=True).decide(after(1, RuntimeError())).retry


def test_a_chain_of_causes_that_bites_its_tail_ends():
    one, other = RuntimeError(), ValueError()
    one.__cause__, other.__cause__ = other, one
    assert not SimpleRetryPolicy(retry_for=OSError, traverse_causes=True).decide(after(1, one)).retry
    one.__cause__ = other.__cause__ = None


def test_not_recoverable_forbids_the_recovery_of_the_failure_and_of_what_it_caused():
    policy = SimpleRetryPolicy(1, not_recoverable=ValueError)
    assert not policy.decide(after(1, ValueError())).recoverable
    assert not policy.decide(after(1, caused(RuntimeError(), ValueError()))).recoverable
    assert policy.decide(after(1, OSError())).recoverable
    assert policy.decide(after(1)).recoverable


def test_the_same_policy_classifies_again_after_a_copy():
    policy = SimpleRetryPolicy(retry_for=OSError)
    assert policy.decide(after(1, OSError())).retry
    assert not pickled(policy).decide(after(1, KeyError())).retry
    assert not attrs.evolve(policy, retry_for=KeyError).decide(after(1, OSError())).retry


def test_many_kinds_of_failures_are_classified_alike_however_many_there_are():
    policy = SimpleRetryPolicy(5, retry_for=OSError)
    kinds_of_errors = [type(f"E{n}", (OSError if n % 2 else ValueError,), {}) for n in range(200)]
    verdicts = [policy.decide(after(n % 5, kind())).retry for n, kind in enumerate(kinds_of_errors)]
    assert verdicts == [bool(n % 2) for n in range(200)]


# -- the plain ones


def test_max_attempts_looks_at_the_count_alone():
    policy = MaxAttemptsRetryPolicy(2)
    assert [policy.decide(after(n, KeyError())).retry for n in range(3)] == [True, True, False]
    assert policy.decide(after(2)).reason == "MaxAttemptsRetryPolicy: attempt 2 of 2"
    assert MaxAttemptsRetryPolicy(None).decide(after(99)).retry


def test_a_deadline_counts_the_pause_before_the_next_attempt():
    policy = TimeoutRetryPolicy(2)
    assert policy.decide(after(1, elapsed=1.5)).retry
    refused = policy.decide(after(1, elapsed=1.5, pause=1.0))
    assert not refused.retry
    assert refused.reason == "TimeoutRetryPolicy: 1.500 s + pause 1.000 s of 2 s"
    assert policy.decide(after(1, elapsed=3)).reason == "TimeoutRetryPolicy: 3.000 s of 2 s"


def test_always_and_never():
    assert AlwaysRetryPolicy().decide(after(10_000)).retry
    assert NeverRetryPolicy().decide(after(0)).retry
    assert not NeverRetryPolicy().decide(after(1)).retry
    assert NeverRetryPolicy().max_attempts == 1


def test_a_predicate_is_asked_about_the_last_failure():
    policy = PredicateRetryPolicy(is_os_error)
    assert policy.decide(after(0)).retry
    assert policy.decide(after(1, OSError())).retry
    assert policy.decide(after(1, KeyError())).reason == "PredicateRetryPolicy: is_os_error is False"

    class Callable:
        def __call__(self, error):
            return True

    assert "Callable is True" in PredicateRetryPolicy(Callable()).decide(after(1, OSError())).reason


def test_a_predicate_is_not_asked_about_a_recorded_failure():
    policy = PredicateRetryPolicy(lambda error: error.code == 7)
    recorded = StoredError("app.Failed", "code 7")
    assert policy.decide(after(1, recorded)).retry
    assert not policy.decide(after(1, recorded, exhausted=True)).retry
    assert policy.decide(after(1, recorded)).reason == "PredicateRetryPolicy: as decided when it failed"


# -- the composed ones


def test_a_classifier_gives_each_class_its_own_count():
    policy = ExceptionClassifierRetryPolicy({OSError: MaxAttemptsRetryPolicy(3), KeyError: MaxAttemptsRetryPolicy(2)})
    assert policy.max_attempts == 4
    assert run(policy, OSError(), KeyError(), OSError())[1] is None
    assert run(policy, OSError(), KeyError(), OSError(), OSError())[0] == policy.max_attempts
    assert run(policy, OSError(), KeyError(), KeyError())[0] == 3
    assert run(policy, OSError(), OSError(), OSError(), OSError())[0] == 3
    assert run(policy, ValueError())[0] == 1
    reason = policy.decide(after(1, KeyError(), tallies={"/builtins.KeyError": Tally(2, 0.0)})).reason
    assert reason == "ExceptionClassifierRetryPolicy: KeyError as KeyError: MaxAttemptsRetryPolicy: attempt 2 of 2"
    assert policy.decide(after(0)).retry


def test_one_policy_under_two_classes_is_one_branch():
    shared = MaxAttemptsRetryPolicy(2)
    policy = ExceptionClassifierRetryPolicy({OSError: shared, KeyError: shared})
    assert run(policy, OSError(), KeyError(), OSError())[0] == 2


def test_a_classifier_without_a_limit_somewhere_has_none():
    policy = ExceptionClassifierRetryPolicy({OSError: AlwaysRetryPolicy()})
    assert policy.max_attempts is None
    assert policy.decide(after(7, StoredError.of_crash(1, "owner"))).retry


def test_a_crash_is_limited_by_the_highest_branch():
    policy = ExceptionClassifierRetryPolicy({OSError: MaxAttemptsRetryPolicy(3)})
    assert policy.decide(after(2, StoredError.of_crash(1, "owner"))).retry
    assert not policy.decide(after(3, StoredError.of_crash(1, "owner"))).retry


def test_a_deadline_in_a_branch_begins_with_the_first_failure_of_that_branch():
    policy = ExceptionClassifierRetryPolicy({OSError: TimeoutRetryPolicy(2)})
    assert policy.decide(after(3, OSError(), elapsed=5.0, tallies={"/builtins.OSError": Tally(1, 4.0)})).retry
    assert not policy.decide(after(3, OSError(), elapsed=7.0, tallies={"/builtins.OSError": Tally(1, 4.0)})).retry


def test_a_pessimistic_composite_needs_the_consent_of_all():
    policy = CompositeRetryPolicy([MaxAttemptsRetryPolicy(3), PredicateRetryPolicy(is_os_error)])
    assert policy.decide(after(1, OSError())).retry
    refused = policy.decide(after(1, KeyError()))
    assert refused.reason == "CompositeRetryPolicy: PredicateRetryPolicy: is_os_error is False"
    assert [clause.retry for clause in refused.clauses] == [True, False]
    assert policy.max_attempts == 3
    assert CompositeRetryPolicy([AlwaysRetryPolicy()]).max_attempts is None


def test_an_optimistic_composite_needs_one():
    policy = CompositeRetryPolicy([MaxAttemptsRetryPolicy(1), MaxAttemptsRetryPolicy(3)], optimistic=True)
    assert policy.decide(after(2)).retry
    assert not policy.decide(after(3)).retry
    assert policy.max_attempts == 3
    assert CompositeRetryPolicy([NeverRetryPolicy(), AlwaysRetryPolicy()], optimistic=True).max_attempts is None


STRICT = SimpleRetryPolicy(5, not_recoverable=ValueError)
COMPOSITIONS = [
    STRICT,
    CompositeRetryPolicy([STRICT, AlwaysRetryPolicy()]),
    CompositeRetryPolicy([STRICT, MaxAttemptsRetryPolicy(1)]),
    CompositeRetryPolicy([MaxAttemptsRetryPolicy(1), STRICT]),
    CompositeRetryPolicy([NeverRetryPolicy(), STRICT], optimistic=True),
    ExceptionClassifierRetryPolicy({Exception: STRICT}),
    CircuitBreakerRetryPolicy(STRICT),
    CompositeRetryPolicy([ExceptionClassifierRetryPolicy({Exception: CompositeRetryPolicy([STRICT])})]),
]


@pytest.mark.parametrize("failures", [1, 5])
@pytest.mark.parametrize("policy", COMPOSITIONS, ids=range(len(COMPOSITIONS)))
def test_not_recoverable_is_seen_through_every_composition_whatever_is_decided(policy, failures):
    tallies = dict.fromkeys(["/builtins.Exception", "/0/builtins.Exception"], Tally(failures))
    assert not policy.decide(after(failures, ValueError(), tallies=tallies)).recoverable
    assert policy.decide(after(failures, KeyError(), tallies=tallies)).recoverable


@pytest.mark.parametrize(
    "policy",
    [
        CompositeRetryPolicy([STRICT, MaxAttemptsRetryPolicy(1)]),
        CompositeRetryPolicy([STRICT, BudgetRetryPolicy(RetryBudget(0, 0.5))]),
    ],
    ids=["limit", "budget"],
)
def test_whoever_refuses_what_is_not_recoverable_is_not_recovered(policy):
    template = RetryTemplate(retry_policy=policy, clock=ManualClock())
    recovered = []
    with pytest.raises(ValueError, match="bad"):
        template.execute(Fails(ValueError("bad")), recovered.append)
    assert recovered == []


def test_a_veto_after_a_consent_is_recovered_though_the_failure_is_not_recoverable():
    class Vetoes(RetryListener):
        def on_error(self, context, error, decision):
            context.veto("enough")

    template = RetryTemplate(retry_policy=STRICT, listeners=[Vetoes()])
    assert template.execute(Fails(ValueError("bad")), lambda context: context.veto_reason) == "enough"


def test_compositions_count_in_compositions():
    inner = ExceptionClassifierRetryPolicy({OSError: MaxAttemptsRetryPolicy(3), KeyError: MaxAttemptsRetryPolicy(2)})
    policy = CompositeRetryPolicy([AlwaysRetryPolicy(), inner])
    assert run(policy, OSError(), KeyError(), KeyError())[0] == 3
    assert run(policy, OSError(), KeyError(), OSError())[1] is None
    outer = ExceptionClassifierRetryPolicy({LookupError: inner, OSError: CompositeRetryPolicy([inner])})
    assert run(outer, KeyError(), KeyError())[0] == 2
    assert run(outer, OSError(), OSError(), OSError())[0] == 3
    assert run(ExceptionClassifierRetryPolicy({OSError: CompositeRetryPolicy([policy])}), *[OSError()] * 3)[0] == 3
    timed = ExceptionClassifierRetryPolicy({OSError: CompositeRetryPolicy([inner, TimeoutRetryPolicy(5)])})
    assert run(timed, OSError(), OSError())[1] is None
    assert run(CircuitBreakerRetryPolicy(inner), OSError(), KeyError(), KeyError())[0] == 3


def test_classes_of_one_name_are_branches_of_their_own():
    one, other = type("Failed", (Exception,), {"__module__": "a"}), type("Failed", (Exception,), {"__module__": "b"})
    default = type("default", (Exception,), {})
    policy = ExceptionClassifierRetryPolicy(
        {one: MaxAttemptsRetryPolicy(3), other: MaxAttemptsRetryPolicy(2), default: MaxAttemptsRetryPolicy(2)},
        MaxAttemptsRetryPolicy(2),
    )
    assert run(policy, one(), other(), one(), default(), KeyError())[1] is None
    assert run(policy, one(), other(), other())[0] == 3
    assert "KeyError as default" in policy.decide(after(1, KeyError())).reason


def test_a_crash_counts_in_every_branch():
    inner = ExceptionClassifierRetryPolicy({KeyError: MaxAttemptsRetryPolicy(2)})
    policy = ExceptionClassifierRetryPolicy({OSError: MaxAttemptsRetryPolicy(3), LookupError: inner})
    assert list(policy.tally(StoredError.of_crash(1, "owner"), "")) == [
        "/builtins.OSError",
        "/builtins.LookupError",
        "/builtins.LookupError/builtins.KeyError",
        "/builtins.LookupError/*",
        "/*",
    ]


def test_what_is_done_to_the_given_mapping_changes_no_policy():
    policies = {OSError: MaxAttemptsRetryPolicy(3)}
    policy = ExceptionClassifierRetryPolicy(policies)
    policies.clear()
    assert policy == ExceptionClassifierRetryPolicy({OSError: MaxAttemptsRetryPolicy(3)})


def test_every_finds_the_parts_at_any_depth():
    budget = BudgetRetryPolicy(RetryBudget())
    policy = CompositeRetryPolicy([ExceptionClassifierRetryPolicy({OSError: budget}), CircuitBreakerRetryPolicy()])
    assert [type(part).__name__ for part in every(policy)] == [
        "CompositeRetryPolicy",
        "ExceptionClassifierRetryPolicy",
        "BudgetRetryPolicy",
        "NeverRetryPolicy",
        "CircuitBreakerRetryPolicy",
        "SimpleRetryPolicy",
    ]


def test_nearest_takes_the_class_that_is_nearest():
    assert nearest(ConnectionResetError(), [Exception, OSError, ConnectionError]) is ConnectionError
    assert nearest(KeyError(), [OSError]) is None


def test_live_failures_are_told_apart_by_class_and_recorded_ones_by_name():
    one, other = type("Failed", (Exception,), {}), type("Failed", (Exception,), {})
    assert nearest(one(), [other, one]) is one
    assert nearest(one(), [other]) is None
    assert nearest(StoredError.of(one()), [other]) is other
    assert not SimpleRetryPolicy(3, other).decide(after(1, one())).retry


@pytest.mark.parametrize(
    ("kind", "argument", "value", "error"),
    [
        (SimpleRetryPolicy, "max_attempts", 0, ValueError),
        (SimpleRetryPolicy, "max_attempts", True, TypeError),
        (SimpleRetryPolicy, "retry_for", KeyboardInterrupt, ValueError),
        (SimpleRetryPolicy, "default", 1, TypeError),
        (CompositeRetryPolicy, "policies", [], ValueError),
        (CompositeRetryPolicy, "policies", 3, TypeError),
        (CompositeRetryPolicy, "policies", [AlwaysRetryPolicy], TypeError),
        (ExceptionClassifierRetryPolicy, "policies", [OSError], TypeError),
        (ExceptionClassifierRetryPolicy, "policies", {int: AlwaysRetryPolicy()}, TypeError),
        (ExceptionClassifierRetryPolicy, "policies", {OSError: 3}, TypeError),
        (ExceptionClassifierRetryPolicy, "policies", {(OSError, KeyError): AlwaysRetryPolicy()}, TypeError),
        (PredicateRetryPolicy, "predicate", 3, TypeError),
        (TimeoutRetryPolicy, "timeout", 0, ValueError),
    ],
    ids=repr,
)
def test_bad_values_are_refused_at_once(kind, argument, value, error):
    with pytest.raises(error, match=rf"^{argument}: must be"):
        kind(**{argument: value})


def test_a_composite_in_a_composite_counts_as_its_members_would():
    inner = CompositeRetryPolicy([MaxAttemptsRetryPolicy(2), TimeoutRetryPolicy(5)])
    assert run(CompositeRetryPolicy([inner]), OSError(), OSError(), OSError())[0] == 2
    assert not CompositeRetryPolicy([inner]).decide(after(1, elapsed=6.0)).retry
    assert run(ExceptionClassifierRetryPolicy({OSError: CompositeRetryPolicy([inner])}), OSError(), OSError())[0] == 2
