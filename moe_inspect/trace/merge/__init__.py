"""Traces of one model, recorded by several people or in several runs, become one."""

from moe_inspect.trace.merge.run import merge

__all__ = ["merge"]
