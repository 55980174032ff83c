"""Several containers in one process, with one lifetime."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import attrs

from retrykit.check import wrong_type, wrong_value
from retrykit.messaging.container import ListenerContainer
from retrykit.messaging.counters import Counters
from retrykit.messaging.lifetime import Ending, Event, Lifetime
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

    Used once, as the containers are: `group.run()`, or `with group: group.wait()`. Those with coroutines share an event
    loop.
    """

    containers: tuple[ListenerContainer, ...] = attrs.field(converter=_containers, validator=_are_containers)
    _ending: Ending = attrs.field(factory=Ending, init=False, repr=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False, repr=False)
    _left: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._left = len(self.containers)
        loops = [one.loop for one in self.containers if one.loop is not None]
        for one in self.containers:
            if one.loop is not None:
                one.loop = loops[0]
            one.watch(partial(self._heard, one))

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
        if not now:
            for one in self.containers:
                one.stop()
            return
        # Beside each other: each may have to wait for its store.
        stopping = [threading.Thread(target=one.stop, kwargs={"now": True}, daemon=True) for one in self.containers]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()

    @property
    def farewell(self) -> float:
        """That of the container which needs the longest."""
        return max(one.farewell for one in self.containers)

    @property
    def counters(self) -> Counters:
        """The totals of all containers at this moment."""
        return total_of(one.counters for one in self.containers)

    def health(self) -> Health:
        """How they are at this moment."""
        return Health.of(one.health() for one in self.containers)

    def _heard(self, one: ListenerContainer, event: Event) -> None:
        """What a container tells, in one of its threads."""
        if event == "failed" and one.error is not None:
            self._ending.fail(one.error)
            self.stop()
        if event == "finished":
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self._ending.finish()
