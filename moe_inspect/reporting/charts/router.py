"""Charts of how confident the routers are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.reporting.charts.spec import (
    SERIES,
    Axis,
    Chart,
    Line,
    Panel,
    chart,
    definitions,
    layer_axis,
)

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

CONFIDENCE = {
    "gate_entropy_nats": ("Entropy of the softmax", "nats"),
    "top_k_mass": ("Probability of the chosen k", "probability"),
    "boundary_margin": ("Margin to the next expert", "logits"),
    "weight_entropy_nats": ("Entropy of the k gate weights", "nats"),
    "weight_margin": ("First gate weight − second", "gate weight"),
}


@chart("router")
def router(data: ReportData) -> Chart | str:
    """How confident each router is: entropy, margin and probability of its choice, from its logits
    or else from its gate weights; a panel per metric."""
    if data.counts.counts_only:
        return "router confidence: counts alone have no weights"
    table: Any = data.tables["router"]
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
