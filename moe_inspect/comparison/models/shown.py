"""What two different models come to, side by side: how even the load is, what experts specialise
in, and what cannot be compared; as findings, and as charts over relative depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.comparison import result
from moe_inspect.comparison.models.spans import jackknife_interval
from moe_inspect.comparison.models.tables import Models
from moe_inspect.comparison.result import COLOURS, MODEL_TABLES, SIDES
from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel, known_interval
from moe_inspect.reporting.tables.registry import Excerpt
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import layer_label, plural

SHARED = ("balance", "specialization", "spans", "vocabulary")


def different(data: Models) -> Iterator[Finding]:
    """Why decisions cannot be compared one by one; the headline."""
    if data.replicas is not None:
        found = data.replicas
        yield finding(
            "physical_ids",
            "critical",
            f"The {found['physical']} ids of {found['trace']} are physical ids of "
            f"{found['logical']} experts: mapped by shared tokens, the traces agree (beyond "
            f"chance {found['agreement']:.1%}). Map them to logical ids before comparing.",
            **found,
        )
        return
    if not data.reasons:
        text = "Two models of the same shape, side by side."
    else:
        text = (
            f"Different models: {'; '.join(data.reasons)}. Their decisions cannot be compared one "
            "by one; what means the same in both is in the tables "
            f"{', '.join(name for name in SHARED if not data.why_not(name))}."
        )
    yield finding("different_models", "note", text, reasons=list(data.reasons))


def text_in_common(data: Models) -> Iterator[Finding]:
    """Whether both read the same text, without which no figure compares the models."""
    if data.why_not("spans"):
        text = (
            "It is unknown whether both read the same text: figures may differ because of the text."
        )
        yield finding("text", "note", text)
        return
    spans = data.spans
    severity = "good" if spans.common >= 0.99 else "warning"
    yield finding(
        "text",
        severity,
        f"The text is the same in {spans.common:.1%} of the bytes of "
        f"{plural(spans.documents, 'document')} (of {spans.of:,} in A), cut into "
        f"{len(spans.at_a):,} spans between cuts of both tokenizers.",
        common=spans.common,
        documents=spans.documents,
        spans=len(spans.at_a),
    )


def balance(data: Models) -> Iterator[Finding]:
    """How even the load is in each."""
    yield from result.balance_of_both(
        data.of_sides(data.tables["balance"]),
        lambda side, r: layer_label(data.of_side[side].routers, r),
        " At most E/k is possible.",
    )


def domains(data: Models) -> Iterator[Finding]:
    """How much of the choice of experts the domain explains in each."""
    if data.why_not("specialization"):
        return
    rows = data.tables["specialization"].dropna(subset=["explained_by_domain"])
    said = [
        f"{side.upper()} {_spread(part['explained_by_domain'])}"
        for side, part in data.of_sides(rows).items()
        if len(part)
    ]
    if said:
        yield finding(
            "domain_specialization",
            "note",
            "Share of the choice of experts that domains explain (of the possible maximum, beyond "
            f"chance): {', '.join(said)}.",
        )


def texts(data: Models) -> Iterator[Finding]:
    """How much of the first choice the text of a span explains in each, and whether they differ."""
    if data.why_not("spans"):
        return
    every = sorted(data.explained.items())
    of_side = [[one for (of, _), one in every if of == side] for side in SIDES]
    shares = [[one.share for one in of] for of in of_side]
    said = [
        f"{side.upper()} {_spread(pd.Series(of))}" for side, of in zip(SIDES, shares, strict=True)
    ]
    a, b = (float(np.mean(of)) for of in shares)
    left_a, left_b = (np.mean([one.share_without_G for one in of], axis=0) for of in of_side)
    low, high = jackknife_interval(a - b, left_a - left_b)
    if np.isnan(low):
        apart = " There are too few documents for an interval."
    else:
        more = f"A's experts follow the text {'more' if a > b else 'less'} than B's."
        apart = (
            f" The mean over layers differs by {100 * (a - b):+.1f} points (95 % over documents "
            f"{100 * low:+.1f} to {100 * high:+.1f}): "
            f"{more if low > 0 or high < 0 else 'no more than documents alone would.'}"
        )
    yield finding(
        "vocabulary",
        "note",
        "Share of the entropy of the first choice that a span's text explains (beyond shuffled "
        f"spans): {', '.join(said)}.{apart}",
        explained_a=a,
        explained_b=b,
        difference_low=low,
        difference_high=high,
    )


def _spread(values: pd.Series) -> str:
    """ "31% in the median layer (14% to 45% over the layers)" """
    middle, low, high = (
        f"{round(float(x), 2) + 0.0:.0%}" for x in (values.median(), values.min(), values.max())
    )
    return f"{middle} in the median layer ({low} to {high} over the layers)"


TEXT = "explained_by_text"
STEPS = 100  # of the axis of relative depth
DEPTH = Axis(
    "relative depth: 0% is the first layer, 100% the last",
    tuple(f"{i}%" for i in range(STEPS + 1)),
)


def _lines(
    data: Models, table: pd.DataFrame, column: str, low: str = "", high: str = "", floor: str = ""
) -> tuple[Line, ...]:
    marks = list[Line]()
    for side, of_side in data.of_sides(table).items():
        rows: Any = of_side.sort_values("depth", kind="stable")
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
    marks = _lines(data, table, "max_over_mean", *ends, "expected_by_chance")
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
    marks = _lines(data, table, "explained_by_domain")
    return Chart(
        "Specialization by domain",
        "Share of what a domain could tell about the expert, by relative depth",
        (Panel(marks, DEPTH, Axis("share, beyond chance", low=0)),),
        text="Beyond chance. 0: all domains are alike; 1: as different as their "
        "number, E and k allow.",
        table=table,
    )


def texts_by_depth(data: Models) -> Chart:
    """The share that the text of a span explains, by relative depth."""
    table = data.tables["spans"]
    marks = _lines(
        data, table, "explained_by_text", "explained_by_text_low", "explained_by_text_high"
    )
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
        rows = frame.index[frame["trace"] == side]
        n = min(max(most // 2, 1), len(rows))
        kept += rows[np.linspace(0, max(len(rows) - 1, 0), n).round().astype(int)].tolist()
    return frame.loc[kept]


# in the order in which they are read
CHECKS: tuple[Callable[[Models], Iterator[Finding]], ...] = (
    different,
    text_in_common,
    balance,
    domains,
    texts,
    result.not_compared,
)
SPREAD = "routers of both traces, spread over their depth"
PLACE = ("layer", "router", "trace", "depth")
Models.kind = result.Kind(
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
