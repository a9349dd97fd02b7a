"""The loops over every decision, compiled by numba. The NumPy references of `reached_*` and
`count_windows` are in kernels_numpy.py.

T tokens, K slots of a decision, E experts, G GPUs (or nodes), S slots of a GPU, C (expert, GPU)
pairs, M decisions of a sample, N assignments of the sample, W windows.
"""
# ruff: noqa: NPY002 (compiled code draws from numba's own generator)

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def reached_dense(ids_KT: np.ndarray, miss_EG: np.ndarray) -> float:
    """The compiled form of `kernels_numpy.reached`, for miss_EG = 1 − share, float32, with a row of
    ones for slots that routed nowhere. Goes through all GPUs without a branch: faster on few GPUs,
    and on more where experts are replicated."""
    K, T = ids_KT.shape
    nowhere, gpus = len(miss_EG) - 1, miss_EG.shape[1]
    miss_G, missed_G = np.empty(gpus, np.float32), np.zeros(gpus)
    for t in range(T):
        miss_G[:] = 1
        for k in range(K):
            row_G = miss_EG[ids_KT[k, t] if ids_KT[k, t] >= 0 else nowhere]
            for g in range(gpus):
                miss_G[g] *= row_G[g]
        for g in range(gpus):
            missed_G[g] += miss_G[g]
    return T * gpus - missed_G.sum()


@njit(nogil=True, cache=True)
def reached_sparse(
    ids_KT: np.ndarray,
    sole_E: np.ndarray,
    start_E: np.ndarray,
    gpu_C: np.ndarray,
    share_C: np.ndarray,
    gpus: int,
) -> float:
    """The same from a table of the GPUs of each expert (`ranks_reached.table_of`): quicker where
    each expert is on one GPU, or there are very many GPUs."""
    K, T = ids_KT.shape
    sure_G, maybe_G, miss_G = (
        np.full(gpus, -1, np.int64),
        np.full(gpus, -1, np.int64),
        np.zeros(gpus),
    )
    total = 0.0
    for t in range(T):
        count = split = 0
        for k in range(K):
            e = ids_KT[k, t]
            if e < 0:
                continue
            g = sole_E[e]
            if g < 0:
                split += 1
            elif sure_G[g] != t:
                sure_G[g] = t
                count += 1
        total += count
        if split == 0:
            continue
        for k in range(K):
            e = ids_KT[k, t]
            if e < 0 or sole_E[e] >= 0:
                continue
            for c in range(start_E[e], start_E[e + 1]):
                g = gpu_C[c]
                if sure_G[g] == t:
                    continue
                if maybe_G[g] != t:
                    maybe_G[g] = t
                    miss_G[g] = 1.0
                # the chance that this expert is the first to reach the GPU
                total += miss_G[g] * share_C[c]
                miss_G[g] *= 1.0 - share_C[c]
    return total


@njit(nogil=True, cache=True)
def count_windows(ids_KT: np.ndarray, window_T: np.ndarray, load_WE: np.ndarray) -> None:
    """The compiled form of `kernels_numpy.count_windows`."""
    K, T = ids_KT.shape
    for k in range(K):
        for t in range(T):
            e = ids_KT[k, t]
            if e >= 0:
                load_WE[window_T[t], e] += 1


@njit(nogil=True, cache=True)
def anneal(
    ids_KM: np.ndarray,
    slots_GS: np.ndarray,
    load_E: np.ndarray,
    limit: float,
    proposals: int,
    heat: float,
    seed: int,
) -> None:
    """Exchanges slots of `slots_GS` in place so that the decisions of the sample reach fewer GPUs,
    no GPU loaded beyond `limit`.

    Simulated annealing on the exact expectation: for each decision and GPU it keeps the number of
    chosen experts that are there alone, and the probability that none of the replicated ones is
    used there."""
    K, M = ids_KM.shape
    G, S = slots_GS.shape
    E = len(load_E)
    copies_GE, replicas_E = np.zeros((G, E), np.int64), np.zeros(E, np.int64)
    load_G = np.zeros(G)
    for g in range(G):
        for s in range(S):
            copies_GE[g, slots_GS[g, s]] += 1
            replicas_E[slots_GS[g, s]] += 1
    for g in range(G):
        for s in range(S):
            load_G[g] += load_E[slots_GS[g, s]] / replicas_E[slots_GS[g, s]]
    start_E = np.zeros(E + 1, np.int64)  # the decisions that chose each expert
    for k in range(K):
        for m in range(M):
            if ids_KM[k, m] >= 0:
                start_E[ids_KM[k, m] + 1] += 1
    start_E = np.cumsum(start_E)
    fill_E, decision_N = start_E[:-1].copy(), np.zeros(start_E[-1], np.int64)
    sure_MG, miss_MG = np.zeros((M, G), np.int64), np.ones((M, G))
    for k in range(K):
        for m in range(M):
            e = ids_KM[k, m]
            if e >= 0:
                decision_N[fill_E[e]] = m
                fill_E[e] += 1
                for g in range(G):
                    if copies_GE[g, e] > 0:
                        _shift(sure_MG, miss_MG, m, g, replicas_E[e], 1)
    np.random.seed(seed)
    for n in range(proposals):
        g, h = np.random.randint(G), np.random.randint(G)
        i, j = np.random.randint(S), np.random.randint(S)
        a, b = slots_GS[g, i], slots_GS[h, j]
        if g == h or a == b or copies_GE[h, a] > 0 or copies_GE[g, b] > 0:
            continue
        change = load_E[a] / replicas_E[a] - load_E[b] / replicas_E[b]
        if (load_G[h] + change > limit and change > 0) or (
            load_G[g] - change > limit and change < 0
        ):
            continue
        difference = 0.0
        for e, came, went in ((a, h, g), (b, g, h)):
            for c in range(start_E[e], start_E[e + 1]):
                m = decision_N[c]
                difference += _shift(sure_MG, miss_MG, m, went, replicas_E[e], -1) + _shift(
                    sure_MG, miss_MG, m, came, replicas_E[e], 1
                )
        affected = start_E[a + 1] - start_E[a] + start_E[b + 1] - start_E[b]
        warmth = heat * (1 - n / proposals) * max(1, affected)
        if difference <= 0 or np.random.random() < np.exp(-difference / max(warmth, 1e-9)):
            slots_GS[g, i], slots_GS[h, j] = b, a
            copies_GE[g, a] -= 1
            copies_GE[h, a] += 1
            copies_GE[h, b] -= 1
            copies_GE[g, b] += 1
            load_G[g] -= change
            load_G[h] += change
            continue
        for e, came, went in ((a, g, h), (b, h, g)):
            for c in range(start_E[e], start_E[e + 1]):
                _shift(sure_MG, miss_MG, decision_N[c], went, replicas_E[e], -1)
                _shift(sure_MG, miss_MG, decision_N[c], came, replicas_E[e], 1)


@njit(nogil=True, cache=True)
def _shift(sure_MG, miss_MG, m, g, replicas, step):
    """One replica of a chosen expert comes to (+1) or leaves (−1) the GPU: by how much the reached
    GPUs change."""
    before = 1.0 if sure_MG[m, g] > 0 else 1.0 - miss_MG[m, g]
    if replicas == 1:
        sure_MG[m, g] += step
    elif step > 0:
        miss_MG[m, g] *= 1.0 - 1.0 / replicas
    else:
        miss_MG[m, g] /= 1.0 - 1.0 / replicas
    after = 1.0 if sure_MG[m, g] > 0 else 1.0 - miss_MG[m, g]
    return after - before
