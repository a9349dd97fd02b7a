"""Loads of experts that change from window to window: bursts, slow drift, or noise alone."""

from __future__ import annotations

import numpy as np

# how much a log load moves, its correlation with the window before, tokens per window
CASES = {
    "noise only": (0.0, 0.0, 4_096),
    "bursts": (0.5, 0.0, 32_768),
    "slow drift": (0.3, 0.97, 32_768),
    "heavy drift": (1.0, 0.9, 32_768),
}
CLUSTERS = 8


def drifting(
    seed: int, experts: int, windows: int, moves: float, rho: float, tokens: int, top_k: int = 8
) -> np.ndarray:
    """Assignments of each expert in each window, int64 [windows, experts]. Popularity is by Zipf's
    law, times a log-normal process of the expert's own and one that it shares with the other
    experts of its cluster, each AR(1)."""
    rng = np.random.default_rng(seed)
    popularity_E = rng.permutation(np.arange(1, experts + 1) ** -rng.uniform(0.4, 1.1))
    cluster_E = rng.integers(CLUSTERS, size=experts)
    state, load_WE = rng.normal(size=experts + CLUSTERS), np.empty((windows, experts), np.int64)
    for w in range(windows):
        state = rho * state + np.sqrt(1 - rho**2) * rng.normal(size=experts + CLUSTERS)
        chance_E = popularity_E * np.exp(
            moves * np.sqrt(0.5) * (state[:experts] + state[experts:][cluster_E])
        )
        load_WE[w] = rng.multinomial(tokens * top_k, chance_E / chance_E.sum())
    return load_WE


def mean_over_windows(expert_P: np.ndarray, load_WE: np.ndarray, gpus: int) -> float:
    """The mean over windows of busiest ÷ mean GPU. Replicas share evenly."""
    each_WE = load_WE / np.bincount(expert_P, minlength=load_WE.shape[1])
    load_WG = each_WE[:, expert_P].reshape(len(load_WE), gpus, -1).sum(2)
    return float((load_WG.max(1) / load_WG.mean(1)).mean())
