"""The policy local-search: a local search from the best of several constructions, EPLB's among
them, that puts the replicas of an expert on different GPUs.

Moves lower the load of the busiest GPU: two slots exchange their experts, or a slot goes from one
replicated expert to another. Replicas share their expert's load evenly. Deterministic.

E experts, P slots, G GPUs, S = P / G slots per GPU, M moves of a replica.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_inspect.simulate.placement.policies import replicate

CLOSE = 1e-4  # relative to the lower bound on the load of the busiest GPU: the search stops there
TRIES = 6  # moves of a replica that are followed up at a time
# of a GPU's mean load: what a replica may carry at most, in one construction each
FULL = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# random perturbations: at least so many; this many ÷ slots; at most, where a start is still better
LEAST_PERTURBATIONS, SLOT_PERTURBATIONS, MOST_PERTURBATIONS = 12, 2_048, 600
MOVES = 8  # replicas moved in a perturbation, at most: one or two do not leave some local optima
CANDIDATES = 20_000  # replica moves looked at in a round
SMALLEST = 1e-9  # relative; below this a gain is rounding


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
