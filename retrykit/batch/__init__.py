"""Batch jobs: items in chunks, each chunk in a transaction; poison items are found and put aside, and a killed job
goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from retrykit.batch.errors import ItemError, SkipLimitError, TransactionEndedError, VetoedError, stop
from retrykit.batch.files import CsvReader, JsonLinesReader
from retrykit.batch.messages import MessageReader
from retrykit.batch.partitions import Division, async_run_partitions, run_partitions
from retrykit.batch.report import Counts, Report, SkippedItem
from retrykit.batch.skipping import SkipPolicy
from retrykit.batch.source import END_OF_CHUNK, Reader, Unreadable
from retrykit.batch.step import AsyncChunkStep, ChunkStep
from retrykit.errors import JobBusyError, JobError, JobFinishedError, JobLostError, JobRunningError

if TYPE_CHECKING:
    from retrykit.sql.tabular import SqlCursorReader, SqlWriter

__all__ = [
    "END_OF_CHUNK",
    "AsyncChunkStep",
    "ChunkStep",
    "Counts",
    "CsvReader",
    "Division",
    "ItemError",
    "JobBusyError",
    "JobError",
    "JobFinishedError",
    "JobLostError",
    "JobRunningError",
    "JsonLinesReader",
    "MessageReader",
    "Reader",
    "Report",
    "SkipLimitError",
    "SkipPolicy",
    "SkippedItem",
    "SqlCursorReader",
    "SqlWriter",
    "TransactionEndedError",
    "Unreadable",
    "VetoedError",
    "async_run_partitions",
    "run_partitions",
    "stop",
]


def __getattr__(name: str) -> Any:
    # A step needs no SQLAlchemy: any context manager is a transaction.
    if name not in {"SqlCursorReader", "SqlWriter"}:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from retrykit.sql import tabular

    return getattr(tabular, name)
