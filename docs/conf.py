"""The documentation site: `make docs` builds it into build/docs."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import generate

project = "moe-inspect"
author = "moe-inspect"
version = release = installed("moe-inspect")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns: list[str] = []
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"moe-inspect {version}"
html_show_sourcelink = False
html_copy_source = False

smartquotes = False  # an option is written with two hyphens
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"


def setup(app: Any) -> None:
    app.connect("source-read", _fill)
    app.connect("autodoc-process-docstring", _as_rst)


def _fill(app: Any, name: str, source: list[str]) -> None:
    source[0] = generate.fill(source[0])


def _as_rst(app: Any, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    lines[:] = generate.docstring_as_rst(lines)
