"""Fixtures that start real servers, at most one of each kind per test process."""

from __future__ import annotations

import pytest

from tests.servers.activemq import ActiveMq, activemq_missing

_ACTIVEMQ = pytest.StashKey[ActiveMq]()


@pytest.fixture(scope="session")
def activemq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ActiveMq:
    """A running ActiveMQ of this test process; tests use queue names of their own, and restart what they killed."""
    if (reason := activemq_missing()) is not None:
        pytest.skip(reason)
    # Several conftest files offer this fixture, and each would have a server of its own: the stash makes it one.
    config = request.config
    if _ACTIVEMQ not in config.stash:
        server = ActiveMq(tmp_path_factory.mktemp("activemq"))
        config.add_cleanup(server.stop)
        server.start()
        config.stash[_ACTIVEMQ] = server
    return config.stash[_ACTIVEMQ]
