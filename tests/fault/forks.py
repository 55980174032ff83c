"""A process that has everything loaded and does nothing but fork consumers, and the other end of its pipe.

`serve` reads orders, a line each: {"fork": {…}} is answered with the process id of a new child, {"reap": pid} with how
that child ended. A forked child needs milliseconds where an interpreter would need a second; what forks has no threads
and no connections.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Child(Protocol):
    """What a child is there for."""

    def run(self) -> Any:
        """Do it, to the end."""


def serve(make: Callable[[dict[str, Any]], Child]) -> None:
    """Obey until standard input ends; `make` makes of an order what a child runs."""
    for line in sys.stdin:
        print(json.dumps(_obey(json.loads(line), make)), flush=True)


def _obey(order: dict[str, Any], make: Callable[[dict[str, Any]], Child]) -> int:
    if "fork" in order:
        return _fork(order["fork"], make)
    _, status = os.waitpid(order["reap"], 0)
    return os.waitstatus_to_exitcode(status)


def _fork(order: dict[str, Any], make: Callable[[dict[str, Any]], Child]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        make(order).run()
        status = 0
    except BaseException as error:
        print(f"consumer {order['worker']}: {error!r}", file=sys.stderr, flush=True)
    os._exit(status)
