"""Tables of the load over time, in windows of the trace in the order of execution.

W windows, E experts.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics import windows as win
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.load import design_effects, of_router, stacked, widened
from moe_inspect.reporting.tables.registry import table

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
