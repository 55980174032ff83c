"""What tests of code that uses retrykit need: a STOMP server that starts in a millisecond, and the contract suites.

`BrokerContract` is written for pytest and loaded when it is asked for, so that everything else works without pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retrykit.testing.blocking import BlockingContextCache
from retrykit.testing.cache_contract import ContextCacheContract
from retrykit.testing.stomp_server import QueuedMessage, StompServer, StompServerProcess
from retrykit.testing.tombstone_contract import TombstoneContract

if TYPE_CHECKING:
    from retrykit.testing.broker_contract import BrokerContract

__all__ = [
    "BlockingContextCache",
    "BrokerContract",
    "ContextCacheContract",
    "QueuedMessage",
    "StompServer",
    "StompServerProcess",
    "TombstoneContract",
]


def __getattr__(name: str) -> Any:
    if name != "BrokerContract":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from retrykit.testing.broker_contract import BrokerContract

    return BrokerContract
