"""Gates: does the metric of any selected router exceed a limit? For continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import records
from moe_inspect.reporting.tables.registry import TABLES, Table
from moe_inspect.text import layer_label, no_such
from moe_inspect.trace.reader import Trace


class Gate(NamedTuple):
    """A router fails where its metric is above (or below) the limit."""

    metric: str
    limit: float
    above: bool


def gate(text: str, above: bool, tables: Mapping[str, Table] = TABLES) -> Gate:
    """ "max_vio=0.5" → Gate. Raises MoeInspectError for an unknown metric or no number."""
    metric, _, limit = (part.strip() for part in text.partition("="))
    known = gated(tables)
    if metric not in known:
        raise MoeInspectError(no_such("metric", metric, known))
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise MoeInspectError(f"{text!r}: expected METRIC=VALUE, e.g. {metric}=0.5")
    return Gate(metric, value, above)


def gated(tables: Mapping[str, Table] = TABLES) -> dict[str, str]:
    """Metric → the table whose column it is."""
    return {metric: name for name, table in tables.items() for metric in table.by_router}


class Gated(Protocol):
    """What gates are put on: tables, and the trace whose routers they name."""

    @property
    def tables(self) -> Mapping[str, pd.DataFrame]: ...
    @property
    def trace(self) -> Trace: ...


def breaches(data: Gated, gates: Iterable[Gate], tables: Mapping[str, Table] = TABLES) -> list[str]:
    """A line per router and gate that fails, or per gate on all routers together. NaN counts as a
    failure."""
    lines = list[str]()
    for metric, limit, above in gates:
        table = data.tables[gated(tables)[metric]]
        for row in records(table.assign(value=table[metric].astype(float))):
            value, where = row["value"], "all routers"
            if "router" in row:
                where = f"layer {layer_label(data.trace.routers, row['router'])}"
            if (value <= limit) if above else (value >= limit):
                continue
            found = "NaN, which counts as" if math.isnan(value) else f"{value:.6g},"
            lines.append(f"{where}: {metric} is {found} {'above' if above else 'below'} {limit:g}")
    return lines
