"""Replicas that need not share evenly: how light the busiest GPU could be if a dispatcher chose among the replicas of an expert.

A linear program per window, solved exactly. Dispatchers that solve it, or nearly, for each batch are LPLB and SGLang's
--ep-dispatch-algorithm lp; what it gives is the least that any of them could reach.

E experts, G GPUs, W windows, N shares: of one expert on one GPU.
"""

from __future__ import annotations

import numpy as np


def least_busiest(load_WE: np.ndarray, share_EG: np.ndarray) -> np.ndarray:
    """The least possible load of the busiest GPU in each window, float64 [W]; 0 where a window has no load. share_EG: positive where the GPU
    has a replica of the expert."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    several_E = (share_EG > 0).sum(1) > 1
    fixed_WG = (load_WE * ~several_E) @ share_EG
    total_W = np.maximum(load_WE.sum(1), 1)
    if not several_E.any():
        return fixed_WG.max(1)
    expert_N, gpu_N = np.nonzero(share_EG[several_E] > 0)
    (experts, gpus), N = share_EG[several_E].shape, len(expert_N)
    last_N = np.arange(N)
    # variables: the load of each share, then the load of the busiest GPU; all as parts of the window's load
    of_expert = coo_array((np.ones(N), (expert_N, last_N)), (experts, N + 1)).tocsr()
    on_gpu = coo_array((np.r_[np.ones(N), -np.ones(gpus)], (np.r_[gpu_N, np.arange(gpus)], np.r_[last_N, np.full(gpus, N)]))).tocsr()
    cost = np.r_[np.zeros(N), 1.0]
    found_W = np.zeros(len(load_WE))
    for w, load_E in enumerate(load_WE):
        found = linprog(cost, on_gpu, -fixed_WG[w] / total_W[w], of_expert, load_E[several_E] / total_W[w], method="highs")
        assert found.status == 0, found.message
        found_W[w] = found.fun * total_W[w]
    return found_W
