"""Gates: does the metric of any selected router exceed a limit? For continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.registry import TABLES
from moe_inspect.text import layer_label


@dataclass(frozen=True)
class Gate:
    """A router fails where its metric is above (or below) the limit."""

    metric: str
    limit: float
    above: bool


def gate(text: str, above: bool) -> Gate:
    """ "max_vio=0.5" → Gate. Raises MoeInspectError for an unknown metric or no number."""
    metric, equals, limit = (part.strip() for part in text.partition("="))
    if metric not in gated():
        raise MoeInspectError(f"no metric {metric!r}: there are {', '.join(gated())}")
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if not equals or math.isnan(value):
        raise MoeInspectError(f"{text!r}: expected METRIC=VALUE, e.g. {metric}=0.5")
    return Gate(metric, value, above)


def gated() -> dict[str, str]:
    """Metric → the table whose column it is."""
    return {metric: name for name, table in TABLES.items() for metric in table.by_router}


def breaches(data: ReportData, gates: Iterable[Gate]) -> list[str]:
    """A line per router and gate that fails. NaN counts as a failure; but a metric of the next
    layer has no value at the last one, which is left out."""
    lines = list[str]()
    for g in gates:
        table: Any = data.tables[gated()[g.metric]]
        values = table[g.metric].astype(float)
        rows = table.assign(value=values)
        if g.metric.startswith("next_accuracy") and values.notna().any():
            rows = rows[values.notna()]
        beyond = ~(rows["value"] <= g.limit) if g.above else ~(rows["value"] >= g.limit)
        for row in rows[beyond].to_dict("records"):
            value = row["value"]
            side = "above" if g.above else "below"
            found = "NaN, which counts as" if math.isnan(value) else f"{value:.6g},"
            router = layer_label(data.trace.routers, row["router"])
            lines.append(f"layer {router}: {g.metric} is {found} {side} {g.limit:g}")
    return lines
