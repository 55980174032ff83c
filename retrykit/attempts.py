"""The block style: the body of a `with` is the attempt, the loop around it is the flow."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

from retrykit.context import RetryContext, _bound
from retrykit.driver import Driver
from retrykit.errors import RetryError
from retrykit.flow import run
from retrykit.loops import async_perform, async_put_straight, perform, put_straight
from retrykit.steps import ANSWER_NOTHING, ATTEMPT, RETURN, Pause, Raise


class _Block:
    """One call in block style: the flow, the step that it stands at, and what came of the block."""

    def __init__(self, driver: Driver) -> None:
        self.ended = True
        self.driver = driver
        self.flow = run(driver)
        self.step: Any = self.flow.send(None)
        self.entered = True
        self.token: Any = None
        self.ended = False

    def __del__(self) -> None:
        self.abandon()

    def has_to_move(self) -> bool:
        """Whether there are steps to perform before the next attempt, or the outcome."""
        return type(self.step) is Pause or not _is_resting(self.step)

    def due(self) -> bool:
        """Whether another attempt is to be made now; raises the outcome if it is one of ours."""
        if self.step is ATTEMPT:
            if not self.entered:
                msg = "an attempt was not made: enter each one, `with attempt as context:`"
                raise RetryError(msg)
            self.entered = False
            return True
        self.over()
        # Tracebacks keep the frames of loops: nothing that leads back to an exception may stay in them.
        outcome, self.step = self.step, RETURN
        try:
            if type(outcome) is Raise:
                raise outcome.error
        finally:
            del outcome
        return False

    def abandon(self) -> None:
        """The loop was left between two attempts.

        The next one will not be made, and what was reserved for it is not needed.
        """
        if not self.ended and self.step is ATTEMPT and not self.entered:
            put_straight(self.driver, GeneratorExit())
        self.over()

    def over(self) -> None:
        """The call is over."""
        if not self.ended:
            self.ended = True
            self.flow.close()
            self.driver.done()

    def enter(self) -> RetryContext:
        """The block begins."""
        self.entered = True
        self.token = _bound.set(self.driver.context)
        return self.driver.context

    def leave(self, error: BaseException | None) -> tuple[Exception, float] | None:
        """The block has ended: what the flow is told."""
        _bound.reset(self.token)
        return (error, self.driver.now()) if isinstance(error, Exception) else None

    def swallows(self, error: BaseException | None) -> bool:
        """What the `with` answers when the flow has gone on: an error that is the outcome goes on its way by itself."""
        passes = type(self.step) is Raise and self.step.error is error
        if passes or self.step in (RETURN, ANSWER_NOTHING):
            # Now, not when the loop asks for another attempt: it is left by the error, or may be by a `break`.
            self.step = RETURN
            self.over()
        return error is not None and not passes


def _is_resting(step: Any) -> bool:
    """Whether the flow waits for the loop: for an attempt, for a pause before one, or at its outcome."""
    return step in (ATTEMPT, RETURN, ANSWER_NOTHING) or type(step) in (Pause, Raise)


class Attempt:
    """One attempt: `with attempt as context: ...`."""

    def __init__(self, block: _Block) -> None:
        self._block = block

    def __enter__(self) -> RetryContext:
        return self._block.enter()

    def __exit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        block = self._block
        answer = block.leave(error)
        if error is not None and answer is None:
            put_straight(block.driver, error)
            block.over()
            return False
        _advance(block, answer)
        return block.swallows(error)


def _advance(block: _Block, answer: Any) -> None:
    """Perform steps until the loop has to do something."""
    try:
        block.step = block.flow.send(answer)
        while not _is_resting(block.step):
            block.step = block.flow.send(perform(block.driver, block.step))
    except BaseException as error:
        put_straight(block.driver, error)
        block.over()
        raise


def _pause(block: _Block) -> Any:
    """Spend the pause that the flow rests at; what is told to it."""
    try:
        return perform(block.driver, block.step)
    except BaseException as error:
        put_straight(block.driver, error)
        block.over()
        raise


def attempts(driver: Driver) -> Iterator[Attempt]:
    """The attempts of a call, each to be entered."""
    block = _Block(driver)
    try:
        while True:
            while block.has_to_move():
                _advance(block, _pause(block))
            if not block.due():
                return
            yield Attempt(block)
    finally:
        block.abandon()


class AsyncAttempt:
    """One attempt: `async with attempt as context: ...`."""

    def __init__(self, block: _Block) -> None:
        self._block = block

    async def __aenter__(self) -> RetryContext:
        return self._block.enter()

    async def __aexit__(
        self, _type: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> bool:
        block = self._block
        answer = block.leave(error)
        if error is not None and answer is None:
            await async_put_straight(block.driver, error)
            block.over()
            return False
        await _async_advance(block, answer)
        return block.swallows(error)


async def _async_advance(block: _Block, answer: Any) -> None:
    try:
        block.step = block.flow.send(answer)
        while not _is_resting(block.step):
            block.step = block.flow.send(await async_perform(block.driver, block.step))
    except BaseException as error:
        await _async_give_up(block, error)
        raise


async def _async_pause(block: _Block) -> Any:
    try:
        return await async_perform(block.driver, block.step)
    except BaseException as error:
        await _async_give_up(block, error)
        raise


async def _async_give_up(block: _Block, error: BaseException) -> None:
    if isinstance(error, GeneratorExit):
        put_straight(block.driver, error)
    else:
        await async_put_straight(block.driver, error)
    block.over()


def async_attempts(driver: Driver) -> AsyncIterator[AsyncAttempt]:
    """The attempts of a call, each to be entered."""
    return _AsyncAttempts(driver)


class _AsyncAttempts:
    """An iterator that need not be closed.

    No generator: every loop whose last failure goes on is left in the middle, and asynchronous generators that are
    left must be closed by somebody.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._block: _Block | None = None

    def __aiter__(self) -> _AsyncAttempts:
        return self

    async def __anext__(self) -> AsyncAttempt:
        if self._block is None:
            self._block = _Block(self._driver)
        block = self._block
        while block.has_to_move():
            await _async_advance(block, await _async_pause(block))
        if not block.due():
            raise StopAsyncIteration
        return AsyncAttempt(block)
