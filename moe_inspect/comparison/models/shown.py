"""Two different models as charts over relative depth, as text and as a page."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_inspect.comparison.models.data import Models
from moe_inspect.comparison.models.verdict import CHECKS
from moe_inspect.comparison.result import MODEL_TABLES, SIDES, Excerpt, Kind
from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel, known_interval

STEPS = 100  # of the axis of relative depth
DEPTH = Axis(
    "relative depth: 0% is the first layer, 100% the last",
    tuple(f"{i}%" for i in range(STEPS + 1)),
)
COLOURS = dict(zip(SIDES, ("c1", "c2"), strict=True))


def _lines(
    table: Any, column: str, low: str = "", high: str = "", floor: str = ""
) -> tuple[Line, ...]:
    marks = list[Line]()
    for side in SIDES:
        rows = table[table["trace"] == side].sort_values("depth", kind="stable")
        x, name = (STEPS * rows["depth"].to_numpy(float)).round(), side.upper()
        ends = known_interval(rows[low], rows[high]) if low else (None, None)
        marks.append(Line(x, rows[column].to_numpy(float), name, COLOURS[side], "", True, *ends))
        if floor:
            y = rows[floor].to_numpy(float)
            marks.append(Line(x, y, f"{name}: chance", COLOURS[side], dash="dot"))
    return tuple(marks)


def load_by_depth(data: Models) -> Chart:
    """How even the load is, by relative depth."""
    table = data.tables["balance"]
    ends = "max_over_mean_low", "max_over_mean_high"
    marks = _lines(table, "max_over_mean", *ends, "expected_by_chance")
    return Chart(
        "How even the load is",
        "Load of the busiest expert ÷ mean load, by relative depth",
        (Panel(marks, DEPTH, Axis("max ÷ mean load", low=1)),),
        text="1 is even; at most E/k is possible. Bars are 95% intervals over documents.",
        table=table,
    )


def domains_by_depth(data: Models) -> Chart:
    """The share that the domain explains, by relative depth."""
    table = data.tables["specialization"]
    return Chart(
        "Specialization by domain",
        "Share of what a domain could tell about the expert, by relative depth",
        (Panel(_lines(table, "explained_by_domain"), DEPTH, Axis("share, beyond chance", low=0)),),
        text="Beyond chance. 0: all domains are alike; 1: as different as their "
        "number, E and k allow.",
        table=table,
    )


def texts_by_depth(data: Models) -> Chart:
    """The share that the text of a span explains, by relative depth."""
    table = data.tables["spans"]
    marks = _lines(table, "explained_by_text", "explained_by_text_low", "explained_by_text_high")
    return Chart(
        "Do experts follow the text?",
        "Share of the entropy of the first choice that a span's text explains, by relative depth",
        (Panel(marks, DEPTH, Axis("share, beyond chance", low=0)),),
        text="The same spans of text for both, however their tokenizers cut them; beyond shuffled "
        "spans. 1: the text alone decides the first expert. Bars are 95% intervals over "
        "documents.",
        table=table,
    )


def _apart(frame: Any, most: int) -> Any:
    """At most `most` routers of both traces, spread over their depth."""
    kept = list[Any]()
    for side in SIDES:
        rows = frame[frame["trace"] == side]
        at = np.unique(
            np.linspace(0, max(len(rows) - 1, 0), min(max(most // 2, 1), len(rows))).round()
        )
        kept += rows.index[at.astype(int)].tolist()
    return frame.loc[kept]


SPREAD = "routers of both traces, spread over their depth"
PLACE = ("layer", "router", "trace", "depth")
TEXT = "explained_by_text"
Models.kind = Kind(
    of="different models",
    tables=MODEL_TABLES,
    main="verdict",
    checks=CHECKS,
    title="Two models, side by side",
    footer="Figures of two models are comparable if they are shares of what is possible or are "
    "shown beside chance.",
    charts={
        "load_by_depth": (load_by_depth, "Balance", "balance"),
        "domains_by_depth": (domains_by_depth, "Specialization", "specialization"),
        "texts_by_depth": (texts_by_depth, "Specialization", "spans"),
    },
    sections={
        "vocabulary": (
            "Specialization",
            "Texts of experts",
            "Spans of text that choose an expert first most exclusively, one per expert.",
        ),
        "summary": ("", "About these models", ""),
        "refused": ("", "Not compared", ""),
    },
    sometimes=("specialization", "spans", "vocabulary"),
    firsts={"vocabulary": ["trace", "router", "expert"]},
    excerpts={
        "balance": Excerpt(
            SPREAD, _apart, (*PLACE, "max_over_mean", "expected_by_chance", "dead_experts")
        ),
        "specialization": Excerpt(SPREAD, _apart, (*PLACE, "explained_by_domain", "jsd_bits")),
        "spans": Excerpt(SPREAD, _apart, (*PLACE, TEXT, f"{TEXT}_low", f"{TEXT}_high")),
    },
)
