"""Locks that a forked child finds open: who held one when the process was forked is not there to let go of it."""

from __future__ import annotations

import os
import threading
from typing import Any
from weakref import WeakSet

_owners: WeakSet[Any] = WeakSet()


def lock_of(owner: Any) -> Any:
    """A lock to keep as `owner._lock`; in a forked child there is another in its place."""
    _owners.add(owner)
    return threading.Lock()


def _open_all() -> None:
    for owner in list(_owners):
        object.__setattr__(owner, "_lock", threading.Lock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_all)
