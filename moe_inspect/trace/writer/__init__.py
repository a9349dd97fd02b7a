"""Writes a trace: batches of what is recorded or imported become shards of Parquet files."""

from moe_inspect.trace.writer.batches import CountedBatches, Document, RoutedBatch
from moe_inspect.trace.writer.pending import SHARD_TOKENS
from moe_inspect.trace.writer.resume import ResumePoint, committed_counts, drop_after, resume_point
from moe_inspect.trace.writer.trace_writer import TraceWriter

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
