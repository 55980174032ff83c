"""Batch jobs: items in chunks, each chunk in a transaction; poison items are found and put aside, and a killed job
goes on.
"""

from __future__ import annotations

from retrykit.batch.errors import ItemError, SkipLimitError
from retrykit.batch.report import Counts, Report, SkippedItem
from retrykit.batch.skipping import SkipPolicy
from retrykit.batch.source import Reader, Unreadable
from retrykit.batch.step import AsyncChunkStep, ChunkStep

__all__ = [
    "AsyncChunkStep",
    "ChunkStep",
    "Counts",
    "ItemError",
    "Reader",
    "Report",
    "SkipLimitError",
    "SkipPolicy",
    "SkippedItem",
    "Unreadable",
]
