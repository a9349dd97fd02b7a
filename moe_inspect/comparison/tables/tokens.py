"""Tables of tokens and documents: how many differ anywhere, where a difference begins and whether
it stays, which documents differ most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.comparison.counting.counts import UNIT
from moe_inspect.comparison.data import METRICS_OF, TABLES, PairData
from moe_inspect.reporting.tables.registry import table


@table(by_router=("tokens_mismatch", *METRICS_OF), tables=TABLES)
def overall(data: PairData) -> pd.DataFrame:
    """One row: all routers together; the differences of the losses are NaN where the traces have
    none."""
    counts = data.counts
    gamma = {
        "router_shift": tt.router_shift(counts.gamma / UNIT, counts.gamma_tokens),
        "router_shift_below_floor": _ratio(counts.gamma_below, counts.gamma_tokens),
    }
    row = {
        "tokens": counts.tokens,
        "tokens_mismatch": data.tokens_mismatch,
        "decisions": data.decisions,
        "decisions_mismatch": data.mismatched / data.decisions,
        **gamma,
    }
    losses: Any = data.tables["loss"]
    for name in METRICS_OF:
        value = losses[name.removeprefix("loss_")].iloc[0] if len(losses) else float("nan")
        row[name] = value
    if data.noise is not None:
        row["noise_tokens_mismatch"] = data.noise.tokens_mismatch
    return pd.DataFrame([row])


@table(tables=TABLES)
def tokens(data: PairData) -> pd.DataFrame:
    """One row per number of routers: tokens whose sets differ at exactly so many, and the share
    of those with more."""
    layers_N = data.counts.layers_N
    last = int(np.flatnonzero(layers_N).max(initial=0))
    share_N = layers_N[: last + 1] / layers_N.sum()
    return pd.DataFrame(
        {
            "routers": np.arange(last + 1),
            "tokens": layers_N[: last + 1],
            "share": share_N,
            "share_more": np.maximum(1 - np.cumsum(share_N), 0),
        }
    )


@table(tables=TABLES)
def depth(data: PairData) -> pd.DataFrame:
    """One row per router: does a difference grow? The share of tokens that differ here or before,
    that differ here first, and the share that differs here of those that did and did not before."""
    rows = []
    differ = 0
    stack = ""
    for r, _ in data.pairs:
        counts, listed = data.of(r), data.router(r)
        if listed.stack != stack:
            differ, stack = 0, listed.stack
        n = int(data.decisions_UX(r).sum())
        differ += counts.new
        rows.append(
            {
                "layer": listed.layer,
                "router": r,
                "set_mismatch": _ratio(counts.new + counts.again, n),
                "differ_so_far": _ratio(differ, n),
                "new": _ratio(counts.new, n),
                "again_after_difference": _ratio(counts.again, counts.before),
                "new_without_difference": _ratio(counts.new, n - counts.before),
            }
        )
    return pd.DataFrame(rows)


@table(tables=TABLES)
def documents(data: PairData) -> pd.DataFrame:
    """One row per document with any difference, those with the largest share first."""
    rows = data.counts.document_rows()
    document, domain, n_tokens, decisions, mismatch = rows[rows[:, 4] > 0].T
    frame = pd.DataFrame(
        {
            "document": document,
            "domain": pd.Series([data.counts.domains[d] for d in domain], dtype="str"),
            "tokens": n_tokens,
            "decisions": decisions,
            "mismatches": mismatch,
            "set_mismatch": mismatch / np.maximum(decisions, 1),
        }
    )
    frame = frame.sort_values(["set_mismatch", "document"], ascending=[False, True])
    frame = frame.reset_index(drop=True)
    return frame.head(data.options.top) if data.options.top else frame


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")
