"""Charts of the load: of every expert, and of the busiest expert of each layer.

L routers, E experts of the widest of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.metrics.balance import load_ratio
from moe_inspect.reporting.charts.spec import (
    Axis,
    Band,
    Chart,
    Heatmap,
    Mark,
    Panel,
    Points,
    Rule,
    cell_numbers,
    chart,
    definitions,
    known_interval,
    layer_axis,
    load_scale,
    log_axis,
)
from moe_inspect.reporting.verdict.chance import uneven
from moe_inspect.text import layer_label, plural

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData


@chart("load")
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


@chart("balance")
def balance(data: ReportData) -> Chart | str:
    """max/mean of the load by layer, with its interval, against what is expected by chance."""
    table: Any = data.tables["balance"]
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
