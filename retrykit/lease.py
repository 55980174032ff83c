"""Leases of attempts that take long: renewed beside the attempt, in threads of their own or in a task of the loop.

One process cannot see whether an attempt that another makes still runs. It believes so until the lease is over, or the
process is gone. So whoever runs longer says again, each third of a lease, that it is there; who is frozen, or cut off
from the store, does not, and is overtaken. What is said, and what it means when it is refused, is the flow's business
(`retrykit.flight.renew`): this module only knows when it is time.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from math import inf
from time import monotonic
from typing import Any, Protocol

_log = logging.getLogger("retrykit")


class Held(Protocol):
    """A call that has an attempt running."""

    def renew(self) -> bool:
        """Say that it is still running. False: nobody believes it any more, and it need not be said again."""

    async def async_renew(self) -> bool:
        """As `renew`, where the store is asynchronous."""


Entry = tuple[float, float, Held, object]
"""When it is due, after how long again, which call, in which store."""


class Keeper:
    """Renews the leases of all calls of this process.

    One thread, begun when it is first needed, knows what is due. The renewing is done by a thread for each store that
    has something due, for as long as it has: a store that hangs holds up its own renewals, and those of no other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[int, Entry] = {}
        self._clerk: threading.Thread | None = None
        self._wakes_at = inf
        self._todo: dict[int, list[Held]] = {}
        """What the thread of a store (by its identity) has still to do; no entry: there is no such thread."""

    def hold(self, call: Held, store: object, every: float) -> Callable[[], None]:
        """Renew the call's lease every so many seconds; what ends that is returned."""
        due, number = monotonic() + every, id(call)
        with self._changed:
            self._held[number] = (due, every, call, store)
            if self._clerk is None or not self._clerk.is_alive():
                self._clerk = _begun(self._run)
            elif due < self._wakes_at:
                self._changed.notify()
        return lambda: self._release(number)

    def _release(self, number: int) -> None:
        with self._changed:
            self._held.pop(number, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._wait()
                for _, _, call, store in self._due():
                    if id(store) in self._todo:
                        self._todo[id(store)].append(call)
                    else:
                        # Begun first: where no thread can be had there must be no trace of one.
                        _begun(self._renew_all, id(store))
                        self._todo[id(store)] = [call]

    def _wait(self) -> None:
        """Until a renewal is due."""
        self._wakes_at = min((entry[0] for entry in self._held.values()), default=inf)
        if self._wakes_at > monotonic():
            self._changed.wait(None if self._wakes_at == inf else self._wakes_at - monotonic())
        self._wakes_at = -inf

    def _due(self) -> list[Entry]:
        """The calls whose turn it is; their next turn is noted."""
        now = monotonic()
        due = [(number, entry) for number, entry in self._held.items() if entry[0] <= now]
        self._held.update((number, (now + entry[1], *entry[1:])) for number, entry in due)
        return [entry for _, entry in due]

    def _renew_all(self, store: int) -> None:
        while (call := self._next(store)) is not None:
            try:
                going_on = call.renew()
            except Exception:  # noqa: BLE001 - a thread ends here, and it is not only this call's
                # One call's bad luck is not that of the others.
                _log.exception("a lease could not be renewed; it is going to be tried again")
                going_on = True
            if not going_on:
                self._release(id(call))

    def _next(self, store: int) -> Held | None:
        """The next call of the store that is still running; None when there is none, and the thread is to end."""
        with self._changed:
            todo = self._todo[store]
            while todo:
                call = todo.pop(0)
                if id(call) in self._held:
                    return call
            del self._todo[store]
            return None


def _begun(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, name="retrykit-leases", daemon=True)
    thread.start()
    return thread


_keeper = Keeper()


def _begin_anew() -> None:
    # Threads do not survive a fork, and the parent's calls are the parent's.
    global _keeper  # noqa: PLW0603 - one of the process
    _keeper = Keeper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def hold(call: Held, store: object, every: float, *, asynchronous: bool) -> Callable[[], Any]:
    """Renew the call's lease in the store every so many seconds, until what is returned is called."""
    return _hold_on_the_loop(call, every) if asynchronous else _keeper.hold(call, store, every)


def _hold_on_the_loop(call: Held, every: float) -> Callable[[], Any]:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        scope = trio.CancelScope()

        async def in_scope() -> None:
            with scope:
                await _renew_again_and_again(call, every, trio.sleep)

        trio.lowlevel.spawn_system_task(in_scope)
        return scope.cancel  # type: ignore[no-any-return]
    import asyncio

    return asyncio.get_running_loop().create_task(_renew_again_and_again(call, every, asyncio.sleep)).cancel


async def _renew_again_and_again(call: Held, every: float, sleep: Callable[[float], Awaitable[None]]) -> None:
    going_on = True
    while going_on:
        await sleep(every)
        going_on = await call.async_renew()
