"""What a forked child finds of the locks that its parent's threads were holding."""

from __future__ import annotations

import os
import signal
import warnings

import pytest

from retrykit import FrontContextCache, MapRetryContextCache, RetryBudget, StatisticsListener
from retrykit.cache import StoredContext
from retrykit.lock import lock_of
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
    with owner._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child does nothing but this
        child = os.fork()
        if not child:
            signal.alarm(20)
            use(owner)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert status == 0


def test_an_owner_goes_although_it_had_a_lock():
    from weakref import ref

    class Owner:
        pass

    owner = Owner()
    owner._lock = lock_of(owner)
    gone = ref(owner)
    del owner
    assert gone() is None
