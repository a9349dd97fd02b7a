"""One file a foreign format, one function each, in FORMATS. Nothing here imports torch but the one
that reads its files, inside."""

from moe_inspect.importers import counts, esft, fiddler, responses, sglang, tensorrt_llm  # noqa: F401  (they register)
from moe_inspect.importers.megatron import importer  # noqa: F401
from moe_inspect.importers.registry import FORMATS, Format

__all__ = ["FORMATS", "Format"]
