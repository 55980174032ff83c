"""Outages: told at length when they begin, with a reminder now and then while they last, and when they are over.

A store that cannot be reached fails every call that needs it. What each of those faults means is told by whoever calls;
here it is told what is amiss, once for all that share the store, not with a traceback for each of them. The rule is
that of `Outages`, which others follow too: the workers of a container whose broker is gone.
"""

from __future__ import annotations

from inspect import isawaitable
from typing import Any, Final, Literal

import attrs

from retrykit.errors import CacheCapacityError, CodecError, ContextCacheError, InconsistentKeyError
from retrykit.failure import message_of, type_name
from retrykit.key import key_to_json
from retrykit.lock import lock_of

Doing = Literal["reading", "writing", "connecting"]
_Told = Literal["all", "line", "reminder", ""]

_KEPT: Final = 1_000
_LONGEST_CHAIN: Final = 16
_FIRST_REMINDER: Final = 10.0
_LONGEST_SILENCE: Final = 300.0
# Those tell of one item, in a sentence: the store is well, or at least can be read.
_OF_ONE_ITEM: Final = (CacheCapacityError, CodecError, InconsistentKeyError)


@attrs.define(eq=False)
class _Outage:
    """What is known of what fails. Times are of the monotonic clock of whoever saw the fault."""

    whom: Any
    began: float
    faults: int = 0
    failing: set[Doing] = attrs.field(factory=set)
    seen: set[str] = attrs.field(factory=set)
    reminder: float = _FIRST_REMINDER

    def told(self, doing: Doing, fault: BaseException, now: float) -> _Told:
        """Note a fault. All is told of the first one, a line of each kind, and a reminder now and then."""
        self.faults += 1
        self.failing.add(doing)
        kind, age = _kind(fault), now - self.began
        news: _Told = "" if kind in self.seen else "line" if self.seen else "all"
        self.seen.add(kind)
        if age < self.reminder:
            return news
        self.reminder = age + min(age, _LONGEST_SILENCE)
        return news or "reminder"


@attrs.define(eq=False)
class Outages:
    """What fails at this moment, by its identity; `known` is empty nearly always."""

    known: dict[int, _Outage] = attrs.field(factory=dict, init=False)
    _lock: Any = attrs.field(default=attrs.Factory(lock_of, takes_self=True), init=False, repr=False)

    def add(self, whom: Any, doing: Doing, fault: BaseException, now: float) -> tuple[_Told, _Outage]:
        """Note a fault, and say how much of it is to be told."""
        with self._lock:
            outage = self.known.get(id(whom))
            if outage is None:
                outage = self.known[id(whom)] = _Outage(whom, now)
                # One that nobody asks any more: what was known of the one seen longest ago is no loss.
                while len(self.known) > _KEPT:
                    del self.known[next(iter(self.known))]
            return outage.told(doing, fault, now), outage

    def end(self, whom: Any, doing: Doing) -> _Outage | None:
        """Note that it does again what had failed; the outage that is over with that."""
        with self._lock:
            outage = self.known.get(id(whom))
            return None if outage is None or doing not in outage.failing else self.known.pop(id(whom))


def _kind(fault: BaseException) -> str:
    """The classes of a fault and of what is underneath: "refused" is other news than "no such table"."""
    names: list[str] = []
    link: BaseException | None = fault
    while link is not None and len(names) < _LONGEST_CHAIN:
        names.append(type_name(type(link)))
        link = link.__cause__
    return " ".join(names)


outages: Final = Outages()
"""Of stores."""
known: Final = outages.known
"""Empty as long as no store fails: a call that finds it so has nothing more to do here."""


def is_of_a_store(fault: BaseException) -> bool:
    """Whether it says by itself what is amiss with a store."""
    return isinstance(fault, ContextCacheError)


def log_store_fault(driver: Any, what: str, fault: BaseException) -> None:
    """Tell of a fault of the store, as far as that is news."""
    import logging

    logger = logging.getLogger("retrykit")
    name, key, store, now = driver.plan.name, driver.context.key, driver.template.context_cache, driver.now()
    told, outage = _noted(store, what, fault, now)
    facts = {"retrykit": {"name": name, "key": key_to_json(key), "error": type_name(type(fault))}}
    if told == "reminder" and outage is not None:
        text = "%s: its store (%s) has failed for %.3g s, with %d faults so far, the last one in %s: %s"
        store_name = type(store).__name__
        logger.error(text, name, store_name, now - outage.began, outage.faults, what, message_of(fault), extra=facts)
        return
    in_detail = told == "all" or logger.isEnabledFor(logging.DEBUG)
    if told or in_detail:
        text = "%s key=%r: fault in %s, the operation goes on: %s"
        logger.error(text, name, key, what, message_of(fault), exc_info=fault if in_detail else None, extra=facts)


def _noted(store: Any, what: str, fault: BaseException, now: float) -> tuple[_Told, _Outage | None]:
    if isinstance(fault, _OF_ONE_ITEM):
        return "line", None
    return outages.add(store, "reading" if what == "load" else "writing", fault, now)


def heard(driver: Any, doing: Doing, answer: Any) -> Any:
    """The answer of a store that may have failed before; when it is there, that is over. An awaitable stays one."""
    if isawaitable(answer):
        return _heard_later(driver, doing, answer)
    _over(driver, doing)
    return answer


async def _heard_later(driver: Any, doing: Doing, answer: Any) -> Any:
    found = await answer
    _over(driver, doing)
    return found


def _over(driver: Any, doing: Doing) -> None:
    store = driver.template.context_cache
    outage = outages.end(store, doing)
    if outage is None:
        return
    import logging

    name = driver.plan.name
    text, facts = "%s: its store (%s) works again, after %.3g s and %d faults", {"retrykit": {"name": name}}
    seconds = max(0.0, driver.now() - outage.began)
    logging.getLogger("retrykit").warning(text, name, type(store).__name__, seconds, outage.faults, extra=facts)
