"""Sections on what goes together: a token and the next, the experts of one decision, a layer and
the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_inspect.reporting.charts.sections_parts import (
    definitions,
    interval,
    layer_axis,
    layers,
    line,
    marks,
    section,
    ticks,
)
from moe_inspect.reporting.render import html
from moe_inspect.reporting.render.html import Section
from moe_inspect.reporting.tables.pairs import BOUNDS, LENGTHS, LUCK
from moe_inspect.text import layer_label

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

PAIRS = 60  # of a table of pairs
NEXT = "The first choice at the next layer"
COLOURS = ("@accent", "@second", "@third")
BESIDE = 0.1  # of a layer, between dots that would hide each other
BARS = " Bars are 95 % intervals, by document."
BEYOND = "is chosen more often than chance may explain"
LOG10_P = (
    "the evidence: log₁₀ of the probability that chance at these loads is as far from what is "
    "expected, or further (binomial, two-sided; "
    "counts ÷ design effect). Supported: times the number of all pairs of the trace "
    f"(Bonferroni) at most {LUCK:g}."
)
LIFT_SD = "the standard deviation of lift by chance, for tokens that come in documents."


@section
def repetition(report: Report) -> Section | str:
    """How often the next token goes to the same expert, by domain."""
    if report.counts.counts_only:
        return "repetition and locality: counts alone have no order"
    table: Any = report.tables["repetition"]
    if table["first_choice"].isna().all():
        return "repetition: first choices are unknown, or no token follows another"
    order = {r: i for i, r in enumerate(report.selection.routers)}
    labels, data = [layer_label(report.trace.routers, r) for r in report.selection.routers], []
    for name, rows in table.groupby("domain", sort=False):
        share, low, high = (rows[f"first_choice{bound}"].to_numpy() for bound in BOUNDS)
        x = rows["router"].map(order).to_numpy()
        data.append(
            line(x, share, html.label(name), mode="lines+markers", **interval(share, low, high))
        )
    chance_of = table.groupby("router", sort=False)["first_choice_random"].first()
    x = np.array([order[r] for r in chance_of.index])
    data.append(
        line(
            x,
            chance_of.to_numpy(),
            "by chance",
            mode="lines",
            line={"color": "@soft", "dash": "dot"},
        )
    )
    return Section(
        "Repetition",
        (
            "How often two consecutive tokens have the same first choice: what a cache of experts "
            "lives on."
        )
        + (BARS if any("error_y" in drawn for drawn in data) else ""),
        figure={
            "data": data,
            "layout": {
                "xaxis": layer_axis(labels),
                "yaxis": {"title": {"text": "share of pairs"}, "rangemode": "tozero"},
            },
        },
        table=table,
    )


@section
def locality(report: Report) -> Section | str:
    """How far a choice can be told from the token before, the segment and the layer before, each
    beside its reference."""
    if report.counts.counts_only:
        return ""  # repetition says so
    table: Any = report.tables["locality"]
    x, labels = layers(report, table)
    with_references = table.assign(**_by_load_and_chance(report, table))
    lengths = [(f"srp_{m}", f"{m} tokens", f"srp_{m}_by_load", "by load") for m in LENGTHS]
    panels = {
        "The first choice of the token before": (
            "share of tokens",
            [("first_choice_repetition", "the same again", "by_load", "by load")],
        ),
        "Any choice of the token before": (
            "share of tokens",
            [("any_choice_repetition", "an expert in common", "by_chance", "by chance")],
        ),
        "The experts of a segment": ("SRP", lengths),
        NEXT: ("accuracy", [("next_accuracy", "foretold", "next_accuracy_null", "by luck")]),
    }
    figures: dict[str, dict[str, Any]] = {}
    for heading, (unit, kinds) in panels.items():
        data = []
        for i, (column, name, reference, said) in enumerate(kinds):
            value, low, high, expected = (
                with_references[c].to_numpy() for c in (*(column + b for b in BOUNDS), reference)
            )
            if not np.isnan(value).all():
                beside = x + BESIDE * (i - (len(kinds) - 1) / 2)
                data.append(
                    marks(beside, value, name, COLOURS[i], labels, **interval(value, low, high))
                )
                data.append(ticks(beside, expected, f"{name}: {said}", COLOURS[i], labels))
        if data and heading == NEXT:
            marginal = table["next_accuracy_marginal"].to_numpy()
            data.append(ticks(x + BESIDE, marginal, "always the most frequent", "@second", labels))
        if data:
            figures[heading] = {
                "data": data,
                "layout": {
                    "xaxis": layer_axis(labels),
                    "yaxis": {"title": {"text": unit}},
                    "height": 260,
                },
            }
    if not figures:
        return "locality: no token follows another, and no layer another"
    missing = [heading.lower() for heading in panels if heading not in figures]
    return Section(
        "Locality",
        "How far a choice can be told from what was chosen just before: what prefetching and "
        "caching experts can gain. Only what a dot "
        "has above the dash of its colour is locality."
        + (
            BARS
            if any("error_y" in drawn for figure in figures.values() for drawn in figure["data"])
            else ""
        )
        + (f" Not in this trace: {', '.join(missing)}." if missing else ""),
        figures=figures,
        table=table,
        definitions={
            **definitions(
                "first_choice", "any_choice", "srp", "next_accuracy", "next_accuracy_marginal"
            ),
            "by load, by chance, by luck": "what tokens that choose independently "
            "give: with these loads; with even loads; "
            "with these "
            "first choices, as few as they are.",
        },
    )


@section
def coactivation(report: Report) -> Section | str:
    """The pairs of experts most often chosen together."""
    if report.counts.counts_only:
        return "co-activation and transitions: counts alone know no decisions"
    table: Any = report.tables["coactivation"]
    if table.empty:
        return "co-activation: one expert a token makes no pairs"
    strongest = _strongest(table)
    if strongest.empty:
        return f"co-activation: no pair {BEYOND}"
    return Section(
        "Chosen together",
        "The pairs of experts that one decision chooses more often than chance, those with the "
        f"most evidence first: {_supported(table)} "
        "Each card lists its expert's partners.",
        table=strongest,
        definitions={
            "probability": (
                "P(other chosen, given expert chosen), over all pairs of slots; (k − 1)/(E − 1) "
                "by chance."
            ),
            "lift": "against what the loads of the two alone would give.",
            "expected": (
                "the number of decisions that choose both where experts keep their loads and are "
                "otherwise picked by lot."
            ),
            "lift_sd": LIFT_SD,
            "log10_p": LOG10_P,
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
    strongest = _strongest(table)
    if strongest.empty:
        return f"transitions: no link {BEYOND}"
    return Section(
        "From layer to layer",
        "Where the tokens of an expert go at the next layer more often than chance, the links "
        "with the most evidence first: "
        f"{_supported(table)}",
        table=strongest,
        definitions={
            "probability": (
                "P(next expert chosen at the next MoE layer, given expert chosen here), over all "
                "pairs of slots."
            ),
            "lift": "against how often the next expert is chosen at all.",
            "expected": (
                "the number of tokens that choose both where the two layers choose independently "
                "of each other."
            ),
            "lift_sd": LIFT_SD,
            "log10_p": LOG10_P,
        },
    )


def _by_load_and_chance(report: Report, table: Any) -> dict[str, np.ndarray]:
    """What the repetition of all domains is held against, a router each; pairs of tokens weigh
    alike."""
    rows: Any = report.tables["repetition"]
    by_router = rows.assign(expected=rows["first_choice_by_load"] * rows["pairs"]).groupby("router")
    by_load = by_router["expected"].sum() / by_router["pairs"].sum()
    return {
        "by_load": by_load.reindex(table["router"]).to_numpy(),
        "by_chance": by_router["any_choice_random"].first().reindex(table["router"]).to_numpy(),
    }


def _strongest(table: Any) -> pd.DataFrame:
    """The supported pairs that happen more often than chance, by their evidence."""
    return table[table["supported"] & (table["lift"] > 1)].nsmallest(PAIRS, "log10_p")


def _supported(table: Any) -> str:
    n = int((table["supported"] & (table["lift"] > 1)).sum())
    return f"{n:,} of the {len(table):,} pairs listed have enough."
