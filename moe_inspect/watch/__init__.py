"""`moe-inspect watch`: show a trace in the terminal while it is being written, and serve the load
of an engine in its /metrics. Rules such as `max_vio>2` raise alarms, window by window, here and in
the monitor of a training run.

May import: analysis, errors, files, reporting, text, trace.
"""
