"""What two different models come to, side by side: how even the load is, what experts specialise
in, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.comparison.models.data import Models
from moe_inspect.comparison.models.spans import jackknife_interval
from moe_inspect.comparison.models.tables import name_of
from moe_inspect.comparison.result import SIDES, balance_of_both, not_compared
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import plural

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
    rows: Any = data.tables["balance"]
    of_side = {side: rows[rows["trace"] == side] for side in SIDES}
    more = " At most E/k is possible."
    yield from balance_of_both(of_side, lambda *of: name_of(data, *of), more)


def domains(data: Models) -> Iterator[Finding]:
    """How much of the choice of experts the domain explains in each."""
    if data.why_not("specialization"):
        return
    rows: Any = data.tables["specialization"].dropna(subset=["explained_by_domain"])
    said = [
        f"{side.upper()} {_spread(part['explained_by_domain'])}"
        for side in SIDES
        for part in [rows[rows["trace"] == side]]
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
    explained = {
        side: [one for (of, _), one in sorted(data.explained.items()) if of == side]
        for side in SIDES
    }
    said = [
        f"{side.upper()} {_spread(pd.Series([x.share for x in explained[side]]))}" for side in SIDES
    ]
    a, b = [float(np.mean([x.share for x in explained[side]])) for side in SIDES]
    left_a, left_b = (
        np.mean([x.share_without_G for x in explained[side]], axis=0) for side in SIDES
    )
    low, high = jackknife_interval(a - b, left_a - left_b)
    known = low == low
    apart = (
        f" The mean over layers differs by {100 * (a - b):+.1f} points (95 % over documents "
        f"{100 * low:+.1f} to {100 * high:+.1f}): "
        + (f"A's experts follow the text {'more' if a > b else 'less'} than B's."
           if low > 0 or high < 0 else "no more than documents alone would.")
        if known
        else " There are too few documents for an interval."
    )  # fmt: skip
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


# in the order in which they are read
CHECKS: tuple[Callable[[Models], Iterator[Finding]], ...] = (
    different,
    text_in_common,
    balance,
    domains,
    texts,
    not_compared,
)
