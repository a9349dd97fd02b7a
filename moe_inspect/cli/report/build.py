"""Builds the report that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_inspect.cli.progress import phases
from moe_inspect.cli.report.request import Request
from moe_inspect.progress import phase

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report
    from moe_inspect.trace.reader import Trace


def phases_of(trace: Trace, request: Request) -> phases.Costs:
    """What the command goes through."""
    from moe_inspect.analysis.counting.select import select
    from moe_inspect.trace.reader import open_trace

    routers = select(trace, request.selection["layers"]).routers
    drawn = phases.drawing(trace, routers)
    found = phases.counting(trace, routers)
    if request.selection["baseline"]:
        found += phases.counting(open_trace(request.selection["baseline"]), routers)
    plots, only = request.drawing.plots, request.drawing.only
    if plots:
        found += [*drawn, *(phases.pictures(len(only)) if only else phases.pictures())]
    if request.html:
        # made before, if there are pictures
        found += [(name, cost / 4) for name, cost in drawn] if plots else drawn
        for simulated in dict.fromkeys(request.simulate):
            found += phases.simulating(trace, simulated.value)
        found += phases.page(trace, routers, samples=True)
    return found


def build(trace: Trace, request: Request) -> tuple[Report, list[str]]:
    """The report with everything counted that was asked for, and a line per gate that failed and
    alarm that its rules raise."""
    from moe_inspect.alarms.of_trace import alarms_of
    from moe_inspect.reporting.report import report as make
    from moe_inspect.reporting.verdict.gate import breaches, gated

    made = make(trace, **request.selection)
    tables = [request.table] if request.table else _tables_of_text(made)
    made.prepare(
        [
            *tables,
            *(gated()[gate.metric] for gate in request.gates),
            *_tables_of_charts(request),
        ]
    )
    advance = phase("computing", len(tables), "tables")
    for name in tables:  # what is counted when it is asked for
        made.tables[name]
        advance(1)
    failed = [f"failed: {line}" for line in breaches(made, request.gates)]
    if request.rules:
        window = request.selection["window"]
        alarms = alarms_of(made.trace, request.rules, made.selection, window)
        failed += [f"alarm: {alarm.text}" for alarm in alarms]
        failed += [f"help: {text}" for text in dict.fromkeys(a.help for a in alarms)]
    return made, failed


def _tables_of_text(made: Report) -> list[str]:
    return ["balance", "specialization", *(["router"] if made.trace.has_weights else [])]


def _tables_of_charts(request: Request) -> list[str]:
    if request.html is None and request.drawing.plots is None:
        return []
    from moe_inspect.reporting.charts.spec import tables_of_charts

    return tables_of_charts(() if request.html else request.drawing.only)
