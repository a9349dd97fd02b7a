"""Charts of the load, of every expert and of the busiest expert of each layer, over time and from
window to window; and of how confident the routers are.

L routers, E experts of the widest of them, W windows.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.balance import load_ratios
from moe_inspect.reporting.charts import spec
from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Line, Panel, Points, layer_axis
from moe_inspect.reporting.tables.data import ReportData, records
from moe_inspect.reporting.verdict.findings import uneven
from moe_inspect.text import layer_label, plural


@spec.chart("load", group="Balance")
def load(data: ReportData) -> Chart | str:
    """Load ratio of every expert at every layer."""
    if not data.loaded:
        return "load: no router made an assignment"
    chosen = data.selection.routers
    routers = [data.trace.routers[r] for r in chosen]
    ratio_LE = load_ratios([data.counts.load_E(r) for r in chosen])
    row, expert = np.unravel_index(np.nan_to_num(ratio_LE, nan=-1).argmax(), ratio_LE.shape)
    dead = int((ratio_LE == 0).sum())
    without = f"{plural(dead, 'expert')} without load" if dead else "every expert has load"
    label = layer_label(data.trace.routers, chosen[int(row)])
    scale = spec.load_scale(routers, "load ÷ mean load")
    heatmap = Heatmap(ratio_LE, scale, spec.cell_numbers(ratio_LE))
    return Chart(
        "Load of every expert",
        f"Busiest: expert {expert} of layer {label}, {ratio_LE[row, expert]:.2f}× the layer's mean "
        f"load; {without}",
        (Panel((heatmap,), Axis("expert"), layer_axis(data, chosen)),),
        text="The load of each expert, as a ratio to the mean of its layer. The colour scale is "
        "logarithmic: half the mean is as far from even as twice the mean. Click a cell, "
        "or move with the arrow keys and press Enter, to open the expert's card.",
        definitions={
            "load ratio": "assignments of an expert ÷ the mean over the experts of its router; "
            "within a domain, of that domain's tokens. 1 is even, E/k is every token.",
            "without load": "no assignment at all, on the tokens of this trace.",
        },
        interactive="map",
    )


@spec.chart("balance", group="Balance")
def balance(data: ReportData) -> Chart | str:
    """max/mean of the load by layer, with its interval, against what is expected by chance."""
    table = data.tables["balance"]
    if not table["max_vio"].notna().any():
        return "balance: no router made an assignment"
    x, value = np.arange(len(table), dtype=float), 1 + table["max_vio"].to_numpy()
    floor_L = table["expected_by_chance"].to_numpy()
    marks: list[spec.Mark] = [spec.chance_band(floor_L), spec.Rule(1)]
    low, high = spec.known_interval(table["max_over_mean_low"], table["max_over_mean_high"])
    name = f"busiest expert, all tokens{', with 95% interval' if low is not None else ''}"
    rows = records(table)
    bad = np.array([row["max_vio"] == row["max_vio"] and uneven(data, row) for row in rows])
    for group, label, colour in ((~bad, name, "c1"), (bad, f"{name}; uneven layer", "bad")):
        if group.any():
            ends = [None if of is None else of[group] for of in (low, high)]
            marks.append(Points(x[group], value[group], label, colour, "dot", *ends))
    if table["max_vio_batch"].notna().any():
        batch = 1 + table["max_vio_batch"].to_numpy()
        marks.append(Points(x, batch, "busiest expert per batch, mean", "c2", "tick"))
    if (pooled := data.pooled_max_over_mean()) is not None:
        marks.append(spec.Rule(pooled, f"of loads summed over layers: {pooled:.2f}×", "c3", "dash"))
    worst = int(np.nanargmax(value))
    label = layer_label(data.trace.routers, data.selection.routers[worst])
    layers, y = layer_axis(data, table["router"]), spec.log_axis("max ÷ mean load", value)
    return Chart(
        "Balance by layer",
        f"Layer {label} is the least balanced: its busiest expert gets {value[worst]:.2f}× the "
        "mean load",
        (Panel(tuple(marks), layers, y),),
        text="The load of the busiest expert of each layer, relative to the mean. Values within "
        "the grey band are explained by chance.",
        table=table,
        definitions={
            **spec.definitions("max_over_mean"),
            "chance": "the ratio expected of a router that chooses uniformly at random on the "
            "same number of tokens, widened because tokens of one document are alike (design "
            "effect).",
            "interval": "95% interval over documents of the largest load ratio, whichever "
            "expert has it; it needs at least five documents.",
            **spec.definitions("cv", "gini", "entropy"),
        },
    )


@spec.chart("windows", group="Balance")
def windows(data: ReportData) -> Chart | str:
    """max/mean of each router in windows of the trace, in execution order."""
    table, name = data.tables["windows"], "max ÷ mean load"
    if table["window"].nunique() < 2:
        if data.counts.counts_only:
            return "load over time and drift: counts written at once have no order"
        return "load over time: the trace is a single window: smaller ones may show it"
    ratio_LW = _by_window(data, "max_over_mean").to_numpy()
    if len(ratio_LW) <= spec.MOST_LINES:
        y = spec.log_axis(name, ratio_LW)
        panel = _lines(data, "max_over_mean", "expected_by_chance", 1, y)
    else:
        panel = _heatmap(data, ratio_LW, spec.amount(name, 1, ratio_LW, 1.1, log=True))
    return Chart(
        "Load over time",
        "Load of the busiest expert ÷ mean load, by window of the trace",
        (panel,),
        text="The load of the busiest expert ÷ the mean load, for consecutive windows of the trace "
        "in the order of execution. A change of text shows as a step, a drifting router as a "
        "slope.",
        table=table,
    )


@spec.chart("drift", "windows", group="Balance")
def drift(data: ReportData) -> Chart | str:
    """How far the load moves, by window and layer."""
    table, moved = data.tables["drift"], "total_variation"
    if not table[moved].notna().any():
        if data.counts.counts_only:
            return ""  # windows says so
        return "drift: no router has load in two whole windows: smaller ones may show it"
    moved_LW, floor_LW = (_by_window(data, name).to_numpy() for name in (moved, f"{moved}_floor"))
    title, share = "From one window to the next", Axis("share moved", low=0)
    if len(moved_LW) <= spec.MOST_LINES:
        first = _lines(data, moved, f"{moved}_floor", 0, share, title)
    else:
        scale = spec.amount("share moved beyond chance", 0, moved_LW - floor_LW, 0.2)
        first = _heatmap(data, moved_LW - floor_LW, scale, title)
    x, axis = np.arange(len(table), dtype=float), layer_axis(data, table["router"])
    distances = list[Points]()
    for name, column, colour in (
        ("to the next window", moved, "c1"),
        ("first to last window", "first_to_last", "c2"),
    ):
        floor = table[f"{column}_floor"].to_numpy()
        distances.append(Points(x, table[column].to_numpy(), name, colour))
        distances.append(Points(x, floor, f"{name}: chance", colour, "tick"))
    return Chart(
        "Drift",
        "How far the load of each layer moves from one window to the next, and by chance",
        (first, Panel(tuple(distances), axis, share, "By layer")),
        text="How far the load of each layer moves from one window to the next, compared with "
        "chance.",
        table=table,
        definitions={
            **spec.definitions("total_variation", "first_to_last"),
            "chance": "the distance expected of two windows of these sizes that draw from the same "
            "load, widened because tokens of one document are alike (design effect).",
        },
    )


def _by_window(data: ReportData, column: str) -> pd.DataFrame:
    """A column of the table `windows` by router and window, NaN where a router saw no token."""
    wide = data.tables["windows"].pivot(index="router", columns="window", values=column)
    return wide.reindex([r for r in data.selection.routers if r in wide.index])


def _time(data: ReportData) -> Axis:
    first = data.tables["windows"].drop_duplicates("window").sort_values("window")["first_token"]
    return spec.token_axis(first)


def _heatmap(data: ReportData, values_LW: np.ndarray, scale: spec.Scale, title: str = "") -> Panel:
    layers = layer_axis(data, _by_window(data, "tokens").index)
    return Panel((Heatmap(values_LW, scale),), _time(data), layers, title)


def _lines(
    data: ReportData, column: str, chance: str, least: float, y: Axis, title: str = ""
) -> Panel:
    """A line per router, above the band between `least` and chance."""
    chance_W = data.tables["windows"].groupby("window")[chance].max().to_numpy()
    value_LW = _by_window(data, column)
    x, layers = np.arange(len(chance_W), dtype=float), layer_axis(data, value_LW.index)
    marks: list[spec.Mark] = [spec.Band(x, x * 0 + least, chance_W, "chance"), spec.Rule(least)]
    for i, (label, value_W) in enumerate(zip(layers.labels, value_LW.to_numpy(), strict=True)):
        marks.append(Line(x, value_W, f"layer {label}", *spec.look(i)))
    return Panel(tuple(marks), _time(data), y, title)


CONFIDENCE = {
    "gate_entropy_nats": ("Entropy of the softmax", "nats"),
    "top_k_mass": ("Probability of the chosen k", "probability"),
    "boundary_margin": ("Margin to the next expert", "logits"),
    "weight_entropy_nats": ("Entropy of the k gate weights", "nats"),
    "weight_margin": ("First gate weight − second", "gate weight"),
}


@spec.chart("router", group="Router")
def router(data: ReportData) -> Chart | str:
    """How confident each router is: entropy, margin and probability of its choice, from its logits
    or else from its gate weights; a panel per metric."""
    if data.counts.counts_only:
        return "router confidence: counts alone have no weights"
    table = data.tables["router"]
    known = [name for name in CONFIDENCE if name in table and table[name].notna().any()]
    if not known:
        return "router confidence: neither logits nor weights were recorded"
    from_logits = [name for name in known if not name.startswith("weight")]
    source = "logits" if from_logits else "gate weights of the chosen experts"
    x, axis = np.arange(len(table), dtype=float), layer_axis(data, table["router"])
    panels = list[Panel]()
    for name, colour in zip(known := from_logits or known, spec.SERIES, strict=False):
        title, unit = CONFIDENCE[name]
        line = Line(x, table[name].to_numpy(float), "", colour, dots=True)
        y = Axis(unit, low=0, high=1.1 * float(np.nanmax(line.y)) or 1)
        panels.append(Panel((line,), axis, y, title))
    return Chart(
        "Router confidence",
        f"How confident each router is, from its {source}",
        tuple(panels),
        columns=2,
        text="How confident each router is: from its logits where they were recorded, else from "
        "the gate weights of the chosen experts.",
        table=table,
        definitions=spec.definitions(*known),
    )
