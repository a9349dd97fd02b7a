"""Report: what a trace says, as tables, as a verdict, as a cell of a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from moe_inspect.analysis.counting.select import select
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.registry import TABLES, check_table
from moe_inspect.reporting.tables.summary import facts, notes
from moe_inspect.reporting.verdict.checks import findings
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.trace.reader import Trace, open_trace

__all__ = ["TABLES", "Report", "check_table", "report"]  # whoever imports these has every table


def report(
    trace: Trace | str | Path,
    *,
    layers: str | int | Iterable[int] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    top: int = 20,
    window: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    scheduler: object = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """The report on a trace, or on a selection of it: layers "0-3,7", domains, phase "prefill",
    "decode" or "encode".

    `top`: token ids per expert in `vocabulary`, and partners per expert in tables of pairs; 0 for
    all. `window`: tokens per window, by default a 64th of the trace. `thresholds`: of the verdict,
    {"uneven": 0.3}. `scheduler`: address of a dask.distributed cluster. `progress` is called with
    the number of decisions read. Raises MoeInspectError where there is no such trace, layer, domain
    or threshold."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    return Report(
        trace,
        select(trace, layers, domains, phase),
        top=top,
        window=window,
        thresholds=thresholds,
        scheduler=scheduler,
        progress=progress,
    )


class Report(ReportData):
    """`tables["balance"]` and the others are DataFrames, computed when first asked for; `verdict()`
    is what they come to, in plain sentences."""

    def __repr__(self) -> str:
        return f"Report({str(self.trace.path)!r}, tables: {', '.join(TABLES)})"

    def _repr_html_(self) -> str:
        """What a notebook shows of a report that a cell ends with."""
        from moe_inspect.reporting.render.notebook import notebook

        return notebook(self)

    def verdict(self) -> list[Finding]:
        """What is wrong, how sure that is and what is fine: a Finding each, with a plain sentence
        in `text`; most important first."""
        return list(findings(self))

    def facts(self) -> list[tuple[str, str]]:
        """The rows of the table `summary`: (key, value)."""
        return list(facts(self))

    def notes(self) -> list[str]:
        """Why columns are NaN, and what numbers are limited to."""
        return list(notes(self))
