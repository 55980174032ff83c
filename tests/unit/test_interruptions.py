"""A signal or a cancellation that comes at any moment leaves no transaction open."""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial

import pytest

import retrykit.batch.work
import retrykit.driver
import retrykit.loops
from retrykit import AsyncRetryTemplate, RetryTemplate, SimpleRetryPolicy, current_context
from retrykit.batch.work import async_drive, drive
from retrykit.template import short_cut
from tests.interruptions import Signal, interrupted_at


class Transactions:
    """Those that were begun, and how they ended."""

    def __init__(self):
        self.open = 0
        self.ends = []

    @contextmanager
    def as_generator(self):
        self.open += 1
        try:
            yield self
        except BaseException:
            self.ends.append("rollback")
            raise
        else:
            self.ends.append("commit")
        finally:
            self.open -= 1

    @asynccontextmanager
    async def as_async_generator(self):
        with self.as_generator():
            await asyncio.sleep(0)
            yield self

    def as_object(self):
        return Plain(self)

    def as_async_object(self):
        return Later(self)


class Plain(AbstractContextManager):
    def __init__(self, transactions):
        self.transactions = transactions

    def __enter__(self):
        self.transactions.open += 1
        return self

    def __exit__(self, kind, error, traceback):
        self.transactions.open -= 1
        self.transactions.ends.append("commit" if error is None else "rollback")


class Later:
    def __init__(self, transactions):
        self.plain = Plain(transactions)

    async def __aenter__(self):
        await asyncio.sleep(0)
        return self.plain.__enter__()

    async def __aexit__(self, *error):
        await asyncio.sleep(0)
        return self.plain.__exit__(*error)


def everywhere(call, spared):
    """Interrupt it at each line of the driver in turn, until it ends before it is interrupted."""
    for number in range(1, 10_000):
        transactions = Transactions()
        place = interrupted_at(
            number,
            lambda transactions=transactions: call(transactions),
            spared,
            modules=(retrykit.driver, retrykit.loops),
        )
        if place is None:
            return number
        assert transactions.open == 0, place
        assert len(transactions.ends) <= 1, place
        assert current_context() is None, place
    raise AssertionError("it never ended")


# Whether a manager that is no generator has been left when leaving it was interrupted, nobody can tell.
SPARED = {"as_object": {"leave", "_left"}, "as_async_object": {"leave", "_left"}}


@pytest.mark.parametrize("kind", ["as_generator", "as_object"])
@pytest.mark.parametrize("shortened", [True, False])
def test_at_no_line_of_the_driver_an_interruption_leaves_a_transaction_open(kind, shortened):
    template = RetryTemplate(retry_policy=SimpleRetryPolicy(1))

    def call(transactions):
        template.execute(lambda context: context.attempt, transaction=getattr(transactions, kind))

    with short_cut(shortened):
        assert everywhere(call, SPARED.get(kind, ())) > 30


# Where it comes between the making of a coroutine and its being awaited, that one is dropped, and the next one awaited.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("kind", ["as_generator", "as_object", "as_async_generator", "as_async_object"])
def test_at_no_line_of_the_asynchronous_driver_either(kind):
    template = AsyncRetryTemplate(retry_policy=SimpleRetryPolicy(1))

    def call(transactions):
        coroutine = template.execute(lambda context: context.attempt, transaction=getattr(transactions, kind))
        # Without a loop that would make something of the signal itself.
        while True:
            try:
                coroutine.send(None)
            except StopIteration:
                return

    assert everywhere(call, SPARED.get(kind, ())) > 40


@contextmanager
def interrupting(manager):
    """The manager with the signal coming in `__enter__`, when its generator has begun the transaction."""
    kind = type(manager)

    class Struck(kind):
        def __enter__(self):
            super().__enter__()
            raise Signal

        async def __aenter__(self):
            await super().__aenter__()
            raise Signal

    manager.__class__ = Struck
    yield manager


def test_a_transaction_that_was_begun_when_entering_it_was_interrupted_is_rolled_back():
    transactions = Transactions()
    with interrupting(transactions.as_generator()) as manager, pytest.raises(Signal) as caught:
        RetryTemplate().execute(lambda _: None, transaction=lambda: manager)
    # The traceback is still there, and with it all that its frames hold.
    assert caught.value.__traceback__ is not None
    assert (transactions.open, transactions.ends) == (0, ["rollback"])


def test_an_asynchronous_one_too():
    async def run():
        with interrupting(transactions.as_async_generator()) as manager, pytest.raises(Signal):
            await AsyncRetryTemplate().execute(lambda _: None, transaction=lambda: manager)
        assert (transactions.open, transactions.ends) == (0, ["rollback"])

    transactions = Transactions()
    asyncio.run(run())


def test_a_manager_that_was_interrupted_before_it_had_begun_anything_is_left_alone():
    class Busy(Plain):
        def __enter__(self):
            raise Signal

    transactions = Transactions()
    with pytest.raises(Signal):
        RetryTemplate().execute(lambda _: None, transaction=lambda: Busy(transactions))
    assert transactions.ends == []


@pytest.mark.parametrize("loop", [drive, lambda work: asyncio.run(async_drive(work))], ids=["plain", "asynchronous"])
def test_the_work_of_a_batch_job_hears_of_each_interruption(loop):
    heard = []

    def work():
        heard.append("begun")
        try:
            for number in range(3):
                yield partial(int, number)
        except BaseException as error:
            heard.append(type(error))
            raise
        heard.append("done")

    for number in range(1, 1_000):
        heard.clear()
        place = interrupted_at(number, lambda: loop(work()), modules=[retrykit.batch.work])
        if place is None:
            break
        assert heard in ([], ["begun", Signal], ["begun", "done"]), place
    assert number > 10
    assert heard == ["begun", "done"]
