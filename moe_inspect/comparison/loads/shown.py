"""The load of two traces as charts by layer, as text and as a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moe_inspect.comparison.loads.data import Loads
from moe_inspect.comparison.loads.tables import times_floor
from moe_inspect.comparison.loads.verdict import CHECKS
from moe_inspect.comparison.result import LOAD_TABLES, SIDES, Excerpt, Kind
from moe_inspect.reporting.charts.spec import (
    MOST_LINES,
    Axis,
    Band,
    Chart,
    Heatmap,
    Line,
    Mark,
    Panel,
    Points,
    Scale,
    look,
)
from moe_inspect.text import layer_label

COLOURS = dict(zip(SIDES, ("c1", "c2"), strict=True))


def _layers(data: Loads) -> Axis:
    return Axis("layer", tuple(layer_label(data.a.routers, r) for r, _ in data.pairs))


def load_shift(data: Loads) -> Chart:
    """How far the load moves, beside chance."""
    table: Any = data.tables["load_shift"]
    x = np.arange(len(table), dtype=float)
    moved, floor = (table[c].to_numpy(float) for c in ("load_shift", "load_shift_floor"))
    marks = (
        Points(x, moved, "B against A", "c1"),
        Points(x, floor, "chance", "c1", shape="tick"),
    )
    return Chart(
        "Load that moves",
        "Total variation of the experts' load between A and B",
        (Panel(marks, _layers(data), Axis("share of the load", low=0)),),
        text="The share of the assignments that go to different experts. The dash is what chance "
        "alone moves between two traces of this many tokens.",
        table=table,
    )


def max_vio(data: Loads) -> Chart:
    """How even the load is in each."""
    table: Any = data.tables["balance"]
    x, marks = np.arange(len(table), dtype=float), list[Line]()
    for side in SIDES:
        names = ("max_over_mean", "expected_by_chance")
        ratio, floor = (table[f"{name}_{side}"].to_numpy(float) for name in names)
        marks.append(Line(x, ratio, side.upper(), COLOURS[side], dots=True))
        marks.append(Line(x, floor, f"{side.upper()}: chance", COLOURS[side], dash="dot"))
    return Chart(
        "How even the load is",
        "Load of the busiest expert ÷ mean load",
        (Panel(tuple(marks), _layers(data), Axis("max ÷ mean load", low=1)),),
        text="1 is even.",
        table=table,
    )


def by_step(data: Loads) -> Chart | str:
    """How far the load moves in every window of steps; none where there are not two of them."""
    table: Any = data.tables["windows"]
    if table["window"].nunique() < 2:
        return ""
    steps, moved = data.steps, "share of the load that moves"
    moved_LW, floor_LW = (
        table[c].to_numpy(float).reshape(len(data.pairs), -1)
        for c in ("load_shift", "load_shift_floor")
    )
    limit_LW = floor_LW * np.array([[times_floor(data, r)] for r, _ in data.pairs])
    time = Axis(f"first {steps.unit} of the window", tuple(f"{step:,}" for step in steps.first_W))
    x = np.arange(len(steps.first_W), dtype=float)
    if len(moved_LW) <= MOST_LINES:
        chance_W = np.nan_to_num(limit_LW).max(0)
        marks: list[Mark] = [Band(x, 0 * x, chance_W, "may be chance")]
        for i, (label, moved_W) in enumerate(zip(_layers(data).labels, moved_LW, strict=True)):
            marks.append(Line(x, moved_W, f"layer {label}", *look(i)))
        panel = Panel(tuple(marks), time, Axis(moved, low=0))
    else:
        beyond_LW = np.maximum(moved_LW - limit_LW, 0)
        high = float(np.nanmax(np.nan_to_num(beyond_LW))) or 1.0
        heatmap = Heatmap(beyond_LW, Scale("amount", f"{moved}, beyond chance", 0.0, high))
        panel = Panel((heatmap,), time, _layers(data))
    return Chart(
        "Since which step",
        f"How far the load of B is from that of A in the same {steps.units}, by layer",
        (panel,),
        text="Diverging runs leave the band of chance and stay outside. A window lies between two "
        f"{steps.units} at which both traces were written to disk; the table shows since "
        f"which {steps.unit} each layer differs.",
        table=data.tables["diverged"],
        definitions={
            "may be chance": "up to twice the total variation expected between two windows of this "
            "many tokens with equal routers; more where few experts have most of the load."
        },
    )


def _highest(column: str) -> Callable[[Any, int], Any]:
    def rows(frame: Any, most: int) -> Any:
        frame = frame.nlargest(most, column) if len(frame) > most else frame
        return frame.sort_values(["layer", "router"])

    return rows


def _excerpt(column: str, *columns: str) -> Excerpt:
    return Excerpt(f"the highest {column}", _highest(column), columns)


OF_BOTH = (f"{name}_{side}" for name in ("dead_experts", "entropy") for side in SIDES)
Loads.kind = Kind(
    of="counts",
    tables=LOAD_TABLES,
    main="load_shift",
    checks=CHECKS,
    title="The load of two traces",
    footer="Counts hold the load of experts, no decisions.",
    charts={
        "load_shift": (load_shift, "Change of the load", "load_shift"),
        "by_step": (by_step, "Change of the load", "diverged"),
        "max_vio": (max_vio, "Load of each trace", "balance"),
    },
    sections={
        "load": ("Load of each trace", "Experts", ""),
        "summary": ("", "About these traces", ""),
        "refused": ("", "Not compared", ""),
    },
    excerpts={
        "load_shift": _excerpt("load_shift"),
        "diverged": _excerpt("most_load_shift"),
        "balance": _excerpt(
            *("max_vio_b", "layer", "router", "max_vio_a", "max_vio_b", "max_vio_difference"),
            *OF_BOTH,
        ),
    },
)
