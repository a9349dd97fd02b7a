"""Gates: does any selected router breach a limit? For the continuous integration of training
runs."""

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
    """A router fails above (or below) `limit`."""

    metric: str
    limit: float
    above: bool


def gate(text: str, above: bool) -> Gate:
    """ "max_vio=0.5" → Gate. MoeInspectError names what is wrong with it, and the metrics there
    are."""
    metric, equals, limit = (part.strip() for part in text.partition("="))
    if metric not in gated():
        raise MoeInspectError(f"no metric {metric!r}: there are {', '.join(gated())}")
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if not equals or math.isnan(value):
        raise MoeInspectError(f"{text!r} is no limit: write it like {metric}=0.5")
    return Gate(metric, value, above)


def gated() -> dict[str, str]:
    """metric → its table."""
    return {metric: name for name, table in TABLES.items() for metric in table.by_router}


def breaches(data: ReportData, gates: Iterable[Gate]) -> list[str]:
    """A line for each router beyond a limit. What has no value has not been shown to keep to the
    limit, so NaN is a breach; but a metric of the next layer has no value at the last one, and is
    not asked for there."""
    lines: list[str] = []
    for g in gates:
        table: Any = data.tables[gated()[g.metric]]
        values = table[g.metric].astype(float)
        rows = table.assign(value=values)
        if g.metric.startswith("next_accuracy") and values.notna().any():
            rows = rows[values.notna()]
        beyond = ~(rows["value"] <= g.limit) if g.above else ~(rows["value"] >= g.limit)
        for row in rows[beyond].to_dict("records"):
            value = row["value"]
            said = (
                f"is {value:.6g}, {'above' if g.above else 'below'}"
                if not math.isnan(value)
                else "has no value (NaN) to hold against"
            )
            lines.append(
                f"layer {layer_label(data.trace.routers, row['router'])}: {g.metric} {said} "
                f"{g.limit:g}"
            )
    return lines
