"""What the page of a report shows, a function a section, each with what it means.

L routers, E experts of the widest of them, D domains. A section is a function decorated with @section: it returns a Section, or
in words why there is none to show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.registry import metrics
from moe_inspect.errors import MoeInspectError
from moe_inspect.report import html
from moe_inspect.report.doubts import doubts, one_rank
from moe_inspect.report.html import Section
from moe_inspect.report.map_data import map_data, numbers
from moe_inspect.report.text import layer_label
from moe_inspect.report.verdict import chance, routers, uneven, worst_router
from moe_inspect.report.words import counted

if TYPE_CHECKING:
    from moe_inspect.report.report import Report

SECTIONS: dict[str, Callable[[Report], Section | str]] = {}
MOST_LINES = 12  # routers drawn as lines; more make a heatmap
CONFIDENCE = {
    "gate_entropy_nats": "entropy of the softmax (nats)",
    "top_k_mass": "probability of the chosen k",
    "boundary_margin": "margin to the next expert (logits)",
    "weight_entropy_nats": "entropy of the k weights (nats)",
    "weight_margin": "first weight − second",
}
PAIRS = 60  # of a table of pairs


def section(function: Callable[[Report], Section | str]) -> Callable[[Report], Section | str]:
    """Registers a section of the page, in the order of the page."""
    SECTIONS[function.__name__] = function
    return function


def report_page(report: Report) -> str:
    """The page of a report, as HTML."""
    report.prepare(SECTIONS)
    sections, left_out = [], []
    for make in SECTIONS.values():
        try:
            made = make(report)
        except MoeInspectError as error:  # what this trace cannot give is said on the page
            made = str(error)
        if isinstance(made, Section):
            sections.append(made)
        elif made:
            left_out.append(made)
    data, short = map_data(report)
    warnings = [said for said in (report.warning, one_rank(report), *doubts(report)) if said]
    verdict = [said for said in report.verdict() if said not in warnings and said != f"Careful: {report.warning}."]
    return html.page(
        str(dict(report.facts())["model"]),
        verdict,
        sections,
        subtitle=_subtitle(report),
        warnings=warnings,
        facts=_tiles(report),
        left_out=[*left_out, *short],
        data=data,
        footer="Every figure is of one router at a time: expert 3 of one layer has nothing to do with expert 3 of the next. Load counts "
        "assignments; a token makes k of them at each router. Made by moe-inspect.",
    )


def _subtitle(report: Report) -> str:
    counts, trace = report.counts, report.trace
    shapes = sorted({(trace.routers[r].experts, trace.routers[r].top_k) for r in report.selection.routers})
    said = [
        str(trace.path.resolve().name),
        counted(counts.tokens, "token") + (f" of {counted(counts.documents, 'document')}" if counts.documents else ""),
        counted(len(counts.domains), "domain"),
        f"{counted(len(report.selection.routers), 'router')}, {' and '.join(f'{k} of {E} experts' for E, k in shapes)} a token",
    ]
    return " · ".join(said + ([f"{report.selection.phase} only"] if report.selection.phase else []))


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    worst, rows = worst_router(report), routers(report)
    if worst is None:
        return []
    pooled = report.pooled_max_over_mean()
    tiles = [
        ("busiest expert ÷ mean", f"{worst['max_over_mean']:.2f}×", f"layer {layer_label(report, int(worst['router']))}, the worst"),
        ("chance would give", f"{1 + chance(worst):.2f}×", "documents like these"),
        (
            "uneven routers",
            f"{sum(uneven(report, row) for row in rows)} of {len(rows)}",
            f"{1 + report.thresholds.uneven:g}× and beyond chance",
        ),
        ("dead experts", str(sum(int(row["dead_experts"]) for row in rows)), f"of {sum(int(row['experts']) for row in rows):,}"),
    ]
    return tiles + ([("pooled over layers", f"{pooled:.2f}×", "what one figure would say")] if pooled else [])


def _definitions(*names: str) -> dict[str, str]:
    known = metrics()
    return {name: known[name].formula for name in names}


# --- the sections


@section
def load(report: Report) -> Section | str:
    """Layers × experts, drawn by map.js."""
    if not routers(report):
        return "load: no router made an assignment"
    return Section(
        "Load of every expert",
        "The load of an expert as a ratio to the mean of its layer, on a scale on which a half is as far from even as double. Click a "
        "cell, or move with the arrow keys and press Enter, for the expert's card.",
        widget="map",
        definitions={
            "load ratio": "assignments of an expert ÷ the mean over the experts of its router; within a domain, of that domain's tokens. "
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
    x, labels = _layers(report, table)
    floor = 1 + np.array([chance(row) for row in table.to_dict("records")])
    edge = np.r_[-0.5, x, len(x) - 0.5]
    value = 1 + table["max_vio"].to_numpy()
    data: list[dict[str, Any]] = [
        _line(edge, np.ones(len(edge)), "", line={"width": 0}, showlegend=False, hoverinfo="skip"),
        _line(
            edge,
            np.r_[floor[0], floor, floor[-1]],
            "chance, for documents like these",
            line={"width": 0},
            fill="tonexty",
            fillcolor="@band",
        ),
    ]
    busiest = {"mode": "markers", "marker": {"color": "@accent", "size": 8}, "hovertemplate": "layer %{text}: %{y:.3f}×", "text": labels}
    if table["max_vio_low"].notna().any():
        upper, lower = (table[c].to_numpy() + 1 for c in ("max_vio_high", "max_vio_low"))
        bars = {"type": "data", "symmetric": False, "array": numbers(upper - value), "arrayminus": numbers(value - lower)}
        busiest["error_y"] = {**bars, "color": "@accent", "thickness": 3, "width": 0}
        busiest["name"] = "busiest expert, with its 95 % interval"
    data.append({"type": "scatter", "x": numbers(x), "y": numbers(value), "name": "busiest expert", **busiest})
    if table["max_vio_batch"].notna().any():
        batch = {"mode": "markers", "marker": {"color": "@second", "symbol": "line-ew-open", "size": 12, "line": {"width": 2}}}
        data.append(_line(x, 1 + table["max_vio_batch"].to_numpy(), "busiest of a batch, mean over batches", **batch))
    pooled = report.pooled_max_over_mean()
    if pooled is not None:
        ends = np.array([edge[0], edge[-1]])
        data.append(
            _line(ends, np.full(2, pooled), f"pooled over layers: {pooled:.2f}×", line={"color": "@third", "dash": "dash", "width": 1.5})
        )
    return Section(
        "Balance by layer",
        "How much more than the mean the busiest expert of each layer gets. Within the grey band chance alone explains it.",
        figure={"data": data, "layout": {"xaxis": _layer_axis(labels), "yaxis": {"title": {"text": "max ÷ mean load"}}, "height": 380}},
        table=table,
        definitions={
            **_definitions("max_over_mean"),
            "chance": "the ratio that a router choosing by lot would show on as many tokens, widened by how alike the tokens of a "
            "document are (design effect).",
            "interval": "of the busiest expert's load ratio, from resampling documents; fewer than five documents have none.",
            **_definitions("cv", "gini", "entropy"),
        },
    )


@section
def windows(report: Report) -> Section | str:
    """Load over time: max/mean of each router in windows of the trace, in execution order."""
    if report.counts.counts_only:
        return "load over time: counts alone have no order"
    table: Any = report.tables["windows"]
    if table["window"].nunique() < 2:
        return "load over time: the trace is a single window"
    first: Any = table.drop_duplicates("window").sort_values("window")["first_token"].to_numpy()
    wide = table.pivot_table(index="router", columns="window", values="max_over_mean", sort=True, dropna=False)
    wide = wide.reindex([r for r in report.selection.routers if r in wide.index])
    labels = [layer_label(report, r) for r in wide.index]
    ticks = np.unique(np.linspace(0, len(first) - 1, min(8, len(first))).round().astype(int))
    axis = {"title": {"text": "first token of the window"}, "tickvals": numbers(ticks), "ticktext": [f"{first[t]:,}" for t in ticks]}
    x = np.arange(wide.shape[1])
    if len(wide) <= MOST_LINES:
        data = [_line(x, wide.to_numpy()[i], f"layer {label}", mode="lines") for i, label in enumerate(labels)]
        floor = 1 + table.groupby("window")["noise_floor"].max().to_numpy()
        data.append(_line(x, floor, "chance", line={"color": "@soft", "dash": "dot"}))
        layout: dict[str, Any] = {"xaxis": axis, "yaxis": {"title": {"text": "max ÷ mean load"}}, "height": 360}
    else:
        data = [_heatmap(wide.to_numpy(), x, "window %{x}, layer %{customdata}: %{z:.2f}×", np.array([[v] * len(x) for v in labels]))]
        layout = {"xaxis": axis, "yaxis": {**_layer_axis(labels), "autorange": "reversed"}, "height": 120 + 9 * len(wide)}
    return Section(
        "Load over time",
        "The busiest expert ÷ the mean, in windows of the trace in the order it ran. Text that changes shows as steps, a router that drifts as a slope.",
        figure={"data": data, "layout": layout},
        table=table,
    )


@section
def domains(report: Report) -> Section | str:
    """Domain × expert of one router, drawn by map.js."""
    if len(report.counts.domains) < 2:
        return "domains: there is only one"
    table: Any = report.tables["domains"]
    rise = table["activation"] - table["activation"] / table["lift"]
    return Section(
        "Domains and experts",
        "What each expert takes of each domain, against its mean over the domains.",
        widget="domains",
        table=table.loc[rise.sort_values(ascending=False, kind="stable").index],
        definitions={
            "activation": "assignments of the expert in a domain ÷ tokens of the domain; over the experts it sums to k.",
            "lift": "activation ÷ its mean over the domains, this one included. 1 is no preference.",
        },
    )


@section
def specialization(report: Report) -> Section | str:
    """How much domain and token id tell of the expert, by layer, each beside what shuffled labels give."""
    table: Any = report.tables["specialization"]
    x, labels = _layers(report, table)
    pairs = [
        ("domain", "domain_mi_bits", "domain_mi_null_bits", "@accent"),
        ("domain, token id known", "domain_mi_given_token_bits", "domain_mi_given_token_null_bits", "@third"),
        ("token id", "token_mi_bits", "token_mi_null_bits", "@second"),
    ]
    data = []
    for name, column, null, colour in pairs:
        if table[column].notna().any():
            data.append(_line(x, table[column].to_numpy(), name, line={"color": colour}, mode="lines+markers"))
            if table[null].notna().any():
                dotted = {"color": colour, "dash": "dot", "width": 1.5}
                data.append(_line(x, table[null].to_numpy(), f"{name}: shuffled", line=dotted, mode="lines"))
    if not data:
        return "specialization: neither two domains nor token ids to tell apart"
    return Section(
        "What decides the expert",
        "Bits that the domain, and the token id, tell of the chosen expert. Only the distance to the dotted line of the same colour means "
        "anything: shuffled labels give as much as that.",
        figure={"data": data, "layout": {"xaxis": _layer_axis(labels), "yaxis": {"title": {"text": "bits"}, "rangemode": "tozero"}}},
        table=table,
        definitions={
            "domain": "mutual information of expert and domain, domains weighted alike; shuffled: document labels permuted.",
            "token id known": "the same among tokens of one id: topic beyond vocabulary.",
            "token id": "mutual information of expert and token id, ids of at least 8 occurrences.",
        },
    )


@section
def repetition(report: Report) -> Section | str:
    """How often the next token goes to the same expert, by domain."""
    if report.counts.counts_only:
        return "repetition: counts alone have no order"
    table: Any = report.tables["repetition"]
    order = {r: i for i, r in enumerate(report.selection.routers)}
    labels, data = [layer_label(report, r) for r in report.selection.routers], []
    for name, rows in table.groupby("domain", sort=False):
        data.append(_line(rows["router"].map(order).to_numpy(), rows["first_choice"].to_numpy(), html.label(name), mode="lines+markers"))
    chance_of = table.groupby("router", sort=False)["first_choice_random"].first()
    x = np.array([order[r] for r in chance_of.index])
    data.append(_line(x, chance_of.to_numpy(), "by chance", mode="lines", line={"color": "@soft", "dash": "dot"}))
    return Section(
        "Repetition",
        "How often two consecutive tokens have the same first choice: what a cache of experts lives on.",
        figure={
            "data": data,
            "layout": {"xaxis": _layer_axis(labels), "yaxis": {"title": {"text": "share of pairs"}, "rangemode": "tozero"}},
        },
        table=table,
    )


@section
def coactivation(report: Report) -> Section | str:
    """The pairs of experts most often chosen together."""
    if report.counts.counts_only:
        return "co-activation and transitions: counts alone know no decisions"
    table: Any = report.tables["coactivation"]
    if table.empty:
        return "co-activation: one expert a token makes no pairs"
    return Section(
        "Chosen together",
        "The pairs of experts that one decision chooses most often beyond what their loads explain. Each card lists its expert's partners.",
        table=_strongest(table[table["expert"] != table["other"]]),
        definitions={
            "probability": "P(other chosen, given expert chosen), over all pairs of slots; (k − 1)/(E − 1) by chance.",
            "lift": "against what the other expert's load alone would give.",
        },
    )


@section
def transitions(report: Report) -> Section | str:
    """The strongest links between the experts of one layer and the next."""
    if report.counts.counts_only:
        return ""
    table: Any = report.tables["transitions"]
    if table.empty:
        return "transitions: no two layers follow each other"
    return Section(
        "From layer to layer",
        "Where the tokens of an expert go at the next layer: the links furthest beyond what the loads explain.",
        table=_strongest(table),
        definitions={"probability": "P(next expert chosen at the next MoE layer, given expert chosen here), over all pairs of slots."},
    )


@section
def router(report: Report) -> Section | str:
    """How sure the routers are."""
    if report.counts.counts_only:
        return "router confidence: counts alone know no weights"
    table: Any = report.tables["router"]
    known = [name for name in CONFIDENCE if name in table and table[name].notna().any()]
    if not known:
        return "router confidence: neither logits nor weights were recorded"
    known = [name for name in known if not name.startswith("weight")] or known
    x, labels = _layers(report, table)
    data = [_line(x, table[name].to_numpy(), html.label(CONFIDENCE[name]), mode="lines+markers") for name in known]
    return Section(
        "Router confidence",
        "How decided each router is: from its logits where they were recorded, else from the gate weights of the chosen.",
        figure={"data": data, "layout": {"xaxis": _layer_axis(labels), "yaxis": {"rangemode": "tozero"}}},
        table=table,
        definitions=_definitions(*known),
    )


@section
def facts(report: Report) -> Section | str:
    return Section("About this trace", table=report.tables["summary"])


# --- what they are made of


def _layers(report: Report, table: Any) -> tuple[np.ndarray, list[str]]:
    return np.arange(len(table)), [layer_label(report, int(r)) for r in table["router"]]


def _layer_axis(labels: list[str]) -> dict[str, Any]:
    step = max(1, len(labels) // 24)
    shown = list(range(0, len(labels), step))
    return {"title": {"text": "layer"}, "tickvals": shown, "ticktext": [labels[i] for i in shown], "zeroline": False}


def _line(x: np.ndarray, y: np.ndarray, name: str, **more: Any) -> dict[str, Any]:
    return {"type": "scatter", "x": numbers(x), "y": numbers(y), "name": name, "mode": "lines", **more}


def _heatmap(z: np.ndarray, x: np.ndarray, said: str, customdata: np.ndarray) -> dict[str, Any]:
    scale = [[0, "@even"], [0.5, "@higher"], [1, "@high"]]
    bar = {"thickness": 10, "outlinewidth": 0, "title": {"text": "max ÷ mean", "side": "right"}}
    most = float(np.nanquantile(z, 0.99))
    return {
        "type": "heatmap",
        "z": [numbers(row) for row in z],
        "x": numbers(x),
        "customdata": customdata.tolist(),
        "hovertemplate": said + "<extra></extra>",
        "colorscale": scale,
        "zmin": 1,
        "zmax": max(most, 1.1),
        "colorbar": bar,
    }


def _strongest(table: Any) -> pd.DataFrame:
    """The pairs that happen most beyond chance: by what their probability has above that of independent choices."""
    beyond = table["probability"] - table["probability"] / table["lift"]
    return table.loc[beyond.nlargest(PAIRS).index]
