"""One call's view of its item, and how client code finds it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import threading
import weakref
from datetime import UTC, datetime

import attrs
import pytest
import trio

from retrykit import (
    AsyncRetryTemplate,
    CodecError,
    FixedBackOffPolicy,
    MaxAttemptsRetryPolicy,
    RetryContext,
    RetryError,
    RetryListener,
    RetryState,
    RetryTemplate,
    SimpleRetryPolicy,
    current_context,
    retryable,
    veto,
)
from retrykit.failure import StoredError
from retrykit.state import always
from tests.doubles import EPOCH, Fails, ManualClock, pickled


def deep(depth, function):
    return function() if depth == 0 else deep(depth - 1, function)


# -- finding it


def test_outside_of_every_attempt_there_is_none():
    assert current_context() is None


def test_it_is_found_at_any_depth_of_a_call():
    template = RetryTemplate()
    assert template.execute(lambda context: deep(20, current_context) is context)


def test_a_decorated_function_finds_its_own_which_is_made_once():
    @retryable(name="orders")
    def handle():
        return current_context(), deep(5, current_context)

    one, other = handle()
    assert one is other
    assert (one.name, one.attempt, one.key) == ("orders", 1, None)
    assert current_context() is None


def test_it_is_the_same_one_from_the_first_attempt_to_the_last():
    seen = []

    @retryable(max_attempts=3)
    def handle():
        seen.append((current_context(), current_context().attempt, current_context().retry_count))
        if len(seen) < 3:
            raise OSError(str(len(seen)))

    handle()
    assert len({id(context) for context, _, _ in seen}) == 1
    assert [facts for _, *facts in seen] == [[1, 0], [2, 1], [3, 2]]


def test_one_that_nobody_asked_for_in_the_first_attempt_is_there_in_the_second():
    seen = []

    @retryable
    def handle():
        seen.append(None if not seen else current_context())
        if len(seen) == 1:
            raise OSError("once")

    handle()
    assert (seen[1].attempt, seen[1].last_error.message) == (2, "once")


@pytest.mark.parametrize("outcome", [None, OSError("x"), KeyboardInterrupt()], ids=["success", "failure", "exit"])
def test_p10_after_a_call_it_is_what_it_was_before(outcome):
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(2))

    def outer(context):
        with contextlib.suppress(OSError, KeyboardInterrupt):
            template.execute(Fails(*[outcome] * 2) if outcome else Fails())
        return current_context() is context

    assert template.execute(outer)
    assert current_context() is None


def test_a_call_in_the_course_of_an_attempt_knows_its_parent():
    template = RetryTemplate()

    @retryable
    def inner():
        return current_context().parent

    def outer(context):
        assert context.parent is None
        assert template.execute(lambda nested: nested.parent) is context
        return inner() is context

    assert template.execute(outer)

    @retryable
    def decorated():
        return inner() is current_context()

    assert decorated()


def test_in_a_recovery_it_is_there_too():
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(1))
    assert template.execute(Fails(OSError()), lambda context: current_context() is context)


def test_threads_find_it_through_a_copied_context_only():
    found = {}

    def outer(context):
        copied = contextvars.copy_context()
        threads = [
            threading.Thread(target=lambda: found.update(bare=current_context())),
            threading.Thread(target=lambda: found.update(copied=copied.run(current_context))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"bare": None, "copied": context}

    RetryTemplate().execute(outer)


def test_threads_that_ask_at_once_find_the_same_one():
    @retryable
    def handle():
        copies = [contextvars.copy_context() for _ in range(8)]
        found = []
        barrier = threading.Barrier(8)

        def ask(copied):
            barrier.wait()
            found.append(copied.run(current_context))

        threads = [threading.Thread(target=ask, args=(copied,)) for copied in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {id(context) for context in found}, current_context()

    identities, context = handle()
    assert identities == {id(context)}


def test_tasks_inherit_it_and_do_not_disturb_each_other():
    template = AsyncRetryTemplate()

    async def one(context):
        await asyncio.sleep(0)
        inherited = await asyncio.create_task(asyncio.to_thread(current_context))
        return current_context() is inherited is context

    async def main():
        return await asyncio.gather(*(template.execute(one) for _ in range(5))), current_context()

    assert asyncio.run(main()) == ([True] * 5, None)


def test_trio_tasks_inherit_it():
    async def attempt(context):
        found = []

        async def child():
            found.append(current_context())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
        return found == [context]

    assert trio.run(AsyncRetryTemplate().execute, attempt)


# -- veto


def test_a_veto_from_deep_client_code_ends_the_attempts():
    calls = []

    @retryable(max_attempts=5)
    def handle():
        calls.append(1)
        deep(10, lambda: veto("bad data"))
        raise ValueError("unparseable")

    with pytest.raises(ValueError, match="unparseable"):
        handle()
    assert len(calls) == 1


def test_a_veto_in_a_later_attempt_ends_them_too():
    calls = []

    @retryable(max_attempts=5)
    def handle():
        calls.append(1)
        if len(calls) == 3:
            veto()
        raise ValueError(len(calls))

    with pytest.raises(ValueError, match="3"):
        handle()


def test_an_attempt_that_was_vetoed_may_still_succeed():
    template = RetryTemplate()

    def attempt(context):
        context.veto("no more")
        return "fine"

    assert template.execute(attempt) == "fine"


def test_a_veto_reaches_the_recovery_with_its_reason():
    def attempt(context):
        context.veto("bad data")
        raise ValueError

    reason = RetryTemplate().execute(attempt, lambda context: (context.veto_reason, context.decision.reason))
    assert reason == ("bad data", "vetoed: bad data")


def test_p4_a_veto_survives_in_the_history_and_can_be_withdrawn():
    template = RetryTemplate()

    def attempt(context):
        context.veto("bad data")
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        template.execute(attempt, state=RetryState(key="m-1"))
    history = template.history("m-1")
    assert (history.vetoed, history.veto_reason, history.retry_count) == (True, "bad data", 1)
    template.withdraw_veto("m-1")
    assert template.execute(Fails(), state=RetryState(key="m-1")) == "done"


def test_a_veto_may_be_withdrawn_by_the_code_that_made_it():
    def attempt(context):
        if context.attempt == 1:
            context.veto("hm")
            context.withdraw_veto()
            raise OSError
        return context.vetoed

    assert RetryTemplate().execute(attempt) is False


def test_a_veto_outside_of_every_attempt_is_an_error():
    with pytest.raises(RetryError, match=r"there is no attempt to veto around this call \(reason given: 'x'\)"):
        veto("x")


def test_a_reason_is_text_and_an_empty_one_is_replaced():
    context = RetryContext(RetryTemplate(), 0.0)
    with pytest.raises(TypeError, match=r"^reason: must be a str, not int 3"):
        context.veto(3)
    context.veto("")
    assert context.veto_reason == "vetoed"


# -- facts


def test_a_new_context_knows_little_and_says_it():
    context = RetryContext(RetryTemplate(name="orders"), 0.0)
    assert repr(context) == "<RetryContext 'orders' key=None attempt=1 retry_count=0 max_attempts=3>"
    facts = (
        context.retry_count,
        context.crashes,
        context.last_error,
        context.errors,
        context.first_failed_at,
        context.last_failed_at,
        context.not_before,
        context.last_delay,
        context.pause,
        context.vetoed,
        context.veto_reason,
        context.exhausted,
        context.recovered,
        context.duplicate,
        context.closed,
        context.decision,
        context.transaction,
        context.fence,
        dict(context.tallies),
        context.elapsed,
    )
    assert facts == (
        0,
        0,
        None,
        (),
        None,
        None,
        None,
        None,
        0,
        False,
        None,
        False,
        False,
        False,
        False,
        None,
        None,
        1,
        {},
        0,
    )


def untouched(name):
    """A fact of a context that nothing has happened to, asked for first."""
    return getattr(RetryContext(RetryTemplate(), 0.0), name)


def test_facts_can_be_asked_for_in_any_order():
    names = [
        "crashes",
        "retry_count",
        "first_failed_at",
        "last_failed_at",
        "tallies",
        "last_delay",
        "pause",
        "exhausted",
    ]
    assert [bool(untouched(name)) for name in names] == [False] * len(names)
    assert untouched("started_at").tzinfo is UTC


def test_it_tells_when_things_happened():
    clock = ManualClock()
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(3), back_off_policy=FixedBackOffPolicy(5), clock=clock)
    seen = []

    def attempt(context):
        clock.elapsed += 1
        if context.attempt < 3:
            raise OSError(str(context.attempt))
        seen.append(context)
        return (
            [context.started_at, context.first_failed_at, context.last_failed_at],
            context.elapsed,
            context.last_delay,
        )

    instants, elapsed, delay = template.execute(attempt)
    assert instants == [datetime.fromtimestamp(EPOCH + at, UTC) for at in (0, 1, 7)]
    assert (elapsed, delay) == (7, 5)
    assert [(str(error), error.attempt) for error in seen[0].errors] == [("OSError: 1", 1), ("OSError: 2", 2)]
    assert [error.at for error in seen[0].errors] == [EPOCH + 1, EPOCH + 7]


def test_the_last_ten_errors_are_kept():
    contexts = []

    def attempt(context):
        contexts[:] = [context]
        if context.attempt < 15:
            raise OSError(str(context.attempt))

    RetryTemplate(retry_policy=MaxAttemptsRetryPolicy(None)).execute(attempt)
    assert [error.attempt for error in contexts[0].errors] == list(range(5, 15))
    assert contexts[0].retry_count == 14


def test_when_the_call_is_over_it_describes_errors_instead_of_holding_them():
    callback = Fails(OSError("x"))
    RetryTemplate().execute(callback)
    context = callback.contexts[0]
    assert context.closed
    assert type(context.last_error) is StoredError
    assert context.last_error is context.last_error
    assert (context.last_error.type, str(context.last_error)) == ("builtins.OSError", "x")


def test_a_call_leaves_no_garbage_and_holds_no_frames():
    class Marker:
        pass

    references = []

    def attempt(context):
        marker = Marker()
        references.append(weakref.ref(marker))
        if context.attempt < 3:
            raise OSError(str(context.attempt))
        return context

    gc.collect()
    gc.disable()
    try:
        context = RetryTemplate().execute(attempt)
        assert [reference() for reference in references] == [None] * 3
        assert context.closed
    finally:
        gc.enable()


def test_the_fence_grows_with_every_attempt_of_a_key():
    fences = []

    def attempt(context):
        fences.append(context.fence)
        raise OSError("x")

    template = RetryTemplate(retry_policy=MaxAttemptsRetryPolicy(9))
    for _ in range(3):
        with pytest.raises(OSError, match="x"):
            template.execute(attempt, state=RetryState(key="m-1"))
    assert fences == sorted(set(fences))


def test_attributes_are_kept_across_deliveries():
    template = RetryTemplate()

    def attempt(context):
        context.attributes["seen"] = context.attributes.get("seen", 0) + 1
        if context.attempt < 3:
            raise OSError("x")
        return context.attributes["seen"]

    for _ in range(2):
        with pytest.raises(OSError, match="x"):
            template.execute(attempt, state=RetryState(key="m-1"))
    assert template.execute(attempt, state=RetryState(key="m-1")) == 3


def test_a_policy_without_a_limit_has_no_max_attempts():
    class Patient:
        def decide(self, context):
            raise NotImplementedError

    assert RetryContext(RetryTemplate(retry_policy=Patient()), 0.0).max_attempts is None


# -- its JSON form


def test_a_snapshot_is_json_and_comes_back():
    template = RetryTemplate(name="orders", clock=ManualClock(), back_off_policy=FixedBackOffPolicy(2))
    contexts = []

    def attempt(context):
        contexts.append(context)
        context.attributes["seen"] = [1]
        raise OSError("x")

    with pytest.raises(OSError, match="x"):
        template.execute(attempt, state=RetryState(key=("m", 1, b"\x00")))
    snapshot = contexts[0].snapshot()
    assert json.loads(json.dumps(snapshot)) == snapshot
    assert snapshot["format"] == 1
    back = RetryContext.from_snapshot(snapshot)
    for fact in ("name", "key", "attempt", "retry_count", "errors", "last_error", "not_before", "attributes", "fence"):
        assert getattr(back, fact) == getattr(contexts[0], fact), fact
    assert (back.started_at, back.first_failed_at, back.last_failed_at) == (
        contexts[0].started_at,
        contexts[0].first_failed_at,
        contexts[0].last_failed_at,
    )
    assert back.closed
    assert back.elapsed >= 0
    assert back.parent is None
    assert back.snapshot() == snapshot
    assert repr(back).startswith("<RetryContext 'orders' key=('m', 1, b'\\x00') attempt=1")


@pytest.mark.parametrize("snapshot", [{}, {"format": 7}, {"format": 1}, None], ids=repr)
def test_what_is_no_snapshot_is_refused(snapshot):
    with pytest.raises(CodecError):
        RetryContext.from_snapshot(snapshot)


# -- states


def test_a_state_is_a_value():
    state = RetryState(key="m-1", redelivered=True, fresh=True, recover_on_redelivery=False, journal="always")
    assert state == attrs.evolve(state)
    assert hash(state) == hash(attrs.evolve(state))
    assert state != attrs.evolve(state, key="m-2")
    assert pickled(state) == state
    assert pickled(RetryState(key=None)) == RetryState(key=None)
    assert repr(RetryState(key="m-1")).startswith("RetryState(key='m-1', redelivered=None, fresh=False")
    assert RetryState(key="m-1").rollback_for is always
    assert always(OSError()) is True
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        state.key = "m-2"


def test_every_field_of_a_state_is_kept():
    given = {
        "key": ("m", 1),
        "redelivered": False,
        "fresh": True,
        "rollback_for": bool,
        "recover_on_redelivery": False,
        "journal": "never",
        "fingerprint": "d41d8cd9",
    }
    state = RetryState(**given)
    assert {name: getattr(state, name) for name in given} == given
    assert {field.name for field in attrs.fields(RetryState)} == set(given)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"key": 1.5}, TypeError),
        ({"key": True}, TypeError),
        ({"redelivered": 1}, TypeError),
        ({"fresh": None}, TypeError),
        ({"fresh": "veto"}, TypeError),
        ({"rollback_for": OSError()}, TypeError),
        ({"recover_on_redelivery": "yes"}, TypeError),
        ({"journal": "sometimes"}, ValueError),
        ({"journal": None}, TypeError),
    ],
    ids=str,
)
def test_bad_values_are_refused_at_once(options, error):
    (argument,) = options
    with pytest.raises(error, match=rf"^{argument}: must be"):
        RetryState(**({"key": "m-1"} | options))


def test_listeners_see_the_context_open_and_closed():
    seen = []

    class Watching(RetryListener):
        def open(self, context):
            seen.append(context.closed)

        def close(self, context, error):
            seen.append(context.closed)

    RetryTemplate(listeners=[Watching()]).execute(Fails())
    assert seen == [False, True]


def test_a_stored_error_that_is_raised_again_keeps_its_own_type():
    stored = StoredError.of(ConnectionError("peer"))
    seen = []

    def attempt(context):
        seen[:] = [context]
        if context.attempt == 1:
            raise stored

    RetryTemplate().execute(attempt)
    context = seen[0]
    assert [(error.type, error.message) for error in context.errors] == [("builtins.ConnectionError", "peer")]
    assert context.last_error == stored
