"""The Python that gives what a page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.thresholds import Thresholds
from moe_inspect.text import ranges
from moe_inspect.trace.reader import Trace


def python_call(
    function: str, traces: Sequence[Trace | list[Trace]], options: Mapping[str, Any]
) -> str:
    """Lines that call `moe_inspect.function` on the traces, with those options that are not None;
    `made` is the result. A trace may be a list of them, which is one argument."""
    given = [
        repr([address(one) for one in trace] if isinstance(trace, list) else address(trace))
        for trace in traces
    ]
    given += [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return f"import moe_inspect\n\nmade = moe_inspect.{function}({', '.join(given)})"


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


def address(trace: Any) -> str:
    """Where a trace is, as it was given: a page that is shared must not say more. `trace`: a Trace,
    or its path."""
    return str(trace.path if isinstance(trace, Trace) else trace)
