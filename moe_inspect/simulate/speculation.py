"""Speculative decoding in `simulate decode`: what verifying drafts costs and yields, and the best
draft length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.reporting.charts.spec import SERIES, Axis, Line, Panel
from moe_inspect.simulate.result import Frame
from moe_inspect.text import plural


def weights_read(layers: Frame) -> float:
    """Cost of a step where reading experts is what takes time: bytes, or the number of experts
    where the size of one is unknown. NaN where a layer has no such step. layers: a row per
    router."""
    distinct_L = layers["distinct_experts"]
    bytes_L = layers["bytes_per_token"] * layers["batch"] * (layers["draft"] + 1)
    known = bytes_L.isna().equals(distinct_L.isna())
    return float((bytes_L if known else distinct_L).sum(skipna=False))


def tokens_gained(acceptance: float, draft: int) -> float:
    """Expected tokens of a sequence per step: the draft tokens before the first that is rejected,
    and one of the model's own. Σ_{n=0..d} a^n = (1 − a^(d+1)) / (1 − a). arXiv:2211.17192."""
    return sum(acceptance**n for n in range(draft + 1))


def break_even(draft: int, cost: float) -> float:
    """The least acceptance, to 10⁻⁶, at which a step yields as many times the tokens of one without
    a draft as it costs; NaN if none below 1 is enough."""
    enough = bisect_left(range(10**6), cost, key=lambda n: tokens_gained(n / 10**6, draft))
    return enough / 10**6 if enough < 10**6 else np.nan


def table(rows: Frame, acceptances: Sequence[float]) -> pd.DataFrame:
    """What drafts cost and yield, relative to steps without at the same positions. rows: per
    router, batch size and draft length `at`, one without and one with the draft."""
    made = list[dict[str, Any]]()
    for (batch, draft), both in rows.groupby(["batch", "at"]):
        plain, layers = both[both["draft"] == 0], both[both["draft"] == draft]
        alone = weights_read(plain)
        relative = weights_read(layers) / alone if alone > 0 else np.nan
        means = layers[["distinct_experts", "independent", "from_marginals"]].mean(skipna=False)
        for acceptance in acceptances:
            gained = tokens_gained(acceptance, draft)
            made.append(
                {
                    "batch": batch,
                    "draft": draft,
                    "acceptance": acceptance,
                    "steps": layers["steps"].min(),
                    **means,
                    "relative_cost": relative,
                    "tokens_per_step": gained,
                    "speedup": gained / relative,
                    "break_even": break_even(draft, relative) if draft and relative > 0 else np.nan,
                }
            )
    rows = pd.DataFrame(made)
    speedups = rows["speedup"].dropna().groupby([rows["batch"], rows["acceptance"]])
    return rows.assign(best=rows.index.isin(speedups.idxmax()))


def sentences(table: Frame, too_few: bool) -> list[str]:
    """too_few: the trace has too little data to advise a draft length."""
    said = []
    for batch, mine in table.groupby("batch"):
        drafted = mine[mine["draft"] > 0].dropna(subset=["speedup"])
        if drafted.empty:
            continue
        last, least = drafted.iloc[-1], drafted["break_even"].iloc[-1]
        best = (
            f"at {row.acceptance:g} "
            + (f"{plural(row.draft, 'token')} ({row.speedup:.2f}x)" if row.draft else "none")
            for row in mine[mine["best"]].sort_values("acceptance").itertuples()
        )
        of_draft = (
            f"{plural(batch, 'sequence')} with drafts of {plural(last['draft'], 'token')}: a step "
            f"reads {last['distinct_experts']:.1f} experts per layer (mean of "
            f"{plural(last['steps'], 'step')}; if tokens chose independently: "
            f"{last['from_marginals']:.1f}), {last['relative_cost']:.2f}x the weights of one "
            "without drafts"
        )
        pays = f"from an acceptance of {least:.2f}" if least < 1 else "at no acceptance below 1"
        advice = f", which pays {pays}. Best draft by acceptance: {', '.join(best)}"
        said.append(f"{of_draft}{'' if too_few else advice}.")
    if said and not too_few:
        said.append(
            "Drafts cost the expert weights that verifying them reads, as long as steps are "
            "memory-bound. The draft model costs too, and makes drafts worth less than this; "
            "weights that a step reads once for all its tokens make them worth more."
        )
    stepped = table.loc[(table["draft"] == 0) & (table["steps"] > 0), "batch"]
    none = table[(table["steps"] == 0) & table["batch"].isin(stepped)]
    said += [
        f"No step of {plural(batch, 'sequence')} with drafts of "
        f"{', '.join(map(str, drafts))} tokens: too few sequences are that long."
        for batch, drafts in none.groupby("batch")["draft"].unique().items()
    ]
    return said


def panel(table: Frame) -> Panel:
    """Break-even acceptance by draft length, a line per batch size."""
    drafted = table[table["draft"] > 0].drop_duplicates(["batch", "draft"])
    names = drafted["draft"].unique()
    at = np.arange(len(names), dtype=float)
    marks = tuple(
        Line(at, mine["break_even"].to_numpy(), plural(batch, "sequence"), colour, dots=True)
        for (batch, mine), colour in zip(drafted.groupby("batch"), cycle(SERIES), strict=False)
        if mine["break_even"].notna().any()
    )
    x = Axis("draft tokens", tuple(map(str, names)))
    return Panel(marks, x, Axis("break-even acceptance", low=0, high=1), "When drafts pay")
