"""The load of every expert as a heatmap in text: a row per router. L routers, E experts."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from rich.console import Console
from rich.text import Text

from moe_inspect.analysis.metrics.balance import load_ratios
from moe_inspect.reporting.render.console import wrapped
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.text import layer_label
from moe_inspect.trace.shard import run_edges

MOST_ROUTERS = 32  # on a terminal; beyond that the least balanced
FILE_CELLS = 128  # characters of a row in a file
NUMBER = 5  # characters of a load ratio
RULER = 8  # cells between two numbers of experts above the map

# upper end of the load ratio → character with Unicode, without, and its colour, which can be seen
# on black and on white; 0 is a dead expert
RAMP = [
    (0, "×", "x", "bold rgb(60,110,255)"),
    (0.25, "▁", ".", "rgb(60,110,255)"),
    (0.5, "▂", ":", "rgb(70,145,235)"),
    (0.8, "▃", "-", "rgb(105,175,230)"),
    (1.2, "▄", "=", ""),
    (2, "▅", "+", "rgb(235,150,95)"),
    (4, "▆", "*", "rgb(230,110,70)"),
    (8, "▇", "#", "rgb(220,65,55)"),
    (math.inf, "█", "@", "bold rgb(215,25,75)"),
]
# the background of numbers, from the mean to four times or a quarter of it (ColorBrewer's RdBu)
ABOVE = [(253, 219, 199), (244, 165, 130), (214, 96, 77), (178, 24, 43)]
BELOW = [(209, 229, 240), (146, 197, 222), (67, 147, 195), (33, 102, 172)]


def heatmap_lines(data: ReportData, console: Console, most: int) -> list[Text]:
    """A title, then a row per router, of the `most` least balanced: the load ratio of each expert,
    as numbers if they fit, as characters otherwise. If even those do not fit, a character shows the
    most extreme of several neighbouring experts, and the title says so."""
    routers = data.selection.routers
    ratio_LE = load_ratios([data.counts.load_E(r) for r in routers])
    worst_L = np.argsort(-np.nan_to_num(ratio_LE).max(1), kind="stable")
    shown: list[int] = sorted(worst_L[:most].tolist())
    widest = ratio_LE.shape[1]
    labels = [f"layer {layer_label(data.trace.routers, routers[n])}" for n in shown]
    indent = max(len("experts"), *map(len, labels)) + 2
    room = console.width - indent if console.is_terminal else FILE_CELLS
    as_numbers = widest * NUMBER <= room
    together = 1 if as_numbers else math.ceil(widest / room)
    unicode = (console.encoding or "").lower().startswith("utf")
    several = len({data.trace.routers[r].layer for r in routers}) < len(routers)
    left_out = list[str]()
    if len(shown) < len(routers):
        what = "routers" if several else "layers"
        left_out.append(f"the {len(shown)} least balanced of {len(routers)} {what}")
    if together > 1:
        left_out.append(f"each character: most extreme of {together} experts")
    lines = [Text("load of each expert ÷ mean of its layer", style="bold")]
    for said in ("; ".join(left_out), "" if as_numbers else legend(unicode)):
        lines += wrapped(Text(said, style="dim"), console) if said else []
    ruler = "".join(f"{e:>{NUMBER}}" for e in range(widest))
    if not as_numbers:
        ruler = "".join(str(e).ljust(RULER) for e in range(0, widest, RULER * together))
    lines.append(Text("experts".ljust(indent) + ruler.rstrip(), style="dim"))
    for label, ratio_C in zip(labels, extremes(ratio_LE[shown], together), strict=True):
        lines.append(Text(label.ljust(indent)) + cells(ratio_C, as_numbers, unicode))
    return lines


def cells(ratio_C: np.ndarray, as_numbers: bool, unicode: bool) -> Text:
    """The load ratios of a row of the map, NaN beyond its experts: as numbers, or a character
    each."""
    ratio_C, line = ratio_C[~np.isnan(ratio_C)], Text()
    if not len(ratio_C):
        return Text("no load", "dim")
    if as_numbers:
        for ratio in ratio_C.tolist():
            # 0 is exactly none
            digits = 0 if ratio == 0 or ratio >= 99.5 else 1 if ratio >= 9.995 else 2
            line.append(f"{ratio:>{NUMBER}.{digits}f}", style(ratio))
        return line
    inner = [high for high, *_ in RAMP[1:-1]]
    step_C = np.where(ratio_C == 0, 0, 1 + np.searchsorted(inner, ratio_C, side="right"))
    for first, end in pairwise(run_edges(step_C).tolist()):
        _, fancy, plain, colour = RAMP[step_C[first]]
        line.append((fancy if unicode else plain) * (end - first), colour)
    return line


def legend(unicode: bool) -> str:
    low, parts, at_least = 0.0, list[str](), "≥" if unicode else ">="
    for high, fancy, plain, _ in RAMP:
        said = "dead" if high == 0 else f"<{high:g}" if high < math.inf else f"{at_least}{low:g}"
        parts.append(f"{fancy if unicode else plain} {said}")
        low = high
    return "   ".join(parts)


def extremes(ratio_E: np.ndarray, together: int) -> np.ndarray:
    """The ratio furthest from 1 of every `together` neighbours, on a logarithmic scale: 0.5 is as
    far as 2. NaN only where all of them are. ratio_E: [..., E] → [..., ceil(E / together)]"""
    if together == 1:
        return ratio_E
    *rows, E = ratio_E.shape
    filling = np.full((*rows, -E % together), np.nan)
    ratio_E = np.concatenate([ratio_E, filling], axis=-1)
    parts = ratio_E.reshape(*rows, -1, together)
    far = np.nan_to_num(np.abs(np.log(np.maximum(parts, 1e-9))), nan=-1.0).argmax(-1)
    return np.take_along_axis(parts, far[..., None], -1)[..., 0]


def style(ratio: float) -> str:
    """The colours of a load ratio as a number: on blue below the mean, on red above it, on nothing
    within 5% of it. The root keeps 0.8, 1 and 1.2 apart, where most loads are."""
    far = min(abs(math.log2(max(ratio, 1e-3))) / 2, 1.0)
    if far < 0.035:
        return ""
    stops = ABOVE if ratio > 1 else BELOW
    at = math.sqrt(far) * (len(stops) - 1)
    low = min(int(at), len(stops) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(*stops[low : low + 2], strict=True))
    return f"{'white' if at > 2.4 else 'black'} on rgb({','.join(map(str, mixed))})"
