"""What a forked child finds of the locks that its parent's threads were holding."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest
from sqlalchemy import StaticPool, create_engine

from retrykit import FrontContextCache, MapRetryContextCache, RetryBudget, StatisticsListener
from retrykit.cache import StoredContext
from retrykit.lock import lock_of
from retrykit.sql import SqlRetryContextCache
from retrykit.sql.capacity import CountedByTheProcess

USES = {
    "map": (MapRetryContextCache(), lambda cache: cache.save("a", {}, None)),
    "front": (FrontContextCache(MapRetryContextCache()), lambda front: front.keep("a", StoredContext({}, 1))),
    "budget": (RetryBudget(), RetryBudget.deposit),
    "statistics": (StatisticsListener(), lambda listener: listener.snapshot("orders")),
    "room": (CountedByTheProcess(10), lambda room: room.freed(1)),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", USES)
def test_a_lock_that_was_held_at_a_fork_is_open_in_the_child(name):
    owner, use = USES[name]
    with owner._lock:
        assert in_child(lambda: use(owner)) == 0


def in_child(function):
    """The status of a forked child that calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child does nothing but this
        child = os.fork()
        if not child:
            signal.alarm(20)
            function()
            os._exit(0)
        return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_store_on_one_connection_for_all_is_not_locked_in_the_child():
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    with SqlRetryContextCache(engine) as cache:
        cache.save("a", {"name": "a"}, None)
        held, let_go = threading.Event(), threading.Event()

        def hold():
            with cache._connections.reading():
                held.set()
                let_go.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(20)
            assert in_child(lambda: cache.load("a")) == 0
        finally:
            let_go.set()
            thread.join()
    engine.dispose()


def test_an_owner_goes_although_it_had_a_lock():
    from weakref import ref

    class Owner:
        pass

    owner = Owner()
    owner._lock = lock_of(owner)
    gone = ref(owner)
    del owner
    assert gone() is None
