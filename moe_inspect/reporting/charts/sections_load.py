"""Sections on the load: of every expert, of the busiest of each layer, and over time.

L routers, E experts of the widest of them, W windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.reporting.charts.sections_parts import (
    MOST_LINES,
    definitions,
    heatmap,
    interval,
    layer_axis,
    layers,
    line,
    marks,
    section,
    ticks,
)
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.render.map_data import numbers
from moe_inspect.reporting.verdict.chance import chance
from moe_inspect.text import layer_label

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report


@section
def load(report: Report) -> Section | str:
    """Layers × experts, drawn by map.js."""
    if not report.loaded:
        return "load: no router made an assignment"
    return Section(
        "Load of every expert",
        "The load of an expert as a ratio to the mean of its layer, on a scale on which a half "
        "is as far from even as double. Click a "
        "cell, or move with the arrow keys and press Enter, for the expert's card.",
        widget="map",
        definitions={
            "load ratio": "assignments of an expert ÷ the mean "
            "over the experts of its router; within a "
            "domain, of that domain's tokens. "
            "1 is even, E/k is every token.",
            "dead": "not one assignment; judged on the tokens of this trace only.",
        },
    )


@section
def balance(report: Report) -> Section | str:
    """max/mean by layer, its interval, and what chance gives."""
    table: Any = report.tables["balance"]
    if not table["max_vio"].notna().any():
        return "balance: no router made an assignment"
    x, labels = layers(report, table)
    floor = 1 + np.array([chance(row) for row in table.to_dict("records")])
    edge = np.r_[-0.5, x, len(x) - 0.5]
    value = 1 + table["max_vio"].to_numpy()
    data: list[dict[str, Any]] = [
        line(edge, np.ones(len(edge)), "", line={"width": 0}, showlegend=False, hoverinfo="skip"),
        line(
            edge,
            np.r_[floor[0], floor, floor[-1]],
            "chance, for documents like these",
            line={"width": 0},
            fill="tonexty",
            fillcolor="@band",
        ),
    ]
    bars = interval(
        value,
        1 + table["max_vio_low"].to_numpy(),
        1 + table["max_vio_high"].to_numpy(),
        thickness=3,
        width=0,
    )
    busiest = f"busiest expert{', with its 95 % interval' if bars else ''}"
    data.append(
        marks(
            x, value, busiest, "@accent", labels, **bars, hovertemplate="layer %{text}: %{y:.3f}×"
        )
    )
    if table["max_vio_batch"].notna().any():
        batch = 1 + table["max_vio_batch"].to_numpy()
        data.append(ticks(x, batch, "busiest of a batch, mean over batches", "@second", labels))
    pooled = report.pooled_max_over_mean()
    if pooled is not None:
        ends = np.array([edge[0], edge[-1]])
        data.append(
            line(
                ends,
                np.full(2, pooled),
                f"pooled over layers: {pooled:.2f}×",
                line={"color": "@third", "dash": "dash", "width": 1.5},
            )
        )
    return Section(
        "Balance by layer",
        "How much more than the mean the busiest expert of each layer gets. Within the grey band "
        "chance alone explains it.",
        figure={
            "data": data,
            "layout": {
                "xaxis": layer_axis(labels),
                "yaxis": {"title": {"text": "max ÷ mean load"}},
                "height": 380,
            },
        },
        table=table,
        definitions={
            **definitions("max_over_mean"),
            "chance": "the ratio that a router choosing by lot "
            "would show on as many tokens, widened "
            "by how alike the tokens of a "
            "document are (design effect).",
            "interval": (
                "of the busiest expert's load ratio, from resampling documents; fewer than five "
                "documents have none."
            ),
            **definitions("cv", "gini", "entropy"),
        },
    )


@section
def windows(report: Report) -> Section | str:
    """Load over time: max/mean of each router in windows of the trace, in execution order."""
    if report.counts.counts_only:
        return "load over time and drift: counts alone have no order"
    table: Any = report.tables["windows"]
    if table["window"].nunique() < 2:
        return "load over time: the trace is a single window; --window N makes smaller ones"
    ratio_LW, labels, axis = _by_window(report, table, "max_over_mean")
    if len(labels) <= MOST_LINES:
        floor_W = 1 + table.groupby("window")["noise_floor"].max().to_numpy()
        figure = _window_lines(ratio_LW, floor_W, labels, axis, "max ÷ mean load")
    else:
        figure = _window_rows(ratio_LW, labels, axis, "max ÷ mean", 1, 1.1)
    return Section(
        "Load over time",
        "The busiest expert ÷ the mean, in windows of the trace in the order it ran. Text that "
        "changes shows as steps, a router that drifts as a slope.",
        figure=figure,
        table=table,
    )


@section
def drift(report: Report) -> Section | str:
    """How far the load moves, window by window and by layer, and what it costs a placement made for
    the window before."""
    if report.counts.counts_only:
        return ""  # windows says so
    table: Any = report.tables["drift"]
    if not table["total_variation"].notna().any():
        return "drift: no router has load in two whole windows; --window N makes smaller ones"
    over_time: Any = report.tables["windows"]
    moved_LW, names, time = _by_window(report, over_time, "total_variation")
    if len(names) <= MOST_LINES:
        floor_W = over_time.groupby("window")["total_variation_floor"].max().to_numpy()
        figure = _window_lines(moved_LW, floor_W, names, time, "share moved")
    else:
        floor_LW, _, _ = _by_window(report, over_time, "total_variation_floor")
        figure = _window_rows(moved_LW - floor_LW, names, time, "moved beyond chance", 0, 0.2)
    x, labels = layers(report, table)
    axis = layer_axis(labels)
    distances = []
    for name, column, colour in (
        ("to the next window", "total_variation", "@accent"),
        ("first to last", "first_to_last", "@second"),
    ):
        distances.append(marks(x, table[column].to_numpy(), name, colour, labels))
        distances.append(
            ticks(x, table[f"{column}_floor"].to_numpy(), f"{name}: chance", colour, labels)
        )
    fresh, stale = table["balancedness_fresh"].to_numpy(), table["balancedness_stale"].to_numpy()
    between = {
        "x": numbers(np.stack([x, x, x * np.nan], 1).ravel()),
        "y": numbers(np.stack([fresh, stale, x * np.nan], 1).ravel()),
    }
    cost = [
        {
            "type": "scatter",
            "mode": "lines",
            **between,
            "line": {"color": "@soft", "width": 2},
            "showlegend": False,
            "hoverinfo": "skip",
        },
        marks(x, fresh, "packed for the window itself", "@second", labels),
        marks(x, stale, "packed for the window before", "@accent", labels),
    ]
    sizes = table["gpus"].unique()
    gpus = f"{sizes[0]} GPUs" if len(sizes) == 1 else "GPUs"
    return Section(
        "Drift",
        "How far the load of each layer moves from a window to the next, beside what chance "
        "moves it. The last figure is what that costs "
        "those who place experts by the window before.",
        figures={
            "From a window to the next": figure,
            "By layer": {
                "data": distances,
                "layout": {
                    "xaxis": axis,
                    "yaxis": {"title": {"text": "share moved"}, "rangemode": "tozero"},
                },
            },
            "What an old placement costs": {
                "data": cost,
                "layout": {"xaxis": axis, "yaxis": {"title": {"text": f"mean ÷ max, {gpus}"}}},
            },
        },
        table=table,
        definitions={
            **definitions("total_variation", "first_to_last"),
            "chance": "the distance expected of two windows of "
            "these sizes that draw from one and the "
            "same load, widened by how alike the "
            "tokens of a document are (design effect). Of what an old placement costs a part is "
            "chance too, the more the smaller the windows.",
            **definitions("balancedness_fresh", "balancedness_stale"),
        },
    )


def _by_window(
    report: Report, table: Any, column: str
) -> tuple[np.ndarray, list[str], dict[str, Any]]:
    """A column of the table of windows as [L, W], NaN where a router saw no token; the routers'
    names; the axis of windows."""
    wide = table.pivot(index="router", columns="window", values=column)
    wide = wide.reindex([r for r in report.selection.routers if r in wide.index])
    first: Any = table.drop_duplicates("window").sort_values("window")["first_token"].to_numpy()
    shown = np.unique(np.linspace(0, len(first) - 1, min(8, len(first))).round().astype(int))
    axis = {
        "title": {"text": "first token of the window"},
        "tickvals": numbers(shown),
        "ticktext": [f"{first[t]:,}" for t in shown],
    }
    return wide.to_numpy(), [layer_label(report.trace.routers, r) for r in wide.index], axis


def _window_lines(
    value_LW: np.ndarray, floor_W: np.ndarray, labels: list[str], axis: dict[str, Any], said: str
) -> dict[str, Any]:
    x = np.arange(value_LW.shape[1])
    data = [
        line(x, value_W, f"layer {label}") for value_W, label in zip(value_LW, labels, strict=True)
    ]
    data.append(line(x, floor_W, "chance", line={"color": "@soft", "dash": "dot"}))
    return {
        "data": data,
        "layout": {"xaxis": axis, "yaxis": {"title": {"text": said}}, "height": 360},
    }


def _window_rows(
    value_LW: np.ndarray,
    labels: list[str],
    axis: dict[str, Any],
    said: str,
    least: float,
    most_at_least: float,
) -> dict[str, Any]:
    x = np.arange(value_LW.shape[1])
    layer_LW = np.array([[label] * len(x) for label in labels])
    most = max(float(np.nanquantile(value_LW, 0.99)), most_at_least)
    data = [
        heatmap(
            value_LW,
            x,
            f"window %{{x}}, layer %{{customdata}}: %{{z:.2f}} {said}",
            layer_LW,
            said,
            least,
            most,
        )
    ]
    layout = {
        "xaxis": axis,
        "yaxis": {**layer_axis(labels), "autorange": "reversed"},
        "height": 120 + 9 * len(labels),
    }
    return {"data": data, "layout": layout}
