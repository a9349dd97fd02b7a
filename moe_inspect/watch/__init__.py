"""`moe-inspect watch`: show a trace in the terminal while it is being written, and serve the load
of an engine in its /metrics.

May import: alarms, analysis, errors, reporting, text, trace.
"""
