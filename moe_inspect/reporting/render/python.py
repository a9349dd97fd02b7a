"""The Python that gives what a page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.thresholds import Thresholds
from moe_inspect.text import ranges
from moe_inspect.trace.reader import Trace, address


def python_call(function: str, traces: Sequence[Trace], options: Mapping[str, Any]) -> str:
    """Lines that call `moe_inspect.function` on the traces, with those options that are not None;
    `made` is the result. A function of `simulate` is called on the one trace."""
    given = [repr(address(trace)) for trace in traces]
    given += [f"{name}={value!r}" for name, value in options.items() if value is not None]
    called = f"{function}("
    if function.startswith("simulate."):
        called = f"open_trace({given.pop(0)}).{called}"
    return f"import moe_inspect\n\nmade = moe_inspect.{called}{', '.join(given)})"


def table_of(lines: str, table: str) -> str:
    """The lines, and one that gives a table of what they made."""
    return f"{lines}\nmade.tables[{table!r}]" if lines else ""


def python_of_report(data: ReportData, table: str) -> str:
    """Lines that make the same report and give one of its tables."""
    selection, trace = data.selection, data.trace
    whole = len(selection.routers) == len(trace.routers)
    usual = asdict(Thresholds())
    changed = {k: v for k, v in asdict(data.thresholds).items() if v != usual[k]}
    options = {
        "layers": None if whole else ranges({trace.routers[r].layer for r in selection.routers}),
        "domains": sorted(selection.domains) if selection.domains else None,
        "phase": selection.phase,
        "top": None if data.top == 20 else data.top,
        "window": data.window,
        "thresholds": changed or None,
    }
    return table_of(python_call("report", [trace], options), table)
