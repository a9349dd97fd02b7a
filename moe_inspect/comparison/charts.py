"""Charts of a comparison: how much differs by layer, at which margins and positions, whether it
grows, whose load it moves.

L routers, C deciles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from moe_inspect.comparison.data import PairData
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import (
    Axis,
    Chart,
    Heatmap,
    Line,
    Panel,
    Points,
    amount,
    known_interval,
)
from moe_inspect.text import layer_label

INTERVALS = " Bars are 95% intervals over documents."
SETS = {
    "set mismatch": (
        "The share of decisions for which the two traces chose different sets of experts."
    ),
    "overlap": "The share of the experts of a decision that both traces chose.",
}
MARGIN = {
    "margin": "How far A's router was from choosing another expert: the k-th largest logit minus "
    "the next.",
}


def _layers(data: PairData) -> Axis:
    return Axis("layer", tuple(layer_label(data.a.routers, r) for r, _ in data.pairs))


def set_mismatch(data: PairData) -> Chart | str:
    """The share of decisions with different experts, by layer."""
    table: Any = data.tables["agreement"]
    x = np.arange(len(table), dtype=float)
    low, high = known_interval(table["set_mismatch_low"], table["set_mismatch_high"])
    share = table["set_mismatch"].to_numpy(float)
    marks = [Line(x, share, "B against A", "c1", dots=True, low=low, high=high)]
    if "noise_set_mismatch" in table:
        noise = table["noise_set_mismatch"].to_numpy(float)
        marks.append(Line(x, noise, "a second run of A against A", "baseline", dash="dot"))
    top = float(np.nanmax([mark.y.max(initial=0) for mark in marks]))
    return Chart(
        "Decisions with different experts",
        "Share of each layer's decisions for which A and B chose different sets of experts",
        (
            Panel(
                tuple(marks), _layers(data), Axis("share of decisions", low=0, high=1.1 * top or 1)
            ),
        ),
        text="How often the two traces chose different experts, by layer." + INTERVALS,
        table=table,
        definitions=SETS,
    )


def margin_map(data: PairData) -> Chart | str:
    """Whether decisions flip where the router was undecided."""
    if not data.mismatched:
        return ""
    return _map(
        data,
        "margins",
        "Where the router was undecided",
        "Share of decisions with different experts, by tenth of A's margins",
        "tenth of the margins, 0 the least decided",
        "Rounding flips only close decisions (leftmost column); a different model flips others "
        "too.",
        MARGIN,
    )


def position_map(data: PairData) -> Chart | str:
    """Whether decisions flip at the beginning or the end of sequences."""
    if not data.mismatched:
        return ""
    return _map(
        data,
        "positions",
        "Where in the sequence",
        "Share of decisions with different experts, by tenth of the sequence",
        "tenth of the sequence, 0 its beginning",
        "A difference that grows along the sequence comes from its context; one only at its end "
        "comes from tokens that were never fed.",
    )


def _map(
    data: PairData,
    name: str,
    title: str,
    caption: str,
    axis: str,
    text: str,
    definitions: dict[str, str] | None = None,
) -> Chart | str:
    table: Any = data.tables[name]
    if not len(table):
        return f"{title}: no decisions with a known margin"
    at = {r: i for i, (r, _) in enumerate(data.pairs)}
    values_LC = np.full((len(at), 10), np.nan)
    values_LC[table["router"].map(at), table["decile"]] = table["set_mismatch"]
    top = float(np.nanmax(values_LC)) or 1.0
    scale = amount("share of decisions with different experts", 0.0, values_LC, top)
    columns = Axis(axis, tuple(str(i) for i in range(10)))
    return Chart(
        title,
        caption,
        (Panel((Heatmap(values_LC, scale),), columns, _layers(data)),),
        text=text,
        table=table,
        definitions=definitions or {},
    )


def growth(data: PairData) -> Chart | str:
    """Whether tokens that have differed differ again."""
    if not data.mismatched or len(data.pairs) < 2:
        return ""
    table: Any = data.tables["depth"]
    x = np.arange(len(table), dtype=float)
    lines = {
        "differ here or in an earlier layer": ("differ_so_far", "c1"),
        "differ here": ("set_mismatch", "c2"),
        "differ here for the first time": ("new", "c3"),
    }
    marks = tuple(
        Line(x, table[column].to_numpy(float), said, colour, dots=True)
        for said, (column, colour) in lines.items()
    )
    top = float(table["differ_so_far"].max())
    return Chart(
        "Does a difference grow?",
        "Share of tokens with different experts, layer by layer",
        (Panel(marks, _layers(data), Axis("share of tokens", low=0, high=1.1 * top or 1)),),
        text="Where most differences are new, each layer adds its own; where few are, early "
        "differences persist.",
        table=table,
    )


def load_shift(data: PairData) -> Chart | str:
    """How far the load moved, beside what two halves of the documents differ by."""
    if not data.mismatched:
        return ""
    table: Any = data.tables["load_shift"]
    x = np.arange(len(table), dtype=float)
    moved, halves = (table[c].to_numpy(float) for c in ("load_shift", "load_shift_halves"))
    marks = (
        Points(x, moved, "B against A", "c1"),
        Points(x, halves, "two halves of A's documents", "c1", shape="tick"),
    )
    top = float(np.nanmax([moved, halves]))
    return Chart(
        "Load that moves",
        "Total variation of the experts' load between A and B",
        (Panel(marks, _layers(data), Axis("share of the load", low=0, high=1.1 * top or 1)),),
        text="The share of the assignments that go to different experts, over all tokens. Below "
        "the dash, it is less than between two halves of A's documents.",
        table=table,
    )


CHARTS: tuple[Callable[[PairData], Chart | str], ...] = (
    set_mismatch,
    margin_map,
    position_map,
    growth,
    load_shift,
)


def draw_charts(data: PairData) -> tuple[list[Chart], list[str]]:
    """All charts that the pair has the data for, and why others are missing."""
    charts, left_out = list[Chart](), list[str]()
    for make in CHARTS:
        try:
            made = make(data)
        except MoeInspectError as error:  # a table that these traces cannot give
            made = str(error)
        if isinstance(made, Chart):
            charts.append(replace(made, name=make.__name__))
        elif made:
            left_out.append(made)
    return charts, left_out
