"""The marks, ticks and colours of a chart's panel on the axes of matplotlib.

R rows, C columns of a heatmap.
"""

# matplotlib's own types leave **kwargs unknown
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap

from moe_inspect.reporting.charts.spec import (
    PALETTE,
    Axis,
    Band,
    Heatmap,
    Line,
    Links,
    Panel,
    Points,
    Rule,
    Scale,
    round_numbers,
)

SMALL = 8  # points: ticks, legends, numbers in cells
DASHES = {"": "-", "dot": ":", "dash": "--"}
NOTHING = -9.0  # the position of 0 on a scale of ratios: below all others
FEW = 12  # positions up to which dots are large
Ticks = list[tuple[float, str]]


def colour(name: str) -> str:
    return PALETTE[name][0]


def plain(text: str) -> str:
    """A label of the corpus, escaped: $ would begin a formula, and a leading _ would hide it from
    the legend."""
    text = text.replace("$", r"\$")
    return "\u200a" + text if text.startswith("_") else text


def vertical_range(panel: Panel) -> tuple[float, float]:
    """The lower and upper end of the y axis of a panel without a heatmap."""
    values = [panel.y.low, panel.y.high]
    for mark in panel.marks:
        if isinstance(mark, Rule):
            values.append(mark.y)
            continue
        for of in ("y", "low", "high"):
            array = getattr(mark, of, None)
            # a logarithmic axis cannot show an interval that reaches down to 0
            shown = np.asarray([] if array is None else array, float)
            shown = shown[np.isfinite(shown) & ((shown > 0) | (not panel.y.log))]
            if len(shown):
                values += [float(shown.min()), float(shown.max())]
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if not high > low:
        low, high = low - 0.5, low + 0.5
    if panel.y.log:
        return (low if low == panel.y.low else low / 1.05), high * 1.05
    margin = 0.04 * (high - low)
    return (
        low if low == panel.y.low else low - margin,
        high if high == panel.y.high else high + margin,
    )


def named_ticks(axis: Axis, count: int, most: float) -> Ticks:
    """(position, label) of at most about `most` ticks of an axis with `count` positions, at round
    numbers."""
    if len(axis.ticks) > 1:
        return list(axis.ticks[:: step_of(len(axis.ticks) / most)])
    step, labels = step_of(count / most), axis.labels
    # layers that begin at 3 have their ticks at 5, 10, …, not at 3, 8, …
    start = int(labels[0]) if labels and labels[0].isdecimal() else 0
    numbered = all(label == str(start + i) for i, label in enumerate(labels))
    first = -start % step if numbered else 0
    return [(i, labels[i] if labels else str(i)) for i in range(first, count, step)]


def value_ticks(axis: Axis, low: float, high: float, most: int) -> Ticks:
    """(position, label) of the ticks of an axis of numbers."""
    if axis.log:
        powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high)) + 1)
        return [(2.0**i, f"{2.0**i:g}") for i in powers]
    return [(v, f"{v:g}") for v in round_numbers(low, high, most)]


def step_of(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that is at least that."""
    power = 10 ** math.floor(math.log10(max(1.0, least)))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= least)


@singledispatch
def draw_mark(mark: Any, axes: Any) -> None:
    raise TypeError(f"no way to draw {type(mark).__name__}")


@draw_mark.register
def _(mark: Line, axes: Any) -> None:
    _interval(mark, axes)
    axes.plot(
        mark.x,
        mark.y,
        color=colour(mark.colour),
        ls=DASHES[mark.dash],
        lw=1.4,
        marker="o" if mark.dots else "",
        ms=3.5 if len(mark.x) <= FEW else 2.4,
        label=plain(mark.name),
    )


@draw_mark.register
def _(mark: Points, axes: Any) -> None:
    _interval(mark, axes)
    few = len(mark.x) <= FEW
    axes.plot(
        mark.x,
        mark.y,
        "o" if mark.shape == "dot" else "_",
        color=colour(mark.colour),
        ms=(5 if few else 3.4) if mark.shape == "dot" else (12 if few else 7),
        mew=0 if mark.shape == "dot" else 1.6,
        label=plain(mark.name),
    )


@draw_mark.register
def _(mark: Band, axes: Any) -> None:
    axes.fill_between(
        mark.x, mark.low, mark.high, color=colour("band"), lw=0, label=plain(mark.name)
    )


@draw_mark.register
def _(mark: Rule, axes: Any) -> None:
    axes.axhline(
        mark.y,
        color=colour(mark.colour),
        lw=0.8 if not mark.dash else 1.2,
        ls=DASHES[mark.dash],
        label=plain(mark.name) or None,
    )


@draw_mark.register
def _(mark: Links, axes: Any) -> None:
    axes.vlines(mark.x, mark.low, mark.high, color=colour("baseline"), lw=1, alpha=0.6)


@draw_mark.register
def _(mark: Heatmap, axes: Any) -> None:
    axes.imshow(
        _positions(mark.values, mark.scale),
        aspect="auto",
        cmap=colour_map(mark.scale),
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )


def write_cells(mark: Heatmap, axes: Any) -> None:
    """The texts in the cells of a heatmap."""
    colours, at_RC = colour_map(mark.scale), _positions(mark.values, mark.scale)
    for (row, column), text in np.ndenumerate(mark.cells):
        if text:
            rgb = np.ravel(colours(at_RC[row : row + 1, column : column + 1]))[:3]
            axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=_ink(rgb))


def _ink(rgb: np.ndarray) -> str:
    """Black or white, whichever has more contrast to a colour (WCAG: at least 4.5 : 1)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def _interval(mark: Line | Points, axes: Any) -> None:
    if mark.low is not None and mark.high is not None:
        width = 3 if len(mark.x) <= FEW else 2
        axes.vlines(mark.x, mark.low, mark.high, color=colour(mark.colour), alpha=0.45, lw=width)


def _positions(values_RC: np.ndarray, scale: Scale) -> np.ndarray:
    """The positions of values on their scale, masked where there is no value; NOTHING where a ratio
    is 0."""
    at_RC = np.clip(scale.place(values_RC), 0, 1)
    if scale.kind == "ratio":
        at_RC = np.where(values_RC == 0, NOTHING, at_RC)
    return np.ma.masked_invalid(at_RC)


def colour_map(scale: Scale) -> Colormap:
    stops = [(at, colour(name)) for at, name in scale.stops()]
    colours = LinearSegmentedColormap.from_list(scale.kind, stops)
    unknown = colour("unknown") if scale.unknown else "white"
    under = colour("dead") if scale.kind == "ratio" else None
    return colours.with_extremes(bad=unknown, under=under)
