"""A report as a cell of a notebook shows it: no script, so that it is seen in notebooks that are
not trusted too."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from moe_inspect.reporting.render.html import template

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

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


def notebook(report: Report) -> str:
    """Verdict, the load of every expert as a picture, and the least balanced routers."""
    balance: Any = report.tables["balance"]
    worst = balance.nlargest(ROWS, "max_vio")[COLUMNS]
    return template("notebook.html").render(
        title=str(dict(report.facts())["model"]),
        warning=report.warning,
        verdict=[f.text for f in report.verdict() if f.kind != "trace_warning"],
        picture=_load(report) if balance["max_vio"].notna().any() else None,
        worst=worst,
        routers=len(balance),
        tables=", ".join(report.tables),
    )


def _load(report: Report) -> str:
    from moe_inspect.reporting.charts.plots import PLOTS

    png, figure = io.BytesIO(), PLOTS["load"](report)
    assert figure is not None
    figure.savefig(png, format="png", dpi=100, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
