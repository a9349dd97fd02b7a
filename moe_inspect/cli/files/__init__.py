"""Commands that read and write traces as such: `moe-inspect verify`, `merge`, `sample`."""

from moe_inspect.cli.files.merge import merge
from moe_inspect.cli.files.sample import sample
from moe_inspect.cli.files.verify import verify

__all__ = ["merge", "sample", "verify"]
