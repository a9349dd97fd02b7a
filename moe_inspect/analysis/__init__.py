"""Counts of a trace, and metrics of them: `counting` passes over the rows once, `metrics` are pure
functions of the counts. Nothing here imports torch.

May import: errors, later, progress, text, trace, workers.
"""
