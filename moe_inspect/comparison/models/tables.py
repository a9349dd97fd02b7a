"""The tables on two different models: what means the same in both, side by side.

E experts, k experts per token, D domains, V texts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from moe_inspect.comparison.models.data import Models
from moe_inspect.comparison.models.spans import adjusted, jackknife_interval
from moe_inspect.comparison.result import MODEL_TABLES, SIDES, facts_of_both, said_of_models
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import layer_label, ranges, readable

BALANCE = (
    "experts",
    "top_k",
    "tokens",
    "max_over_mean",
    "max_over_mean_low",
    "max_over_mean_high",
    "expected_by_chance",
    "max_vio",
    "gini",
    "entropy",
    "dead_experts",
)


@table(tables=MODEL_TABLES)
def summary(data: Models) -> pd.DataFrame:
    """One row per fact: key, and its value in A and in B (text)."""
    return facts_of_both(_facts(data))


def _facts(data: Models) -> Iterator[tuple[object, ...]]:
    both = data.a, data.b
    yield from said_of_models(*both)
    yield "layers", *(trace.stated_blocks or "unknown" for trace in both)
    yield "moe_layers", *(ranges({r.layer for r in trace.routers}) for trace in both)
    for key in ("experts", "top_k"):
        yield (
            key,
            *(", ".join(map(str, sorted({getattr(r, key) for r in x.routers}))) for x in both),
        )
    yield "vocabulary", *(len(trace.vocabulary_table) or "unknown" for trace in both)
    yield "tokens", *(trace.n_tokens for trace in both)
    yield "domains", *(", ".join(data.reports[side].counts.domains) for side in SIDES)


@table(tables=MODEL_TABLES)
def balance(data: Models) -> pd.DataFrame:
    """One row per trace and router: its balance, as its report has it, beside what chance gives
    documents like these (expected_by_chance) and the most that E and k allow
    (max_over_mean_most)."""
    parts = list[pd.DataFrame]()
    for side in SIDES:
        part = data.of(side, "balance")[["layer", "router", *BALANCE]].copy()
        most = part["experts"] / part["top_k"]
        part.insert(part.columns.get_loc("max_over_mean") + 1, "max_over_mean_most", most)  # type: ignore[operator]
        parts.append(_of_side(data, side, part))
    return pd.concat(parts, ignore_index=True)


@table(tables=MODEL_TABLES)
def specialization(data: Models) -> pd.DataFrame:
    """One row per trace and router: the information that the domain carries about the expert, that
    by chance, and beyond it as a share of the most that D, E and k allow: 0 is chance, 1 all
    (explained_by_domain)."""
    names = [frozenset(data.reports[side].counts.domains) for side in SIDES]
    if names[0] != names[1] or len(names[0]) < 2:
        said = (", ".join(map(readable, sorted(of_side))) for of_side in names)
        what = "not the same" if names[0] != names[1] else "fewer than two"
        raise MoeInspectError("the domains are {}: {} in A, {} in B".format(what, *said))
    parts = list[pd.DataFrame]()
    for side in SIDES:
        routers = data.of_side[side].routers
        part = data.of(side, "specialization")
        part = part[
            [
                "layer",
                "router",
                "domain_mi_bits",
                "domain_mi_null_bits",
                "domain_mi_null_p99_bits",
                "jsd_bits",
            ]
        ].copy()
        # the k experts of a token are distinct: no domain can narrow them down to fewer
        most = [routers[r].experts / routers[r].top_k for r in part["router"].tolist()]
        most_bits = np.log2(np.minimum(most, len(names[0])))
        bits = part["domain_mi_bits"], most_bits, part["domain_mi_null_bits"]
        part["explained_by_domain"] = [adjusted(*row) for row in zip(*bits, strict=True)]
        parts.append(_of_side(data, side, part))
    return pd.concat(parts, ignore_index=True)


@table(tables=MODEL_TABLES)
def spans(data: Models) -> pd.DataFrame:
    """One row per trace and router, on the same spans of text, however the tokenizers cut them:
    the information that a span's text carries about the first choice at its last token, with the
    spans shuffled, and beyond that as a share of the entropy of the first choice: 0 is chance, 1
    all (explained_by_text, with a 95 % interval over documents)."""
    rows = list[dict[str, object]]()
    for (side, r), explained in data.explained.items():
        low, high = jackknife_interval(explained.share, explained.share_without_G)
        rows.append(
            {
                "layer": data.of_side[side].routers[r].layer,
                "router": r,
                "spans": int(explained.counts_VE.sum()),
                "texts": len(explained.counts_VE),
                "text_mi_bits": explained.mi_bits,
                "text_mi_null_bits": explained.null_bits,
                "entropy_bits": explained.entropy_bits,
                "explained_by_text": explained.share,
                "explained_by_text_low": low,
                "explained_by_text_high": high,
            }
        )
    frame = pd.DataFrame(rows)
    sides = np.array([side for side, _ in data.explained])
    parts = [_of_side(data, side, frame[sides == side].copy()) for side in SIDES]
    return pd.concat(parts, ignore_index=True)


@table(tables=MODEL_TABLES)
def vocabulary(data: Models) -> pd.DataFrame:
    """One row per trace, expert and text: the spans that choose the expert first most exclusively,
    of those that occur eight times or more in the sample; `fraction` of the span's occurrences."""
    texts = np.array([data.spans.texts[i] for i in data.texts], object)
    parts = list[pd.DataFrame]()
    for (side, r), explained in data.explained.items():
        counts_VE = explained.counts_VE
        occurrences_V = np.maximum(counts_VE.sum(1), 1)
        fraction_VE = counts_VE / occurrences_V[:, None]
        order_VE = np.lexsort((-counts_VE, -fraction_VE), axis=0)
        order_VE = order_VE[: data.top] if data.top else order_VE
        v, e = order_VE.T.reshape(-1), np.repeat(np.arange(counts_VE.shape[1]), len(order_VE))
        v, e = v[counts_VE[v, e] > 0], e[counts_VE[v, e] > 0]
        part = pd.DataFrame(
            {
                "layer": data.of_side[side].routers[r].layer,
                "router": r,
                "expert": e,
                "text": texts[v],
                "count": counts_VE[v, e],
                "fraction": fraction_VE[v, e],
                "occurrences": occurrences_V[v],
            }
        )
        parts.append(_of_side(data, side, part))
    return pd.concat(parts, ignore_index=True)


def _of_side(data: Models, side: str, part: pd.DataFrame) -> pd.DataFrame:
    """`trace` and the relative depth beside the names of the routers."""
    part.insert(2, "trace", side)
    part.insert(3, "depth", [data.depth(side, r) for r in part["router"].tolist()])
    return part.astype({"trace": "str"})


def name_of(data: Models, side: str, router: int) -> str:
    return layer_label(data.of_side[side].routers, router)
