"""`moe-inspect trace`: record where a model sends every token of a corpus."""

from moe_inspect.cli.trace.command import Dtype, EngineName, trace

__all__ = ["Dtype", "EngineName", "trace"]
