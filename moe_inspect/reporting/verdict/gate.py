"""Gates: does the metric of any selected router exceed a limit? For continuous integration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import Row, records
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


class GateResult(NamedTuple):
    """Lines on the gates that failed, one per router and gate, and on those that passed."""

    failed: list[str]
    passed: list[str]


def check_gates(
    data: Gated, gates: Iterable[Gate], tables: Mapping[str, Table] = TABLES
) -> GateResult:
    """Compare every router with every gate, or all routers together if the table has no routers.
    NaN counts as a failure."""
    result = GateResult([], [])
    for metric, limit, above in gates:
        table = data.tables[gated(tables)[metric]]
        rows = records(table.assign(value=table[metric].astype(float)))
        failures = [
            f"{_place(data, row)}: {metric} is {_value(row)} {'above' if above else 'below'} "
            f"{limit:g}"
            for row in rows
            if not ((row["value"] <= limit) if above else (row["value"] >= limit))
        ]
        result.failed.extend(failures)
        if rows and not failures:
            worst = (max if above else min)(rows, key=lambda row: row["value"])
            bound = "most" if above else "least"
            result.passed.append(
                f"{metric} is at {bound} {worst['value']:.6g} ({_place(data, worst)}), "
                f"limit {limit:g}"
            )
    return result


def _place(data: Gated, row: Row) -> str:
    if "router" not in row:
        return "all routers"
    return f"layer {layer_label(data.trace.routers, row['router'])}"


def _value(row: Row) -> str:
    return "NaN, which counts as" if math.isnan(row["value"]) else f"{row['value']:.6g},"
