"""The tables of `simulate placement`: the balance of plans on the windows that judge them.

Replicas need not share evenly: a linear program per window, solved exactly by HiGHS, gives the load
of the busiest GPU if a dispatcher chose among the replicas of an expert. LPLB and SGLang's
--ep-dispatch-algorithm lp solve it, or nearly, for each batch; no dispatcher can go below it.

E experts, G GPUs, P slots, W windows, N shares of one expert on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.chance import ALPHA
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import hidden_bytes
from moe_inspect.simulate.placement.policies import colocated, shares
from moe_inspect.simulate.placement.windows import PlacementPlans, Reached

AT_ONCE = 64  # windows
WORTH = 0.01  # share of the time saved below which no policy counts as faster


def least_busiest(load_WE: np.ndarray, share_EG: np.ndarray) -> np.ndarray:
    """The least possible load of the busiest GPU in each window, float64 [W]; 0 where a window has
    no load. share_EG: positive where the GPU has a replica of the expert."""
    several_E = (share_EG > 0).sum(1) > 1
    fixed_WG = (load_WE * ~several_E) @ share_EG
    if not several_E.any():
        return fixed_WG.max(1)
    total_W = np.maximum(load_WE.sum(1), 1)
    fixed_WG, free_WE = fixed_WG / total_W[:, None], load_WE[:, several_E] / total_W[:, None]
    solved = [
        _solved(fixed_WG[w : w + AT_ONCE], free_WE[w : w + AT_ONCE], share_EG[several_E] > 0)
        for w in range(0, len(load_WE), AT_ONCE)
    ]
    return np.concatenate(solved) * total_W


def _solved(fixed_WG: np.ndarray, free_WE: np.ndarray, on_EG: np.ndarray) -> np.ndarray:
    """Solve windows as independent blocks of one program, whose variables are the load of each
    share and of the busiest GPU."""
    from scipy.optimize import linprog
    from scipy.sparse import block_diag, coo_array

    (E, G), W, (expert_N, gpu_N) = on_EG.shape, len(fixed_WG), np.nonzero(on_EG)
    N = len(expert_N)
    of_expert = coo_array((np.ones(N), (expert_N, np.arange(N))), (E, N + 1))
    minus_most = (-np.ones(G), (np.arange(G), np.full(G, N)))
    on_gpu = coo_array((np.ones(N), (gpu_N, np.arange(N))), (G, N + 1)) + coo_array(
        minus_most, (G, N + 1)
    )
    cost = np.tile(np.r_[np.zeros(N), 1.0], W)
    blocks, equal = block_diag([on_gpu] * W, "csr"), block_diag([of_expert] * W, "csr")
    found = linprog(cost, blocks, -fixed_WG.ravel(), equal, free_WE.ravel(), method="highs")
    assert found.status == 0, found.message
    return found.x.reshape(W, N + 1)[:, N]


def tables_of(
    plans: PlacementPlans, reached: Reached, linear_program: bool
) -> dict[str, pd.DataFrame]:
    """`placement`: a row per router and policy; `policies`: a row per policy; `windows`: a row per
    window, router and policy. `linear_program`: with what the best dispatch could reach."""
    windows, size = plans.windows, hidden_bytes(plans.trace)
    apart = bool(windows.names)
    fit, judged = slice(windows.fit), windows.judged
    rows, by_window = list[dict[str, object]](), list[dict[str, object]]()
    first_W = windows.first_W
    for (r, name), expert_P in plans.of.items():
        router, layout, load_WE = plans.trace.routers[r], plans.layouts[r], plans.loads[r]
        share_EG = shares(expert_P, router.experts, layout.gpus)
        most_W, mean_W = (load_WE @ share_EG).max(1), load_WE.sum(1) / layout.gpus
        least_W = least_busiest(load_WE, share_EG) if linear_program else None
        key = {"layer": router.layer, "router": r, "policy": name}
        ranks, nodes = reached.get((r, name), (np.nan, np.nan))
        sent = 2 * ranks * (1 - 1 / layout.gpus)  # there and back, but to the token's own GPU
        most, mean = _waits(load_WE[judged], share_EG, apart)
        fit_most, fit_mean = _waits(load_WE[fit], share_EG, apart)
        ratio = most / mean if mean else np.nan
        row = key | {
            "max_over_mean": ratio,
            "balancedness": 1 / ratio,
            "ranks_per_token": ranks,
            "nodes_per_token": nodes,
            "moved_bytes_per_token": sent * size if size else np.nan,
            "fit_max_over_mean": fit_most / fit_mean if fit_mean else np.nan,
            "colocated": colocated(expert_P, layout.gpus),
            "max_load": most,
            "mean_load": mean,
            "by_window_max_over_mean": _over(most_W, mean_W, judged),
        }
        if least_W is not None:
            row["lp_max_over_mean"] = _over(least_W, mean_W, judged)
        rows.append(row)
        for w, load_E in enumerate(load_WE):
            load_G = load_E @ share_EG
            ratio = float(load_G.max() / load_G.mean()) if load_G.any() else np.nan
            row = {
                "window": w,
                **({"workload": windows.names[w]} if apart else {}),
                "first_token": first_W[w],
                "tokens": first_W[w + 1] - first_W[w],
                "part": "fit" if w < windows.fit else "judged",
                **key,
                "max_over_mean": ratio,
                "balancedness": 1 / ratio,
            }
            if least_W is not None:
                row["lp_max_over_mean"] = _over(least_W, mean_W, slice(w, w + 1))
            by_window.append(row)
    table = pd.DataFrame(rows)
    return {"placement": table, "policies": _by_policy(table), "windows": pd.DataFrame(by_window)}


def _waits(load_WE: np.ndarray, share_EG: np.ndarray, apart: bool) -> tuple[float, float]:
    """Load of the busiest GPU, and mean load: of the sum of the windows, or summed over
    workloads."""
    load_WG = (load_WE if apart else load_WE.sum(0, keepdims=True)) @ share_EG
    return float(load_WG.max(1).sum()), float(load_WG.mean(1).sum())


def _over(most_W: np.ndarray, mean_W: np.ndarray, part: slice) -> float:
    """Load of the busiest GPU ÷ mean load, over windows one after the other: in each, all wait for
    its busiest GPU. NaN without load."""
    return float(most_W[part].sum() / mean_W[part].sum()) if mean_W[part].any() else np.nan


def _by_policy(table: pd.DataFrame) -> pd.DataFrame:
    """One row per policy. max_over_mean: Σ max ÷ Σ mean over layers."""
    rows = []
    means = ("fit_max_over_mean", "ranks_per_token", "nodes_per_token")
    for name, mine in table.dropna(subset=["max_over_mean"]).groupby("policy", sort=False):
        load = mine["mean_load"].sum()
        balancedness = load / mine["max_load"].sum()
        row = {
            "policy": name,
            "max_over_mean": 1 / balancedness,
            "worst_max_over_mean": mine["max_over_mean"].max(),
            **{column: mine[column].mean() for column in means},
            "moved_bytes_per_token": mine["moved_bytes_per_token"].sum(min_count=1),
            "colocated": mine["colocated"].sum(),
        }
        for how in ("by_window", "lp"):
            if f"{how}_max_over_mean" in mine:
                # the mean over layers, each weighing as its load
                weighted = mine[f"{how}_max_over_mean"] * mine["mean_load"]
                row[f"{how}_max_over_mean"] = float(weighted.sum() / load)
        rows.append(row)
    if not rows:
        raise MoeInspectError("no router made an assignment in the judged part: lower --fit-share")
    return pd.DataFrame(rows)


def worth(error: float | None) -> float:
    """The share of the time saved from which a policy counts as faster: `error` of the times, where
    these were measured."""
    return max(WORTH, error or 0.0)


def time_of(by_policy: pd.DataFrame) -> str:
    """The column that policies are compared by."""
    return "ms" if "ms" in by_policy else "max_over_mean"


def fastest(by_policy: pd.DataFrame) -> str:
    """The policy that takes the least time; of equals local-search, then the first."""
    time = by_policy.set_index("policy")[time_of(by_policy)].round(9)
    return min(time.index, key=lambda name: (time[name], name != "local-search"))


def alike(by_policy: pd.DataFrame, simplest_first: Iterable[str], least: float) -> list[str]:
    """The policies that are no slower than the fastest by the share `least` of its time or, if
    chance is known, beyond chance."""
    of, by = by_policy.set_index("policy"), time_of(by_policy)
    saved = 1 - of[by].min() / of[by]
    p = of.get("ms_p" if by == "ms" else "slower_p", np.nan)
    same = of.index[(saved < least) | (p >= ALPHA)]
    return [name for name in simplest_first if name in same]
