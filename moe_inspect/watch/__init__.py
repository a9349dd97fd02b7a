"""Shows a trace in the terminal while it is being written, and an engine's load in its /metrics."""
