"""The text of a document in a terminal, each token in the colour of its first expert."""

from __future__ import annotations

import colorsys

from rich.text import Text

from moe_inspect.later import pd
from moe_inspect.text import legible

GOLDEN = 0.61803398875  # of a turn: neighbours in number are far apart in hue
SHADES = (0.86, 0.70)  # lightness: neighbours differ in it too, for who sees few hues
TAB = "    "


def routed_text(document: pd.DataFrame, colours: bool) -> Text:
    """`document`: the rows of one router of `Trace.document`. Without `colours` the expert stands
    in brackets where it changes."""
    found, before = Text(), None
    for text, expert in zip(document["text"], document["expert_0"], strict=True):
        expert = None if pd.isna(expert) else int(expert)
        if not colours and expert != before:
            found.append(f"[{'–' if expert is None else expert}]")
        found.append(legible(text.replace("\t", TAB)), style=_style(expert) if colours else None)
        before = expert
    return found


def legend(document: pd.DataFrame, experts: int, most: int = 16) -> Text:
    """The experts that come first most often, with their shares."""
    counts = document["expert_0"].dropna().astype(int).value_counts()
    found = Text("first expert: ")
    for expert, n in zip(counts.index[:most].tolist(), counts.tolist(), strict=False):
        found.append(f" {expert} ", style=_style(expert))
        found.append(f" {n / len(document):.0%}  ")
    if len(counts) > most:
        found.append(f"and {len(counts) - most} more of {experts}")
    return found


def _style(expert: int | None) -> str:
    if expert is None:
        return "dim"
    rgb = colorsys.hls_to_rgb(expert * GOLDEN % 1, SHADES[expert % len(SHADES)], 0.75)
    back = "".join(f"{round(255 * part):02x}" for part in rgb)
    return f"#000000 on #{back}"
