"""Which messages the workers of this process have in hand, where no other process can know their histories.

An attempt is reserved in its history before it is made, so that one that kills its process is counted, and attempts
that run at the same time use up one limit. A history that a process keeps for itself goes with it, so only the second
is left to see to; and that is done for less by having the workers ask each other: of two deliveries of one message, the
second waits until the first has come to its end.

A source that flags redeliveries truly cannot do so for two messages to which their producer has given one id, nor for
one that it delivers again because a connection was lost while its handler works.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from weakref import WeakKeyDictionary

from retrykit.front import FrontContextCache


class KeysInHand:
    """The keys of the messages whose histories are in one cache, and which some worker has in hand."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: set[Hashable] = set()

    def take(self, key: Hashable) -> bool:
        """Whether nobody else had it in hand; then the caller has it until `leave`."""
        with self._lock:
            before = len(self._keys)
            self._keys.add(key)
            return len(self._keys) > before

    def leave(self, key: Hashable) -> None:
        """The delivery has come to its end."""
        with self._lock:
            self._keys.discard(key)


_known: WeakKeyDictionary[object, KeysInHand] = WeakKeyDictionary()
_making = threading.Lock()


def _begin_anew() -> None:
    # The workers that have something in hand are the parent's.
    global _making  # noqa: PLW0603 - it may be held by one of them
    _making = threading.Lock()
    _known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def in_hand_of(cache: object) -> KeysInHand | None:
    """What is shared by all who use the cache; None if other processes use it too."""
    if getattr(cache, "shared", True):
        return None
    # Two containers may each have a front of their own before one store.
    store = cache.store if isinstance(cache, FrontContextCache) else cache
    with _making:
        return _known.setdefault(store, KeysInHand())
