"""How many GPUs (or nodes) a token reaches under a placement, and placements that reach fewer.

T tokens, K slots of a decision, E experts, G GPUs, P physical slots, M decisions of a sample. Of
each chosen expert one replica is used, any with the same chance and independently: GPU g is reached
with probability 1 − Π (1 − its share of the expert).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.tasks import by_shard, summed
from moe_inspect.progress import phase
from moe_inspect.simulate.kernels_numba import anneal, reached_dense, reached_sparse
from moe_inspect.simulate.placement.layouts import Layout, Plans, shares
from moe_inspect.simulate.placement.policies.policies import POLICIES
from moe_inspect.simulate.placement.windows import FitWindows, decisions
from moe_inspect.trace.shard import Shard

SAMPLE = 8_192  # decisions of a router by which an exchange is judged
PROPOSALS = 60_000  # exchanges tried
HEAT = 0.02  # the first temperature, in reached GPUs per decision that chose the expert
# GPUs up to which going through all of them beats looking up those that have a replica; an eighth,
# where no expert has several
DENSE = 128

Counter = Callable[[np.ndarray], float]  # ids_KT → the sum over decisions of the GPUs reached


def ranks_reached(plans: Plans) -> dict[tuple[int, str], tuple[float, float]]:
    """GPUs and nodes that a token of the judged part is expected to reach, its own included, by
    (router, policy)."""
    asked = plans.selection, plans.windows, plans.layouts, plans.of
    parts = summed(plans.trace, "counting ranks", _add_reached, _reached, *asked)
    sums: Reached = reduce(_add_reached, parts, {})
    return {
        key: (gpus / tokens, nodes / tokens)
        for key in plans.of
        if key in sums
        for tokens, gpus, nodes in [sums[key]]
        if tokens
    }


# tokens, and the GPUs and nodes that they reach, by (router, policy)
Reached = dict[tuple[int, str], tuple[int, float, float]]


def _add_reached(total: Reached, other: Reached) -> Reached:
    for key, (tokens, gpus, nodes) in other.items():
        before = total.get(key, (0, 0.0, 0.0))
        total[key] = before[0] + tokens, before[1] + gpus, before[2] + nodes
    return total


def _reached(
    shard: Shard,
    selection: Selection,
    windows: FitWindows,
    layouts: dict[int, Layout],
    plans: dict[tuple[int, str], np.ndarray],
) -> Reached:
    """Of the judged part of a shard."""
    found: Reached = {}
    for r, ids_KT, _ in decisions(shard, selection, windows, windows.judged.start):
        E, layout = shard.trace.routers[r].experts, layouts[r]
        for key, expert_P in plans.items():
            if key[0] == r:
                gpus = counter(shares(expert_P, E, layout.gpus))(ids_KT)
                if layout.nodes > 1:
                    nodes = counter(shares(expert_P, E, layout.nodes))(ids_KT)
                else:  # it is reached by every decision that routes anywhere
                    nodes = int((ids_KT >= 0).any(0).sum())
                found[key] = ids_KT.shape[1], gpus, nodes
    return found


def counter(share_EG: np.ndarray) -> Counter:
    """The quicker of two ways to count."""
    gpus = share_EG.shape[1]
    if gpus <= (DENSE if ((share_EG > 0).sum(1) > 1).any() else DENSE // 8):
        # the last row: a slot that routed nowhere
        miss_EG = np.vstack([1 - share_EG, np.ones(gpus)]).astype(np.float32)
        return lambda ids_KT: reached_dense(ids_KT, miss_EG)
    table = table_of(share_EG)
    return lambda ids_KT: reached_sparse(ids_KT, *table, gpus)


def table_of(share_EG: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For `reached_sparse`: sole_E int64 (the one GPU that has the expert, else −1),
    and the GPUs of the others: start_E [E + 1], gpu_C, share_C."""
    sole_E = np.where((share_EG > 0).sum(1) == 1, share_EG.argmax(1), -1)
    expert_C, gpu_C = np.nonzero(share_EG * (sole_E < 0)[:, None])
    start_E = np.searchsorted(expert_C, np.arange(len(share_EG) + 1))
    return sole_E, start_E, gpu_C, share_EG[expert_C, gpu_C]


def reach_fewer(plans: Plans, policy: str, slack: float) -> None:
    """Replaces the plans of a policy by ones that reach fewer GPUs, on a sample of the decisions
    they were fitted on. No GPU is loaded more than the best EPLB's heaviest × (1 + slack)."""
    windows = plans.windows
    step = max(1, int(windows.tokens * windows.edge_W[windows.fit]) // SAMPLE)
    samples: dict[int, list[np.ndarray]] = {r: [] for r in plans.selection.routers}
    asked = plans.selection, windows, step
    for part in by_shard(plans.trace, "sampling", _sampled, *asked):
        for r, ids_KM in part:
            samples[r].append(ids_KM)
    advance = phase("exchanging", len(samples), "routers")
    for r, parts in samples.items():
        ids_KM = np.ascontiguousarray(np.concatenate(parts, axis=1))
        layout, load_E = plans.layouts[r], plans.loads[r][: windows.fit].sum(0)
        best = min(
            (load_E @ shares(POLICIES[name](load_E, layout), len(load_E), layout.gpus)).max()
            for name in ("eplb", "eplb-global")
        )
        plans.of[r, policy] = fewer_reached(
            plans.of[r, policy], layout.gpus, load_E, ids_KM, best * (1 + slack)
        )
        advance(1)


def _sampled(
    shard: Shard, selection: Selection, windows: FitWindows, step: int
) -> list[tuple[int, np.ndarray]]:
    return [
        (r, ids_KT[:, window_T < windows.fit][:, ::step])
        for r, ids_KT, window_T in decisions(shard, selection, windows)
    ]


def fewer_reached(
    expert_P: np.ndarray, gpus: int, load_E: np.ndarray, ids_KM: np.ndarray, limit: float
) -> np.ndarray:
    """A placement with the replicas of `expert_P`, exchanged among GPUs so that the sampled
    decisions reach fewer, no GPU loaded beyond `limit` (or beyond what it was). int64 [P]"""
    slots_GS = np.ascontiguousarray(expert_P.reshape(gpus, -1))
    if slots_GS.shape[1] > 1 and gpus > 1:
        anneal(ids_KM, slots_GS, load_E.astype(np.float64), limit, PROPOSALS, HEAT, 0)
    return slots_GS.reshape(-1)
