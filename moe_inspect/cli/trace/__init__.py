"""`moe-inspect trace` and `serve-trace`: record where a model sends every token of a corpus."""

from moe_inspect.cli.trace.command import Dtype, EngineName, trace
from moe_inspect.cli.trace.serve import serve_trace

__all__ = ["Dtype", "EngineName", "serve_trace", "trace"]
