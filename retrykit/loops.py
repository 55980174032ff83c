"""The two loops that run a call to its outcome: one calls, one awaits. What is done in each step is the driver's."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import nullcontext
from contextvars import Token
from inspect import isawaitable
from types import CoroutineType
from typing import Any

from retrykit.context import RetryContext, _bound
from retrykit.driver import Driver, answer_to, described
from retrykit.errors import CommitInDoubtError
from retrykit.flight import withdraw
from retrykit.flow import abort, run
from retrykit.steps import (
    ANSWER_NOTHING,
    ATTEMPT,
    BEGIN,
    COMMIT,
    RECOVER,
    RETURN,
    Pause,
    Raise,
    RollBack,
)

_bind = _bound.set
_unbind = _bound.reset


def without_frame(error: BaseException) -> BaseException:
    """The error, the frame that caught it taken off its traceback: it is on it again when the error leaves."""
    trace = error.__traceback__
    # Not by assignment: a frozen exception would refuse it.
    return error.with_traceback(None if trace is None else trace.tb_next)


def own_frame_off(error: BaseException) -> BaseException:
    """The error without the frame of the loop that caught it, if one did: raising it there adds that frame again."""
    trace = error.__traceback__
    return without_frame(error) if trace is not None and trace.tb_frame.f_code in _LOOPS else error


def drive(driver: Driver, first: tuple[Exception, float] | None = None) -> Any:
    """Run a call to its outcome. `first`: how the first attempt failed, if it has been made already."""
    binding, now = driver.binding, driver.plan.now or driver.guarded_now
    function, arguments, keywords = driver.function, driver.arguments, driver.keywords
    driver.first = first
    flow: Any = run(driver)
    send: Any = flow.send
    step: Any = None
    answer: Any = None
    over = False
    try:
        while True:
            step = send(answer)
            if step is ATTEMPT:
                token = _bind(binding)
                try:
                    value = function(*arguments, **keywords)
                    driver.value = (
                        refuse_awaitable(value, "the function") if value.__class__ is CoroutineType else value
                    )
                    answer = None
                except Exception as error:  # noqa: BLE001 - this is where an attempt ends
                    # What is stored of it begins where the work begins.
                    answer = (error if driver.key is None else without_frame(error), now())
                finally:
                    _unbind(token)
            elif step is RETURN:
                return driver.value
            elif step is ANSWER_NOTHING:
                return None
            elif type(step) is Raise:
                over = True
                raise own_frame_off(step.error)  # noqa: TRY301 - the outcome: what the `except` below lets pass
            else:
                answer = perform(driver, step)
    except BaseException as error:
        if not over:
            put_straight(driver, error)
        raise
    finally:
        # Tracebacks keep this frame: nothing that leads back to an exception may stay in it, or it is garbage that only
        # gc can find.
        driver.done()
        answer = first = step = flow = send = value = binding = driver = None  # type: ignore[assignment]


def drive_at_once(driver: Driver) -> Any:
    """As `drive`, of a call that has nothing to load, nothing to store and nobody to tell: its first attempt, which has
    a transaction, is made without the flow. What follows a failure of it is the flow's.
    """
    first = None
    try:
        first = _in_transaction(driver)
        if first is None:
            return driver.value
        driver.spell_key()
    except BaseException as error:
        driver.spell_key()
        put_straight(driver, error)
        raise
    finally:
        if first is None:
            driver.done()
    try:
        return drive(driver, first)
    finally:
        # As in `drive`.
        first = driver = None  # type: ignore[assignment]


def _in_transaction(driver: Driver) -> tuple[Exception, float] | None:
    """The first attempt, in the order of the flow's `_transaction`: how it has failed; None if it has not."""
    failure = None
    try:
        driver.begin()
        token = _bind(driver.binding)
        try:
            value = driver.function(driver.context)
            driver.value = refuse_awaitable(value, "the function") if value.__class__ is CoroutineType else value
        except Exception as error:  # noqa: BLE001 - this is where an attempt ends
            without_frame(error)
            failure = (error, driver.now())
        finally:
            _unbind(token)
        if failure is not None:
            perform(driver, RollBack(failure[0]))
            return failure
        if (left := driver.leave()) is not None:
            refuse_awaitable(left, COMMIT)
    except CommitInDoubtError:
        raise
    except Exception as fault:  # noqa: BLE001 - a transaction that does not open or commit is a failed attempt
        return (fault, driver.now())
    finally:
        # The frames of the work keep this one, as in `drive`.
        failure = None
    return None


def perform(driver: Driver, step: Any) -> Any:
    """Perform one step by calling; faults become answers."""
    try:
        if step is RECOVER:
            return _recover(driver)
        if type(step) is Pause:
            return driver.template.clock.sleep(step.seconds)
        return refuse_awaitable(driver.perform(step), step)
    except Exception as fault:  # noqa: BLE001 - the flow decides what a fault means
        return answer_to(driver, step, fault)


def _recover(driver: Driver) -> tuple[Exception, float] | None:
    assert driver.recover is not None  # noqa: S101 - the flow asks only if there is one
    token = _bind(driver.binding)
    try:
        driver.value = refuse_awaitable(driver.recover(driver.context), "the recovery")
    except Exception as error:  # noqa: BLE001 - this is where a recovery ends
        return (error, driver.now())
    finally:
        _unbind(token)
    return None


def put_straight(driver: Driver, error: BaseException) -> None:
    """Put things straight after a cancellation."""
    _let_go(driver)
    flow = abort(driver, error, opened=driver.is_open())
    answer = None
    while (step := _send(flow, answer)) is not None:
        try:
            answer = perform(driver, step)
        except BaseException as again:  # noqa: BLE001 - a second interruption must not stop the tidying up of the first, which is raised on
            answer = answer_to(driver, step, again)


def _let_go(driver: Driver) -> None:
    """An interruption may come between the binding of an attempt's context and the note of how to take it back."""
    if _bound.get() is driver.binding:
        outer = driver.context._outer
        before = outer.old_value if type(outer) is Token else outer
        _bound.set(None if before is Token.MISSING else before)


def _send(flow: Generator[Any, Any, Any], answer: Any) -> Any:
    """The next step, None at the end."""
    try:
        return flow.send(answer)
    except StopIteration:
        return None


def retract(template: Any, context: RetryContext) -> Exception | None:
    """Withdraw, beside a call that is in the middle of its attempt, what is stored of that; the fault of the store.

    For one whose process is to end before the attempt does: it has not failed, and is not to be believed dead. Nothing
    of the call itself is touched. Should it go on after all, it finds that somebody else has changed its history.
    """
    history = context._history
    if history is None or history.flight(history.fence) is None:
        return None
    context._retracted = True
    driver = template.driver(template.context(context._state), retract, (), {}, None)
    driver.flight = history.fence
    steps, answer, fault = withdraw(driver), None, None
    try:
        while (step := _send(steps, answer)) is not None:
            answer = perform(driver, step)
            fault = answer if isinstance(answer, Exception) else fault
    finally:
        driver.done()
    return fault


def refuse_awaitable(answer: Any, what: Any) -> Any:
    """A sync template cannot await: say so instead of dropping the coroutine."""
    if answer.__class__ is not CoroutineType:
        return answer
    answer.close()
    msg = f"{what if isinstance(what, str) else described(what)} is asynchronous: use AsyncRetryTemplate"
    raise TypeError(msg)


async def async_drive(driver: Driver, first: tuple[Exception, float] | None = None) -> Any:
    """As `drive`, awaiting what can be awaited: attempts, recoveries, pauses, stores, listeners and transactions."""
    binding, now = driver.binding, driver.plan.now or driver.guarded_now
    function, arguments, keywords = driver.function, driver.arguments, driver.keywords
    driver.first = first
    flow: Any = run(driver)
    send: Any = flow.send
    step: Any = None
    answer: Any = None
    over = False
    try:
        while True:
            step = send(answer)
            if step is ATTEMPT:
                token = _bind(binding)
                try:
                    value = function(*arguments, **keywords)
                    driver.value = await value if isawaitable(value) else value
                    answer = None
                except Exception as error:  # noqa: BLE001 - this is where an attempt ends
                    # What is stored of it begins where the work begins.
                    answer = (error if driver.key is None else without_frame(error), now())
                finally:
                    _unbind(token)
            elif step is RETURN:
                return driver.value
            elif step is ANSWER_NOTHING:
                return None
            elif type(step) is Raise:
                over = True
                raise own_frame_off(step.error)  # noqa: TRY301 - the outcome: what the `except` below lets pass
            else:
                answer = await async_perform(driver, step)
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            # The coroutine is being closed: it may await nothing any more.
            put_straight(driver, error)
        elif not over:
            await async_put_straight(driver, error)
        raise
    finally:
        driver.done()
        answer = first = step = flow = send = value = binding = driver = None  # type: ignore[assignment]


async def async_perform(driver: Driver, step: Any) -> Any:
    """As `perform`, awaiting what can be awaited."""
    try:
        if step is RECOVER:
            return await _async_recover(driver)
        if type(step) is Pause:
            return await driver.template.clock.async_sleep(step.seconds)
        answer = driver.perform(step)
        if step is not BEGIN or answer is None:
            return await answer if isawaitable(answer) else answer
        # As in `Driver.begin`.
        driver.manager, driver.context.transaction = driver.opening, await answer
    except Exception as fault:  # noqa: BLE001 - the flow decides what a fault means
        return answer_to(driver, step, fault)
    return None


async def _async_recover(driver: Driver) -> tuple[Exception, float] | None:
    assert driver.recover is not None  # noqa: S101 - the flow asks only if there is one
    token = _bind(driver.binding)
    try:
        value = driver.recover(driver.context)
        driver.value = await value if isawaitable(value) else value
    except Exception as error:  # noqa: BLE001 - this is where a recovery ends
        return (error, driver.now())
    finally:
        _unbind(token)
    return None


async def async_put_straight(driver: Driver, error: BaseException) -> None:
    """As `put_straight`, whatever else cancels the task meanwhile."""
    _let_go(driver)
    flow = abort(driver, error, opened=driver.is_open())
    answer = None
    with _shielded():
        while (step := _send(flow, answer)) is not None:
            try:
                answer = await async_perform(driver, step)
            except BaseException as again:  # noqa: BLE001 - as in `put_straight`
                answer = answer_to(driver, step, again)


def _shielded() -> Any:
    """Where tidying up may await although its task is cancelled.

    Asyncio cancels once, trio at every checkpoint unless it is shielded.
    """
    trio = sys.modules.get("trio")
    in_trio = trio is not None and trio.lowlevel.in_trio_run()
    return trio.CancelScope(shield=True) if trio is not None and in_trio else nullcontext()


_LOOPS = (drive.__code__, async_drive.__code__)
