"""Charts of the load over time: by window of the trace, and how far it moves between windows.

L routers, W windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.reporting.charts.spec import (
    MOST_LINES,
    Axis,
    Band,
    Chart,
    Heatmap,
    Line,
    Links,
    Mark,
    Panel,
    Points,
    Rule,
    amount,
    chart,
    definitions,
    layer_axis,
    log_axis,
    look,
    token_axis,
)

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

MOVED = "From one window to the next"


@chart("windows")
def windows(data: ReportData) -> Chart | str:
    """max/mean of each router in windows of the trace, in execution order."""
    table: Any = data.tables["windows"]
    if table["window"].nunique() < 2:
        if data.counts.counts_only:
            return "load over time and drift: counts written at once have no order"
        return "load over time: the trace is a single window; --window N makes smaller ones"
    ratio_LW, layers, time = _by_window(data, table, "max_over_mean")
    if len(ratio_LW) <= MOST_LINES:
        chance_W = table.groupby("window")["expected_by_chance"].max().to_numpy()
        panel = _lines(ratio_LW, chance_W, 1, layers, time, log_axis("max ÷ mean load", ratio_LW))
    else:
        scale = amount("max ÷ mean load", 1, ratio_LW, 1.1, log=True)
        panel = Panel((Heatmap(ratio_LW, scale),), time, layers)
    return Chart(
        "Load over time",
        "Load of the busiest expert ÷ mean load, by window of the trace",
        (panel,),
        text="The load of the busiest expert ÷ the mean load, for consecutive windows of the trace "
        "in the order of execution. A change of text shows as a step, a drifting router as a "
        "slope.",
        table=table,
    )


@chart("drift", "windows")
def drift(data: ReportData) -> Chart | str:
    """How far the load moves, by window and by layer, and what that costs a placement made for the
    window before."""
    table: Any = data.tables["drift"]
    if not table["total_variation"].notna().any():
        if data.counts.counts_only:
            return ""  # windows says so
        return "drift: no router has load in two whole windows; --window N makes smaller ones"
    over_time: Any = data.tables["windows"]
    moved_LW, layers, time = _by_window(data, over_time, "total_variation")
    if len(moved_LW) <= MOST_LINES:
        chance_W = over_time.groupby("window")["total_variation_floor"].max().to_numpy()
        first = _lines(moved_LW, chance_W, 0, layers, time, Axis("share moved", low=0), MOVED)
    else:
        floor_LW, _, _ = _by_window(data, over_time, "total_variation_floor")
        beyond_LW = moved_LW - floor_LW
        scale = amount("share moved beyond chance", 0, beyond_LW, 0.2)
        first = Panel((Heatmap(beyond_LW, scale),), time, layers, MOVED)
    x, axis = np.arange(len(table), dtype=float), layer_axis(data, table["router"])
    distances: list[Mark] = []
    for name, column, colour in (
        ("to the next window", "total_variation", "c1"),
        ("first to last window", "first_to_last", "c2"),
    ):
        floor = table[f"{column}_floor"].to_numpy()
        distances.append(Points(x, table[column].to_numpy(), name, colour))
        distances.append(Points(x, floor, f"{name}: chance", colour, "tick"))
    fresh, stale = (table[f"balancedness_{age}"].to_numpy() for age in ("fresh", "stale"))
    sizes = sorted({int(n) for n in table["gpus"]})
    return Chart(
        "Drift",
        "How far the load of each layer moves, and what that costs a placement of experts",
        (
            first,
            Panel(tuple(distances), axis, Axis("share moved", low=0), "By layer"),
            Panel(
                (
                    Links(x, np.fmin(stale, fresh), np.fmax(stale, fresh)),
                    Points(x, fresh, "placed for the window itself", "c1"),
                    Points(x, stale, "placed for the window before", "c2"),
                ),
                axis,
                Axis(f"mean ÷ max load of {' or '.join(map(str, sizes))} GPUs", high=1),
                "Balancedness of a placement made for the window before",
            ),
        ),
        text="How far the load of each layer moves from one window to the next, compared with "
        "chance. The last panel shows what this costs a placement made for the window before.",
        table=table,
        definitions={
            **definitions("total_variation", "first_to_last"),
            "chance": "the distance expected of two windows of these sizes that draw from the same "
            "load, widened because tokens of one document are alike (design effect). Part of the "
            "cost of an old placement is chance too: the smaller the windows, the larger "
            "that part.",
            **definitions("balancedness_fresh", "balancedness_stale"),
        },
    )


def _by_window(data: ReportData, table: Any, column: str) -> tuple[np.ndarray, Axis, Axis]:
    """A column of the table `windows` as [L, W], NaN where a router saw no token; the axis of
    layers; the axis of windows."""
    wide = table.pivot(index="router", columns="window", values=column)
    wide = wide.reindex([r for r in data.selection.routers if r in wide.index])
    first: Any = table.drop_duplicates("window").sort_values("window")["first_token"]
    time = token_axis("first token of the window", first)
    return wide.to_numpy(), layer_axis(data, wide.index), time


def _lines(
    value_LW: np.ndarray,
    chance_W: np.ndarray,
    least: float,
    layers: Axis,
    time: Axis,
    axis: Axis,
    title: str = "",
) -> Panel:
    """A line per router, above the band between `least` and chance."""
    x = np.arange(value_LW.shape[1], dtype=float)
    marks: list[Mark] = [Band(x, x * 0 + least, chance_W, "chance"), Rule(least)]
    for i, (label, value_W) in enumerate(zip(layers.labels, value_LW, strict=True)):
        marks.append(Line(x, value_W, f"layer {label}", *look(i)))
    return Panel(tuple(marks), time, axis, title)
