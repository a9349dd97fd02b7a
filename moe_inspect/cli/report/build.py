"""Builds the report that was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moe_inspect.cli.report.request import Request

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report


def build(request: Request) -> tuple[Report, list[str]]:
    """The report with everything counted that was asked for, and a line per gate that failed and
    alarm that its rules raise."""
    from moe_inspect.alarms.of_trace import alarms_of
    from moe_inspect.reporting.report import report as make
    from moe_inspect.reporting.verdict.gate import breaches, gated

    with decisions_read() as progress:
        made = make(request.trace, progress=progress, **request.selection)
        tables = [request.table] if request.table else _tables_of_text(made)
        made.prepare(
            [
                *tables,
                *(gated()[gate.metric] for gate in request.gates),
                *(_tables_of_charts() if request.html or request.plots else []),
            ]
        )
        for name in tables:  # what is counted when it is asked for
            made.tables[name]
        failed = [f"failed: {line}" for line in breaches(made, request.gates)]
        if request.rules:
            window = request.selection["window"]
            alarms = alarms_of(made.trace, request.rules, made.selection, window)
            failed += [f"alarm: {alarm.text}" for alarm in alarms]
            failed += [f"help: {text}" for text in dict.fromkeys(a.help for a in alarms)]
        return made, failed


def _tables_of_text(made: Report) -> list[str]:
    return ["balance", "specialization", *(["router"] if made.trace.has_weights else [])]


def _tables_of_charts() -> list[str]:
    from moe_inspect.reporting.charts.spec import tables_of_charts

    return tables_of_charts()


@contextmanager
def decisions_read() -> Generator[Callable[[int], None] | None]:
    """Shows, on a terminal, the decisions read so far."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.completed:,.0f} decisions read"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda decisions: bar.advance(task, decisions)
