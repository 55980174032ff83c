"""What was decided stays decided, and nothing is lost or repeated: whole deliveries, one after another."""

from __future__ import annotations

import pytest

from retrykit import (
    BudgetRetryPolicy,
    CircuitBreakerRetryPolicy,
    CompositeRetryPolicy,
    ExceptionClassifierRetryPolicy,
    FixedBackOffPolicy,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    NeverRetryPolicy,
    NoBackOffPolicy,
    PredicateRetryPolicy,
    RecoveryFailedError,
    RetryBudget,
    RetryDecision,
    RetryListener,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    TimeoutRetryPolicy,
)
from retrykit.errors import CommitInDoubtError
from retrykit.failure import StoredError
from tests.doubles import Fails, ManualClock, Transaction


class Exits(BaseException):
    pass


class Always:
    """A callback or a recovery that fails each time in the same way, and counts how often it was called."""

    def __init__(self, error):
        self.error = error
        self.calls = 0

    def __call__(self, context):
        self.calls += 1
        raise self.error


def deliver(template, callback, recover=None, *, transaction=None, **state):
    """One delivery; its value or its error."""
    state = RetryState(**({"key": "m-1"} | state))
    try:
        return template.execute(callback, recover, state=state, transaction=transaction)
    except Exception as error:
        return error


def park(context):
    return "parked"


# -- what was refused stays refused


def beyond_the_budget():
    """A template whose budget never has a token."""
    budget = BudgetRetryPolicy(RetryBudget(ratio=0.0, reserve=0.5))
    return RetryTemplate(retry_policy=CompositeRetryPolicy((MaxAttemptsRetryPolicy(50), budget)))


def test_an_item_that_the_budget_refused_is_recovered_at_the_next_delivery():
    template, callback = beyond_the_budget(), Always(OSError())
    assert type(deliver(template, callback, park)) is OSError
    assert deliver(template, callback, park) == "parked"
    assert callback.calls == 1


def test_p3_an_item_that_the_budget_refused_is_not_attempted_again_when_its_recovery_fails():
    template, callback = beyond_the_budget(), Always(OSError())
    for _ in range(3):
        error = deliver(template, callback, Always(KeyError()), recover_on_redelivery=False)
        assert type(error) is RecoveryFailedError
    assert callback.calls == 1


class InTheCourseOfAnother:
    """Fails while it handles another failure: that one is its context, and not its cause."""

    def __init__(self):
        self.calls = 0

    def __call__(self, context):
        self.calls += 1
        try:
            raise ConnectionError
        except ConnectionError:
            raise ValueError  # noqa: B904 - the chaining that nobody asked for is what is looked at


def test_a_failure_is_no_more_retryable_at_the_next_delivery_than_when_it_happened():
    policy = SimpleRetryPolicy(5, retry_for=(ConnectionError,), traverse_causes=True)
    template, callback = RetryTemplate(retry_policy=policy), InTheCourseOfAnother()
    assert type(deliver(template, callback, park)) is ValueError
    assert deliver(template, callback, park) == "parked"
    assert callback.calls == 1


def test_a_failure_is_no_less_recoverable_at_the_next_delivery_than_when_it_happened():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(1, not_recoverable=(ConnectionError,)))
    assert deliver(template, InTheCourseOfAnother(), park, recover_on_redelivery=False) == "parked"
    assert type(deliver(template, InTheCourseOfAnother(), park)) is ValueError
    assert deliver(template, InTheCourseOfAnother(), park) == "parked"


def breaking(clock, *, reset_timeout=5.0):
    """A template whose circuit opens at the first failure."""
    policy = CircuitBreakerRetryPolicy(MaxAttemptsRetryPolicy(1), failure_threshold=1, reset_timeout=reset_timeout)
    return RetryTemplate(retry_policy=policy, clock=clock)


def test_p3_an_item_that_the_circuit_refused_is_not_attempted_when_its_recovery_fails():
    clock, callback = ManualClock(), Fails()
    template = breaking(clock)
    with pytest.raises(OSError, match="down"):
        template.execute(Fails(OSError("down")))
    for _ in range(2):
        error = deliver(template, callback, Always(KeyError()), recover_on_redelivery=False)
        assert type(error) is RecoveryFailedError
        clock.elapsed += 10
    assert deliver(template, callback, park) == "parked"
    assert callback.calls == 0


class Fickle:
    """A policy that refuses the first time it is asked, and then never again."""

    def __init__(self, *, raises):
        self.raises = raises
        self.asked = 0

    def decide(self, context):
        self.asked += 1
        if self.raises and self.asked == 1:
            raise RuntimeError("no opinion")
        return RetryDecision(self.asked > 1)


@pytest.mark.parametrize("raises", [True, False], ids=["raised", "said no"])
def test_an_item_that_was_refused_is_not_attempted_because_the_policy_would_now_consent(raises):
    template, callback = RetryTemplate(retry_policy=Fickle(raises=raises)), Always(OSError())
    assert type(deliver(template, callback, park)) is OSError
    assert deliver(template, callback, park) == "parked"
    assert callback.calls == 1


def test_a_predicate_is_asked_about_live_failures_only_and_its_consent_holds_at_the_next_delivery():
    asked = []

    def transient(error):
        asked.append(type(error))
        return error.errno == 5

    policy = CompositeRetryPolicy((MaxAttemptsRetryPolicy(3), PredicateRetryPolicy(transient)))
    template, callback = RetryTemplate(retry_policy=policy), Always(OSError(5, "down"))
    for _ in range(3):
        assert deliver(template, callback, park) is callback.error
    assert deliver(template, callback, park) == "parked"
    assert callback.calls == 3
    assert StoredError not in asked


def test_the_refusal_of_a_predicate_holds_at_the_next_delivery():
    policy = PredicateRetryPolicy(lambda error: isinstance(error, ConnectionError))
    template, callback = RetryTemplate(retry_policy=policy), Always(ValueError())
    assert deliver(template, callback, park) is callback.error
    assert deliver(template, callback, park) == "parked"
    assert callback.calls == 1


# -- the recovery's own policy


class FailsUntil(Always):
    """As `Always`, but exits from a loop that has no end."""

    def __call__(self, context):
        if self.calls == 20:
            raise Exits
        super().__call__(context)


@pytest.mark.parametrize("policy", [NeverRetryPolicy(), None], ids=["another policy", "the same policy"])
def test_a_classifier_counts_the_failures_of_the_recovery_and_only_those(policy):
    classifier = ExceptionClassifierRetryPolicy({KeyError: SimpleRetryPolicy(2)})
    template = RetryTemplate(retry_policy=policy or classifier, recovery_policy=classifier)
    recovery = FailsUntil(KeyError())
    with pytest.raises(RecoveryFailedError):
        template.execute(Always(KeyError()), recovery)
    assert recovery.calls == 2


def test_the_deadline_of_a_recovery_is_measured_from_its_own_beginning():
    clock = ManualClock()

    def slow(context):
        clock.elapsed += 100
        raise OSError

    template = RetryTemplate(retry_policy=NeverRetryPolicy(), recovery_policy=TimeoutRetryPolicy(60), clock=clock)
    assert template.execute(slow, Fails(ValueError(), value="parked")) == "parked"


# -- what was evicted is not lost


class Crowd(RetryListener):
    """Another item comes at a failure, and takes the place of this one in the store."""

    def __init__(self, cache):
        self.other = RetryTemplate(name="other", context_cache=cache)

    def on_error(self, context, error, decision):
        deliver(self.other, Always(KeyError()), key="m-2")


def test_an_exhausted_item_whose_history_was_evicted_is_recovered_all_the_same():
    cache = MapRetryContextCache(1, on_full="evict_oldest")
    template = RetryTemplate(context_cache=cache, retry_policy=SimpleRetryPolicy(1), listeners=[Crowd(cache)])
    recovery = Fails(value="parked")
    assert deliver(template, Always(OSError()), recovery, recover_on_redelivery=False) == "parked"
    assert recovery.calls == 1


class Forgets(RetryListener):
    """Somebody makes the store forget the item at its failure."""

    def __init__(self, cache):
        self.cache = cache

    def on_error(self, context, error, decision):
        assert self.cache.remove("retry/m-1")


def test_an_exhausted_item_that_was_forgotten_and_left_no_mark_is_recovered():
    cache = MapRetryContextCache()
    policy, listener = SimpleRetryPolicy(1), Forgets(cache)
    template = RetryTemplate(context_cache=cache, retry_policy=policy, listeners=[listener], remember_completed=60)
    assert deliver(template, Always(OSError()), park, recover_on_redelivery=False) == "parked"
    assert deliver(template, Fails()) is None


@pytest.mark.parametrize("times", [1, 2])
def test_work_whose_reservation_was_evicted_meanwhile_completes_and_leaves_its_mark(times):
    cache = MapRetryContextCache(1, on_full="evict_oldest")
    template = RetryTemplate(context_cache=cache, remember_completed=60)
    other = RetryTemplate(name="other", context_cache=cache)
    runs = []

    def work(context):
        runs.append(context.attempt)
        for n in range(times):
            deliver(other, Always(KeyError()), key=f"m-{n + 2}")
        return "done"

    assert deliver(template, work) == "done"
    assert deliver(template, work) is None
    assert runs == [1]


def test_p6_completion_marks_keep_no_new_item_from_being_remembered():
    clock = ManualClock()
    template = RetryTemplate(context_cache=MapRetryContextCache(3), clock=clock, remember_completed=60)
    for n in range(3):
        deliver(template, Fails(), key=n)
    clock.elapsed += 3_600
    callback = Fails()
    assert deliver(template, callback) == "done"
    assert deliver(template, callback) is None
    poison = Always(OSError())
    assert [type(deliver(template, poison, park, key="poison")) for _ in range(4)] == [OSError, OSError, OSError, str]


# -- deadlines


class Patient:
    """A policy that names a pause of its own."""

    def decide(self, context):
        return RetryDecision(context.retry_count < 3, 10.0)


@pytest.mark.parametrize("back_off", [NoBackOffPolicy(), FixedBackOffPolicy(0.5)], ids=["no back-off", "back-off"])
def test_a_deadline_is_not_slept_past_when_a_policy_names_the_pause(back_off):
    clock, callback = ManualClock(), Always(OSError("down"))
    policy = CompositeRetryPolicy((Patient(), TimeoutRetryPolicy(15)))
    with pytest.raises(OSError, match="down"):
        RetryTemplate(retry_policy=policy, back_off_policy=back_off, clock=clock).execute(callback)
    assert (clock.slept, callback.calls) == ([10], 2)


class Tired(RetryListener):
    """A listener that takes its time."""

    def __init__(self, clock):
        self.clock = clock

    def on_error(self, context, error, decision):
        self.clock.elapsed += 50


class Oversleeping(ManualClock):
    """A clock whose pauses are longer than they should be."""

    def sleep(self, seconds):
        super().sleep(seconds + 50)


@pytest.mark.parametrize(
    "state", [None, RetryState(key="m-1", rollback_for=lambda _: False)], ids=["stateless", "in place"]
)
@pytest.mark.parametrize("cause", ["listener", "pause", "pause with listener"])
def test_no_attempt_is_begun_after_the_deadline_whatever_took_the_time(cause, state):
    clock = ManualClock() if cause == "listener" else Oversleeping()
    listeners = [Tired(clock)] if cause == "listener" else [RetryListener()] * cause.count("listener")
    back_off = NoBackOffPolicy() if cause == "listener" else FixedBackOffPolicy(1)
    policy, callback = TimeoutRetryPolicy(10), Always(OSError())
    template = RetryTemplate(retry_policy=policy, back_off_policy=back_off, listeners=listeners, clock=clock)
    assert template.execute(callback, park, state=state) == "parked"
    assert callback.calls == 1


# -- the circuit


def test_a_trial_whose_commit_is_in_doubt_is_given_back_to_the_circuit():
    clock = ManualClock()
    template = breaking(clock)
    with pytest.raises(OSError, match="down"):
        template.execute(Fails(OSError("down")))
    clock.elapsed += 6
    with pytest.raises(CommitInDoubtError):
        template.execute(Fails(), transaction=Transaction([], commit=CommitInDoubtError()))
    assert template.execute(Fails()) == "done"
