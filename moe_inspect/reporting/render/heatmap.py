"""The load of every expert as a heatmap in text: a row per router. L routers, E experts."""

from __future__ import annotations

import math

import numpy as np
from rich.console import Console
from rich.text import Text

from moe_inspect.analysis.metrics.balance import load_ratio
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.text import layer_label

MOST_ROUTERS = 32  # on a terminal; beyond that the least balanced
FILE_CELLS = 128  # characters of a row in a file

# upper end of the load ratio → character, with Unicode and without; 0 is a dead expert
RAMP = [
    (0, "×", "x"),
    (0.25, "▁", "."),
    (0.5, "▂", ":"),
    (0.8, "▃", "-"),
    (1.25, "▄", "="),
    (2, "▅", "+"),
    (4, "▇", "#"),
    (math.inf, "█", "@"),
]


def print_heatmap(data: ReportData, console: Console) -> None:
    """A row per router: the load ratio of each expert, as numbers if they fit, as characters
    otherwise. If even those do not fit, a character shows the most extreme of several neighbouring
    experts, and the title says so."""
    counts, routers = data.counts, data.selection.routers
    ratios = {r: load_ratio(counts.load_E(r)[None])[0] for r in routers}
    if console.is_terminal and len(routers) > MOST_ROUTERS:
        routers = sorted(
            sorted(routers, key=lambda r: -np.nan_to_num(ratios[r]).max())[:MOST_ROUTERS]
        )
    widest = max(len(ratio_E) for ratio_E in ratios.values())
    label_of = {r: f"layer {layer_label(data.trace.routers, r)}" for r in routers}
    indent = max(len(label) for label in label_of.values()) + 2
    room = (console.width if console.is_terminal else FILE_CELLS + indent) - indent
    numbers = widest * 5 <= room
    together = 1 if numbers else math.ceil(widest / room)
    unicode = (console.encoding or "").lower().startswith("utf")
    console.print()
    console.print(Text(_heatmap_title(numbers, together), style="bold"))
    if len(routers) < len(ratios):
        console.print(Text(f"the least balanced, {len(routers)} of {len(ratios)} routers"))
    if numbers:
        console.print(Text(" " * indent + "".join(f"{e:>5}" for e in range(widest))))
    else:
        console.print(Text(legend(unicode)))
    for r in routers:
        line = Text(label_of[r].ljust(indent))
        if np.isnan(ratios[r]).all():
            line.append("no load")
        elif numbers:
            for ratio in ratios[r]:
                line.append(
                    f"{ratio:>5.2f}" if ratio < 99.5 else f"{ratio:>5.0f}",
                    style=style(ratio, "on "),
                )
        else:
            for ratio in extremes(ratios[r], together):
                _, fancy, plain = RAMP[int(ramp_of(ratio))]
                line.append(fancy if unicode else plain, style=style(ratio))
        console.print(line, no_wrap=True, overflow="crop")


def _heatmap_title(numbers: bool, together: int) -> str:
    title = "load of each expert, as a ratio to its router's mean"
    if numbers:
        return title
    return f"{title}; experts left to right" + (
        f", each character the most extreme of {together}" if together > 1 else ""
    )


def legend(unicode: bool) -> str:
    low, parts = 0.0, list[str]()
    for high, fancy, plain in RAMP:
        character = fancy if unicode else plain
        if high == 0:
            parts.append(f"{character} dead")
        elif high == math.inf:
            parts.append(f"{character} ≥{low:g}" if unicode else f"{character} >={low:g}")
        else:
            parts.append(f"{character} <{high:g}")
        low = high
    return "   ".join(parts)


def extremes(ratio_E: np.ndarray, together: int) -> np.ndarray:
    """The ratio furthest from 1 of every `together` neighbours, on a logarithmic scale: 0.5 is as
    far as 2. NaN only where all of them are. ratio_E: [..., E] → [..., ceil(E / together)]"""
    if together == 1:
        return ratio_E
    *rows, E = ratio_E.shape
    missing = -E % together
    if missing:
        ratio_E = np.concatenate([ratio_E, np.full((*rows, missing), np.nan)], axis=-1)
    parts = ratio_E.reshape(*rows, -1, together)
    far = np.nan_to_num(np.abs(np.log(np.maximum(parts, 1e-9))), nan=-1.0).argmax(-1)
    return np.take_along_axis(parts, far[..., None], -1)[..., 0]


def ramp_of(ratio: np.ndarray | float) -> np.ndarray:
    """The index into RAMP of load ratios."""
    inner = [high for high, *_ in RAMP[1:-1]]
    return np.where(ratio == 0, 0, 1 + np.searchsorted(inner, ratio, side="right"))


def style(ratio: float, on: str = "") -> str:
    """Blue below the mean, red above it, none near it. `on`: "on " colours the background, "" the
    character."""
    far = min(abs(math.log2(max(ratio, 1e-3))) / 1.5, 1.0)
    if far < 0.15:
        return ""
    fade, ink = round(215 - 145 * far), "black " if on else ""
    return f"{ink}{on}rgb(255,{fade},{fade})" if ratio > 1 else f"{ink}{on}rgb({fade},{fade},255)"
