"""What came of a delivery: counted for observers, and told in the log.

Everything here is said of what has been decided, and has happened; nothing depends on it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from retrykit.message import Discard, Park, Parked, Republish
from retrykit.messaging.delays import Where, waits
from retrykit.messaging.logs import at_hand, decision_facts, in_a_line, in_detail, not_stored
from retrykit.messaging.recoverers import ID, stable_id

if TYPE_CHECKING:
    from retrykit.messaging.delivery import Delivery

_log: Final = logging.getLogger("retrykit.messaging")


def name_facts(delivery: Delivery) -> dict[str, Any]:
    """As `verdict_facts`, of what is no verdict on an attempt."""
    return {"retrykit": decision_facts(delivery.work.template.name, delivery.key, None, None)}


def verdict_facts(delivery: Delivery, error: BaseException | None = None) -> dict[str, Any]:
    """What a log record of a delivery carries besides its text, for logs that are read by programs."""
    return {"retrykit": decision_facts(delivery.work.template.name, delivery.key, delivery.context, error)}


def tell_settled(delivery: Delivery) -> None:
    """Everything is committed."""
    tally, key, message = delivery.work.tally, delivery.message.key, delivery.message
    if delivery.recovering:
        tally.add(recovered=1)
    match delivery.settlement:
        case Park(place, reason=reason, headers=headers):
            _tell_parked(delivery, place, headers.get(ID) or stable_id(message.headers, message.id), reason)
        case Parked(place, number, reason=reason):
            _tell_parked(delivery, place, number, reason)
        case Republish(destination):
            tally.add(republished=1)
            if delivery.recovering:
                _tell_end(delivery, f"was sent on to {destination}")
        case Discard(reason):
            tally.add(discarded=1)
            _tell_end(delivery, f"was discarded: {reason}")
        case _:
            tally.add(acknowledged=1)
            if delivery.recovering:
                _tell_end(delivery, "was recovered: no further attempt")
            elif _log.isEnabledFor(logging.DEBUG):
                _log.debug("message %r is handled, and acknowledged", key, extra=name_facts(delivery))


def _tell_parked(delivery: Delivery, place: str, known_as: int | str | None, reason: str) -> None:
    """By what `retrykit parked` knows it."""
    delivery.work.tally.add(parked=1)
    name = "" if known_as == delivery.message.id else f" as {known_as}"
    _tell_end(delivery, f"was parked in {place}{name}: {reason}", parked_in=place, parked_as=known_as)


def _tell_end(delivery: Delivery, what: str, **more: Any) -> None:
    """Say what became of a message, with the failure that led to it: nobody may have stored its traceback."""
    told = verdict_facts(delivery)
    told["retrykit"] |= more
    error = None if delivery.context is None or not delivery.recovering else delivery.context.last_error
    failed = "" if error is None else f"; its last attempt failed: {in_a_line(error)}"
    _log.warning("message %r %s%s", delivery.message.key, what, failed, exc_info=at_hand(error), extra=told)


def tell_doubt(delivery: Delivery, why: BaseException) -> None:
    """Nobody knows whether the message is acknowledged."""
    delivery.work.tally.add(in_doubt=1)
    text = "message %r: its commit was not confirmed, so nothing is counted; it comes again, or is done: %s"
    _log.warning(text, delivery.message.key, why, extra=name_facts(delivery))


def tell_failed(delivery: Delivery, error: BaseException, where: Where) -> None:
    """An attempt has failed, and others are left; `where` the message is until then."""
    context = delivery.context
    why = "" if context is None or context.decision is None else context.decision.reason
    then = waits(where, None if context is None else context.not_before)
    text = "message %r: an attempt has failed: %r%s; %s"
    extra = verdict_facts(delivery, error)
    _log.info(
        text, delivery.message.key, error, f" ({why})" if why else "", then, exc_info=in_detail(error), extra=extra
    )


def tell_withheld(delivery: Delivery, error: BaseException, pause: float) -> None:
    """The message is kept for a while, because its next delivery would come to the same."""
    work, key, context = delivery.work, delivery.message.key, delivery.context
    fault = None if context is None else context.fault
    unsaid = "" if work.recover is not None else "; there is no recover= to say what becomes of it"
    why = f"{error}{unsaid} ({error.__cause__!r})"
    if fault is not None:
        why = f"its history could not be read or stored, so no attempt is counted: {not_stored(fault, error)}"
    times = work.patience.times(key)
    again = f" ({times} times now)" if times > 1 else ""
    # Of a store's outage the traceback is told by whoever sees it; of anything else here, once.
    trace = at_hand(error) if fault is None and times <= 1 else in_detail(error)
    text, extra = "message %r is withheld for %g s%s: %s", verdict_facts(delivery, error)
    _log.error(text, key, round(pause, 3), again, why, exc_info=trace, extra=extra)
