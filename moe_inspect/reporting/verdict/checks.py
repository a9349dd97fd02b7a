"""All checks of a report, and their findings as a list and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, once
from moe_inspect.reporting.tables.registry import table
from moe_inspect.reporting.verdict.findings import (
    SECTIONS,
    Finding,
    every_check,
    most_important_first,
)


@once
def findings(data: ReportData) -> list[Finding]:
    """Findings of every check, most important first; a cost that was asked for before warnings."""
    results = [
        replace(result, kind=result.kind or check.__name__, group=SECTIONS[section])
        for section, check in every_check()
        if (result := check(data)) is not None
    ]
    asked = "busiest_gpu" if data.costs is not None else ""
    in_order = most_important_first(results)
    return sorted(in_order, key=lambda one: one.severity != "critical" and one.kind != asked)


@table()
def verdict(data: ReportData) -> pd.DataFrame:
    """One row per finding, most important first."""
    return verdict_table(findings(data))


def verdict_table(found: Sequence[Finding], values: bool = False) -> pd.DataFrame:
    """One row per finding: severity, kind, layer, router, text; `values`: and the numbers."""
    columns = ["severity", "kind", "layer", "router", "text", *(["values"] if values else [])]
    rows = [[getattr(one, name) for name in columns] for one in found]
    kinds = dict.fromkeys(("severity", "kind", "text"), "str")
    kinds |= dict.fromkeys(("layer", "router"), "Int64")
    return pd.DataFrame(rows, columns=columns).astype(kinds)
