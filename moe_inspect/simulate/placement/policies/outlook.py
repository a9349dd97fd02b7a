"""Windows that may come, drawn from windows that were seen: what a placement that must last is
fitted to.

The log load of an expert moves around a level. How fast it moves is estimated from the variogram,
pooled over the experts; ordinary kriging then gives the level to expect some windows ahead, and how
uncertain it is. Experts move together as they were seen to. The noise of counting is drawn on its
own for each expert, so that chance is not taken for experts that move together.

W windows seen, E experts, L lags, H windows ahead, M windows drawn.
"""

from __future__ import annotations

import numpy as np

# windows; more are merged with their neighbours, since kriging solves a system of as many equations
MOST = 256
# correlations of a window with the next that are tried
RHOS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)


def drawn(load_WE: np.ndarray, windows: int, seed: int = 0) -> np.ndarray:
    """Share of each expert's load in `windows` windows drawn from the next W, float64 [M, E]. Each
    row sums to 1.

    load_WE: assignments; W is at least 2, and each window has some."""
    load_WE = merged(load_WE)
    (W, E), rng = load_WE.shape, np.random.default_rng(seed)
    log_WE = np.log(load_WE + 0.5) - np.log(load_WE.sum(1, keepdims=True))
    share_E = load_WE.sum(0) / load_WE.sum()
    weight_HW, variance_H = kriging(W, W, *variogram(log_WE, share_E))
    own_E = log_WE.var(0, ddof=1)
    chance_E = 1 / (load_WE.mean(0) + 0.5)  # variance of the logarithm of a Poisson count
    moves_E = np.maximum(own_E - chance_E, 0)
    moves_E = (moves_E + share_E @ moves_E) / 2  # few windows: halfway to what all experts have
    ahead_M = np.arange(windows) * W // windows
    scale_M = variance_H[ahead_M] / max(float(share_E @ own_E), 1e-12)
    centred_WE = log_WE - log_WE.mean(0)
    unit_WE = centred_WE / np.maximum(np.sqrt(own_E), 1e-12)
    together_ME = rng.normal(size=(windows, W)) @ unit_WE / np.sqrt(W - 1)
    alone_ME = rng.normal(size=(windows, E))
    level_ME = (weight_HW @ log_WE)[ahead_M] - chance_E / 2
    drawn_ME = np.exp(
        level_ME + np.sqrt(np.outer(scale_M, moves_E)) * together_ME + np.sqrt(chance_E) * alone_ME
    )
    return drawn_ME / drawn_ME.sum(1, keepdims=True)


def merged(load_WE: np.ndarray) -> np.ndarray:
    """At most MOST windows, each the sum of neighbours."""
    start_W = np.arange(0, len(load_WE), -(-len(load_WE) // MOST))
    return np.add.reduceat(load_WE, start_W, axis=0)


def variogram(log_WE: np.ndarray, share_E: np.ndarray) -> tuple[float, float, float]:
    """(rho, nugget, sill): the variance between windows at lag l is nugget + sill · (1 − rho^l).
    Least squares over the lags, experts weigh as their load."""
    W = len(log_WE)
    lag_L = np.arange(1, max(1, W * 2 // 3) + 1)
    half_L = np.array(
        [((log_WE[lag:] - log_WE[:-lag]) ** 2).mean(0) @ share_E / 2 for lag in lag_L]
    )
    pairs_L = W - lag_L
    best, least = (0.0, float(np.average(half_L, weights=pairs_L)), 0.0), np.inf
    for rho in RHOS:
        rise_L = 1 - rho**lag_L if rho else np.zeros(len(lag_L))
        basis_L2 = np.column_stack([np.ones(len(lag_L)), rise_L]) * np.sqrt(pairs_L)[:, None]
        both = np.linalg.lstsq(basis_L2, half_L * np.sqrt(pairs_L), rcond=None)[0]
        slope = float(pairs_L * rise_L @ half_L / max(pairs_L * rise_L @ rise_L, 1e-300))
        for nugget, sill in (both, (0.0, slope)):
            error = float(pairs_L @ (half_L - nugget - sill * rise_L) ** 2)
            if min(nugget, sill) >= 0 and error < least * 0.999:
                best, least = (rho, float(nugget), float(sill)), error
    return best


def kriging(
    W: int, H: int, rho: float, nugget: float, sill: float
) -> tuple[np.ndarray, np.ndarray]:
    """The weights [H, W] of the windows seen in the best linear forecast of each of the next H, the
    mean being unknown; and the variance of what comes around its forecast, [H]."""
    lag = np.abs(np.subtract.outer(np.arange(W + H), np.arange(W + H)))
    covariance = sill * rho**lag + nugget * (lag == 0)
    seen_WW, ahead_HW = covariance[:W, :W], covariance[W:, :W]
    system = np.ones((W + 1, W + 1))
    system[:W, :W] = seen_WW + max(sill + nugget, 1e-12) * 1e-9 * np.eye(W)
    system[W, W] = 0
    solved = np.linalg.solve(system, np.vstack([ahead_HW.T, np.ones(H)]))[:W]
    variance_H = (
        sill + nugget - 2 * (solved * ahead_HW.T).sum(0) + (solved * (seen_WW @ solved)).sum(0)
    )
    return solved.T, np.maximum(variance_H, 0)
