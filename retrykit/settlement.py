"""The end of a history: dropped, or replaced by a completion mark, after a confirmed outcome or together with it.

See the essay in `retrykit.flow` for the why.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from retrykit.call import Call, Flow, raising
from retrykit.errors import TerminatedRetryError
from retrykit.history import History
from retrykit.memory import collision_with, history_of, make_out
from retrykit.steps import ANSWER_NOTHING, JOIN, NOW, Load, Raise, Remove, Report, Save


def has_to_settle(call: Call) -> bool:
    """Whether a success leaves something to do in the store."""
    if call.key is None or call.blind or call.settled:
        return False
    return call.plan.remember is not None or call.version is not None or call.doubtful


def _settling(call: Call, version: int | None, *, joined: bool) -> Flow:
    """One try to bring the stored history to its end: a completion mark, or nothing left."""
    key = call.key or ""
    if call.plan.remember is None:
        return True if version is None else (yield Remove(key, version, joined=joined))
    mark = yield from _mark(call, call.plan.remember)
    if joined and call.context._facts()._outbox:
        # The transaction commits before the source is told: what was sent in it may have to be sent again.
        mark.outbox.extend(call.context.outbox)
    saved = yield Save(key, mark.to_json(call.plan.name, call.context.json_key), version, joined=joined)
    if mark._outbox and isinstance(saved, int):
        call.unsent = mark, saved
    return saved


def _mark(call: Call, remember: float) -> Flow:
    context = call.context
    yield from make_out(call)
    now = yield NOW
    return History(
        failures=context.retry_count,
        fence=context.fence,
        recovered=context.recovered,
        fingerprint=call.content,
        completed_at=now,
        expires_at=now + remember,
    )


def settle(call: Call) -> Flow:
    """Settle the history after a confirmed outcome, unless that was done within the transaction."""
    call.reporting = True
    yield from _empty_outbox(call)
    while has_to_settle(call):
        if call.doubtful:
            call.doubtful = False
            stored = yield Load(call.key or "")
            call.version = getattr(stored, "version", None)
            if (yield from _belongs_to_another(call, stored)):
                return
        answer = yield from _settling(call, call.version, joined=False)
        if isinstance(answer, Exception):
            yield Report("settle", answer)
            return
        if answer is not None and answer is not False:
            return
        stored = yield Load(call.key or "")
        if isinstance(stored, Exception) or (stored is None and call.plan.remember is None):
            return
        if (yield from _belongs_to_another(call, stored)):
            return
        # Gone, but not settled by anybody: evicted or forgotten. The mark is still to be made.
        call.version = None if stored is None else stored.version


def _empty_outbox(call: Call) -> Flow:
    """The whole transaction is confirmed, so what was sent in it was sent: the mark need not keep it any longer."""
    if call.unsent is None:
        return
    (mark, version), call.unsent = call.unsent, None
    mark.outbox.clear()
    answer = yield Save(call.key or "", mark.to_json(call.plan.name, call.context.json_key), version)
    if isinstance(answer, Exception):
        yield Report("outbox", answer)


def _belongs_to_another(call: Call, stored: Any) -> Flow:
    """Whether the history that is found under the key is that of another item: then it is not ours to settle."""
    theirs = history_of(stored)
    fault = None if isinstance(theirs, Exception) else collision_with(call, theirs)
    if fault is None:
        return False
    yield Report("settle", fault)
    return True


def settle_within(call: Call) -> Flow:
    """Settle the history that is to be settled inside the work's own transaction, if the cache can join it.

    The outcome if somebody else had it; the failure if the transaction has a fault, and so can surely not commit.
    """
    call.reporting = True
    joined = yield JOIN
    if isinstance(joined, Exception):
        # Asking may have been one statement too many for the transaction: a commit of it would be none.
        return (yield from _failed(call, joined))
    return (yield from _settle_joined(call)) if joined is True else None


def _settle_joined(call: Call) -> Flow:
    """As `settle_within`, in a transaction that was joined."""
    # The call itself goes on knowing what it has read: should the commit fail, what others stored is not overwritten.
    version, known = call.version, not call.doubtful
    while True:
        answer = (yield from _settling(call, version, joined=True)) if known else None
        if isinstance(answer, Exception):
            return (yield from _failed(call, answer))
        if answer is not None and answer is not False:
            call.settled = True
            return None
        stored = yield Load(call.key or "", joined=True)
        theirs = history_of(stored)
        if isinstance(theirs, Exception):
            return (yield from _failed(call, theirs))
        outcome = _overtaken(call, theirs)
        if outcome is not None:
            return outcome
        version, known = None if stored is None else stored.version, True


def _failed(call: Call, fault: Exception) -> Flow:
    """The failure of an attempt whose transaction cannot be used any more: the database's own words for it."""
    error = fault.__cause__ if isinstance(fault.__cause__, Exception) else fault
    with suppress(Exception):
        error.add_note("retrykit: raised by the work's transaction while its history was settled there; rolled back")
    yield NOW
    return (error, call.context._now)


def _overtaken(call: Call, theirs: History | None) -> Any:
    """Somebody else changed the history while the attempt ran: may it still settle?"""
    fault = collision_with(call, theirs)
    if fault is not None:
        return Raise(fault)
    if theirs is not None and theirs.completed_at is not None:
        call.context.duplicate = True
        return ANSWER_NOTHING
    if theirs is not None and theirs.veto is not None and not call.seen:
        # Vetoed before this delivery, of which the source said that there was nothing to look up.
        return raising(TerminatedRetryError, call, None, reason=f"vetoed: {theirs.veto}; its work is rolled back")
    overtaken = None if call.flight is None else _how_overtaken(call, theirs)
    if overtaken is not None:
        return raising(TerminatedRetryError, call, None, reason=f"{overtaken}; its work is rolled back")
    return None


def _how_overtaken(call: Call, theirs: History | None) -> str | None:
    """What befell a reserved attempt that the history knows no longer; None if it is known, or was perhaps evicted."""
    assert call.flight is not None  # noqa: S101 - asked of reserved attempts only
    if theirs is not None:
        gone = theirs.flight(call.flight) is None
        return "it was believed dead, counted as a crash and overtaken" if gone else None
    # Where marks are kept there would be one.
    evictable = call.plan.remember is not None or call.plan.evicts
    return None if evictable else "its history was settled or forgotten by somebody else"
