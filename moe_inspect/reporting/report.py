"""Report: what a trace says, as tables, as a verdict, as a cell of a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moe_inspect.analysis.counting.select import select
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.shown import Shown, python_call
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.registry import TABLES, Excerpt, check_table
from moe_inspect.reporting.tables.summary import facts, notes, title_of
from moe_inspect.reporting.verdict.checks import findings
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.trace.answers import TraceMethod
from moe_inspect.trace.reader import Trace, open_trace

if TYPE_CHECKING:
    from moe_inspect.reporting.charts.spec import Chart

__all__ = ["TABLES", "Report", "check_table", "report"]  # whoever imports these has every table


def report(
    trace: Trace | str | Path,
    *,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    top: int = 20,
    window: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    scheduler: object = None,
    progress: Callable[[int], None] | None = None,
    baseline: Trace | str | Path | None = None,
    times: Mapping[str, Any] | None = None,
) -> Report:
    """The report on a trace, or on a selection of it: layers "0-3,7", domains, phase "prefill",
    "decode", "encode" or "draft".

    `top`: token ids per expert in `vocabulary`, and partners per expert in tables of pairs; 0 for
    all. `window`: tokens per window, by default a 64th of the trace. `thresholds`: of the verdict,
    {"uneven": 0.3}. `scheduler`: of a dask.distributed cluster, as `Trace.on` takes it. `progress`
    is called with the number of decisions read. `baseline`: a trace of an untrained or earlier
    model over the same or similar text; `specialization` and the verdict say what is beyond it.
    `times`: options of `trace.simulate.placement`, {"hardware": "h200", "engine": "vllm", "dtype":
    "fp8"}: the verdict and the page then say what imbalance costs in milliseconds. Raises
    MoeInspectError where there is no such trace, layer, domain or threshold, where the baseline has
    other routers or domains, or counts only, and where those times cannot be used."""

    opened, its = open_trace(trace, scheduler=scheduler), None
    selection = select(opened, layers, domains, phase)
    if baseline is not None:
        other = open_trace(baseline, scheduler=scheduler)
        if other.counts_only:
            raise MoeInspectError(f"the baseline {other.path} holds counts only, no documents")
        its = Report(other, select(other, layers, domains, phase))
    made = Report(
        opened,
        selection,
        top=top,
        window=window,
        thresholds=thresholds,
        progress=progress,
        baseline=its,
    )
    if times:
        what = {"layers": layers, "domains": domains, "phase": phase}
        lines = python_call("simulate.placement", [opened], what | {**times})
        made.costs = replace(made.imbalance_costs(**what, **times), python=lines)
    return made


class Report(ReportData, Shown):
    """`tables["balance"]` and the others are DataFrames, computed when first asked for; `verdict()`
    is what they come to, in plain sentences. `print(report)` is one screen of it."""

    imbalance_costs = TraceMethod[..., Any]("simulate.step", "imbalance_costs")

    def __repr__(self) -> str:
        return f"Report({str(self.trace.path)!r}, tables: {', '.join(TABLES)})"

    def write_text(self, file: TextIO) -> None:
        """Writes the text as the command prints it: one screen."""
        from moe_inspect.reporting.render.terminal import print_report

        print_report(self, file)

    @property
    def title(self) -> str:
        return title_of(self)

    @property
    def said(self) -> list[Finding]:
        return [one for one in findings(self) if one.kind != "trace_warning"]

    @property
    def excerpts(self) -> Mapping[str, Excerpt]:
        from moe_inspect.reporting.render.terminal import excerpt_of_balance

        return {"balance": excerpt_of_balance(self)}

    def charts(self) -> tuple[list[Chart], list[str]]:
        from moe_inspect.reporting.charts.spec import draw_charts

        return draw_charts(self)

    def page(self, text: bool = True) -> str:
        """Return the page, as one string of HTML. `text`: whether it shows documents, as many as a
        megabyte holds."""
        from moe_inspect.reporting.render.page import report_page

        return report_page(self, text)

    def first_chart(self) -> Chart | str:
        from moe_inspect.reporting.charts.spec import chart_of

        return chart_of(self, "load")

    def chart_named(self, name: str) -> Chart:
        from moe_inspect.reporting.charts.spec import chart_of, check_chart

        check_chart(name)
        made = chart_of(self, name)
        if isinstance(made, str):
            raise MoeInspectError(made or f"this trace has no data for the chart {name!r}")
        return made

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
