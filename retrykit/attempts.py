"""The block style: the body of a `with` is the attempt, the loop around it is the flow."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

from retrykit.context import RetryContext, _bound
from retrykit.driver import Driver, _abort, _async_abort, _async_perform, _perform
from retrykit.errors import RetryError
from retrykit.flow import run
from retrykit.steps import ANSWER_NOTHING, ATTEMPT, RETURN, Pause, Raise


class _Block:
    """One call in block style: the flow, the step that it stands at, and what came of the block."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.flow = run(driver)
        self.step: Any = self.flow.send(None)
        self.entered = True
        self.token: Any = None

    def due(self) -> bool:
        """Whether another attempt is to be made now; raises the outcome if it is one of ours."""
        if self.step is ATTEMPT:
            if not self.entered:
                msg = "an attempt was not made: enter each one, `with attempt as context:`"
                raise RetryError(msg)
            self.entered = False
            return True
        outcome = self.step
        self.over()
        if type(outcome) is Raise:
            raise outcome.error
        return False

    def over(self) -> None:
        """The call is over."""
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

    def ended_with(self, error: BaseException) -> bool:
        """Whether the error that the block raised is the outcome: then it goes on its way by itself."""
        return type(self.step) is Raise and self.step.error is error


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
            _abort(block.driver, error)
            block.over()
            return False
        _advance(block, answer)
        if error is None or not block.ended_with(error):
            return error is not None
        block.over()
        return False


def _advance(block: _Block, answer: Any) -> None:
    """Perform steps until the loop has to do something."""
    block.step = block.flow.send(answer)
    while not _is_resting(block.step):
        block.step = block.flow.send(_perform(block.driver, block.step))


def attempts(driver: Driver) -> Iterator[Attempt]:
    """The attempts of a call, each to be entered."""
    block = _Block(driver)
    while True:
        while block.step is not ATTEMPT and (type(block.step) is Pause or not _is_resting(block.step)):
            _advance(block, _perform(driver, block.step))
        if not block.due():
            return
        yield Attempt(block)


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
            await _async_abort(block.driver, error)
            block.over()
            return False
        await _async_advance(block, answer)
        if error is None or not block.ended_with(error):
            return error is not None
        block.over()
        return False


async def _async_advance(block: _Block, answer: Any) -> None:
    block.step = block.flow.send(answer)
    while not _is_resting(block.step):
        block.step = block.flow.send(await _async_perform(block.driver, block.step))


async def async_attempts(driver: Driver) -> AsyncIterator[AsyncAttempt]:
    """The attempts of a call, each to be entered."""
    block = _Block(driver)
    while True:
        while block.step is not ATTEMPT and (type(block.step) is Pause or not _is_resting(block.step)):
            await _async_advance(block, await _async_perform(driver, block.step))
        if not block.due():
            return
        yield AsyncAttempt(block)
