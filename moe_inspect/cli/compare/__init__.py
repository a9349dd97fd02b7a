"""`moe-inspect compare`: do two traces have the same routing?"""

from moe_inspect.cli.compare.command import CompareCommand, compare

__all__ = ["CompareCommand", "compare"]
