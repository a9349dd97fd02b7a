"""Right of the trace: one pass over the rows, then pure functions on the aggregates. Nothing here
imports torch."""
