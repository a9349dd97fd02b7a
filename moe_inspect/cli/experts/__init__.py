"""What experts are worth: `ablate`; a model without the least of them: `prune`."""

from moe_inspect.cli.experts.ablate import ablate
from moe_inspect.cli.experts.prune import prune

__all__ = ["ablate", "prune"]
