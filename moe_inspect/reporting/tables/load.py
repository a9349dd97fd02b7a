"""Tables of the load: of every router and of every expert. `layer, router` come first. L routers, E
experts, U documents, S sizes of forward passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import INPUTS, Counts, values_of
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.registry import metrics_of
from moe_inspect.reporting.tables.data import ReportData, once
from moe_inspect.reporting.tables.registry import table

BALANCE = tuple(
    dict.fromkeys(
        [
            *metrics_of("balance", {"load_LE"}),
            "busiest_expert",
            "expected_by_chance",
            "max_over_mean_low",
            "max_over_mean_high",
            "max_vio_batch",
            "noise_floor_batch",
            "design_effect",
            "busiest_p",
            "least_used_p",
            "importance_cv",
            "empty_slots",
            "dropped",
            "drop_rate",
            "busiest_expert_before_drops",
            "max_over_mean_before_drops",
            *(m.column for m in metrics_of("balance", INPUTS).values()),
        ]
    )
)


@table(by_router=BALANCE)
def balance(data: ReportData) -> pd.DataFrame:
    """One row per router: how even its load is, and what is expected by chance."""
    return balance_of(data.counts, data.thresholds.starved, data.trace.drops)


def balance_of(counts: Counts, starved: float = bal.STARVED, drops: bool = False) -> pd.DataFrame:
    """The balance table of any counts, also those of a recording in progress. `starved`: load ratio
    below which an expert counts as starved. `drops`: whether slots that routed nowhere are
    dropped."""
    rows = list[dict[str, float | None]]()
    for r in counts.indices:
        router, load_E = counts.routers[r], counts.load_E(r)
        E, k, total = router.experts, router.top_k, int(load_E.sum())
        row: dict[str, float | None] = {
            "layer": router.layer,
            "router": r,
            "experts": E,
            "top_k": k,
            "tokens": counts.tokens_of(r),
            "assignments": total,
        }
        row |= values_of(counts, r, "balance")
        row["starved_experts"] = float(bal.starved_experts(load_E[None], starved)[0])
        row["busiest_expert"] = int(bal.busiest_expert(load_E[None])[0]) if total else None
        interval = (
            (float("nan"), float("nan"))
            if counts.counts_only
            else unc.max_vio_interval(counts.of[r].assignments_UE, counts.domain_of_unit_U)
        )
        most = E * counts.tokens_of(r) / total if total else math.nan  # every token goes there
        row["max_over_mean_low"], row["max_over_mean_high"] = (min(1 + x, most) for x in interval)
        row["design_effect"] = effect = design_effect(counts, r)
        tokens = max(round(total / k), min(total, 1))  # null slots make no load
        floor = unc.noise_floor(tokens, E, k)
        row["expected_by_chance"] = 1 + floor * widened(effect)
        row["max_vio_batch"], row["noise_floor_batch"] = _by_batch(
            counts, r, total / max(k * counts.tokens_of(r), 1)
        )
        slots = k * counts.tokens_of(r)
        row["empty_slots"] = slots - total
        dropped_E = counts.dropped_E(r)
        row["dropped"] = dropped = float(dropped_E.sum())
        lost = slots - total if drops and math.isnan(dropped) else dropped
        row["drop_rate"] = lost / slots if slots else float("nan")
        before_E = load_E + dropped_E
        known = before_E.sum() > 0
        row["busiest_expert_before_drops"] = int(before_E.argmax()) if known else None
        row["max_over_mean_before_drops"] = (
            float(before_E.max() / before_E.mean()) if known else float("nan")
        )
        rows.append(row)
    _add_p_values(counts, rows)
    columns = ["layer", "router", "experts", "top_k", "tokens", "assignments", *BALANCE]
    frame = pd.DataFrame(rows, columns=columns)
    # whole numbers that may be missing
    whole = ("dead_experts", "starved_experts", "busiest_expert", "busiest_expert_before_drops")
    return frame.astype(dict.fromkeys(whole, "Int64"))


@once
def chosen(data: ReportData) -> list[dict[str, Any]]:
    """The rows of `balance` of what routers chose: before drops, where it is known which expert
    dropped what."""
    if not data.trace.has_dropped:
        return data.loaded
    before, starved = data.counts.before_drops(), data.thresholds.starved
    table: Any = balance_of(before, starved, data.trace.drops)
    return table.dropna(subset=["max_vio"]).to_dict("records")


def _add_p_values(counts: Counts, rows: Sequence[dict[str, float | None]]) -> None:
    """How likely documents like these make any router's busiest expert as busy, and any's least
    used one as little used, by chance: NaN where documents are unknown or too few."""
    loads = [counts.load_E(r) for r in counts.indices]
    judged = not counts.counts_only and len(counts.units) >= chance.FEWEST_TO_JUDGE
    at = [i for i, load_E in enumerate(loads) if judged and load_E.any()]
    nulls = [
        chance.evenness_nulls(counts.of[counts.indices[i]].assignments_UE, counts.domain_of_unit_U)
        for i in at
    ]
    apart = [np.array([loads[i].max(), loads[i].min()]) / loads[i].mean() - 1 for i in at]
    for side, name in enumerate(("busiest_p", "least_used_p")):
        p_L = chance.joint_p([abs(of[side]) for of in apart], [of[side] for of in nulls])
        for row in rows:
            row[name] = float("nan")
        for i, p in zip(at, p_L, strict=True):
            rows[i][name] = float(p)


def _by_batch(counts: Counts, router: int, filled: float) -> tuple[float, float]:
    """Mean max_vio over forward passes, and the noise floor of passes of these sizes. `filled`:
    share of slots that are not null."""
    batches = counts.of[router].batches
    if not batches or filled <= 0:
        return float("nan"), float("nan")
    tokens_S, (passes_S, vio_sum_S) = np.array(list(batches)), np.array(list(batches.values())).T
    E, k = counts.routers[router].experts, counts.routers[router].top_k
    whole_S = bal.whole_passes(tokens_S)
    floor_S, _ = unc.noise_of(tokens_S[whole_S] * filled, E, k)
    floor = np.average(floor_S, weights=passes_S[whole_S])
    return bal.max_vio_batch(vio_sum_S, passes_S, tokens_S), float(floor)


@table()
def load(data: ReportData) -> pd.DataFrame:
    """One row per expert of a router: its load, absolute and relative to the mean."""
    counts, parts = data.counts, list[dict[str, np.ndarray]]()
    for r in data.selection.routers:
        load_E = counts.load_E(r)
        columns = {
            "expert": np.arange(len(load_E)),
            "assignments": load_E,
            "share": sp.share_by_domain(load_E[None])[0],
            "load_ratio": bal.load_ratio(load_E[None])[0],
            "first_choice": counts.first_choice_E(r),
            "weight_sum": counts.weight_sum_E(r),
            "dropped": counts.dropped_E(r),
        }
        parts.append(of_router(data, r, columns))
    return stacked(parts)


@once
def design_effects(data: ReportData) -> dict[int, float]:
    """`design_effect` of each router."""
    return {r: design_effect(data.counts, r) for r in data.selection.routers}


def widened(effect: float) -> float:
    """By how much the tokens of one document, which are alike, raise what chance gives independent
    ones: √ design effect, at least 1; 1 where it is unknown."""
    return max(1.0, math.sqrt(effect)) if effect == effect else 1.0


def design_effect(counts: Counts, router: int) -> float:
    """That of documents on the load of a router; NaN with few documents, and where they are
    unknown."""
    if counts.counts_only:
        return math.nan
    loads_UE, tokens_U = counts.of[router].assignments_UE, counts.tokens_U_of(router)
    return unc.design_effect(loads_UE, tokens_U, counts.domain_of_unit_U)


def of_router(
    data: ReportData, router: int, columns: Mapping[str, np.ndarray | float]
) -> dict[str, np.ndarray]:
    """Rows of a table about one router, by column: `layer, router` come first. A number is that of
    all rows."""
    rows = {"layer": data.counts.routers[router].layer, "router": router, **columns}
    return dict(zip(rows, np.broadcast_arrays(*rows.values()), strict=True))


def stacked(parts: list[dict[str, np.ndarray]]) -> pd.DataFrame:
    """One table of the rows of several routers."""
    return pd.DataFrame({name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]})
