"""Replicas that need not share evenly: how light the busiest GPU could be if a dispatcher chose
among the replicas of an expert.

A linear program per window, solved exactly by HiGHS. Dispatchers that solve it, or nearly, for each
batch are LPLB and SGLang's
--ep-dispatch-algorithm lp; what it gives is the least that any of them could reach.

E experts, G GPUs, W windows, N shares: of one expert on one GPU.
"""

from __future__ import annotations

import numpy as np

AT_ONCE = 64  # windows


def least_busiest(load_WE: np.ndarray, share_EG: np.ndarray) -> np.ndarray:
    """The least possible load of the busiest GPU in each window, float64 [W]; 0 where a window has
    no load. share_EG: positive where the GPU has a replica of the expert."""
    several_E = (share_EG > 0).sum(1) > 1
    fixed_WG, free_WE = (load_WE * ~several_E) @ share_EG, load_WE[:, several_E]
    if not several_E.any():
        return fixed_WG.max(1)
    total_W = np.maximum(load_WE.sum(1), 1)[:, None]
    parts = np.arange(AT_ONCE, len(load_WE), AT_ONCE)
    pieces = zip(
        np.split(fixed_WG / total_W, parts), np.split(free_WE / total_W, parts), strict=True
    )
    return (
        np.concatenate([_solved(fixed, free, share_EG[several_E] > 0) for fixed, free in pieces])
        * total_W[:, 0]
    )


def _solved(fixed_WG: np.ndarray, free_WE: np.ndarray, on_EG: np.ndarray) -> np.ndarray:
    """Of windows that are independent blocks of one program: variables are the load of each share,
    then that of the busiest GPU."""
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
