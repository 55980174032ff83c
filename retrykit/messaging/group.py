"""Several containers in one process, with one lifetime."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.messaging.container import ListenerContainer
from retrykit.messaging.counters import Counters
from retrykit.messaging.lifetime import Event, Lifetime
from retrykit.messaging.readiness import Health, total_of


def _containers(value: Iterable[ListenerContainer]) -> tuple[ListenerContainer, ...]:
    if not isinstance(value, Iterable):
        raise wrong_type("containers", "an iterable of ListenerContainers", value)
    return tuple(value)


def _are_containers(_instance: Any, field: Any, value: tuple[Any, ...]) -> None:
    for one in value:
        if not isinstance(one, ListenerContainer):
            raise wrong_type(field.name, "ListenerContainers", one)
    if not value:
        raise wrong_value(field.name, "one or more", value)


@attrs.define(eq=False)
class ContainerGroup(Lifetime):
    """Containers that start and stop together: one that gives up stops them all, and what made it give up is raised.

    Used once, as the containers are: `group.run()`, or `with group: group.wait()`.
    """

    containers: tuple[ListenerContainer, ...] = attrs.field(converter=_containers, validator=_are_containers)
    _finished: threading.Event = attrs.field(factory=threading.Event, init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)
    _watchers: list[Callable[[Event], None]] = attrs.field(factory=list, init=False, repr=False)
    _left: int = attrs.field(default=0, init=False, repr=False)
    _failed: bool = attrs.field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._left = len(self.containers)
        for one in self.containers:
            one.watch(self._heard)

    def start(self) -> None:
        """Start them all. `RuntimeError` if one was started before; then none of them goes on."""
        try:
            for one in self.containers:
                one.start()
        except BaseException:
            self.stop()
            raise

    def stop(self, *, now: bool = False) -> None:
        """Stop them all, as `ListenerContainer.stop` does."""
        for one in self.containers:
            one.stop(now=now)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all workers of all containers have left; False after `timeout` seconds.

        Raises what made the first of them give up.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        finished = self._finished.wait(timeout)
        if finished:
            for one in self.containers:
                one.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return finished

    def watch(self, tell: Callable[[Event], None]) -> None:
        """Have `tell("failed")` called when one gives up and `tell("finished")` when all workers have left."""
        with self._lock:
            self._watchers.append(tell)
            failed, finished = self._failed, self._finished.is_set()
        if failed:
            tell("failed")
        if finished:
            tell("finished")

    @property
    def counters(self) -> Counters:
        """The totals of all containers at this moment."""
        return total_of(one.counters for one in self.containers)

    def health(self) -> Health:
        """How they are at this moment."""
        return Health.of(one.health() for one in self.containers)

    def _heard(self, event: Event) -> None:
        """What a container tells, in one of its threads."""
        with self._lock:
            if event == "failed":
                said, self._failed = self._failed, True
            else:
                self._left -= 1
                said = self._left > 0
                if not said:
                    self._finished.set()
            watchers = [] if said else list(self._watchers)
        if event == "failed" and not said:
            self.stop()
        for tell in watchers:
            tell(event)
