"""Writes a trace: batches of what is recorded or imported become shards of Parquet files."""

from moe_inspect.trace.writer.batches import SHARD_TOKENS, CountedBatches, Document, RoutedBatch
from moe_inspect.trace.writer.trace_writer import (
    ResumePoint,
    TraceWriter,
    committed_counts,
    drop_after,
    resume_point,
)

__all__ = [
    "SHARD_TOKENS",
    "CountedBatches",
    "Document",
    "ResumePoint",
    "RoutedBatch",
    "TraceWriter",
    "committed_counts",
    "drop_after",
    "resume_point",
]
