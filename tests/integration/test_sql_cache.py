from __future__ import annotations

from contextlib import ExitStack

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from retrykit.sql import SqlRetryContextCache
from retrykit.testing import ContextCacheContract


@pytest.fixture(autouse=True)
def at_the_end(request):
    """Closes what a test opened: `at_the_end.enter_context`, or `.callback`."""
    with ExitStack() as stack:
        if request.instance is not None:
            request.instance.at_the_end = stack
        yield stack


class TestFile(ContextCacheContract):
    def make_cache(self, directory, **options):
        return self.at_the_end.enter_context(SqlRetryContextCache(f"sqlite:///{directory}/histories.db", **options))


class TestMemory(ContextCacheContract):
    def make_cache(self, directory, **options):
        return self.at_the_end.enter_context(SqlRetryContextCache("sqlite://", **options))


class TestMemoryOfAnEngineWithOneSharedConnection(ContextCacheContract):
    def make_cache(self, directory, **options):
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        self.at_the_end.callback(engine.dispose)
        return SqlRetryContextCache(engine, **options)


class TestFileOfAnEngineAsUsersMakeThem(ContextCacheContract):
    def make_cache(self, directory, **options):
        engine = create_engine(f"sqlite:///{directory}/histories.db", connect_args={"timeout": 60})
        self.at_the_end.callback(engine.dispose)
        return SqlRetryContextCache(engine, **options)
