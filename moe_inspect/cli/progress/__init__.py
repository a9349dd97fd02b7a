"""How far a command is, on a terminal: the bar, the phases, and the tokens of a tracing run."""

from moe_inspect.cli.progress.bar import shown

__all__ = ["shown"]
