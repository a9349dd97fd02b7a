"""Parts of charts: axes of layers, colours of series, definitions of metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.reporting.charts.spec import FEW_CELLS, SERIES, Axis, Dash
from moe_inspect.text import layer_label

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

INTERVALS = " Bars are 95% intervals over documents."
DASHES: tuple[Dash, ...] = ("", "dash", "dot")


def definitions(*names: str) -> dict[str, str]:
    """The definitions of these metrics, from the registry."""
    known = metrics()
    return {name: known[name].formula for name in names}


def layer_axis(data: ReportData, routers: Iterable[int]) -> Axis:
    """An axis with a label per router."""
    return Axis("layer", tuple(layer_label(data.trace.routers, int(r)) for r in routers))


def look(i: int) -> tuple[str, Dash]:
    """Colour and dash of series i: after eight colours the dash changes."""
    return SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]


def known_interval(low: Any, high: Any) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """`low` and `high` of a mark; None where no value has an interval."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    return (None, None) if np.isnan(low).all() else (low, high)


def cell_numbers(values_RC: np.ndarray) -> np.ndarray | None:
    """The text in the cells of a heatmap of ratios, None if it has many. str [R, C]"""
    if values_RC.size > FEW_CELLS:
        return None
    return np.array([["" if v != v else f"{v:.2f}" for v in row] for row in values_RC], object)
