"""The processor's turn: what the writer is given, and of each the index of the item that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrykit.batch.effects import Effects


def processed(attempt: Effects) -> tuple[list[Any], Sequence[int]]:
    """Process what is left of the attempt's items, one after the other; each is blamed while it is in hand."""
    items, processor = attempt.chunk.items, attempt.step.processor
    outputs, origins = [], []
    for index in attempt.live:
        attempt.blamed = index
        try:
            output = processor(items[index])
        except attempt.step.in_place as error:
            attempt.leave_out(index, error)
            continue
        if output is not None:
            outputs.append(output)
            origins.append(index)
    return outputs, origins


async def processed_later(attempt: Effects) -> tuple[list[Any], Sequence[int]]:
    """As `processed`, awaiting what the processor gives."""
    items, processor = attempt.chunk.items, attempt.step.processor
    outputs, origins = [], []
    for index in attempt.live:
        attempt.blamed = index
        try:
            output = processor(items[index])
            output = await output if isawaitable(output) else output
        except attempt.step.in_place as error:
            attempt.leave_out(index, error)
            continue
        if output is not None:
            outputs.append(output)
            origins.append(index)
    return outputs, origins
