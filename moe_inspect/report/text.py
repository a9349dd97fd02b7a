"""How things are written for people, on the page and in pictures: names of layers, texts from a corpus, numbers."""

from __future__ import annotations

import math
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.trace import schema

if TYPE_CHECKING:
    from moe_inspect.report.report import Report


def layer_label(report: Report, router: int) -> str:
    """`schema.layer_label` of a router of the report's trace."""
    return schema.layer_label(report.trace.routers, router)


def readable(text: object) -> str:
    """A text in which every character is seen: line ends, control and direction marks as escapes, a blank at an end as ␣."""
    text = "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else _escape(c) for c in str(text))
    inner = text.strip(" ")
    lead = len(text) - len(text.lstrip(" "))
    return "␣" * lead + inner + "␣" * (len(text) - lead - len(inner)) if inner else "␣" * len(text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def number(value: Any) -> str:
    """A cell as people read it; "–" where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or str(value) == "<NA>":
        return "–"
    if isinstance(value, (float, np.floating)):
        return f"{value:,.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    return readable(value)


def cut(text: str, most: int = 18) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
