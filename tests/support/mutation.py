"""Changes a fragment of a source file, and loads a file as a module."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

CLOSING = {r"\)", r"\]", r"\}"}


def changed_source(source: str, old: str, new: str) -> str:
    """`source` with `new` for `old`, which must be in it exactly once. Line breaks and the commas
    before closing brackets do not count: a formatter moves them."""
    pieces = map(re.escape, re.findall(r"\w+|[^\w\s]", old))
    loose = "".join((r"\s*,?\s*" if piece in CLOSING else r"\s*") + piece for piece in pieces)
    spans = [m.span() for m in re.finditer(loose.removeprefix(r"\s*"), source)]
    assert len(spans) == 1, f"{len(spans)} times in the source: {old}"
    ((start, end),) = spans
    return source[:start] + new.strip() + source[end:]


def load_file(name: str, file: Path) -> Any:
    """The module `name`, run from a file."""
    spec: Any = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
