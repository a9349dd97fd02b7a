"""A report as a notebook shows it: without scripts, so that it is seen before the notebook is
trusted."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from moe_inspect.reporting.charts.spec import chart_of
from moe_inspect.reporting.render.html import template
from moe_inspect.reporting.tables.summary import facts
from moe_inspect.reporting.verdict.checks import findings

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

ROWS = 10
COLUMNS = [
    "layer",
    "router",
    "max_over_mean",
    "max_vio_low",
    "max_vio_high",
    "noise_floor",
    "cv",
    "gini",
    "dead_experts",
    "busiest_expert",
]


def notebook(data: ReportData) -> str:
    """Verdict, the load of every expert as a picture, and the least balanced routers."""
    balance: Any = data.tables["balance"]
    worst = balance.nlargest(ROWS, "max_vio")[COLUMNS]
    return template("notebook.html").render(
        title=str(dict(facts(data))["model"]),
        warning=data.warning,
        verdict=[f.text for f in findings(data) if f.kind != "trace_warning"],
        picture=_load(data),
        worst=worst,
        routers=len(balance),
        tables=", ".join(data.tables),
    )


def _load(data: ReportData) -> tuple[str, str] | None:
    """The chart of the load as the address of a picture, and in words."""
    from moe_inspect.reporting.render.matplotlib import draw, letters, picture

    made = chart_of(data, "load")
    if isinstance(made, str):
        return None
    with letters():
        png = picture(draw(made), "png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(png).decode(), made.description
