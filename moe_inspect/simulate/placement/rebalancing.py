"""What it costs to rebalance, and how often that pays: the experts that GPUs are sent, at the
measured bandwidth between them, against what a plan loses as it ages.

W windows, V plans, each fitted on a window, E experts, P slots, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.windows import FEWEST_WINDOWS
from moe_inspect.simulate.placement.policies import Layout, contiguous, shares
from moe_inspect.simulate.placement.windows import PlacementPlans, window_of
from moe_inspect.simulate.prices import Prices, shape_of
from moe_inspect.simulate.sampling import SEED, expected
from moe_inspect.simulate.shards import taken

SHUFFLES = 999
LINK = "alltoall"  # the transfer whose bandwidth experts are moved at

Place = Callable[[np.ndarray, Layout], np.ndarray]


@dataclass(frozen=True)
class Ageing:
    """`lost`: ms of a step that a plan loses per window of age; `most`: with the greatest age here;
    `p`: that the order of the windows does not matter; all NaN where `unknown` says why."""

    lost: float = math.nan
    most: float = math.nan
    p: float = math.nan
    unknown: str = ""


def rebalancing(
    plans: PlacementPlans, policy: str, place: Place, prices: Prices, N: int
) -> tuple[pd.DataFrame, Ageing]:
    """Of this policy, for steps of N tokens: a row for the plan after experts in order, and one per
    window whose own plan follows that of the window before. `plans`: on windows of time, or on
    workloads, which have no order."""
    in_order = dict[int, np.ndarray]()
    for r, layout in plans.layouts.items():
        E = plans.trace.routers[r].experts
        without = layout if E % layout.gpus else replace(layout, slots=E)  # replicas
        in_order[r] = contiguous(plans.loads[r][0], without)
    planned = {r: plans.of[r, policy] for r in plans.selection.routers}
    first = {"window": None, "policy": policy, **moved(plans, in_order, planned, prices)}
    if plans.windows.names or plans.trace.counts_only:
        return pd.DataFrame([first]), Ageing(unknown="the loads have no order in time")
    W, gap = len(plans.windows.edge_W) - 1, _spanned(plans)
    fitted = [
        {r: place(plans.loads[r][v], layout) for r, layout in plans.layouts.items()}
        for v in range(W)
    ]
    ms_VW = _priced(plans, fitted, prices, N)
    rows = [
        {"window": w, "policy": policy, **moved(plans, fitted[w - 1], fitted[w], prices)}
        | {"ms_before": ms_VW[w - 1, w], "ms_first": ms_VW[0, w]}
        for w in range(1, W)
    ]
    table = pd.DataFrame([first, *rows]).astype({"window": "Int64"})
    if W < FEWEST_WINDOWS:
        return table, Ageing(unknown=f"it takes {FEWEST_WINDOWS} windows (--window)")
    if gap > W // 4:
        return table, Ageing(unknown="documents last longer than a window")
    return table, ageing(ms_VW, gap)


def moved(
    plans: PlacementPlans,
    before: dict[int, np.ndarray],
    after: dict[int, np.ndarray],
    prices: Prices,
) -> dict[str, float]:
    """10^9 bytes of the experts that GPUs lack, of all and of the GPU that is sent most, and the
    time of that one: NaN where no link was measured."""
    gb_G = np.zeros(1)
    for r, layout in plans.layouts.items():
        E, shape = plans.trace.routers[r].experts, shape_of(plans.trace, r)
        had_EG, has_EG = (shares(of[r], E, layout.gpus) > 0 for of in (before, after))
        gb_G = gb_G + (has_EG & ~had_EG).sum(0) * prices.expert_gb(shape)
    link, most = prices.transfers.get(LINK), float(gb_G.max())
    ms = float(link.predict(np.array([most]), 1e9).item()) if link and most else math.nan
    return {"moved_gb": float(gb_G.sum()), "moved_gb_of_gpu": most, "move_ms": ms if most else 0.0}


def _priced(
    plans: PlacementPlans, fitted: list[dict[int, np.ndarray]], prices: Prices, N: int
) -> np.ndarray:
    """Milliseconds of a step that loads experts as window w does, under the plan of window v.
    float64 [V, W]"""
    W = len(plans.windows.edge_W) - 1
    ms_VW = np.zeros((len(fitted), W))
    for r, layout in plans.layouts.items():
        shape, expert_VP = shape_of(plans.trace, r), np.stack([of[r] for of in fitted])
        for w, load_E in enumerate(plans.loads[r]):
            if load_E.any():
                loads = expected(load_E, N, shape.top_k, expert_VP, layout.gpus)
                ms_VW[:, w] += prices.of(loads, shape, N).total
    return ms_VW


def _spanned(plans: PlacementPlans) -> int:
    """Windows that the longest document goes on for after its first."""
    parts = list[np.ndarray]()
    for shard in plans.trace.shards:
        taken_T = taken(shard, plans.selection)
        window_T = window_of(shard, taken_T, plans.windows)[taken_T]
        document_T = shard.tokens(["document"])["document"].to_numpy()[taken_T]
        parts.append(np.unique(np.stack([document_T, window_T]), axis=1))
    document_N, window_N = np.unique(np.concatenate(parts, axis=1), axis=1)
    first_N = np.r_[True, document_N[1:] != document_N[:-1]] if len(document_N) else np.zeros(0)
    begins = np.flatnonzero(first_N)
    ends = np.r_[begins[1:], len(document_N)] - 1
    return int((window_N[ends] - window_N[begins]).max(initial=0))


def ageing(ms_VW: np.ndarray, gap: int) -> Ageing:
    """The time of each plan in each window is a part of the plan's, a part of the window's, and
    `lost` × the windows between them (least squares). Chance: the windows in any order (Mantel's
    test). Pairs up to `gap` apart, which may share a document, are left out."""
    W = len(ms_VW)
    v, w = np.indices(ms_VW.shape)
    age_VW = np.abs(v - w).astype(float)
    kept_VW = age_VW > gap
    own = np.eye(W)
    basis = np.hstack([np.repeat(own, W, 0), np.tile(own, (W, 1))])[kept_VW.ravel()]
    age_N = age_VW[kept_VW]
    rest_N = age_N - basis @ np.linalg.lstsq(basis, age_N, rcond=None)[0]
    rest_VW = np.zeros(ms_VW.shape)
    rest_VW[kept_VW] = rest_N / (rest_N @ rest_N)
    lost, rng, beyond = float((ms_VW * rest_VW).sum()), np.random.default_rng(SEED), 1
    for _ in range(SHUFFLES):
        order_W = rng.permutation(W)
        beyond += float((ms_VW[np.ix_(order_W, order_W)] * rest_VW).sum()) >= lost
    return Ageing(lost, lost * (W - 1), beyond / (SHUFFLES + 1))
