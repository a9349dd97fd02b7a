"""Tables of the load: of every router, of every expert, and over time, in windows of the trace in
the order of execution. `layer, router` come first. L routers, E experts, U documents, S sizes of
forward passes, W windows."""

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
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
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


CAPACITY_FACTOR = 1.25  # of simulated_drop_rate
DRIFT = (
    "windows",
    "total_variation",
    "total_variation_floor",
    "window_jsd_bits",
    "window_jsd_floor_bits",
    "first_to_last",
    "first_to_last_floor",
    "trend_expert",
    "trend_first",
    "trend_last",
    "trend_p",
    "gpus",
    "balancedness_fresh",
    "balancedness_stale",
)


@table("windows")
def windows(data: ReportData) -> pd.DataFrame:
    """One row per window of tokens, in the order of execution: its balance and the one expected by
    chance of as many tokens of documents like these; the distance of its load from that of the
    window before and the one expected by chance; the share of assignments that a capacity factor of
    1.25 would drop."""
    counts, parts = data.decisions("windows"), list[dict[str, np.ndarray]]()
    for r in data.selection.routers:
        index_W, first_W, tokens_W, load_WE = _windows(counts, r)
        E, k = counts.routers[r].experts, counts.routers[r].top_k
        floors = _floors(data, r, load_WE)
        floor_W = unc.noise_of(load_WE.sum(1) / k, E, k)[0]  # null slots make no load
        there_W = load_WE.sum(1) > 0
        columns = {
            "window": index_W,
            "first_token": first_W,
            "tokens": tokens_W,
            "max_over_mean": bal.max_over_mean(load_WE),
            "busiest_expert": np.where(there_W, bal.busiest_expert(load_WE), -1),
            "expected_by_chance": 1 + floor_W * widened(design_effects(data)[r]),
            "total_variation": np.r_[np.nan, win.step_total_variation(load_WE)][: len(tokens_W)],
            "total_variation_floor": np.r_[np.nan, floors[0]][: len(tokens_W)],
            "jsd_bits": np.r_[np.nan, win.step_jsd_bits(load_WE)][: len(tokens_W)],
            "jsd_floor_bits": np.r_[np.nan, floors[1]][: len(tokens_W)],
            "simulated_drop_rate": win.simulated_drop_rate(load_WE, CAPACITY_FACTOR),
        }
        parts.append(of_router(data, r, columns))
    frame = stacked(parts)
    busiest = frame["busiest_expert"].astype("Int64")
    return frame.assign(busiest_expert=busiest.mask(busiest < 0))


@table("windows", by_router=DRIFT)
def drift(data: ReportData) -> pd.DataFrame:
    """One row per router: how far its load moves from one window to the next, how far chance alone
    moves it, and what that costs if experts are placed on GPUs by the load of the window before.
    Windows with fewer than half the tokens of the largest are left out. trend_expert: the expert
    whose share rises or falls most steadily, with its load ÷ mean load in the first quarter of the
    trace and in the last (trend_first, trend_last), and the probability that documents by chance
    give any expert of any router such a trend (trend_p)."""
    counts, rows = data.decisions("drift"), list[dict[str, float | None]]()
    for r in data.selection.routers:
        _, _, tokens_W, load_WE = _windows(counts, r)
        whole_W = bal.whole_passes(tokens_W)
        load_WE = load_WE[whole_W]
        floors = _floors(data, r, load_WE)
        ends = _floors(data, r, load_WE[[0, -1]]) if len(load_WE) > 1 else floors
        # with one expert per GPU no placement is better than another
        gpus = min(win.RANKS, max(1, counts.routers[r].experts // 2))
        rank_WE = win.pack(load_WE, gpus)
        rows.append(
            {
                "layer": counts.routers[r].layer,
                "router": r,
                "windows": len(load_WE),
                "total_variation": win.total_variation(load_WE),
                "total_variation_floor": _mean(floors[0]),
                "window_jsd_bits": win.window_jsd_bits(load_WE),
                "window_jsd_floor_bits": _mean(floors[1]),
                "first_to_last": win.first_to_last(load_WE),
                "first_to_last_floor": _mean(ends[0]),
                **_trend(data, r, load_WE),
                "gpus": gpus,
                "balancedness_fresh": win.balancedness_fresh(load_WE, gpus, rank_WE),
                "balancedness_stale": win.balancedness_stale(load_WE, gpus, rank_WE),
            }
        )
    return pd.DataFrame(rows, columns=["layer", "router", *DRIFT]).astype({"trend_expert": "Int64"})


def _trend(data: ReportData, router: int, load_WE: np.ndarray) -> dict[str, float | None]:
    counts = data.counts
    p_E = win.trend_p(load_WE, counts.of[router].assignments_UE, counts.domain_of_unit_U)
    if np.isnan(p_E).all() or len(counts.units) < FEWEST_TO_JUDGE:
        names = ("trend_first", "trend_last", "trend_p")
        return {"trend_expert": None} | dict.fromkeys(names, float("nan"))
    e = int(np.nanargmin(p_E))
    first, last = win.quarter_ratio(load_WE)[:, e].tolist()
    p = min(1.0, float(p_E[e]) * len(p_E) * len(data.selection.routers))
    return {"trend_expert": e, "trend_first": first, "trend_last": last, "trend_p": p}


def _windows(counts: Counts, router: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """index, first token, tokens, load_WE of the windows in which the router saw any token."""
    listed = list(counts.windows(router))
    index_W, first_W, tokens_W = (np.array([w[i] for w in listed], np.int64) for i in range(3))
    return (
        index_W,
        first_W,
        tokens_W,
        np.array([w[3] for w in listed], np.int64).reshape(-1, counts.routers[router].experts),
    )


def _floors(data: ReportData, router: int, load_WE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The total variation and JSD of each window and the one before that chance gives."""
    load_E, k = data.counts.load_E(router), data.counts.routers[router].top_k
    effect, share_E = design_effects(data)[router], load_E / max(load_E.sum(), 1)
    return win.step_floors(
        share_E, load_WE.sum(1) / k, k, max(1.0, effect) if effect == effect else 1.0
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
