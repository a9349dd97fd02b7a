"""What the sections of a page are made of: their registry, and the lines, intervals and heatmaps of
plotly figures.

A section is a function decorated with @section: it returns a Section, or in words why there is none
to show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.metrics.registry import metrics
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.render.map_data import numbers
from moe_inspect.text import layer_label

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

SECTIONS: dict[str, Callable[[Report], Section | str]] = {}
MOST_LINES = 12  # routers drawn as lines; more make a heatmap


def section(function: Callable[[Report], Section | str]) -> Callable[[Report], Section | str]:
    """Registers a section of the page, in the order of the page."""
    SECTIONS[function.__name__] = function
    return function


def definitions(*names: str) -> dict[str, str]:
    """What the registry says of these metrics."""
    known = metrics()
    return {name: known[name].formula for name in names}


def layers(report: Report, table: Any) -> tuple[np.ndarray, list[str]]:
    """Of a table of a row a router: where each stands on the axis, and what it is called."""
    return np.arange(len(table)), [
        layer_label(report.trace.routers, int(r)) for r in table["router"]
    ]


def layer_axis(labels: list[str]) -> dict[str, Any]:
    step = max(1, len(labels) // 24)
    shown = list(range(0, len(labels), step))
    ticks = {"tickvals": shown, "ticktext": [labels[i] for i in shown], "zeroline": False}
    return {"title": {"text": "layer"}, "range": [-0.5, len(labels) - 0.5], **ticks}


def line(x: np.ndarray, y: np.ndarray, name: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": numbers(x),
        "y": numbers(y),
        "name": name,
        "mode": "lines",
        **more,
    }


def marks(
    x: np.ndarray, y: np.ndarray, name: str, colour: str, labels: list[str], **more: Any
) -> dict[str, Any]:
    """A dot a layer; `labels` are the layers' names."""
    hover = f"layer %{{text}}: %{{y:.3f}}<extra>{name}</extra>"
    dot = {"color": colour, "size": 8 if len(x) <= MOST_LINES else 6}
    return line(
        x,
        y,
        name,
        **{"mode": "markers", "marker": dot, "text": labels, "hovertemplate": hover, **more},
    )


def ticks(
    x: np.ndarray, y: np.ndarray, name: str, colour: str, labels: list[str]
) -> dict[str, Any]:
    """A short dash a layer: what the dots of the same colour are to be held against."""
    dash = {
        "color": colour,
        "symbol": "line-ew-open",
        "size": 12 if len(x) <= MOST_LINES else 7,
        "line": {"width": 2},
    }
    return marks(x, y, name, colour, labels, marker=dash)


def interval(value: np.ndarray, low: np.ndarray, high: np.ndarray, **look: Any) -> dict[str, Any]:
    """The error bars of a line or its marks; nothing where no value has an interval."""
    if np.isnan(low).all():
        return {}
    ends = {"array": numbers(high - value), "arrayminus": numbers(value - low)}
    return {
        "error_y": {
            "type": "data",
            "symmetric": False,
            **ends,
            "thickness": 1.5,
            "width": 4,
            **look,
        }
    }


def heatmap(
    z: np.ndarray,
    x: np.ndarray,
    said: str,
    customdata: np.ndarray,
    bar: str,
    least: float,
    most: float,
) -> dict[str, Any]:
    """Rows of z by x, coloured from `least`, as good as even, to `most`; `bar` says what of."""
    return {
        "type": "heatmap",
        "z": [numbers(row) for row in z],
        "x": numbers(x),
        "customdata": customdata.tolist(),
        "hovertemplate": said + "<extra></extra>",
        "colorscale": [[0, "@even"], [0.5, "@higher"], [1, "@high"]],
        "zmin": least,
        "zmax": most,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "title": {"text": bar, "side": "right"}},
    }
