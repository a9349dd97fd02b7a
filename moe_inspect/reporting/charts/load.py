"""Charts of the load, of every expert and of the busiest expert of each layer, over time and from
window to window; and of how confident the routers are.

L routers, E experts of the widest of them, W windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.metrics.balance import load_ratio
from moe_inspect.reporting.charts.spec import (
    MOST_LINES,
    SERIES,
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
    cell_numbers,
    chart,
    definitions,
    known_interval,
    layer_axis,
    load_scale,
    log_axis,
    look,
    token_axis,
)
from moe_inspect.reporting.verdict.findings import uneven
from moe_inspect.text import layer_label, plural

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData


@chart("load", group="Balance")
def load(data: ReportData) -> Chart | str:
    """Load ratio of every expert at every layer."""
    if not data.loaded:
        return "load: no router made an assignment"
    chosen = data.selection.routers
    widest = max(data.trace.routers[r].experts for r in chosen)
    ratio_LE = np.full((len(chosen), widest), np.nan)
    for row, r in enumerate(chosen):
        load_E = data.counts.load_E(r)
        ratio_LE[row, : len(load_E)] = load_ratio(load_E[None])[0]
    worst = np.nan_to_num(ratio_LE, nan=-1)
    row, expert = np.unravel_index(worst.argmax(), worst.shape)
    dead = int((ratio_LE == 0).sum())
    label = layer_label(data.trace.routers, chosen[int(row)])
    scale = load_scale((data.trace.routers[r] for r in chosen), "load ÷ mean load")
    return Chart(
        "Load of every expert",
        f"Busiest: expert {expert} of layer {label}, {worst.max():.2f}× the layer's mean load; "
        + (f"{plural(dead, 'expert')} without load" if dead else "every expert has load"),
        (
            Panel(
                (Heatmap(ratio_LE, scale, cell_numbers(ratio_LE)),),
                Axis("expert"),
                layer_axis(data, chosen),
            ),
        ),
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


@chart("balance", group="Balance")
def balance(data: ReportData) -> Chart | str:
    """max/mean of the load by layer, with its interval, against what is expected by chance."""
    table = data.frame("balance")
    if not table["max_vio"].notna().any():
        return "balance: no router made an assignment"
    rows = table.to_dict("records")
    x, value = np.arange(len(table), dtype=float), 1 + table["max_vio"].to_numpy()
    floor = table["expected_by_chance"].to_numpy()
    edge = np.r_[-0.5, x, len(x) - 0.5]
    marks: list[Mark] = [
        Band(edge, edge * 0 + 1, np.r_[floor[0], floor, floor[-1]], "expected by chance"),
        Rule(1),
    ]
    low, high = known_interval(table["max_over_mean_low"], table["max_over_mean_high"])
    name = f"busiest expert, all tokens{', with 95% interval' if low is not None else ''}"
    bad = np.array([row["max_vio"] == row["max_vio"] and uneven(data, row) for row in rows])
    for group, label, colour in ((~bad, name, "c1"), (bad, f"{name}; uneven layer", "bad")):
        if group.any():
            ends = (None, None) if low is None or high is None else (low[group], high[group])
            marks.append(Points(x[group], value[group], label, colour, "dot", *ends))
    if table["max_vio_batch"].notna().any():
        batch = 1 + table["max_vio_batch"].to_numpy()
        marks.append(Points(x, batch, "busiest expert per batch, mean", "c2", "tick"))
    pooled = data.pooled_max_over_mean()
    if pooled is not None:
        marks.append(Rule(pooled, f"averaged over layers: {pooled:.2f}×", "c3", "dash"))
    worst = int(np.nanargmax(value))
    label = layer_label(data.trace.routers, data.selection.routers[worst])
    return Chart(
        "Balance by layer",
        f"Layer {label} is the least balanced: its busiest expert gets {value[worst]:.2f}× the "
        "mean load",
        (
            Panel(
                tuple(marks),
                layer_axis(data, table["router"]),
                log_axis("max ÷ mean load", value),
            ),
        ),
        text="The load of the busiest expert of each layer, relative to the mean. Values within "
        "the grey band are explained by chance.",
        table=table,
        definitions={
            **definitions("max_over_mean"),
            "chance": "the ratio expected of a router that chooses uniformly at random on the "
            "same number of tokens, widened because tokens of one document are alike (design "
            "effect).",
            "interval": "95% interval over documents of the largest load ratio, whichever "
            "expert has it; it needs at least five documents.",
            **definitions("cv", "gini", "entropy"),
        },
    )


MOVED = "From one window to the next"


@chart("windows", group="Balance")
def windows(data: ReportData) -> Chart | str:
    """max/mean of each router in windows of the trace, in execution order."""
    table = data.frame("windows")
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


@chart("drift", "windows", group="Balance")
def drift(data: ReportData) -> Chart | str:
    """How far the load moves, by window and by layer, and what that costs a placement made for the
    window before."""
    table = data.frame("drift")
    if not table["total_variation"].notna().any():
        if data.counts.counts_only:
            return ""  # windows says so
        return "drift: no router has load in two whole windows; --window N makes smaller ones"
    over_time = data.frame("windows")
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


CONFIDENCE = {
    "gate_entropy_nats": ("Entropy of the softmax", "nats"),
    "top_k_mass": ("Probability of the chosen k", "probability"),
    "boundary_margin": ("Margin to the next expert", "logits"),
    "weight_entropy_nats": ("Entropy of the k gate weights", "nats"),
    "weight_margin": ("First gate weight − second", "gate weight"),
}


@chart("router", group="Router")
def router(data: ReportData) -> Chart | str:
    """How confident each router is: entropy, margin and probability of its choice, from its logits
    or else from its gate weights; a panel per metric."""
    if data.counts.counts_only:
        return "router confidence: counts alone have no weights"
    table = data.frame("router")
    known = [name for name in CONFIDENCE if name in table and table[name].notna().any()]
    if not known:
        return "router confidence: neither logits nor weights were recorded"
    from_logits = [name for name in known if not name.startswith("weight")]
    known = from_logits or known
    x, axis = np.arange(len(table), dtype=float), layer_axis(data, table["router"])
    source = "logits" if from_logits else "gate weights of the chosen experts"
    panels = list[Panel]()
    for name, colour in zip(known, SERIES, strict=False):
        title, unit = CONFIDENCE[name]
        value = table[name].to_numpy(float)
        high = 1.1 * float(np.nanmax(value)) or 1
        panels.append(
            Panel(
                (Line(x, value, "", colour, dots=True),), axis, Axis(unit, low=0, high=high), title
            )
        )
    return Chart(
        "Router confidence",
        f"How confident each router is, from its {source}",
        tuple(panels),
        columns=2,
        text="How confident each router is: from its logits where they were recorded, else from "
        "the gate weights of the chosen experts.",
        table=table,
        definitions=definitions(*known),
    )
