"""Results as a notebook shows them: without scripts, so that they are seen before the notebook is
trusted, and no more than a screen."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_inspect.reporting.charts.spec import Chart, chart_of
from moe_inspect.reporting.render.html import template
from moe_inspect.reporting.tables.summary import facts
from moe_inspect.reporting.verdict.checks import findings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from moe_inspect.reporting.tables.data import ReportData
    from moe_inspect.reporting.verdict.findings import Finding

SENTENCES = 5  # of a verdict, the most important
ROWS, WIDE = 5, 8  # rows and columns of a table
COLUMNS = [
    "layer",
    "router",
    "max_over_mean",
    "max_over_mean_low",
    "max_over_mean_high",
    "expected_by_chance",
    "dead_experts",
    "busiest_expert",
]


@dataclass(frozen=True)
class Cell:
    """verdict: sentences, the most important first. tables: their names. picture: an address and
    what is seen. table: an excerpt, which `caption` describes."""

    title: str
    verdict: Sequence[str]
    tables: Sequence[str]
    warning: str | None = None
    picture: tuple[str, str] | None = None
    table: pd.DataFrame | None = None
    caption: str = ""


def cell_html(cell: Cell) -> str:
    frame, caption = cell.table, cell.caption
    if frame is not None:
        caption += f" (+ {left} more columns)" if (left := len(frame.columns) - WIDE) > 0 else ""
        frame = frame.iloc[:ROWS, :WIDE]
    return template("notebook.html").render(
        cell=cell,
        verdict=cell.verdict[:SENTENCES],
        more=len(cell.verdict[SENTENCES:]),
        table=frame,
        caption=caption,
    )


def verdict_cell(
    title: str,
    found: Sequence[Finding],
    tables: Iterable[str],
    chart: Chart | str | None = None,
    table: pd.DataFrame | None = None,
    caption: str = "",
) -> Cell:
    """What findings come to, one chart (none where it is the reason that there is none) and an
    excerpt of a table."""
    picture = chart_picture(chart) if isinstance(chart, Chart) else None
    sentences = [one.text for one in found]
    return Cell(title, sentences, list(tables), picture=picture, table=table, caption=caption)


def report_cell(data: ReportData) -> Cell:
    """Verdict, the load of every expert as a picture, and the least balanced routers."""
    balance: Any = data.tables["balance"]
    made = chart_of(data, "load")
    some = f"The least balanced routers, {ROWS} of {len(balance)}"
    return Cell(
        str(dict(facts(data))["model"]),
        [f.text for f in findings(data) if f.kind != "trace_warning"],
        list(data.tables),
        data.warning,
        chart_picture(made) if isinstance(made, Chart) else None,
        balance.nlargest(ROWS, "max_vio")[COLUMNS],
        some if len(balance) > ROWS else "Balance",
    )


def chart_picture(chart: Chart) -> tuple[str, str]:
    """A chart as the address of a picture, and in words."""
    from moe_inspect.reporting.render.matplotlib import draw, letters

    with letters():
        return figure_picture(draw(chart), chart.description)


def figure_picture(figure: Figure, description: str) -> tuple[str, str]:
    from moe_inspect.reporting.render.matplotlib import picture

    png = picture(figure, "png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(png).decode(), description
