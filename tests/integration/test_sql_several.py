"""Sessions with several binds: they commit one database after the other, so nothing of a history is joined to them."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from sqlalchemy import ForeignKey, create_engine, event, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from retrykit import AsyncRetryTemplate, RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.errors import ContextCacheError
from retrykit.sql import SqlRetryContextCache, rk_context

# What SQLAlchemy says of a Session that has committed on one connection when the next one fails.
pytestmark = pytest.mark.filterwarnings("ignore:transaction already deassociated from connection")

MARK = {"completed_at": 1.0, "expires_at": 4e9, "retry_count": 0}
KEYS = [f"m-{number}" for number in range(6)]
"""The order in which a Session commits is that of a set: it is tried several times."""


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[int] = mapped_column(primary_key=True)


class Order(Base):
    """Its customer is looked for at the COMMIT."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[int] = mapped_column(ForeignKey("customer.id", deferrable=True, initially="DEFERRED"))


@pytest.fixture
def at_the_end():
    with ExitStack() as stack:
        yield stack


def enforced(engine):
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys=ON"))
    return engine


@pytest.fixture
def histories(tmp_path, at_the_end):
    engine = create_engine(f"sqlite:///{tmp_path}/histories.db")
    at_the_end.callback(engine.dispose)
    return engine


@pytest.fixture
def orders(tmp_path, at_the_end):
    engine = enforced(create_engine(f"sqlite:///{tmp_path}/orders.db"))
    at_the_end.callback(engine.dispose)
    Base.metadata.create_all(engine)
    return engine


@pytest.fixture
def cache(histories):
    return SqlRetryContextCache(histories)


def binds(histories, orders):
    return {rk_context: histories, Base: orders}


def deliver(template, work, key, transaction):
    state = RetryState(key=key, redelivered=True, recover_on_redelivery=False)
    return template.execute(work, lambda _: "parked", state=state, transaction=transaction)


def kept(cache):
    return {stored.snapshot["key"]: stored.snapshot.get("completed_at") is not None for _, stored in cache.items()}


@pytest.mark.parametrize("flushed", [True, False])
def test_commit_that_fails_on_one_database_leaves_no_completion_mark_on_the_other(cache, histories, orders, flushed):
    template = RetryTemplate(
        name="orders", retry_policy=SimpleRetryPolicy(2), context_cache=cache, remember_completed=3_600
    )

    def work(context):
        context.transaction.add(Order(customer=1))
        if flushed:
            context.transaction.flush()
        return "done"

    begin = sessionmaker(binds=binds(histories, orders)).begin
    for key in KEYS:
        with pytest.raises(IntegrityError):
            deliver(template, work, key, begin)
    assert kept(cache) == dict.fromkeys(KEYS, False)
    with Session(orders) as session, session.begin():
        session.add(Customer(id=1))
    assert [deliver(template, work, key, begin) for key in KEYS] == ["done"] * len(KEYS)
    assert kept(cache) == dict.fromkeys(KEYS, True)
    with Session(orders) as session:
        assert len(session.scalars(select(Order)).all()) == len(KEYS)


def test_recovery_that_does_not_commit_everywhere_is_not_remembered_as_done(cache, histories, orders):
    template = RetryTemplate(
        name="orders",
        retry_policy=SimpleRetryPolicy(1),
        recovery_policy=SimpleRetryPolicy(1),
        context_cache=cache,
        remember_completed=3_600,
    )

    def fail(context):
        raise OSError("down")

    def park(context):
        context.transaction.add(Order(customer=1))

    for key in KEYS:
        state = RetryState(key=key, redelivered=True, recover_on_redelivery=False)
        with pytest.raises(Exception, match="recovery") as caught:
            template.execute(fail, park, state=state, transaction=sessionmaker(binds=binds(histories, orders)).begin)
        assert isinstance(caught.value.__cause__, IntegrityError)
    assert kept(cache) == dict.fromkeys(KEYS, False)


def test_session_of_several_binds_that_works_on_one_is_joined(cache, histories, orders, caplog):
    with Session(binds=binds(histories, orders)) as session, session.begin():
        joined = cache.joined(session)
        assert joined.save("a/1", MARK, None) is not None
    assert [key for key, _ in cache.items()] == ["a/1"]
    assert caplog.messages == []


def test_session_that_works_on_several_is_not_joined_and_a_warning_says_so_once(cache, histories, orders, caplog):
    for _ in range(2):
        with Session(binds=binds(histories, orders)) as session, session.begin():
            session.scalars(select(Customer)).all()
            assert cache.joined(session) is None
    (told,) = caplog.messages
    assert "not joined, so its effects happen at least once" in told


def test_session_that_comes_to_another_database_after_it_was_joined_is_refused(cache, histories, orders):
    with Session(binds=binds(histories, orders)) as session, session.begin():
        joined = cache.joined(session)
        session.add(Customer(id=7))
        for write in (lambda: joined.save("a/1", MARK, None), lambda: joined.remove("a/1")):
            with pytest.raises(ContextCacheError, match="works on several connections by now"):
                write()
        assert joined.load("a/1") is None
    assert list(cache.items()) == []


def test_session_whose_binds_nobody_knows_for_what_it_is_to_flush_is_not_joined(cache, histories):
    with Session(binds={rk_context: histories}) as session, session.begin():
        session.add(Customer(id=7))
        assert cache.joined(session) is None
        session.expunge_all()


def test_async_session_on_several_databases_is_not_joined(tmp_path, orders):
    async def run():
        ours = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/histories.db")
        theirs = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/orders.db")
        enforced(theirs.sync_engine)
        cache = SqlRetryContextCache(ours)
        template = AsyncRetryTemplate(
            name="orders", retry_policy=SimpleRetryPolicy(2), context_cache=cache, remember_completed=3_600
        )

        async def work(context):
            context.transaction.add(Order(customer=1))

        def begin():
            return AsyncSession(binds=binds(ours, theirs)).begin()

        for key in KEYS:
            state = RetryState(key=key, redelivered=True, recover_on_redelivery=False)
            with pytest.raises(IntegrityError):
                await template.execute(work, state=state, transaction=lambda: Opened(begin()))
        async with AsyncSession(binds=binds(ours, theirs)) as session, session.begin():
            joined = [await cache.joined(session)]
            session.add(Order(customer=1))
            joined.append(await cache.joined(session))
            with pytest.raises(ContextCacheError, match="works on several"):
                await joined[0].save("a/1", MARK, None)
            session.expunge_all()
        assert joined[1] is None
        found = [stored.snapshot.get("completed_at") async for _, stored in cache.items()]
        await ours.dispose()
        await theirs.dispose()
        return found

    assert asyncio.run(run()) == [None] * len(KEYS)


class Opened:
    """A transaction whose Session is closed with it, as that of `async_sessionmaker.begin`."""

    def __init__(self, transaction):
        self.transaction = transaction

    async def __aenter__(self):
        return (await self.transaction.__aenter__()).session

    async def __aexit__(self, *error):
        session = self.transaction.session
        try:
            return await self.transaction.__aexit__(*error)
        finally:
            await session.close()
