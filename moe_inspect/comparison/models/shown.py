"""What two different models come to, side by side: how even the load is, what experts specialise
in, and what cannot be compared; as findings, and as charts over relative depth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd

from moe_inspect.comparison import result
from moe_inspect.comparison.models.spans import jackknife_interval
from moe_inspect.comparison.models.tables import Models
from moe_inspect.comparison.result import COLOURS, SIDES
from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel, known_interval
from moe_inspect.reporting.tables.registry import Excerpt
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import layer_label, plural

SHARED = ("balance", "specialization", "spans", "vocabulary")


def different(data: Models) -> Iterator[Finding]:
    """Why decisions cannot be compared one by one; the headline."""
    if (found := data.replicas) is not None:
        text = (
            f"The {found['physical']} ids of {found['trace']} are physical ids of "
            f"{found['logical']} experts: mapped by shared tokens, the traces agree (beyond "
            f"chance {found['agreement']:.1%}). Map them to logical ids before comparing."
        )
        yield finding("physical_ids", "critical", text, **found)
        return
    text = "Two models of the same shape, side by side."
    if data.reasons:
        text = (
            f"Different models: {'; '.join(data.reasons)}. Their decisions cannot be compared one "
            "by one; what means the same in both is in the tables "
            f"{', '.join(name for name in SHARED if not data.why_not(name))}."
        )
    yield finding("different_models", "note", text, reasons=list(data.reasons))


def text_in_common(data: Models) -> Iterator[Finding]:
    """Whether both read the same text, without which no figure compares the models."""
    if data.why_not("spans"):
        text = "It is unknown whether both read the same text: figures may differ because of "
        yield finding("text", "note", f"{text}the text.")
        return
    spans, n = data.spans, len(data.spans.at_a)
    text = (
        f"The text is the same in {spans.common:.1%} of the bytes of "
        f"{plural(spans.documents, 'document')} (of {spans.of:,} in A), cut into "
        f"{n:,} spans between cuts of both tokenizers."
    )
    severity = "good" if spans.common >= 0.99 else "warning"
    values = {"common": spans.common, "documents": spans.documents, "spans": n}
    yield finding("text", severity, text, **values)


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
        text = (
            "Share of the choice of experts that domains explain (of the possible maximum, beyond "
            f"chance): {', '.join(said)}."
        )
        yield finding("domain_specialization", "note", text)


def texts(data: Models) -> Iterator[Finding]:
    """How much of the first choice the text of a span explains in each, and whether they differ."""
    if data.why_not("spans"):
        return
    every = sorted(data.explained.items())
    of_side = {side: [one for (of, _), one in every if of == side] for side in SIDES}
    shares = {side: pd.Series([one.share for one in of]) for side, of in of_side.items()}
    said = [f"{side.upper()} {_spread(share)}" for side, share in shares.items()]
    a, b = (float(np.mean(share.to_numpy())) for share in shares.values())
    left = (np.mean([one.share_without_G for one in of], axis=0) for of in of_side.values())
    low, high = jackknife_interval(a - b, np.subtract(*left))
    apart = " There are too few documents for an interval."
    if not np.isnan(low):
        more = "no more than documents alone would."
        if low > 0 or high < 0:
            more = f"A's experts follow the text {'more' if a > b else 'less'} than B's."
        apart = (
            f" The mean over layers differs by {100 * (a - b):+.1f} points (95 % over documents "
            f"{100 * low:+.1f} to {100 * high:+.1f}): {more}"
        )
    text = (
        "Share of the entropy of the first choice that a span's text explains (beyond shuffled "
        f"spans): {', '.join(said)}.{apart}"
    )
    values = {"explained_a": a, "explained_b": b, "difference_low": low, "difference_high": high}
    yield finding("vocabulary", "note", text, **values)


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
BEYOND = Axis("share, beyond chance", low=0)
# name → group and table of the chart, column, axis, title, caption and text
CHARTS = {
    "load_by_depth": (
        *("Balance", "balance", "max_over_mean", Axis("max ÷ mean load", low=1)),
        "How even the load is",
        "Load of the busiest expert ÷ mean load",
        "1 is even; at most E/k is possible. Bars are 95% intervals over documents.",
    ),
    "domains_by_depth": (
        *("Specialization", "specialization", "explained_by_domain", BEYOND),
        "Specialization by domain",
        "Share of what a domain could tell about the expert",
        "Beyond chance. 0: all domains are alike; 1: as different as their number, E and k allow.",
    ),
    "texts_by_depth": (
        *("Specialization", "spans", TEXT, BEYOND),
        "Do experts follow the text?",
        "Share of the entropy of the first choice that a span's text explains",
        "The same spans of text for both, however their tokenizers cut them; beyond shuffled "
        "spans. 1: the text alone decides the first expert. Bars are 95% intervals over documents.",
    ),
}


def by_depth(data: Models, name: str) -> Chart:
    """A column of both traces by relative depth, with its interval and chance where the table has
    them."""
    _, of, column, axis, title, caption, text = CHARTS[name]
    table, marks = data.tables[of], list[Line]()
    for side, rows in data.of_sides(table).items():
        rows = rows.sort_values("depth", kind="stable")
        x, label = (STEPS * rows["depth"].to_numpy(float)).round(), side.upper()
        ends, y = (None, None), rows[column].to_numpy(float)
        if f"{column}_low" in rows:
            ends = known_interval(rows[f"{column}_low"], rows[f"{column}_high"])
        marks.append(Line(x, y, label, COLOURS[side], "", True, *ends))
        if "expected_by_chance" in rows:
            y = rows["expected_by_chance"].to_numpy(float)
            marks.append(Line(x, y, f"{label}: chance", COLOURS[side], dash="dot"))
    panel = Panel(tuple(marks), DEPTH, axis)
    return Chart(title, f"{caption}, by relative depth", (panel,), text=text, table=table)


def _apart(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` routers of both traces, spread over their depth."""
    kept = list[int]()
    for side in SIDES:
        rows = np.flatnonzero(frame["trace"] == side)
        n = min(max(most // 2, 1), len(rows))
        kept += rows[np.linspace(0, max(len(rows) - 1, 0), n).round().astype(int)].tolist()
    return frame.iloc[kept]


SPREAD = partial(Excerpt, "routers of both traces, spread over their depth", _apart)
PLACE = ("layer", "router", "trace", "depth")
Models.kind = result.Kind(
    of="different models",
    tables=result.MODEL_TABLES,
    main="verdict",
    # in the order in which they are read
    checks=(different, text_in_common, balance, domains, texts, result.not_compared),
    title="Two models, side by side",
    footer="Figures of two models are comparable if they are shares of what is possible or are "
    "shown beside chance.",
    charts={
        name: (partial(by_depth, name=name), group, table)
        for name, (group, table, *_) in CHARTS.items()
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
        "balance": SPREAD((*PLACE, "max_over_mean", "expected_by_chance", "dead_experts")),
        "specialization": SPREAD((*PLACE, "explained_by_domain", "jsd_bits")),
        "spans": SPREAD((*PLACE, TEXT, f"{TEXT}_low", f"{TEXT}_high")),
    },
)
