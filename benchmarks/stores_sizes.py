"""What the verbs of a cache cost among few histories and among many, and what a history takes up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
from stores_places import Store

LOAD, SAVE, REMOVE, ADD = "load", "save of a known key", "remove", "save of a new key"
VERBS = (LOAD, SAVE, REMOVE, ADD)
CAPACITY = 2_000_000


@attrs.define
class Filled:
    """A place with so many histories: what each takes up, and how long each call took, by verb."""

    histories: int
    bytes_each: float
    seconds: dict[str, list[float]] = attrs.field(factory=lambda: {verb: [] for verb in VERBS})


def filled(store: Store, sizes: Sequence[int], samples: int, say: Callable[[str], None]) -> list[Filled]:
    """Places of these sizes; then so many calls of each verb in each of them, in turn, A B C A B C …"""
    places = []
    for size in sizes:
        say(f"storing {size:,} histories")
        places.append(_fill(store, size))
    say(f"{samples:,} calls of each verb there")
    chance = random.Random(1)
    rounds = [_round(store, store.cache(place, capacity=CAPACITY), each, chance) for each, place in places]
    for number in range(-samples // 10, samples):
        for call in rounds:
            call(number >= 0)
    return [each for each, _ in places]


def _fill(store: Store, size: int) -> tuple[Filled, str]:
    place = store.place()
    before = store.size(place)
    store.fill(place, 1, size)
    store.settled(place)
    return Filled(size, (store.size(place) - before) / size), place


def _round(store: Store, cache: Any, filled: Filled, chance: random.Random) -> Callable[[bool], None]:
    """Each verb once, on a history picked by chance, which is there again afterwards. It is told whether it counts."""

    def timed(seconds: dict[str, float], verb: str, *arguments: Any) -> Any:
        call = calls[verb]
        begun = time.perf_counter()
        answer = call(*arguments)
        seconds[verb] = time.perf_counter() - begun
        assert answer is not None
        assert answer is not False
        return answer

    def call(counts: bool) -> None:
        seconds: dict[str, float] = {}
        key = store.key(chance.randint(1, filled.histories))
        stored = timed(seconds, LOAD, key)
        version = timed(seconds, SAVE, key, stored.snapshot, stored.version)
        timed(seconds, REMOVE, key, version)
        timed(seconds, ADD, key, stored.snapshot, None)
        for verb in VERBS if counts else ():
            filled.seconds[verb].append(seconds[verb])

    calls = {LOAD: cache.load, SAVE: cache.save, REMOVE: cache.remove, ADD: cache.save}

    return call
