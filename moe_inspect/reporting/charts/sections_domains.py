"""Sections on what the experts are for: domains, token ids, and the experts that a domain needs.

L routers, E experts, D domains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.reporting.charts.sections_parts import (
    MOST_LINES,
    definitions,
    heatmap,
    layer_axis,
    layers,
    line,
    section,
)
from moe_inspect.reporting.render import html
from moe_inspect.reporting.render.html import Section
from moe_inspect.text import cut, layer_label, readable

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

MOST_DOMAINS = 24  # drawn as rows
NAMED, LISTED = 3, 8  # experts of a domain written in a cell, and under the mouse


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
            "activation": (
                "assignments of the expert in a domain ÷ tokens of the domain; over the experts "
                "it sums to k."
            ),
            "lift": (
                "activation ÷ its mean over the domains, this one included. 1 is no preference."
            ),
        },
    )


@section
def specialization(report: Report) -> Section | str:
    """How much domain and token id tell of the expert, by layer, each beside what shuffled labels
    give."""
    table: Any = report.tables["specialization"]
    x, labels = layers(report, table)
    pairs = [
        ("domain", "domain_mi_bits", "domain_mi_null_bits", "@accent"),
        (
            "domain, token id known",
            "domain_mi_given_token_bits",
            "domain_mi_given_token_null_bits",
            "@third",
        ),
        ("token id", "token_mi_bits", "token_mi_null_bits", "@second"),
    ]
    data = []
    for name, column, null, colour in pairs:
        if table[column].notna().any():
            data.append(
                line(
                    x, table[column].to_numpy(), name, line={"color": colour}, mode="lines+markers"
                )
            )
            if table[null].notna().any():
                dotted = {"color": colour, "dash": "dot", "width": 1.5}
                data.append(
                    line(x, table[null].to_numpy(), f"{name}: shuffled", line=dotted, mode="lines")
                )
    if not data:
        return "specialization: neither two domains nor token ids to tell apart"
    return Section(
        "What decides the expert",
        "Bits that the domain, and the token id, tell of the chosen expert. Only the distance to "
        "the dotted line of the same colour means "
        "anything: shuffled labels give as much as that.",
        figure={
            "data": data,
            "layout": {
                "xaxis": layer_axis(labels),
                "yaxis": {"title": {"text": "bits"}, "rangemode": "tozero"},
            },
        },
        table=table,
        definitions={
            "domain": (
                "mutual information of expert and domain, domains weighted alike; shuffled: "
                "document labels permuted."
            ),
            "token id known": "the same among tokens of one id: topic beyond vocabulary.",
            "token id": "mutual information of expert and token id, ids of at least 8 occurrences.",
        },
    )


@section
def esft(report: Report) -> Section | str:
    """The share of each domain that the k experts it uses most take, by layer, and which they
    are."""
    table: Any = report.tables["esft"]
    if not table["token_score"].notna().any():
        return "experts of a domain: no router made an assignment"
    chosen, counts, D = report.selection.routers, report.counts, len(report.counts.domains)
    rows_of = dict(iter(table.groupby("router")))
    share_DL, top_DL, kept = (
        np.full((D, len(chosen)), np.nan),
        np.full((D, len(chosen), 2), "", object),
        [],
    )
    for column, r in enumerate(chosen):
        score_DE = rows_of[r]["token_score"].to_numpy().reshape(D, -1)
        order_DK = np.argsort(-score_DE, axis=1, kind="stable")[:, : counts.routers[r].top_k]
        score_DK = np.take_along_axis(score_DE, order_DK, 1)
        share_DL[:, column] = score_DK.sum(1)
        top_DL[:, column, 0] = [", ".join(map(str, order_K[:NAMED])) for order_K in order_DK]
        top_DL[:, column, 1] = [
            _ranked(order_K[:LISTED], score_K)
            for order_K, score_K in zip(order_DK, score_DK, strict=True)
        ]
        kept.append(
            np.take_along_axis(rows_of[r].index.to_numpy().reshape(D, -1), order_DK, 1).ravel()
        )
    drawn_D = np.sort(np.argsort(-counts.tokens_D, kind="stable")[:MOST_DOMAINS])
    x, labels = np.arange(len(chosen)), [layer_label(report.trace.routers, r) for r in chosen]
    names = [html.label(cut(readable(counts.domains[d]))) for d in drawn_D]
    even = min(counts.routers[r].top_k / counts.routers[r].experts for r in chosen)
    hover_DL = np.array([[f"{name}, layer {label}" for label in labels] for name in names], object)
    drawn = heatmap(
        share_DL[drawn_D],
        x,
        "%{customdata[0]}: %{z:.3f}<br>%{customdata[1]}",
        np.stack([hover_DL, top_DL[drawn_D, :, 1]], axis=2),
        "share of the top k",
        even,
        max(float(np.nanquantile(share_DL, 0.99)), 1.1 * even),
    )
    if len(chosen) <= MOST_LINES:
        drawn |= {
            "text": top_DL[drawn_D, :, 0].tolist(),
            "texttemplate": "%{text}",
            "textfont": {"size": 12},
        }
    axis = {"tickvals": list(range(len(names))), "ticktext": names, "autorange": "reversed"}
    left_out = (
        f" Drawn are the {len(names)} of {D} domains with the most tokens."
        if len(names) < D
        else ""
    )
    left_out += (
        ""
        if table["gate_score"].notna().any()
        else " Without recorded weights there is no gate score."
    )
    return Section(
        "Experts of a domain",
        "The share of each domain that the k experts it uses most take, with the first of them "
        "named: k/E is even, 1 is all. By these "
        "scores expert-specialised fine-tuning (ESFT) picks the experts to train." + left_out,
        figure={
            "data": [drawn],
            "layout": {"xaxis": layer_axis(labels), "yaxis": axis, "height": 110 + 26 * len(names)},
        },
        table=table.loc[np.concatenate(kept)].sort_values(
            "token_score", ascending=False, kind="stable"
        ),
        definitions={
            **definitions("token_score", "gate_score"),
            "by_sample": (
                "the same scores with all samples (sequences) weighing alike, however long."
            ),
            "chance": (
                "of a domain with few tokens the k busiest experts take more than k/E by chance "
                "alone."
            ),
        },
    )


def _ranked(experts_K: np.ndarray, score_K: np.ndarray) -> str:
    """The experts that have a score, a line each."""
    return "<br>".join(
        f"expert {e}: {score:.3f}"
        for e, score in zip(experts_K, score_K, strict=False)
        if score == score
    )
