"""Sections on how sure the routers are, and on the trace itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_inspect.reporting.charts.sections_parts import (
    definitions,
    layer_axis,
    layers,
    line,
    section,
)
from moe_inspect.reporting.render import html
from moe_inspect.reporting.render.html import Section

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

CONFIDENCE = {
    "gate_entropy_nats": "entropy of the softmax (nats)",
    "top_k_mass": "probability of the chosen k",
    "boundary_margin": "margin to the next expert (logits)",
    "weight_entropy_nats": "entropy of the k weights (nats)",
    "weight_margin": "first weight − second",
}


@section
def router(report: Report) -> Section | str:
    """How sure the routers are."""
    if report.counts.counts_only:
        return "router confidence: counts alone know no weights"
    table: Any = report.tables["router"]
    known = [name for name in CONFIDENCE if name in table and table[name].notna().any()]
    if not known:
        return "router confidence: neither logits nor weights were recorded"
    known = [name for name in known if not name.startswith("weight")] or known
    x, labels = layers(report, table)
    data = [
        line(x, table[name].to_numpy(), html.label(CONFIDENCE[name]), mode="lines+markers")
        for name in known
    ]
    return Section(
        "Router confidence",
        "How decided each router is: from its logits where they were recorded, else from the "
        "gate weights of the chosen.",
        figure={
            "data": data,
            "layout": {"xaxis": layer_axis(labels), "yaxis": {"rangemode": "tozero"}},
        },
        table=table,
        definitions=definitions(*known),
    )


@section
def facts(report: Report) -> Section | str:
    return Section("About this trace", table=report.tables["summary"])
