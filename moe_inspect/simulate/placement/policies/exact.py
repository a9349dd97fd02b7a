"""Is there a placement as light as this one with the replicas of an expert apart? Answered by
trying all, for few experts.

E experts, P slots, G GPUs, S = P / G slots of a GPU. N ways to share out the replicas, C sets of S
experts that a GPU may hold.
"""

from __future__ import annotations

from itertools import combinations, combinations_with_replacement
from math import comb, gcd

import numpy as np

MOST_SETS = 1_000
MOST_WAYS = 400_000
CELLS = 2**21  # ways × sets at a time
STEPS = 100_000  # of putting sets together
ROUNDING = 1e-9  # relative


def as_light(
    load_E: np.ndarray, slots: int, gpus: int, most: float, crowds: bool = False
) -> np.ndarray | None:
    """The expert of each slot, int64 [P], of a placement whose GPUs all carry `most` or less; no
    expert is on one twice, or with `crowds` none that has no more replicas than there are GPUs.
    None where there is none, or all are too many to try; then one that repeats itself every so many
    GPUs is looked for too."""
    for times in (t for t in range(1, gpus) if gcd(slots, gpus) % t == 0):
        sets = _sets(load_E, slots // times, gpus // times, most * times * (1 + ROUNDING), crowds)
        if sets is not None:
            return np.tile(np.array(sets, np.int64).reshape(-1), times)
    return None


def _sets(
    load_E: np.ndarray, slots: int, gpus: int, most: float, crowds: bool
) -> list[tuple[int, ...]] | None:
    """The experts of each GPU."""
    E, S = len(load_E), slots // gpus
    spare = gpus * most - load_E.sum()  # if it is all left over on one GPU, the others are full
    if spare < 0 or comb(E + S - 1 if crowds else E, S) > MOST_SETS:
        return None
    sets = list(combinations_with_replacement(range(E), S) if crowds else combinations(range(E), S))
    in_CE = np.zeros((len(sets), E))
    for experts, in_E in zip(sets, in_CE, strict=True):
        np.add.at(in_E, list(experts), 1)
    ways_NE = _ways(load_E, slots, slots if crowds else gpus, most)
    left, chunk = STEPS, max(1, CELLS // len(sets))
    for start in range(0, len(ways_NE), chunk):
        n_NE = ways_NE[start : start + chunk]
        load_NC = (load_E / n_NE) @ in_CE.T
        fits_NC = (
            (load_NC <= most)
            & (load_NC >= most - spare)
            & ((n_NE <= gpus).astype(float) @ (in_CE > 1).T == 0)
        )
        for i in np.flatnonzero((fits_NC @ in_CE > 0).all(1)):
            found, left = _together(
                n_NE[i], [c for c, fits in zip(sets, fits_NC[i], strict=True) if fits], left
            )
            if found or left <= 0:
                return found
    return None


def _ways(load_E: np.ndarray, slots: int, replicas: int, most: float) -> np.ndarray:
    """Every number of replicas of each expert, int64 [N, E], that adds up to the slots, none above
    `replicas` or too few to be light enough; no rows where they are too many."""
    fewest_E = np.maximum(np.ceil(load_E / most), 1).astype(np.int64)
    ways_NE = np.zeros((1, 0), np.int64)
    for e, fewest in enumerate(fewest_E):
        n, after = np.arange(fewest, replicas + 1), fewest_E[e + 1 :]
        ways_NE = np.column_stack([np.repeat(ways_NE, len(n), 0), np.tile(n, len(ways_NE))])
        used_N = ways_NE.sum(1)
        ways_NE = ways_NE[
            (used_N + after.sum() <= slots) & (used_N + replicas * len(after) >= slots)
        ]
        if len(ways_NE) > MOST_WAYS:
            return np.zeros((0, len(load_E)), np.int64)
    return ways_NE


def _together(
    n_E: np.ndarray, sets: list[tuple[int, ...]], left: int
) -> tuple[list[tuple[int, ...]] | None, int]:
    """Sets that hold each expert as often as it has replicas, in at most `left` steps; and how many
    of those are left."""
    hopeless: set[tuple[int, ...]] = set()

    def rest(n: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        nonlocal left
        if not any(n):
            return []
        left -= 1
        if n in hopeless or left <= 0:
            return None
        able = [s for s in sets if all(n[e] >= s.count(e) for e in s)]
        rarest = min((e for e, of in enumerate(n) if of), key=lambda e: sum(e in s for s in able))
        for s in (s for s in able if rarest in s):
            others = rest(tuple(of - s.count(e) for e, of in enumerate(n)))
            if others is not None:
                return [s, *others]
        hopeless.add(n)
        return None

    return rest(tuple(n_E.tolist())), left
