"""The policy local-search: a local search from the best of several constructions, EPLB's among
them, that puts the replicas of an expert on different GPUs. If the loads of several windows are
known, it is fitted to a forecast of the windows to come, not to the sum of the windows seen.

Moves lower the load of the busiest GPU: two slots exchange their experts, or a slot goes from one
replicated expert to another. Replicas share their expert's load evenly. Deterministic.

The best placement for the sum of the windows does not stay the best: it gives few replicas to the
busiest experts, whose load varies most. The search on a forecast lowers the mean, over windows
drawn from it, of the load of the busiest GPU. On the sum of the windows no GPU carries more than
the busiest of the published placement that it starts from.

The log load of an expert moves around a level. How fast it moves is estimated from the variogram,
pooled over the experts; ordinary kriging then gives the level to expect some windows ahead, and how
uncertain it is. Experts move together as they were seen to. The noise of counting is drawn on its
own for each expert, so that chance is not taken for experts that move together.

E experts, P slots, G GPUs, S = P / G slots per GPU, W windows seen, M windows drawn or moves of a
replica, L lags, H windows ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numba import njit

from moe_inspect.simulate.placement.policies import Layout, eplb, eplb_global, replicate

CLOSE = 1e-4  # relative to the lower bound on the load of the busiest GPU: the search stops there
TRIES = 6  # moves of a replica that are followed up at a time
# of a GPU's mean load: what a replica may carry at most, in one construction each
FULL = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# random perturbations: at least so many; this many ÷ slots; at most, where a start is still better
LEAST_PERTURBATIONS, SLOT_PERTURBATIONS, MOST_PERTURBATIONS = 12, 2_048, 600
MOVES = 8  # replicas moved in a perturbation, at most: one or two do not leave some local optima
CANDIDATES = 20_000  # replica moves looked at in a round
SMALLEST = 1e-9  # relative; below this a gain is rounding
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


class Placement:
    """slots_GS: expert of each slot; copies_GE: replicas of an expert on a GPU."""

    def __init__(self, load_E: np.ndarray, slots_GS: np.ndarray):
        self.load_E, self.slots_GS = load_E, slots_GS.copy()
        G, E = len(slots_GS), len(load_E)
        self.copies_GE = np.zeros((G, E), np.int64)
        np.add.at(self.copies_GE, (np.arange(G)[:, None], slots_GS), 1)
        self.weigh()

    def weigh(self) -> None:
        self.replicas_E = self.copies_GE.sum(0)
        self.each_E: np.ndarray = self.load_E / self.replicas_E
        self.load_G: np.ndarray = self.each_E[self.slots_GS].sum(1)

    @property
    def most(self) -> float:
        return float(self.load_G.max())

    @property
    def free_E(self) -> np.ndarray:
        """bool: has more replicas than there are GPUs, so that they may share one."""
        return self.replicas_E > len(self.slots_GS)

    def takes(self, gpu: int, expert: int) -> bool:
        return bool(self.copies_GE[gpu, expert] == 0 or self.free_E[expert])

    def put(self, gpu: int, slot: int, expert: int) -> None:
        self.copies_GE[gpu, self.slots_GS[gpu, slot]] -= 1
        self.copies_GE[gpu, expert] += 1
        self.slots_GS[gpu, slot] = expert

    def swap(self, g: int, i: int, h: int, j: int) -> None:
        a, b = self.slots_GS[g, i], self.slots_GS[h, j]
        self.put(g, i, b)
        self.put(h, j, a)
        self.load_G[g] += self.each_E[b] - self.each_E[a]
        self.load_G[h] += self.each_E[a] - self.each_E[b]


def search(load_E: np.ndarray, slots: int, gpus: int, starts: Sequence[np.ndarray]) -> np.ndarray:
    """The expert of each slot, int64 [P], from `starts`, placements [P] of others. No two replicas
    of an expert are on one GPU, unless it has more than there are GPUs. The busiest GPU carries no
    more than in any start that keeps them on different GPUs too. A start that does not can carry
    less than what is found: of few experts alone, and by little (of 8 experts on 300 random Zipf
    loads 6 times, by 0.2 % at most; of 16 to 256 on none of 1,000)."""
    E, S = len(load_E), slots // gpus
    if S >= E:  # the same experts on every GPU: the load is the same too
        spare = np.argsort(-load_E, kind="stable")[: S % E]
        return np.tile(np.concatenate([np.tile(np.arange(E), S // E), spare]), gpus)
    load_E = load_E.astype(np.float64)
    _, replicas_E = replicate(load_E, slots, most=gpus)
    bound = max(load_E.sum() / gpus, float((load_E / replicas_E).max()))
    replicas = replicas_E, *_fewest_replicas(load_E, slots, gpus)
    begun = [*starts, *(packed(load_E, n_E, gpus) for n_E in replicas)]
    target = min((Placement(load_E, s.reshape(gpus, S)).most for s in starts), default=np.inf)
    states = [state for s in begun if (state := separated(Placement(load_E, s.reshape(gpus, S))))]
    for state in states:
        improve(state, bound)
    best = min(states, key=lambda state: state.most)
    rng, few = np.random.default_rng(0), max(LEAST_PERTURBATIONS, SLOT_PERTURBATIONS // slots)
    for n in range(MOST_PERTURBATIONS):
        if best.most <= target * (1 + SMALLEST) and (n >= few or best.most <= bound * (1 + CLOSE)):
            break
        state = perturbed(best, rng)
        improve(state, bound)
        best = min(best, state, key=lambda state: state.most)
    return best.slots_GS.reshape(-1)


def _fewest_replicas(load_E: np.ndarray, slots: int, gpus: int) -> list[np.ndarray]:
    """Replicas of each expert, int64 [E], several ways: as few as keep a replica within a share of
    a GPU's mean load, and of what is left one more for each of the lightest, where it matters
    least."""
    found: dict[bytes, np.ndarray] = {}
    lightest, mean = np.argsort(load_E, kind="stable"), load_E.sum() / gpus or 1.0
    for full in FULL:
        replicas_E = np.clip(np.ceil(load_E / (full * mean)), 1, gpus).astype(np.int64)
        while (left := slots - int(replicas_E.sum())) > 0:
            replicas_E[lightest[replicas_E[lightest] < gpus][:left]] += 1
        if left == 0:
            found[replicas_E.tobytes()] = replicas_E
    return list(found.values())


def packed(load_E: np.ndarray, replicas_E: np.ndarray, gpus: int) -> np.ndarray:
    """The heaviest replica first, each to the lightest GPU with room that lacks its expert (where
    there is one). int64 [P]"""
    each_E, S = load_E / replicas_E, int(replicas_E.sum()) // gpus
    expert_P = np.repeat(np.arange(len(load_E)), replicas_E)
    placed: list[list[int]] = [[] for _ in range(gpus)]
    load: list[float] = [0.0] * gpus
    for expert in expert_P[np.argsort(-each_E[expert_P], kind="stable")].tolist():
        room = [g for g in range(gpus) if len(placed[g]) < S]
        g = min([g for g in room if expert not in placed[g]] or room, key=load.__getitem__)
        placed[g].append(expert)
        load[g] += float(each_E[expert])
    return np.array(placed, np.int64).reshape(-1)


def separated(state: Placement) -> Placement | None:
    """Exchanges replicas that share a GPU for others, at the least cost to the heavier of the two
    GPUs. Each exchange leaves one pair fewer. None where one is left: only where an expert that has
    more replicas than there are GPUs, which may share one, is in the way."""
    G, S = state.slots_GS.shape
    while len(crowded := np.argwhere((state.copies_GE > 1) & (state.replicas_E <= G))):
        h, a = (int(v) for v in crowded[0])
        i = int(np.argmax(state.slots_GS[h] == a))
        b_GS = state.slots_GS
        twice_GS = np.take_along_axis(state.copies_GE, b_GS, 1) > 1
        allowed_GS = (state.copies_GE[:, a] == 0)[:, None] & (
            (state.copies_GE[h, b_GS] == 0) | twice_GS
        )
        gain_GS = state.each_E[a] - state.each_E[b_GS]
        cost_GS = np.where(
            allowed_GS,
            np.maximum(state.load_G[h] - gain_GS, state.load_G[:, None] + gain_GS),
            np.inf,
        )
        g, j = divmod(int(cost_GS.argmin()), S)
        if not allowed_GS[g, j]:
            return None
        state.swap(h, i, g, j)
    return state


def descend(state: Placement) -> None:
    """Exchanges a slot of the busiest GPU for another's, the best first, as long as it helps."""
    S, free_E = state.slots_GS.shape[1], state.free_E
    takes_EG = (state.copies_GE == 0).T | free_E[:, None]
    while True:
        h = int(state.load_G.argmax())
        most, a_S = state.load_G[h], state.slots_GS[h]
        gain_SP = state.each_E[a_S][:, None] - state.each_E[state.slots_GS].reshape(1, -1)
        other_SP = np.repeat(state.load_G, S)[None] + gain_SP
        worse_SP = np.maximum(most - gain_SP, other_SP)
        allowed_SP = (
            np.repeat(takes_EG[a_S], S, axis=1) & takes_EG[state.slots_GS.reshape(-1), h][None]
        )
        worse_SP[~allowed_SP] = np.inf
        i, p = divmod(int(worse_SP.argmin()), worse_SP.shape[1])
        if not worse_SP[i, p] < most * (1 - SMALLEST):
            return
        g, j = divmod(p, S)
        a, b = a_S[i], state.slots_GS[g, j]
        takes_EG[[a, b], [h, g]], takes_EG[[a, b], [g, h]] = True, free_E[[a, b]]
        state.swap(h, i, g, j)


def improve(state: Placement, bound: float) -> None:
    """Exchanges, then moves of a replica with exchanges after each, as long as either helps."""
    descend(state)
    while state.most > bound * (1 + CLOSE):
        trials = []
        for gpu, slot, expert in replica_moves(state):
            trial = Placement(state.load_E, state.slots_GS)
            trial.put(gpu, slot, expert)
            trial.weigh()
            descend(trial)
            trials.append(trial)
        best = min(trials, key=lambda trial: trial.most, default=None)
        if best is None or best.most >= state.most * (1 - SMALLEST):
            return
        state.__dict__.update(best.__dict__)


def replica_moves(state: Placement) -> list[tuple[int, int, int]]:
    """(GPU, slot, expert that it gets) of the moves of a replica that leave the lightest heaviest
    GPU: more replicas of what the busiest GPU holds, or a replicated expert leaves it."""
    S = state.slots_GS.shape[1]
    h, on_GE = int(state.load_G.argmax()), state.copies_GE > 0
    spare_P, E = _spare(state), len(state.load_E)
    p_M, y_M = np.repeat(spare_P, E), np.tile(np.arange(E), len(spare_P))
    g_M, x_M = p_M // S, state.slots_GS.reshape(-1)[p_M]
    kept = np.flatnonzero((on_GE[h, y_M] | (g_M == h)) & ~on_GE[g_M, y_M])
    if len(kept) > CANDIDATES:
        kept = kept[np.linspace(0, len(kept) - 1, CANDIDATES).astype(np.int64)]
    if not len(kept):
        return []
    p_M, y_M, g_M, x_M = p_M[kept], y_M[kept], g_M[kept], x_M[kept]
    load_E, replicas_E = state.load_E, state.replicas_E
    fewer_M, more_M = load_E[x_M] / (replicas_E[x_M] - 1), load_E[y_M] / (replicas_E[y_M] + 1)
    load_MG = (
        state.load_G
        + state.copies_GE[:, x_M].T * (fewer_M - state.each_E[x_M])[:, None]
        + state.copies_GE[:, y_M].T * (more_M - state.each_E[y_M])[:, None]
    )
    load_MG[np.arange(len(p_M)), g_M] += more_M - fewer_M
    first = np.argsort(load_MG.max(1), kind="stable")[:TRIES]
    return [(int(g_M[m]), int(p_M[m] % S), int(y_M[m])) for m in first]


def _spare(state: Placement) -> np.ndarray:
    """Slots of experts that can do without one: where one replica fewer leaves as many as there are
    GPUs, they must then be on different ones."""
    G, S = state.slots_GS.shape
    expert_P, gpu_P = state.slots_GS.reshape(-1), np.repeat(np.arange(G), S)
    replicas_P = state.replicas_E[expert_P]
    separate_P = (state.copies_GE[gpu_P, expert_P] == 2) & np.all(state.copies_GE, axis=0)[expert_P]
    return np.flatnonzero((replicas_P > 1) & ((replicas_P != G + 1) | separate_P))


def perturbed(state: Placement, rng: np.random.Generator) -> Placement:
    """A few slots exchanged at random, one of them on the busiest GPU, after perhaps some replicas
    moved at random."""
    new = Placement(state.load_E, state.slots_GS)
    G, S = state.slots_GS.shape
    moves = (0, 0, 1, int(rng.integers(2, MOVES + 1)))[int(rng.integers(4))]
    for _ in range(moves):
        spare_P = _spare(new)
        if not len(spare_P):
            break
        g, i = divmod(int(rng.choice(spare_P)), S)
        allowed_E = np.flatnonzero(new.copies_GE[g] == 0)
        if len(allowed_E):
            new.put(g, i, int(rng.choice(allowed_E)))
            new.weigh()
    for n in range(int(rng.integers(1, 4))):
        g = int(new.load_G.argmax()) if n == 0 else int(rng.integers(G))
        h, i, j = int(rng.integers(G)), int(rng.integers(S)), int(rng.integers(S))
        if g != h and new.takes(h, new.slots_GS[g, i]) and new.takes(g, new.slots_GS[h, j]):
            new.swap(g, i, h, j)
    return new


# --- fitted to windows


def local_search(load_WE: np.ndarray, layout: Layout, apart: bool = False) -> np.ndarray:
    """From EPLB's placements, replicas of an expert on different GPUs: see `search`. With at least
    FEWEST windows it is fitted to windows drawn from a forecast; where they are workloads, which
    come in no order (`apart`), to these themselves."""
    load_E, load_WE = load_WE.sum(0).astype(np.float64), load_WE[load_WE.any(axis=1)]
    slots, gpus = layout.slots, layout.gpus
    starts = [eplb(load_E, layout), eplb_global(load_E, layout)]
    if len(load_WE) < (2 if apart else FEWEST) or slots // gpus >= len(load_E):
        return search(load_E, slots, gpus, starts)
    drawn_EM, judged_EM = (
        np.ascontiguousarray((load_WE if apart else drawn(load_WE, n, seed)).T, np.float64)
        for seed, n in enumerate((DRAWN, JUDGED))
    )
    limit = min(Placement(load_E, start.reshape(gpus, -1)).most for start in starts)
    cautious_E = replicate(drawn_EM.mean(1) + CAUTION * drawn_EM.std(1), slots, most=gpus)[1]
    found: list[np.ndarray] = []
    for start in (*starts, packed(load_E, cautious_E, gpus)):
        if state := separated(Placement(load_E, start.reshape(gpus, -1))):
            descend(state)
            found += [state.slots_GS] if state.most <= limit * (1 + SMALLEST) else []
    found = found or [search(load_E, slots, gpus, starts).reshape(gpus, -1)]
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
