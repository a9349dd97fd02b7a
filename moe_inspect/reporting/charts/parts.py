"""Parts of charts: axes of layers, colours of series, definitions of metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.reporting.charts.spec import FEW_CELLS, SERIES, Axis, Dash, Scale, round_numbers
from moe_inspect.text import layer_label

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData
    from moe_inspect.trace.schema import Router

INTERVALS = " Bars are 95% intervals over documents."
FAR = 5.0  # a ratio beyond which the others would lie on the axis
DASHES: tuple[Dash, ...] = ("", "dash", "dot")


def definitions(*names: str) -> dict[str, str]:
    """The definitions of these metrics, from the registry."""
    known = metrics()
    return {name: known[name].formula for name in names}


def layer_axis(data: ReportData, routers: Iterable[int]) -> Axis:
    """An axis with a label per router."""
    return Axis("layer", tuple(layer_label(data.trace.routers, int(r)) for r in routers))


def token_axis(title: str, first_token: Iterable[int]) -> Axis:
    """An axis with a position per window, and ticks at round numbers of tokens."""
    first_W = np.array(list(first_token), float)
    marks = round_numbers(first_W[0], first_W[-1], 10) if len(first_W) > 1 else []
    at = np.interp(marks, first_W, np.arange(len(first_W)))
    # a window's position is its middle, its first token is at its left edge
    ticks = [(float(a) - 0.5, f"{mark:,.0f}") for a, mark in zip(at, marks, strict=True)]
    return Axis(title, tuple(f"{token:,.0f}" for token in first_W), ticks=tuple(ticks))


def load_scale(routers: Iterable[Router], title: str) -> Scale:
    """The scale of the load of experts ÷ its mean, up to E/k: every token."""
    most = max(router.experts / router.top_k for router in routers)
    least = Scale("ratio", title)
    return replace(least, high=most, end="E/k") if most >= least.high else least


def log_axis(title: str, values: np.ndarray) -> Axis:
    """An axis of ratios from 1 on; logarithmic where one is far beyond the others."""
    return Axis(title, low=1, log=float(np.nanmax(values)) > FAR)


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
