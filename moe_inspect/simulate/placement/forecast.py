"""The policy local-search. Where the loads of several windows are known, it is fitted to a forecast
of the windows to come, not to the sum of those seen.

The best placement for the sum of the windows does not stay the best: it gives few replicas to the
busiest experts, whose load varies most. This search lowers the mean, over windows drawn from the
forecast, of the load of the busiest GPU. On the sum of the windows no GPU carries more than the
busiest of the published placement that it starts from.

The log load of an expert moves around a level. How fast it moves is estimated from the variogram,
pooled over the experts; ordinary kriging then gives the level to expect some windows ahead, and how
uncertain it is. Experts move together as they were seen to. The noise of counting is drawn on its
own for each expert, so that chance is not taken for experts that move together.

W windows seen, M windows drawn, E experts, L lags, H windows ahead, P slots, G GPUs, S = P / G
slots of a GPU.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numba import njit

from moe_inspect.simulate.placement import search
from moe_inspect.simulate.placement.policies import Layout, eplb, eplb_global, replicate

# correlations of a window with the next that are tried
RHOS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
FEWEST = 4  # windows from which their spread is estimated
# windows drawn to fit to, and others drawn to compare the results
DRAWN, JUDGED = 768, 1024
# standard deviations above its mean at which an expert's load is taken when replicas are counted
# out
CAUTION = 2.0
SWEEPS = 20  # over all pairs of GPUs, at most
GAIN = 1e-6  # relative; less is no gain
ENOUGH = 1e-4  # relative gain of a sweep below which the next is not worth its time


def local_search(load_WE: np.ndarray, layout: Layout, apart: bool = False) -> np.ndarray:
    """From EPLB's placements, replicas of an expert on different GPUs: see `search`. With at least
    FEWEST windows it is fitted to windows drawn from a forecast; where they are workloads, which
    come in no order (`apart`), to these themselves."""
    load_E, load_WE = load_WE.sum(0).astype(np.float64), load_WE[load_WE.any(axis=1)]
    slots, gpus = layout.slots, layout.gpus
    starts = [eplb(load_E, layout), eplb_global(load_E, layout)]
    if len(load_WE) < (2 if apart else FEWEST) or slots // gpus >= len(load_E):
        return search.search(load_E, slots, gpus, starts)
    drawn_EM, judged_EM = (
        np.ascontiguousarray((load_WE if apart else drawn(load_WE, n, seed)).T, np.float64)
        for seed, n in enumerate((DRAWN, JUDGED))
    )
    limit = min(search.Placement(load_E, start.reshape(gpus, -1)).most for start in starts)
    cautious_E = replicate(drawn_EM.mean(1) + CAUTION * drawn_EM.std(1), slots, most=gpus)[1]
    found: list[np.ndarray] = []
    for start in (*starts, search.packed(load_E, cautious_E, gpus)):
        if state := search.separated(search.Placement(load_E, start.reshape(gpus, -1))):
            search.descend(state)
            found += [state.slots_GS] if state.most <= limit * (1 + search.SMALLEST) else []
    found = found or [search.search(load_E, slots, gpus, starts).reshape(gpus, -1)]
    tried = {slots_GS.tobytes(): slots_GS for slots_GS in found}
    for slots_GS in list(tried.values()):
        exchanged_GS = slots_GS.copy()
        replicas_E = np.bincount(slots_GS.ravel(), minlength=len(load_E))
        descend_windows(exchanged_GS, drawn_EM / replicas_E[:, None], load_E / replicas_E, limit)
        tried[exchanged_GS.tobytes()] = exchanged_GS
    return min(tried.values(), key=lambda slots_GS: busiest(slots_GS, judged_EM)).reshape(-1)


def busiest(slots_GS: np.ndarray, load_EM: np.ndarray) -> float:
    """The mean over windows of the load of the busiest GPU."""
    each_EM = load_EM / np.bincount(slots_GS.ravel(), minlength=len(load_EM))[:, None]
    return float(np.max([each_EM[experts_S].sum(0) for experts_S in slots_GS], axis=0).mean())


def drawn(load_WE: np.ndarray, windows: int, seed: int = 0) -> np.ndarray:
    """Share of each expert's load in `windows` windows drawn from the next W, float64 [M, E]. Each
    row sums to 1.

    load_WE: assignments; W is at least 2, and each window has some."""
    W, (of_MW, alone_ME) = len(load_WE), _normal(seed, windows, *load_WE.shape)
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
    together_ME = of_MW @ unit_WE / np.sqrt(W - 1)
    level_ME = (weight_HW @ log_WE)[ahead_M] - chance_E / 2
    drawn_ME = np.exp(
        level_ME + np.sqrt(np.outer(scale_M, moves_E)) * together_ME + np.sqrt(chance_E) * alone_ME
    )
    return drawn_ME / drawn_ME.sum(1, keepdims=True)


@lru_cache(4)
def _normal(seed: int, windows: int, W: int, E: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal deviates, the same for all routers: [M, W] and [M, E]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(windows, W)), rng.normal(size=(windows, E))


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


@njit(nogil=True, cache=True)
def descend_windows(slots_GS, each_EM, fitted_E, limit):  # type: ignore[no-untyped-def]
    """Exchanges slots in place, as long as the sum over windows of the busiest GPU's load falls.
    each_EM: load of a replica in each window; fitted_E: on the whole part fitted to, of which no
    GPU may get more than `limit`."""
    G, S = slots_GS.shape
    E, M = each_EM.shape
    has_GE, load_GM, fitted_G = np.zeros((G, E), np.bool_), np.zeros((G, M)), np.zeros(G)
    for g in range(G):
        for e in slots_GS[g]:
            has_GE[g, e] = True
            fitted_G[g] += fitted_E[e]
            load_GM[g] += each_EM[e]
    busiest_M, most_M = np.zeros(M, np.int64), np.zeros(M)
    rest_M, hope_M, order_M = np.zeros(M), np.zeros(M + 1), np.zeros(M, np.int64)
    for m in range(M):
        busiest_M[m] = np.argmax(load_GM[:, m])
        most_M[m] = load_GM[busiest_M[m], m]
    total = most_M.sum()
    for _ in range(SWEEPS):
        before = total
        for g in range(G):
            for h in range(g + 1, G):
                hot = _pair(g, h, load_GM, busiest_M, most_M, rest_M, hope_M, order_M)
                for i in range(S):
                    for j in range(S):
                        a, b = slots_GS[g, i], slots_GS[h, j]
                        moved = fitted_E[a] - fitted_E[b]
                        if (
                            has_GE[h, a]
                            or has_GE[g, b]
                            or (fitted_G[h] if moved > 0 else fitted_G[g]) + abs(moved) > limit
                        ):
                            continue
                        change = 0.0
                        for n in range(M):
                            if change - hope_M[n] > -GAIN * total:
                                change = 0.0
                                break
                            m = order_M[n]
                            x = each_EM[a, m] - each_EM[b, m]
                            change += (
                                max(rest_M[m], load_GM[g, m] - x, load_GM[h, m] + x) - most_M[m]
                            )
                        if change > -GAIN * total:
                            continue
                        slots_GS[g, i], slots_GS[h, j] = b, a
                        has_GE[g, a] = has_GE[h, b] = False
                        has_GE[g, b] = has_GE[h, a] = True
                        fitted_G[g] -= moved
                        fitted_G[h] += moved
                        total += change
                        for n in range(M):
                            m = order_M[n]
                            x = each_EM[a, m] - each_EM[b, m]
                            load_GM[g, m] -= x
                            load_GM[h, m] += x
                            here = g if load_GM[g, m] >= load_GM[h, m] else h
                            if load_GM[here, m] >= rest_M[m]:
                                busiest_M[m] = here
                            elif n < hot:
                                busiest_M[m] = np.argmax(load_GM[:, m])
                            most_M[m] = load_GM[busiest_M[m], m]
                        hot = _pair(g, h, load_GM, busiest_M, most_M, rest_M, hope_M, order_M)
        if total > before * (1 - ENOUGH):
            break


@njit(nogil=True, cache=True)
def _pair(g, h, load_GM, busiest_M, most_M, rest_M, hope_M, order_M):  # type: ignore[no-untyped-def]
    """Puts first in order_M the windows whose busiest GPU is g or h, the only ones in which an
    exchange between the two gains; returns how many. rest_M: the load of the busiest of the other
    GPUs. hope_M[n]: what the windows order_M[n:] can gain at most."""
    hot, cold = 0, len(order_M)
    for m in range(len(order_M)):
        if busiest_M[m] == g or busiest_M[m] == h:
            order_M[hot] = m
            hot += 1
        else:
            rest_M[m] = most_M[m]
            cold -= 1
            order_M[cold] = m
    hope_M[hot:] = 0.0
    for n in range(hot - 1, -1, -1):
        m = order_M[n]
        rest_M[m] = 0.0
        for o in range(len(load_GM)):
            if o != g and o != h and load_GM[o, m] > rest_M[m]:
                rest_M[m] = load_GM[o, m]
        hope_M[n] = hope_M[n + 1] + most_M[m] - max(rest_M[m], (load_GM[g, m] + load_GM[h, m]) / 2)
    return hot
