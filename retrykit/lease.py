"""Leases of attempts that take long: renewed beside the attempt, by one thread of the process or a task of the loop.

One process cannot see whether an attempt that another makes still runs. It believes so until the lease is over, or the
process is gone. So whoever runs longer says again, each third of a lease, that it is there; who is frozen, or cut off
from the store, does not, and is overtaken. What is said, and what it means when it is refused, is the flow's business
(`retrykit.flight.renew`): this module only knows when it is time.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Awaitable, Callable
from math import inf
from time import monotonic
from typing import Any, Protocol


class Held(Protocol):
    """A call that has an attempt running."""

    def renew(self) -> bool:
        """Say that it is still running. False: nobody believes it any more, and it need not be said again."""

    async def async_renew(self) -> bool:
        """As `renew`, where the store is asynchronous."""


class Keeper:
    """Renews the leases of all calls of this process, in one thread, begun when it is first needed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: dict[int, tuple[float, float, Held]] = {}
        self._thread: threading.Thread | None = None
        self._wakes_at = inf

    def hold(self, call: Held, every: float) -> Callable[[], None]:
        """Renew the call's lease every so many seconds; what ends that is returned."""
        due, number = monotonic() + every, id(call)
        with self._changed:
            self._held[number] = (due, every, call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="retrykit-leases", daemon=True)
                self._thread.start()
            elif due < self._wakes_at:
                self._changed.notify()
        return lambda: self._release(number)

    def _release(self, number: int) -> None:
        with self._changed:
            self._held.pop(number, None)

    def _run(self) -> None:
        while True:
            for call in self._due():
                if not call.renew():
                    self._release(id(call))

    def _due(self) -> list[Held]:
        """Wait until a renewal is due: the calls whose turn it is, their next turn noted."""
        with self._changed:
            self._wakes_at = min((due for due, _, _ in self._held.values()), default=inf)
            if self._wakes_at > monotonic():
                self._changed.wait(None if self._wakes_at == inf else self._wakes_at - monotonic())
            self._wakes_at = -inf
            now = monotonic()
            ready = [(number, every, call) for number, (due, every, call) in self._held.items() if due <= now]
            self._held.update((number, (now + every, every, call)) for number, every, call in ready)
        return [call for _, _, call in ready]


_keeper = Keeper()


def _begin_anew() -> None:
    # Threads do not survive a fork, and the parent's calls are the parent's.
    global _keeper  # noqa: PLW0603 - one of the process
    _keeper = Keeper()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def hold(call: Held, every: float, *, asynchronous: bool) -> Callable[[], Any]:
    """Renew the call's lease every so many seconds, until what is returned is called."""
    return _hold_on_the_loop(call, every) if asynchronous else _keeper.hold(call, every)


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
