"""Too many: whether an item can be skipped beside those that were, and those that are going to be.

Counted in the order of the items, so that the verdict on one does not depend on how many were read with it. A veto from
outside is somebody's word about one item; limits are for failures, and count none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from retrykit.batch.errors import VetoedError, is_veto
from retrykit.batch.report import Counts, SkippedItem
from retrykit.batch.skipping import SkipPolicy
from retrykit.batch.source import Chunk
from retrykit.failure import type_name

Refusal = tuple[int, BaseException, str]
"""The index of an item that cannot be skipped, its failure, and why."""

VETOED: Final = type_name(VetoedError)


def refused(  # noqa: PLR0917 - the question in the order in which it is put
    policy: SkipPolicy,
    counts: Counts,
    chunk: Chunk,
    index: int,
    error: BaseException,
    besides: Iterable[SkippedItem],
) -> Refusal | None:
    """The first item that cannot be skipped if this one is: itself, or one behind it that is condemned already; None
    if all of them can, beside those that have not been counted yet.
    """
    condemned = {at: one.error for at, one in chunk.skipped(len(chunk.items)).items() if not is_veto(one.error)}
    pending = [one for at, one in condemned.items() if at < index]
    pending += [skipped.error for skipped in besides]
    behind = [(at, one) for at, one in condemned.items() if at > index]
    for at, one in ((index, error), *behind):
        reason = _too_many(policy, counts, one, pending, read=chunk.number + at + 1)
        if reason is not None:
            return at, one, reason
        pending.append(one)
    return None


def _too_many(
    policy: SkipPolicy, counts: Counts, error: BaseException, pending: Sequence[BaseException], *, read: int
) -> str | None:
    limited = dict(counts.limited)
    for name in filter(None, map(policy.limited_as, pending)):
        limited[name] = limited.get(name, 0) + 1
    skipped = counts.all_skipped - counts.skipped.get(VETOED, 0) + len(pending)
    return policy.refusal(error, skipped=skipped, limited=limited, read=read)
