"""Traces that are made of traces: `merge` several into one, take a `sample` of one."""
