"""Report: what a trace says, as tables, as a verdict, as a cell of a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.shown import Shown
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.registry import TABLES, Excerpt, check_table
from moe_inspect.reporting.tables.summary import facts, notes, title_of
from moe_inspect.reporting.verdict.findings import Finding, findings, verdict_of

if TYPE_CHECKING:
    from moe_inspect.reporting.charts.spec import Chart

__all__ = ["TABLES", "Report", "check_table"]  # whoever imports these has every table


class Report(ReportData, Shown):
    """`tables["balance"]` and the others are DataFrames, computed when first asked for; `verdict()`
    is what they come to, in plain sentences. `print(report)` is one screen of it."""

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
        verdict = verdict_of(self)
        return [verdict.headline, *verdict.others, verdict.sample]

    @property
    def main_table(self) -> None:
        return None

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
