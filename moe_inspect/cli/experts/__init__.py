"""What experts are worth: `ablate`."""

from moe_inspect.cli.experts.ablate import ablate

__all__ = ["ablate"]
